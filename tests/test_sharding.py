"""Parameters shared out among processes by torch's `fully_shard` train as whole ones do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def runs():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command.append(str(Path(__file__).parent / "sharding_script.py"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", ["stacked", "residual", "chunked", "untied"])
def test_sharded_parameters_train_as_whole_ones(runs, model):
    run = runs[model]

    assert run["all_sharded"]
    assert run["share"] == pytest.approx(0.5, abs=0.02)
    assert run["losses"]["sharded"] == pytest.approx(run["losses"]["whole"], rel=1e-5)
    assert run["difference"] < 1e-5
    assert run["losses"]["whole"][-1] != run["losses"]["whole"][0]
