"""Every Python block of the README runs as it stands, and says what the README says it says."""

import re
from pathlib import Path

import pytest
from conftest import run_script
from processes import Program

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
    ["any text is remembered in 1,056,768 bytes"],
    ["春眠不覺曉，處處聞啼鳥。"],
]
LAST_NUMBERS = {1: (0, 1.0), 7: (1, 1.2)}  # bits per byte of a text that was learnt, and a perplexity


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


@pytest.fixture(scope="module")
def ran(folder):
    """How each block ended and what it printed, one after the other in the same folder."""
    return [Program(block, folder=folder).wait() for block in BLOCKS]


@pytest.mark.parametrize("index", range(len(EXPECTED)))
def test_blocks_run_and_print_what_they_should(ran, index):
    assert ran[index].returncode == 0, ran[index].stderr
    printed = ran[index].stdout
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
