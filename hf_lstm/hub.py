"""Select, check and upload a model folder to the Hub."""

import json
import re
import struct
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

import torch
from huggingface_hub import CommitInfo, CommitOperation, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from hf_lstm.model.configuration_lstm import AUTO_MAP, FORMER_FILES, LSTMConfig

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
# Nothing else is ever uploaded: no optimizer states, caches, checkpoints, `.env` or training_args.bin, which is a
# pickle.
UPLOAD_PATTERNS = (
    "config.json",
    "generation_config.json",
    *WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*_lstm.py",
    "README.md",
    "run.json",
    "metrics.json",
    "learning_curve.png",
    "onnx/*.onnx",
    "onnx/run_onnx.py",
)
# Deleted from the repository: weights in another number of files, which would be loaded instead of the new ones, and
# training_args.bin, which the stock Trainer uploads during training with every argument of its author.
DELETE_PATTERNS = (*WEIGHTS, "training_args.bin", *FORMER_FILES)
# The chunks that a PNG needs, and the text that matplotlib writes; other chunks can hold names, places and thumbnails.
PNG_CHUNKS = b"IHDR PLTE tRNS gAMA cHRM sRGB sBIT bKGD pHYs tEXt IDAT IEND".split()
SECRETS = (
    r"hf_[A-Za-z0-9]{30,}|hf_oauth_\w{30,}",
    r"gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}",
    r"gl(?:pat|oas|dt|rt|cbt|ptt|ft|imt|agent|soat|ffct)-[\w-]{16,}",  # GitLab: personal, deploy, runner and other tokens
    r"ATATT3[\w=-]{20,}|ATBB\w{20,}",  # Atlassian, Bitbucket
    r"(?:AKIA|ASIA)[A-Z0-9]{16}|(?i:secret_?(?:access_?)?key)\W{1,8}[A-Za-z0-9/+]{40}",  # AWS
    r"AIza[\w-]{30,}|GOCSPX-[\w-]{20,}|ya29\.[\w-]{20,}",  # Google
    r"(?:AccountKey|SharedAccessKey)=[A-Za-z0-9/+]{40,}|[\w~.-]{3}8Q~[\w~.-]{31,}",  # Azure
    r"sk-[A-Za-z0-9_-]*[A-Za-z0-9]{20,}|sk-(?:ant|proj|svcacct|admin|or)-[\w-]{20,}",  # OpenAI, Anthropic, OpenRouter
    r"gsk_\w{30,}|xai-\w{30,}|nvapi-[\w-]{30,}|pplx-\w{30,}|r8_\w{30,}",  # Groq, xAI, NVIDIA, Perplexity, Replicate
    r"(?i:wandb_?api_?key)\W{1,8}[0-9a-f]{40}|wandb_v1_\w{20,}|KGAT_\w{20,}|dapi[0-9a-f]{32}",  # W&B, Kaggle, Databricks
    r"npm_[A-Za-z0-9]{30,}|pypi-AgE[\w-]{16,}|pypi-\w{30,}|dckr_[a-z]{3}_[\w-]{20,}",
    r"do[opr]_v1_[0-9a-f]{32,}|hv[sbr]\.[\w-]{20,}|sbp_[0-9a-f]{40}",  # DigitalOcean, HashiCorp, Supabase
    r"xox[a-z](?:\.xox[a-z])?-[\w-]{10,}|xapp-\d-[\w-]{20,}|hooks\.slack\.com/services/\w+/\w+/\w+",  # Slack
    r"discord(?:app)?\.com/api/webhooks/\d+/[\w-]+|\d{8,10}:AA[\w-]{32,}",  # Discord, Telegram
    r"[srp]k_(?:live|test)_\w{16,}|whsec_\w{20,}|shp(?:at|ca|pa|ss)_[0-9a-f]{32}",  # Stripe, Shopify
    r"SG\.[\w-]{16,}\.[\w-]{16,}|SK[0-9a-f]{32}|key-[0-9a-f]{32}|glsa_\w{20,}|glc_[\w=]{20,}",  # SendGrid, Twilio, Grafana
    r"lin_api_\w{30,}|ntn_\w{30,}|NRAK-[A-Z0-9]{20,}|PMAK-[\w-]{20,}",  # Linear, Notion, New Relic, Postman
    r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",  # JSON web tokens
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY|PuTTY-User-Key-File-\d|AGE-SECRET-KEY-1\w+|b3BlbnNzaC1rZXktdjE",
    # Any other provider: a value that is named as a secret and looks like one.
    r"(?i:api_?key|secret|token|password)[\"']?\s?[=:]\s?[\"']?(?=[A-Za-z/+]*\d)[A-Za-z0-9/+]{32,}",
)
SECRET = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(SECRETS)})")


