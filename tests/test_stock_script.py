"""Everybody's own training script works too, in one process and under `accelerate launch`."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SCRIPTS
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parent / "stock_script.py"


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stock_script_learns(tmp_path, monkeypatch, capsys, processes):
    if processes == 1:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "run")])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        check(capsys.readouterr().out, 1, tmp_path / "run")
        return
    # `--multi_gpu` is what starts several processes by torchrun; the script itself says `use_cpu=True`
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--num_processes", str(processes), "--num_cpu_threads_per_process", "1", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0"]
    command = [sys.executable, *launch, SCRIPT, tmp_path / "run"]

    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    assert ran.returncode == 0, ran.stderr
    check(ran.stdout, processes, tmp_path / "run")


def check(printed, processes, folder):
    result = json.loads([line for line in printed.splitlines() if line.startswith('{"before"')][-1])
    assert result["processes"] == processes
    assert result["before"] > 3
    assert result["after"] < 0.6 * result["before"]
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 32


@pytest.mark.filterwarnings("ignore:'pin_memory'")  # on a machine without a GPU
def test_the_minimal_script_trains_and_writes(tmp_path, text_file, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = (SCRIPTS / "train_minimal.py").read_text()
    assert len(script.splitlines()) <= 60
    constants = {
        "FILES": '[Path("beer.txt")]',
        "HIDDEN_SIZE, NUM_LAYERS, DROPOUT": "16, 1, 0.1",
        "PROMPT": '"99 "',
        "LANES, BPTT_LENGTH": "4, 16",
        "MAX_STEPS, LEARNING_RATE": "2, 4e-3",
    }
    for names, values in constants.items():
        script, count = re.subn(rf"^{names} = .*$", f"{names} = {values}", script, flags=re.MULTILINE)
        assert count == 1
    copy = tmp_path / "mine.py"
    copy.write_text(script)

    runpy.run_path(str(copy), run_name="__main__")

    printed = capsys.readouterr().out
    assert re.search(r"validation: \d\.\d{4} nats per character, \d\.\d{4} bits per byte\n99 ", printed)
    assert AutoModelForCausalLM.from_pretrained("runs/minimal").config.hidden_size == 16
