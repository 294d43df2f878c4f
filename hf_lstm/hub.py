"""What of a model's folder is for others, and how it gets to the Hub."""

import json
import re
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from safetensors import SafetensorError, safe_open

# Nothing else ever goes up: no optimizer states, caches, checkpoints, `.env` or training_args.bin, which is a pickle.
FOR_OTHERS = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
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
# Weights of another number of files, which would be read instead of the new ones; and what the stock Trainer uploads during
# training, with every argument of its author's in it.
TAKEN_AWAY = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors", "training_args.bin")
SECRET = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{30,}|hf_oauth_\w{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|AKIA[A-Z0-9]{16}"
    r"|sk-[A-Za-z0-9_-]*[A-Za-z0-9]{20,})"
)


def files_to_push(folder: str | Path) -> list[Path]:
    """
    The files of a model's folder that are for others, once they are known to be whole and to tell nothing of their author.

    Raises:
        ValueError: if the model, its tokenizer, code or card is missing or damaged, or a text in the folder holds an
            access token or a path of this machine.
    """
    folder = Path(folder)
    files = sorted({path for pattern in FOR_OTHERS for path in folder.glob(pattern) if path.is_file()})
    names = {path.name for path in files}
    for name, remedy in (
        ("config.json", "name the folder of a saved model"),
        ("tokenizer.json", "save its tokenizer into it with `tokenizer.save_pretrained`"),
        (
            "README.md",
            "write the model's card: `scripts/train.py` does, and `hf_lstm.model_card` says what goes into it",
        ),
    ):
        if name not in names:
            raise ValueError(f"{folder} holds no {name}: {remedy}.")
    config = read_json(folder / "config.json")
    for module in {name.split(".")[0] for name in config.get("auto_map", {}).values()}:
        if f"{module}.py" not in names:
            raise ValueError(
                f"{folder}/config.json names the code {module}.py, which is not there: save the model anew where hf_lstm "
                "is imported."
            )
    if "auto_map" not in config:
        raise ValueError(
            f"{folder}/config.json has no `auto_map`, so that nobody could load it without hf_lstm: save the model anew "
            "where hf_lstm is imported."
        )
    weights = [path for path in files if path.suffix == ".safetensors"]
    if not weights:
        raise ValueError(f"{folder} holds no model.safetensors: save the model with `save_pretrained`.")
    for path in weights:
        _check_weights(path)
    for path in files:
        if path.suffix in (".json", ".md", ".py", ".jinja", ".txt"):
            _check_text(path, folder)
    return files


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> CommitInfo:
    """
    Upload a model's folder, with a progress bar, into a repository that is created if need be; the snippet in its card
    then names the repository. The token comes from the environment (`HF_TOKEN`) or from `hf auth login`. An upload that
    was interrupted is finished by the same call.

    Args:
        folder (`str` or `Path`): The model's folder.
        repo_id (`str`): The repository, `author/name` or `name`.
        private (`bool`, *optional*): Whether a new repository is private; as the account is set up by default.
        revision (`str`, *optional*): The branch, which is created if need be; `main` by default.
        message (`str`, *optional*): The message of the commit.

    Raises:
        ValueError: as [`files_to_push`] does.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses, or cannot be reached.
    """
    folder, api = Path(folder), HfApi()
    files = files_to_push(folder)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    card = CommitOperationAdd("README.md", _card_for(folder, repo_id).encode())
    operations = [card if operation.path_in_repo == "README.md" else operation for operation in operations]
    going = {operation.path_in_repo for operation in operations}
    for name in api.list_repo_files(repo_id, revision=revision):
        if name not in going and any(fnmatch(name, pattern) for pattern in TAKEN_AWAY):
            operations.append(CommitOperationDelete(name))
    message = message or f"Upload {folder.resolve().name}"
    return api.create_commit(repo_id, operations, commit_message=message, revision=revision)


def _card_for(folder: Path, repo_id: str) -> str:
    """The card, whose snippet names the repository where it named the folder that the model was trained in."""
    card, run = (folder / "README.md").read_text(encoding="utf-8"), folder / "run.json"
    if run.is_file() and (trained_in := read_json(run).get("folder")):
        card = card.replace(f'model="{trained_in}"', f'model="{repo_id}"')
    return card


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises `ValueError` if it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): save the model anew.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, and must hold an object: save the model anew.")
    return content


def _check_weights(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                if not file.get_tensor(name).isfinite().all():
                    raise ValueError(f"{path} holds numbers in `{name}` that are none (NaN or infinity).")
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or was cut off ({error}): save the model anew.") from error


def _check_text(path: Path, folder: Path) -> None:
    """Neither an access token nor where things lie on this machine."""
    text = path.read_text(encoding="utf-8")
    if secret := SECRET.search(text):
        raise ValueError(f"{path} holds what looks like an access token ({secret[0][:6]}...): take it out.")
    places = {str(folder.resolve()), str(Path.cwd()), str(Path.home())}
    for place in places - {"/", "/root"}:
        if re.search(rf"{re.escape(place)}\b", text):
            raise ValueError(f"{path} names {place}, a folder of this machine: take it out.")