def files_to_push(folder: str | Path) -> list[Path]:
    """
    Return the files of a model folder to upload, after checking that they are complete and contain no private data.

    Raises:
        ValueError: if the model, its tokenizer, code or card is missing or damaged, the weights do not fit the config,
            a file is a link, or a text in the folder contains an access token or a path of this machine.
    """
    folder = Path(folder)
    matches = {
        path
        for pattern in map(folder.joinpath, UPLOAD_PATTERNS)
        for path in pattern.parent.glob("*")
        if path.match(pattern.name)
    }
    for path in sorted(matches):
        if path.is_symlink() or (path.parent.is_symlink() and path.parent != folder):
            raise ValueError(f"{path} is a link, which may point anywhere: replace it with the file itself.")
    files = sorted(path for path in matches if path.is_file())
    names = {path.name for path in files}
    for name, remedy in (
        ("config.json", "name the folder of a saved model"),
        ("tokenizer.json", "save its tokenizer into it with `tokenizer.save_pretrained`"),
        (
            "README.md",
            "write a model card, as `scripts/train.py` does with `hf_lstm.model_card`",
        ),
    ):
        if name not in names:
            raise ValueError(f"{folder} contains no {name}: {remedy}.")
    config = read_json(folder / "config.json")
    _check_code(config.get("auto_map"), folder, names)
    shapes = {path.name: _check_weights(path) for path in files if path.suffix == ".safetensors"}
    _check_fit(config, shapes, folder)
    for path in files:
        for text in texts_of(path):
            check_text(text, path, folder)
    return files


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> CommitInfo:
    """
    Upload a model folder in one commit, with a progress bar. The repository is created if it does not exist, and the
    code example in the model card names it. The token comes from the environment (`HF_TOKEN`) or from `hf auth login`.
    An interrupted upload is finished by the same call.

    Args:
        folder (`str` or `Path`): The model folder.
        repo_id (`str`): The repository, `author/name` or `name`.
        private (`bool`, *optional*): Whether a new repository is private. The default is that of the account.
        revision (`str`, *optional*): The branch, created if it does not exist. The default is `main`.
        message (`str`, *optional*): The commit message.

    Raises:
        ValueError: in the cases listed in [`files_to_push`].
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses the upload or cannot be reached.
    """
    folder, api = Path(folder), HfApi()
    files = files_to_push(folder)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    uploads = {path.relative_to(folder).as_posix(): path for path in files}
    card, run = (folder / "README.md").read_text(encoding="utf-8"), folder / "run.json"
    if run.is_file() and (trained_in := read_json(run).get("folder")):  # the folder that the code example names
        card = card.replace(f'model="{trained_in}"', f'model="{repo_id}"')
    contents = uploads | {"README.md": card.encode()}
    operations: list[CommitOperation] = [CommitOperationAdd(name, content) for name, content in contents.items()]
    for name in api.list_repo_files(repo_id, revision=revision):
        if name not in contents and any(fnmatch(name, pattern) for pattern in DELETE_PATTERNS):
            operations.append(CommitOperationDelete(name))
    message = message or f"Upload {folder.resolve().name}"
    return api.create_commit(repo_id, operations, commit_message=message, revision=revision)


