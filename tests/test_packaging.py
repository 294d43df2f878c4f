"""The wheel works where the checkout is not."""

import os
import subprocess
import sys
import sysconfig

import pytest
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
