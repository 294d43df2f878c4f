"""The wheel works where the checkout is not, and `python -m hf_lstm` says where the programs are."""

import os
import subprocess
import sys
import sysconfig

import pytest
from conftest import SCRIPTS
from mutations import copy_checkout

PROGRAM = """
import importlib.resources, sys
from pathlib import Path
import torch, hf_lstm
from transformers import AutoModelForCausalLM
assert Path(hf_lstm.__file__).is_relative_to(sys.argv[1]), hf_lstm.__file__
for name in ("py.typed", "templates/model_card.md"):
    assert importlib.resources.files("hf_lstm").joinpath(name).is_file(), name
model = hf_lstm.LSTMForCausalLM(hf_lstm.LSTMConfig(hidden_size=8))
model.save_pretrained("model")
hf_lstm.byte_tokenizer().save_pretrained("model")
again = AutoModelForCausalLM.from_pretrained("model")
print(again.generate(torch.tensor([[5, 6]]), max_new_tokens=3, eos_token_id=None).shape[1])
"""


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(tmp_path):
    """It has the libraries of this one, but not its editable installation of the checkout."""
    source, wheels, place = (tmp_path / name for name in ("source", "wheels", "site"))
    copy_checkout(source)
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, source], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", place, *wheels.glob("*.whl")], check=True)
    # `-S` leaves out the editable installation, which a .pth file adds.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(place), sysconfig.get_path("purelib")])}

    ran = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM, place], cwd=tmp_path, env=environment, capture_output=True, text=True
    )

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "5\n"


def test_the_package_says_where_its_programs_are(monkeypatch):
    from hf_lstm.__main__ import PROGRAMS, main

    monkeypatch.chdir(SCRIPTS.parent)
    for arguments, command in (
        (["train", "--train_file", "my text.txt"], "python scripts/train.py --train_file 'my text.txt'"),
        (["tune"], "python scripts/train.py --output_dir runs/first"),
        ([], "python scripts/train.py --output_dir runs/first"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert str(stopped.value) == f"hf_lstm is a library, and its programs are files: `{command}`."
    assert all((SCRIPTS / f"{name}.py").is_file() for name in PROGRAMS)