def read_json(path: Path) -> dict:
    """Read a JSON object from a file. Raises `ValueError` if the file contains anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): save the model again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, not a {type(content).__name__}: save the model again.")
    return content


def _check_code(auto_map: object, folder: Path, names: set[str]) -> None:
    """Check that `auto_map` names classes of code files in the folder."""
    if auto_map is None or auto_map == {}:
        raise ValueError(
            f"{folder}/config.json has no `auto_map`, so the model needs an installed hf_lstm: save it again where "
            "hf_lstm is imported."
        )
    references = list(auto_map.values()) if isinstance(auto_map, dict) else []
    if not references or not all(isinstance(reference, str) and reference.count(".") == 1 for reference in references):
        raise ValueError(
            f"`auto_map` ({auto_map!r}) in {folder}/config.json must map each class of transformers to a "
            "class, such as `modeling_lstm.LSTMModel`: save the model again where hf_lstm is imported."
        )
    for module in {reference.split(".")[0] for reference in references}:
        if f"{module}.py" not in names:
            raise ValueError(
                f"{folder}/config.json names the code file {module}.py, which is missing: save the model again where "
                "hf_lstm is imported."
            )


def _check_weights(path: Path) -> dict[str, list[int]]:
    """Check that all weights in a file are finite and return their shapes by name."""
    shapes = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  safe_open is not a dict
                weight = file.get_tensor(name)
                shapes[name] = list(weight.shape)
                if weight.is_floating_point() and weight.element_size() == 1:  # torch can only convert 8-bit floats
                    weight = weight.float()
                if not weight.isfinite().all():
                    raise ValueError(f"`{name}` in {path} contains NaN or infinite values: use an earlier checkpoint.")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a valid safetensors file, or is truncated ({error}): save it again."
        ) from error
    except NotImplementedError as error:  # torch's, of a check that a dtype of 4 or 8 bits lacks
        raise ValueError(
            f"`{name}` in {path} has a dtype ({weight.dtype}) whose values torch cannot check: save the model in "
            "another dtype."
        ) from error
    return shapes


def _check_fit(config: dict, shapes: dict[str, dict[str, list[int]]], folder: Path) -> None:
    """Check that the weights that would be loaded are those of the config."""
    read, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if read[0] not in shapes and index.is_file():
        weight_map = read_json(index).get("weight_map")
        read = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not read or not all(isinstance(name, str) and name in shapes for name in read):
        raise ValueError(
            f"{folder} contains neither model.safetensors nor all files of an index: save the model with "
            "`save_pretrained`."
        )
    if config.get("quantization_config") is not None:  # quantized weights have other names and shapes
        return

    architectures = config.get("architectures") or ["LSTMForCausalLM"]
    name = architectures[0] if isinstance(architectures, list) else architectures
    places = [reference.split(".") for auto, reference in AUTO_MAP.items() if auto != "AutoConfig"]
    classes = {kind: f"hf_lstm.model.{module}" for module, kind in places}
    if config.get("model_type") != LSTMConfig.model_type or name not in list(classes):
        raise ValueError(
            f"`model_type` ({config.get('model_type')!r}) and `architectures` ({architectures!r}) in {folder}/config.json "
            "do not name a model of hf_lstm: save the model again where hf_lstm is imported."
        )
    try:
        LSTMConfig.from_dict(config)
        # Only fields of our own: others may download kernels.
        own = {key: config[key] for key in (*LSTMConfig.__annotations__, "id2label") if key in config}
        with torch.device("meta"):
            model = getattr(import_module(classes[name]), name)(LSTMConfig(**own))
    except (StrictDataclassError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{folder}/config.json does not describe a model ({reason}): save it again.") from error
    needed = {key: list(weight.shape) for key, weight in model.state_dict().items()}
    found = {key: shape for file in set(read) for key, shape in shapes[file].items()}
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    for key in sorted(needed.keys() | found):
        if needed.get(key) != found.get(key) and not (key in tied and key not in found):
            raise ValueError(
                f"{folder}/config.json does not fit the weights: `{key}` must have the shape {needed.get(key)} and "
                f"has {found.get(key)}: restore the config.json that was saved with them."
            )


def texts_of(path: Path) -> Iterator[str]:
    """Yield the readable text of a file: all of a text file, the metadata and strings of others."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        yield content[8 : 8 + int.from_bytes(content[:8], "little")].decode("utf-8", errors="replace")
    elif path.suffix == ".onnx":
        yield "\n".join(run.decode() for run in re.findall(rb"[\x20-\x7e\t\n]{8,}", content))
    elif path.suffix == ".png":
        yield from _texts_of_picture(content, path)
    else:
        try:
            yield content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not valid UTF-8 ({error}): save it again.") from error


def _texts_of_picture(content: bytes, path: Path) -> Iterator[str]:
    """Yield the text chunks of a PNG, after checking that it has no other metadata."""
    kind, start = b"", len(b"\x89PNG\r\n\x1a\n")
    while start < len(content) and kind != b"IEND":
        length, kind = struct.unpack(">I4s", content[start : start + 8].ljust(8, b"\0"))
        if kind not in PNG_CHUNKS:
            raise ValueError(f"{path} has the chunk {kind!r}, which may identify its author: draw the picture again.")
        if kind == b"tEXt":
            yield content[start + 8 : start + 8 + length].decode("latin-1")
        start += length + 12
    if kind != b"IEND" or start != len(content):
        raise ValueError(f"{path} is not a complete PNG picture, or has data after it: draw the picture again.")


ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", flags=re.DOTALL)


def _readings(text: str) -> set[str]:
    """Return a text with and without its escapes: those of JSON, of JSON inside JSON, and of URLs."""
    once = ESCAPE.sub(_unescape, text)
    readings = {text, once, ESCAPE.sub(_unescape, once)}
    return readings | {unquote(reading) for reading in readings if "%" in reading}


def _unescape(escape: re.Match[str]) -> str:
    if escape[1]:
        return chr(int(escape[1], 16))
    return " " if escape[2] in "nrtbf" else escape[2]


def _with_slashes(text: str | Path) -> str:
    return re.sub(r"[\\/]+", "/", str(text))


def check_text(text: str, path: Path, folder: Path) -> None:
    """
    Check that a text contains no access token and no path of this machine.

    Args:
        text (`str`): The text of a file.
        path (`Path`): The file, for the error message.
        folder (`Path`): The model folder.

    Raises:
        ValueError: if it contains an access token or names the model folder, the home folder or the current folder.
    """
    readings = _readings(text)
    if secret := next(filter(None, map(SECRET.search, readings)), None):
        raise ValueError(f"{path} seems to contain an access token ({secret[0][:6]}...): remove it.")
    for place in {folder.absolute(), folder.resolve(), Path.cwd(), Path.home(), Path.home().resolve()}:
        parts = [part for part in _with_slashes(place).split("/") if part]
        named = re.escape(_with_slashes(place).rstrip("/"))
        # `/root` or `/data` alone can mean many things: only a path below it identifies this machine.
        pattern = rf"{named}(?![\w-])" if len(parts) > 1 else rf"(?<![\w.-]){named}/[\w.]"
        if parts and any(re.search(pattern, _with_slashes(reading)) for reading in readings):
            raise ValueError(f"{path} contains {place}, a folder of this machine: remove it.")
