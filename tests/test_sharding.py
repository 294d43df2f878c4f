"""Parameters shared out among processes by torch's `fully_shard` or `DistributedDataParallel` train as whole ones do."""

import json
from pathlib import Path

import pytest
from processes import run_ranks


@pytest.fixture(scope="module")
def runs():
    first, second = run_ranks(Path(__file__).parent / "sharding_script.py")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    return json.loads(first.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", ["stacked", "residual", "hybrid", "chunked", "untied", "in one group", "by DDP"])
def test_sharded_parameters_train_as_whole_ones(runs, model):
    run = runs[model]

    assert run["all_sharded"] == (model != "by DDP")
    assert run["share"] == pytest.approx(1 if model == "by DDP" else 0.5, abs=0.02)
    assert run["by_token"] == (
        model in ("in one group", "by DDP")
    )  # FSDP2 makes a class of its own for a layer sharded alone
    assert run["losses"]["sharded"] == pytest.approx(run["losses"]["whole"], rel=1e-5)
    assert run["difference"] < 1e-5
    assert run["losses"]["whole"][-1] != run["losses"]["whole"][0]
