"""A text that is large beside the memory it is given: read, tokenized and cut into lanes."""

import json
import subprocess
import sys

import pytest
from conftest import SCRIPTS


@pytest.mark.slow
def test_a_hundred_megabytes_need_less_than_a_gigabyte(tmp_path):
    """Anonymous memory of all processes; and the second run begins at once."""
    command = [sys.executable, SCRIPTS / "benchmarks" / "tokenization.py", "--megabytes", "100", "--results", tmp_path]

    subprocess.run(command, check=True, cwd=tmp_path)

    rows = json.loads((tmp_path / "tokenization_100mb.json").read_text())["rows"]
    assert [(row["tokenizer"], row["run"]) for row in rows] == [
        (tokenizer, run) for tokenizer in ("byte", "bpe") for run in ("first", "second")
    ]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["tokens"] == second["tokens"]
        assert first["anonymous_megabytes"] < 1000
        assert second["anonymous_megabytes"] < 1000
        assert second["seconds"]["tokenize"] < 0.1 * first["seconds"]["tokenize"]
    assert rows[0]["tokens"] == 100_000_000  # bytes
