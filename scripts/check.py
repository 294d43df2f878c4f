"""Run what must pass before a commit: ruff, its formatter and the fast tests; with `--types`, mypy too (a minute).

python scripts/check.py [--types]
"""

import argparse
import subprocess
import sys
from pathlib import Path

STYLE, TYPES = [["ruff", "check", "."], ["ruff", "format", "--check", "."]], [["mypy"]]
TESTS = [["pytest", "-q", "-n", "2", "--dist", "loadfile"]]  # a file's tests share what is trained for them


def commands(types: bool) -> list[list[str]]:
    """Return the modules to run, with their arguments."""
    return STYLE + (TYPES if types else []) + TESTS


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", action="store_true", help="also check the types of hf_lstm")
    root = Path(__file__).parent.parent
    for command in commands(parser.parse_args().types):
        print(f"$ {' '.join(command)}", flush=True)
        code = subprocess.run([sys.executable, "-m", *command], cwd=root, check=False).returncode
        if code:
            sys.exit(code)
