"""The one-token step as a file of torch's own, for any number of rows."""

import subprocess
import sys

import pytest
import torch
from conftest import CONFIGS, make_ids, make_model
from transformers import DynamicCache

from hf_lstm.convert.torch_export import Step, export_step


@pytest.mark.parametrize("name", ["tied_narrow", "residual_narrow"])
def test_the_file_computes_what_the_model_does(name, tmp_path):
    model = make_model(**CONFIGS[name])

    step = torch.export.load(export_step(model, tmp_path / "new" / "step.pt2")).module()

    for rows in (1, 5):
        ids, cache = make_ids(rows, 6), DynamicCache(config=model.config)
        state = Step(model).zero_state(rows)
        for column in ids.split(1, dim=1):
            logits, state = step(column, state)
            expected = model(column, past_key_values=cache).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
        for index, layer in enumerate(cache.layers):
            torch.testing.assert_close(state[2 * index], layer.keys, rtol=0, atol=1e-10)
            torch.testing.assert_close(state[2 * index + 1], layer.values, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_it_runs_where_the_package_is_not(tmp_path, run):
    make_model(torch.float32).save_pretrained(tmp_path / "model")
    run("convert.py", "--to", "torch", "--model", tmp_path / "model", "--output_dir", tmp_path)
    code = f"""
import sys, torch
sys.modules["hf_lstm"] = sys.modules["transformers"] = None
step = torch.export.load({str(tmp_path / "step.pt2")!r}).module()
logits, state = step(torch.tensor([[5]]), [torch.zeros(1, 12) for _ in range(4)])
print(tuple(logits.shape), len(state))
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "(1, 1, 31) 4\n"
