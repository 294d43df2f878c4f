"""Every Python block of the README runs as it stands, and says what the README says it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_script

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
EXPECTED = [
    ["--- 10 tokens, remembered in 256 bytes", "--- 300 tokens, remembered in 256 bytes", "def main("],
    [],
    ["main(arguments):", "Error(Exception):"],
    ["'tokens': 1799"],
    ["tokens read"],
    ["'regularization_loss'", "'perplexity'"],
    ["春眠不覺曉，處處聞啼鳥。"],
]
LAST_NUMBERS = {1: (0, 1.0), 6: (1, 1.2)}  # bits per byte of a text that was learnt, and a perplexity


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder where the README's first command has been run, as far as it goes in two steps."""
    folder = tmp_path_factory.mktemp("readme")
    options = "--max_steps 2 --logging_steps 2 --eval_steps 2 --save_steps 2 --hidden_size 32 --use_cpu true"
    (folder / "text.txt").write_text("def main():\n    print('hello')\n" * 100)
    options += " --per_device_train_batch_size 4 --per_device_eval_batch_size 2"
    run_script(
        "train.py", *options.split(), "--train_file", folder / "text.txt", "--output_dir", folder / "runs/first"
    )
    return folder


def test_every_block_is_known():
    assert len(BLOCKS) == len(EXPECTED)


# Each block in a process of its own, which begins with the libraries imported and hf_lstm not.
RUN_BLOCKS = """
import json, os, sys, traceback
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
for index, block in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"printed{index}", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(f"errors{index}", os.O_WRONLY | os.O_CREAT), 2)
        try:
            exec(block, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def ran(folder):
    """For each block how it ended, what it printed, and what it said of errors."""
    command = [sys.executable, "-c", RUN_BLOCKS]
    codes = subprocess.run(command, cwd=folder, input=json.dumps(BLOCKS), capture_output=True, text=True, check=True)
    return [
        (code, (folder / f"printed{index}").read_text(), (folder / f"errors{index}").read_text())
        for index, code in enumerate(codes.stdout.split())
    ]


@pytest.mark.parametrize("index", range(len(EXPECTED)))
def test_blocks_run_and_print_what_they_should(ran, index):
    code, printed, errors = ran[index]

    assert code == "0", errors
    for line in EXPECTED[index]:
        assert line in printed
    if index in LAST_NUMBERS:
        least, most = LAST_NUMBERS[index]
        assert least <= float(printed.splitlines()[-1]) < most


def test_commands_name_files_that_exist():
    for path in set(re.findall(r"\b(?:scripts|tests|hf_lstm)/[\w/]+\.\w+", README)):
        assert (ROOT / path).exists(), path
    for name in set(re.findall(r"`(test_\w+\.py)`", README)):
        assert (ROOT / "tests" / name).exists(), name


def test_the_test_command_stands_where_ci_looks_for_it():
    assert len(re.findall(r"^pip install .*\[dev\].*scripts/check\.py$", README, flags=re.MULTILINE)) == 1
