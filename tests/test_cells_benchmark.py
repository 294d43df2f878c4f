"""The comparison of cells: tiny models of every cell, both tasks, what is stored, and what is not run twice."""

import json
import shutil

import pytest
import torch
from conftest import SCRIPTS, make_model


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")


def test_each_run_is_stored_once_and_drawn(run, benchmarks, text_file, tmp_path, monkeypatch):
    text_file.write_text("she sells sea shells by the sea shore. " * 30)
    command = ("benchmarks/cells.py", "--train_file", text_file, "--quick", "--results", tmp_path)

    first = run(*command, "--only", "lstm")
    whole = run(*command)
    stored = json.loads((tmp_path / "cells.json").read_text())
    again = run(*command)

    cells = set(stored["labels"])
    found = {
        task: {one["cell"] for one in stored["runs"] if one["task"] == task} for task in ("tokens", "seconds", "copy")
    }
    assert found["tokens"] == cells
    assert found["seconds"] | {"lstm_0", "lstm_2", "chrono"} == cells
    assert found["copy"] | {"lstm_0", "lstm_2"} == cells
    assert (first.count(": stored"), whole.count(": stored"), again.count(": stored")) == (0, 3, len(stored["runs"]))
    assert json.loads((tmp_path / "cells.json").read_text()) == stored
    for label in stored["labels"].values():
        assert f"| {label} |" in again
    assert (tmp_path / "cells.png").stat().st_size > 10_000

    import comparisons

    monkeypatch.setattr(comparisons, "RESULTS", tmp_path)
    shutil.copy(SCRIPTS / "benchmarks" / "results" / "cell_speed.json", tmp_path)
    section = comparisons.cells("results")
    assert comparisons.cells_tables(stored) in section
    assert "(results/cells.json)" in section


def test_a_run_with_other_settings_is_made_again(run, benchmarks, text_file, tmp_path):
    command = ("benchmarks/cells.py", "--quick", "--task", "copy", "--only", "lstm", "--results", tmp_path)
    run(*command, "--train_file", text_file)
    path = tmp_path / "cells.json"
    stored = json.loads(path.read_text())
    stored["runs"][0]["settings"]["learning_rate"] = 1.0
    path.write_text(json.dumps(stored))

    printed = run(*command, "--train_file", text_file)

    assert ": stored" not in printed
    (made,) = json.loads(path.read_text())["runs"]
    assert made["settings"]["learning_rate"] != 1.0


def test_zoneout_in_evaluation_is_the_expectation(benchmarks):
    from zoneout import KEEP_C, KEEP_H, add_zoneout

    model = add_zoneout(make_model(num_hidden_layers=1))
    layer = model.model.layers[0]
    x, h, c = torch.randn(2, 1, 12).double(), torch.randn(2, 12).double(), torch.randn(2, 12).double()
    i, f, g, o = (layer.input_gates(x[:, 0]) + layer.hidden_gates(h)).chunk(4, dim=-1)
    new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    new_h = o.sigmoid() * new_c.tanh()

    _, last_h, last_c = layer(x, h, c)

    torch.testing.assert_close(last_c, KEEP_C * c + (1 - KEEP_C) * new_c)
    torch.testing.assert_close(last_h, KEEP_H * h + (1 - KEEP_H) * new_h)
    torch.manual_seed(0)
    layer.train()
    drawn = torch.stack([layer(x, h, c)[2] for _ in range(2000)])
    assert ((drawn == c) | (drawn == new_c)).all()  # either of both, never a mixture
    torch.testing.assert_close(drawn.mean(dim=0), last_c, atol=0.1, rtol=0)


def test_a_key_is_the_only_target(benchmarks):
    import copying

    ids, targets = copying.examples(7, 3, torch.Generator().manual_seed(0))

    assert ids.shape == targets.shape == (3, copying.KEY + 7 + copying.KEY)
    assert (ids[:, -copying.KEY] == copying.MARKER).all()
    assert torch.equal(targets[:, -copying.KEY :], ids[:, : copying.KEY])
    assert torch.equal(targets[:, -copying.KEY : -1], ids[:, -copying.KEY + 1 :])
    assert (targets[:, : -copying.KEY] == -100).all()
