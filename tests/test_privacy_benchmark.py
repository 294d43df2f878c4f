"""The benchmark of private training: what is stored, and what is not run twice."""

import json

import pytest
from conftest import SCRIPTS, TEXT

pytest.importorskip("opacus")


def test_each_run_is_stored_once_and_drawn(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines()))
    command = ("benchmarks/privacy.py", "--train_file", lines, "--quick", "--results", tmp_path)

    first = run(*command, "--only", "plain")
    whole = run(*command, "--only", "plain", "inf")

    stored = json.loads((tmp_path / "privacy.json").read_text())["runs"]
    assert [one["task"] for one in stored] == ["speed", "train", "train"]
    assert (first.count(": stored"), whole.count(": stored")) == (0, 2)
    assert stored[2]["epsilon"] is None
    assert {count: len(bits) for count, bits in stored[1]["exposures"].items()} == {"0": 2, "1": 2, "3": 2}
    assert "| plain | 1 |" in whole
    assert (tmp_path / "privacy.png").stat().st_size > 5_000
