"""Run transformers' common model tests on our classes; tests/transformers_common.py lists the exceptions and reasons.

python scripts/common_tests.py

The tests come from the source distribution of the installed version, which pip downloads into a temporary folder. It
lacks two modules that the common tests import, the mixins for export and generation.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

ROOT = Path(__file__).parent.parent  # its hf_lstm is tested, wherever another is installed

# Our own tests cover export and generation. With the generation tests of transformers' repository (June 2026) in place
# of the stub, 200 passed and 18 failed: those that look for keys and values of attention in a cache, that call what
# another version names otherwise, or that ask for `output_attentions`, which an LSTM without attention refuses.
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
}


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        package = f"transformers=={transformers.__version__}"
        fetch = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            ":all:",
            "-d",
            folder,
            package,
        ]
        subprocess.run(fetch, check=True)
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        shutil.copytree(next(folder.glob("transformers-*/tests")), folder / "tests")
        for name, text in STUBS.items():
            path = folder / "tests" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            (path.parent / "__init__.py").touch()
        (folder / "tests" / "__init__.py").touch()
        shutil.copy(ROOT / "tests" / "transformers_common.py", folder / "test_lstm.py")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-p",
            "no:cacheprovider",
            "test_lstm.py",
            *sys.argv[1:],
        ]
        return subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
            check=False,
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
