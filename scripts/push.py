"""Publish a trained model on the Hub.

python scripts/push.py --model runs/first --repo author/first --dry_run true
HF_TOKEN=... python scripts/push.py --model runs/first --repo author/first --private true

The token comes from `HF_TOKEN` or `hf auth login`, never from an argument. Repeat the command to finish an
interrupted upload.
"""

import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

from command_line import Parser
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id
from saved_models import check_source
from screen import prepare_screen

from hf_lstm.hub import files_to_push, push_folder


@dataclass
class Arguments:
    """Arguments of the upload."""

    repo: str = field(metadata={"help": "The repository, author/name, created if it does not exist."})
    model: str | None = field(default=None, metadata={"help": "A model folder written by scripts/train.py."})
    private: bool | None = field(default=None, metadata={"help": "Whether a new repository is private."})
    revision: str | None = field(default=None, metadata={"help": "The branch, created if it does not exist."})
    message: str | None = field(default=None, metadata={"help": "The commit message."})
    dry_run: bool = field(default=False, metadata={"help": "Only list the files that would be uploaded."})


def main(arguments: Arguments) -> None:
    check_source(arguments.model, hub=False)
    folder = Path(arguments.model)
    validate_repo_id(arguments.repo)
    files = files_to_push(folder)
    for path in files:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path.stat().st_size:>12,}  {digest}  {path.relative_to(folder)}")
    print(f"The code example in README.md will name {arguments.repo}.")
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB (size, sha256, name)")
    if arguments.dry_run:
        print("Nothing was uploaded.")
        return
    commit = push_folder(folder, arguments.repo, arguments.private, arguments.revision, arguments.message)
    print(f"uploaded: {commit.commit_url}")


if __name__ == "__main__":
    prepare_screen()
    try:
        main(*Parser(Arguments, __doc__).parse_args_into_dataclasses())
    except (HfHubHTTPError, httpx.HTTPError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        sys.exit(f"push.py: {cause}\nUploaded files are kept: the same command finishes it.")
    except (ValueError, OSError, HFValidationError) as error:
        sys.exit(f"push.py: {error}")
