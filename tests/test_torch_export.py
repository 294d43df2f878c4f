"""The one-token step exported with torch.export, for any number of rows."""

import subprocess
import sys

import pytest
import torch
from conftest import CONFIGS, make_ids, make_model
from transformers import DynamicCache

from hf_lstm.convert.checking import check_file
from hf_lstm.convert.torch_export import Step, difference, export_step


@pytest.mark.parametrize("name", ["tied_narrow", "untied", "residual_narrow", "hybrid"])
def test_the_exported_step_agrees_with_the_model(name, tmp_path):
    model = make_model(**CONFIGS[name])

    step = torch.export.load(export_step(model, tmp_path / "new" / "step.pt2")).module()

    for rows in (1, 5):
        ids, cache = make_ids(rows, 6), DynamicCache(config=model.config)
        state = Step(model).zero_state(rows)
        for column in ids.split(1, dim=1):
            logits, state = step(column, state)
            expected = model(column, past_key_values=cache).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
        expected = [part for layer in cache.layers for part in layer.get_state()]
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_step_accepts_its_own_state(dtype, tmp_path):
    """h is in half precision, c in float32."""
    model = make_model(dtype, num_hidden_layers=1)

    path = export_step(model, tmp_path / "step.pt2")

    assert [part.dtype for part in Step(model).zero_state(1)] == [dtype, torch.float32]
    assert difference(model, path) == 0


@pytest.mark.parametrize(
    ("found", "dtype", "message"),
    [
        (0.1, torch.float32, r"differ from the model's by 0\.1 nats, more than rounding explains \(0\.0035\)"),
        (float("nan"), None, "differ from the model's by nan nats"),
        (
            RuntimeError("dtype mismatch!\nat line 3"),
            torch.float16,
            "could not be run and was removed: dtype mismatch!$",
        ),
    ],
)
def test_a_file_that_differs_from_its_model_is_removed(found, dtype, message, tmp_path):
    def difference():
        if isinstance(found, Exception):
            raise found
        return found

    path = tmp_path / "step.pt2"
    path.touch()

    with pytest.raises(ValueError, match=message):
        check_file(path, difference, dtype)

    assert not path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_exported_step_runs_without_the_package(dtype, tmp_path, run):
    make_model(getattr(torch, dtype)).save_pretrained(tmp_path / "model")

    printed = run("convert.py", "--to", "torch", "--model", tmp_path / "model", "--output_dir", tmp_path)

    assert "its log-probabilities differ from the model's by 0 nats at most" in printed
    code = f"""
import sys, torch
sys.modules["hf_lstm"] = sys.modules["transformers"] = None
step = torch.export.load({str(tmp_path / "step.pt2")!r}).module()
state = [torch.zeros(1, 12, dtype=dtype) for dtype in (torch.{dtype}, torch.float32) * 2]
for token in (5, 6, 7):
    logits, state = step(torch.tensor([[token]]), state)
print(tuple(logits.shape), len(state))
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "(1, 1, 31) 4\n"
