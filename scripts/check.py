"""What must pass before every commit: ruff, its formatter and the fast tests.

python scripts/check.py
"""

import subprocess
import sys
from pathlib import Path

CHECKS = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["pytest", "-q"])

if __name__ == "__main__":
    root = Path(__file__).parent.parent
    for check in CHECKS:
        print(f"$ {' '.join(check)}", flush=True)
        code = subprocess.run([sys.executable, "-m", *check], cwd=root, check=False).returncode
        if code:
            sys.exit(code)
