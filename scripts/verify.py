"""Compare the code that lies beside a model with that of the hf-lstm which is installed.

python scripts/verify.py --model author/model

`trust_remote_code=True` runs such files, and those that its JSON files name. Each is printed with its sha256 and whether it is
the same, and so is what the JSON files name; nothing is run.
"""

import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx
from transformers import HfArgumentParser

import hf_lstm
from hf_lstm.hub import read_json
from hf_lstm.model import configuration_lstm


@dataclass
class Arguments:
    """What to compare."""

    model: str = field(metadata={"help": "A model's folder, or its name on the Hub."})
    revision: str | None = field(default=None, metadata={"help": "The branch, tag or commit on the Hub."})


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of each Python file where transformers would look for one."""
    paths = [*folder.glob("*.py"), *folder.glob("custom_generate/**/*.py")]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def named_code(folder: Path) -> dict[str, dict]:
    """What the JSON files name as code, by file and field."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        for field_name in ("auto_map", "custom_pipelines"):
            if field_name in content:
                found[f"{field_name} of {path.name}"] = content[field_name]
    return found


def main(arguments: Arguments) -> None:
    folder = Path(arguments.model)
    if not folder.is_dir():
        folder = Path(
            snapshot_download(arguments.model, revision=arguments.revision, allow_patterns=["*.py", "*.json"])
        )
        print(f"commit {folder.name}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{arguments.model!r} holds no config.json: name a model.")
    found, ours = hashes(folder), hashes(Path(configuration_lstm.__file__).parent)
    del ours["__init__.py"]
    verdicts = {name: "same" if found.get(name) == ours.get(name) else "differs" for name in found | ours}
    verdicts |= dict.fromkeys(ours.keys() - found, "missing") | dict.fromkeys(found.keys() - ours, "not ours")
    for name in sorted(verdicts):
        print(f"{verdicts[name]:<9} {found.get(name, '-' * 64)}  {name}")
    expected, named = {"auto_map of config.json": configuration_lstm.AUTO_MAP}, named_code(folder)
    for place in sorted(expected | named):
        verdicts[place] = "same" if named.get(place) == expected.get(place) else "differs"
        print(f"{verdicts[place]:<9} {'':64}  {place}")
    if set(verdicts.values()) == {"same"}:
        print(f"All of it is the code of hf-lstm {hf_lstm.__version__}.")
    else:
        sys.exit(
            f"This is not the code of hf-lstm {hf_lstm.__version__}: it was saved by another version, or changed. With "
            "`import hf_lstm`, and without `trust_remote_code=True`, none of it runs."
        )


if __name__ == "__main__":
    try:
        main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
    except (HfHubHTTPError, httpx.HTTPError, ValueError, OSError, HFValidationError) as error:
        sys.exit(f"verify.py: {error}")
