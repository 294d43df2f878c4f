"""Publish a trained model on the Hub.

python scripts/push.py --model runs/first --repo author/first --dry_run true
HF_TOKEN=... python scripts/push.py --model runs/first --repo author/first --private true

`hf auth login` keeps a token for later; none is ever taken as an argument. A command that was interrupted finishes the
upload when it is given again.
"""

import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id
from transformers import HfArgumentParser

from hf_lstm.hub import files_to_push, push_folder


@dataclass
class Arguments:
    """What to publish, and where."""

    model: str = field(metadata={"help": "A model's folder, as scripts/train.py leaves it."})
    repo: str = field(metadata={"help": "The repository, author/name; it is created if need be."})
    private: bool | None = field(default=None, metadata={"help": "Whether a new repository is private."})
    revision: str | None = field(default=None, metadata={"help": "The branch; it is created if need be."})
    message: str | None = field(default=None, metadata={"help": "The message of the commit."})
    dry_run: bool = field(default=False, metadata={"help": "Only list what would go up."})


def main(arguments: Arguments) -> None:
    folder = Path(arguments.model)
    validate_repo_id(arguments.repo)
    files = files_to_push(folder)
    for path in files:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path.stat().st_size:>12,}  {digest}  {path.relative_to(folder)}")
    print(f"README.md will name {arguments.repo} where it names the folder.")
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB (size, sha256, name)")
    if arguments.dry_run:
        print("Nothing was uploaded.")
        return
    commit = push_folder(folder, arguments.repo, arguments.private, arguments.revision, arguments.message)
    print(f"uploaded: {commit.commit_url}")


if __name__ == "__main__":
    try:
        main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
    except (HfHubHTTPError, httpx.HTTPError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        sys.exit(f"push.py: {cause}\nWhat was uploaded stays: the same command finishes it.")
    except (ValueError, OSError, HFValidationError) as error:
        sys.exit(f"push.py: {error}")
