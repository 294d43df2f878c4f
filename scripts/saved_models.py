"""Saved models that scripts load: looked for on this machine before the Hub is asked, and refused in words."""

from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import httpx
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lstm.hub import read_json

ADAPTER = "adapter_config.json"
PATIENCE = 10  # seconds that the Hub is waited for


def check_source(
    name: str | None,
    flag: str = "--model",
    holds: tuple[str, ...] = ("config.json",),
    hub: bool = True,
    remedy: str | None = None,
) -> None:
    """
    Check that a model, or a tokenizer, can be loaded from a folder or the Hub. transformers would ask the Hub for a folder
    that does not exist, for most of a minute where it cannot be reached.

    Args:
        name (`str`, *optional*): The folder, or the name on the Hub; `None` where the flag was left out.
        flag (`str`): The flag that names it, for the message.
        holds (`tuple[str, ...]`): Files one of which it must hold.
        hub (`bool`): Whether it may be on the Hub.
        remedy (`str`, *optional*): What to give instead; by default a model, such as the newest under runs/.

    Raises:
        ValueError: if it is missing, or neither a folder that holds one of these files nor a repository of the Hub.
    """
    reason = _reason(name, holds, hub)
    if reason is not None:
        remedy = remedy or f"name the folder of a saved model, such as {_newest_model(flag, Path(name or 'runs'))}"
        raise ValueError(f"`{flag}` {reason}: {remedy}.")


def _reason(name: str | None, holds: tuple[str, ...], hub: bool) -> str | None:
    """Say why nothing can be loaded from a name; `None` if it can."""
    if name is None:
        return "is missing"
    place = Path(name)
    if place.is_dir():
        return None if any((place / file).is_file() for file in holds) else f"{name} contains no {holds[0]}"
    if place.exists():
        return f"{name} is a file"
    if not hub:
        return f"{name} does not exist"
    try:
        if not any(isinstance(try_to_load_from_cache(name, file), str) for file in holds):
            HfApi().model_info(name, timeout=PATIENCE)
    except HFValidationError:  # names on the Hub are `name` or `author/name`
        return f"{name} does not exist"
    except RepositoryNotFoundError:
        return f"{name} is neither a folder here nor a repository that the Hub shows you (private ones after `hf auth login`)"
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        return f"{name} is not a folder here, and the Hub cannot be asked for it ({first_line(error)})"
    return None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class where it has none."""
    return str(error).partition("\n")[0] or type(error).__name__


def _newest_model(flag: str, place: Path) -> str:
    """Name the newest model in a folder, or else under runs/, as a flag's value, or else the command that makes one."""
    for configs in (place.glob("*/config.json"), Path("runs").rglob("config.json")):
        found = [path for path in configs if any(path.parent.glob("*.safetensors"))]
        finished = [path for path in found if not path.parent.name.startswith("checkpoint-")] or found
        if finished:
            newest = max(finished, key=lambda path: path.stat().st_mtime)
            return f"the newest here, `{flag} {newest.parent}`"
    return "`python scripts/train.py --output_dir runs/first` makes"


def load_model(name: str | None, trust_remote_code: bool = False, device: str = "auto"):
    """
    Load a language model, or an adapter of PEFT (LoRA) with the model that it adapts, and the tokenizer.

    Raises:
        ValueError: if the model does not exist, or is an adapter and PEFT is not installed.
    """
    check_source(name, holds=("config.json", ADAPTER))
    read = {"trust_remote_code": trust_remote_code}
    named, tokenizer = Path(name), name
    if named.is_dir() and not (named / "config.json").is_file():
        if find_spec("peft") is None:
            raise ValueError(f"`--model` {name} is an adapter, which PEFT loads: `pip install peft`.")
        if not (named / "adapter_model.safetensors").is_file():
            raise ValueError(f"`--model` {name} contains no adapter_model.safetensors: save the adapter again.")
        base = read_json(named / ADAPTER).get("base_model_name_or_path")
        check_source(
            base, "base_model_name_or_path", remedy=f"write into {named / ADAPTER} where the adapted model lies"
        )
        tokenizer = name if (named / "tokenizer_config.json").is_file() else base
    return (
        AutoModelForCausalLM.from_pretrained(name, device_map=device, **read).eval(),
        AutoTokenizer.from_pretrained(tokenizer, **read),
    )
