"""Compare the files beside a model's weights with the installed hf-lstm.

python scripts/verify.py --model author/model

`trust_remote_code=True` runs the Python files of a repository and code that its JSON files name, there or elsewhere.
This script prints every file and field that is not known to be harmless: code with its sha256 and whether it is the
same, fields that differ from those of an hf-lstm model, and files that no such model needs. It runs none of them.
"""

import hashlib
import re
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from command_line import Parser
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx
from saved_models import check_source
from screen import prepare_screen
from transformers import GenerationConfig

import hf_lstm
from hf_lstm.hub import UPLOAD_PATTERNS, read_json
from hf_lstm.model import configuration_lstm
from hf_lstm.model.configuration_lstm import AUTO_MAP, LSTMConfig
from hf_lstm.model.loading_lstm import SAFETENSORS

# Files that are never run: those that `scripts/push.py` uploads, weights, licences, and the records of Git and
# huggingface_hub.
DATA = (
    *UPLOAD_PATTERNS,
    "*.safetensors",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    ".gitattributes",
    ".gitignore",
    ".git/*",
)
DATA += (".cache/huggingface/.gitignore", ".cache/huggingface/CACHEDIR.TAG", ".cache/huggingface/*.metadata")
DATA += (".cache/huggingface/*.lock",)
# Files that training leaves beside a model and only training reads. Some are pickles, which are better not opened.
TRAINING = ("training_args.bin", "trainer_state.json", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")
TRAINING += ("rng_state.pth", "rng_state_*.pth", ".lock")  # the last is left by a run that was killed

TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
TOKENS += ("additional_special_tokens", "extra_special_tokens")
CLASSES = [reference.split(".")[1] for name, reference in AUTO_MAP.items() if name != "AutoConfig"]


def is_plain(value) -> bool:
    """Whether a value is a scalar or a list of scalars, which no reader resolves to code."""
    return not isinstance(value, dict) and (not isinstance(value, list) or all(map(is_plain, value)))


def is_number(value) -> bool:
    return all(map(is_number, value)) if isinstance(value, list) else value is None or isinstance(value, int | float)


def is_anything(value) -> bool:
    """Accept any value, for labels, tokens and templates: templates run in a sandbox."""
    return True


# The fields that a file may have and the check of each. Any other field may lead to other code.
FIELDS = {
    "config.json": dict.fromkeys(LSTMConfig.__annotations__, is_plain)
    | dict.fromkeys(
        ("transformers_version", "dtype", "torch_dtype", "problem_type", "chunk_size_feed_forward"), is_plain
    )
    | dict.fromkeys(("is_encoder_decoder", "output_attentions", "output_hidden_states", "return_dict"), is_plain)
    | dict.fromkeys(("id2label", "label2id"), is_anything)
    | {
        "auto_map": lambda value: value == AUTO_MAP,
        "model_type": lambda value: value == LSTMConfig.model_type,
        "architectures": lambda value: isinstance(value, list) and all(name in CLASSES for name in value),
    },
    "generation_config.json": dict.fromkeys(vars(GenerationConfig()), is_number)
    | dict.fromkeys(("transformers_version", "cache_implementation", "early_stopping", "stop_strings"), is_plain),
    "tokenizer_config.json": dict.fromkeys((*TOKENS, "added_tokens_decoder", "chat_template"), is_anything)
    | dict.fromkeys(
        ("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens", "is_local"), is_plain
    )
    | dict.fromkeys(("clean_up_tokenization_spaces", "local_files_only", "model_input_names"), is_plain)
    | dict.fromkeys(("model_max_length", "padding_side", "truncation_side"), is_plain)
    | {
        "backend": lambda value: value == "tokenizers",
        "tokenizer_class": lambda value: value in ("TokenizersBackend", "PreTrainedTokenizerFast"),
    },
    "special_tokens_map.json": dict.fromkeys(TOKENS, is_anything),
    "model.safetensors.index.json": {
        "metadata": lambda value: isinstance(value, dict) and all(map(is_plain, value.values())),
        "weight_map": lambda value: (
            isinstance(value, dict)
            and all(isinstance(name, str) and SAFETENSORS.fullmatch(name) for name in value.values())
        ),
    },
}


@dataclass
class Arguments:
    """Arguments of the comparison."""

    model: str | None = field(default=None, metadata={"help": "A model folder or a model on the Hub."})
    revision: str | None = field(default=None, metadata={"help": "The branch, tag or commit on the Hub."})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names_in(folder: Path) -> list[str]:
    """Return the relative path of each file in a folder. Links are listed, and never followed."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return [path.relative_to(folder).as_posix() for path in paths]


def main(arguments: Arguments) -> None:
    check_source(arguments.model)
    folder = Path(arguments.model)
    if folder.is_dir():
        names = names_in(folder)
    else:
        folder = Path(
            snapshot_download(arguments.model, revision=arguments.revision, allow_patterns=["*.py", "*.json"])
        )
        print(f"commit {folder.name}")
        names = HfApi().list_repo_files(arguments.model, revision=folder.name)
    if "config.json" not in names:
        raise ValueError(f"{arguments.model!r} contains no config.json: name a model.")

    ours = {path.name: sha256(path) for path in Path(configuration_lstm.__file__).parent.glob("*_lstm.py")}
    lines = [("missing", "-" * 64, name) for name in ours.keys() - names]
    ours["onnx/run_onnx.py"] = sha256(Path(__file__).with_name("run_onnx.py"))
    for name in names:
        plain = re.sub(r"^checkpoint-\d+/", "", name)  # the same rules for checkpoints
        if name.endswith(".py"):
            found = sha256(folder / name)
            lines.append(
                ("not ours" if plain not in ours else "same" if found == ours[plain] else "differs", found, name)
            )
        elif any(fnmatchcase(plain, pattern) for pattern in TRAINING):
            lines.append(("not read", "", name))
        elif not any(fnmatchcase(plain, pattern) for pattern in DATA):
            lines.append(("unknown", "", name))
        if plain in FIELDS:
            content = read_json(folder / name)
            lines += [
                ("differs", "", f"{key} of {name}")
                for key, value in content.items()
                if key not in FIELDS[plain] or not FIELDS[plain][key](value)
            ]
            if plain == "config.json" and content.get("auto_map") == AUTO_MAP:
                lines.append(("same", "", f"auto_map of {name}"))
    for verdict, digest, name in sorted(lines, key=lambda line: line[2]):
        print(f"{verdict:<9} {digest:64}  {name if name.isprintable() else repr(name)}")

    verdicts, version = {verdict for verdict, *_ in lines}, hf_lstm.__version__
    if "not read" in verdicts:
        print("Files marked `not read` are left by training, may be pickles, and are not opened with the model.")
    if verdicts <= {"same", "not read"}:
        print(f"All code is that of hf-lstm {version}.")
    elif verdicts <= {"same", "not read", "unknown"}:
        sys.exit(
            f"The code is that of hf-lstm {version}. Its models do not need the files marked `unknown`, and these may "
            "lead to other code when the model is loaded. To run none of it, load a copy without them, after "
            "`import hf_lstm` and without `trust_remote_code=True`."
        )
    else:
        sys.exit(
            f"This is not the code of hf-lstm {version}: it was saved by another version, or changed. To run none of "
            "it, load the model after `import hf_lstm` and without `trust_remote_code=True`."
        )


if __name__ == "__main__":
    prepare_screen()
    try:
        main(*Parser(Arguments, __doc__).parse_args_into_dataclasses())
    except (HfHubHTTPError, httpx.HTTPError, ValueError, OSError, HFValidationError) as error:
        sys.exit(f"verify.py: {error}")
