"""Say how the programs are started: `python -m hf_lstm` runs none of them."""

import shlex
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent / "scripts"  # of a clone: they are not installed
PROGRAMS = ("train", "generate", "evaluate", "classify", "convert", "push", "serve", "verify")


def main(arguments: list[str]) -> None:
    name, *flags = arguments if arguments[:1] and arguments[0] in PROGRAMS else ["train", "--output_dir", "runs/first"]
    folder = SCRIPTS if SCRIPTS.is_dir() and SCRIPTS.parent != Path.cwd() else Path("scripts")
    where = "" if SCRIPTS.is_dir() else " in a clone of its repository, which are not installed with it"
    command = shlex.join(["python", str(folder / f"{name}.py"), *flags])
    sys.exit(f"hf_lstm is a library, and its programs are files{where}: `{command}`.")


if __name__ == "__main__":
    main(sys.argv[1:])
