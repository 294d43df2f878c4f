"""Exported ONNX graphs agree with the model and generate without it."""

import json
import runpy
import subprocess
import sys

import numpy
import pytest
import torch
from conftest import CONFIGS, SCRIPTS, make_model

from hf_lstm import bpe_tokenizer, byte_tokenizer, char_tokenizer, word_tokenizer

pytest.importorskip("onnx", reason="needs the extra `onnx`")
onnxruntime = pytest.importorskip("onnxruntime")

from hf_lstm.convert.onnx import difference, export_onnx, quantize_onnx


def byte_model(**config):
    return make_model(torch.float32, **{"vocab_size": 260} | config)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_graphs_agree_with_the_model(name, tmp_path):
    model = byte_model(**CONFIGS[name])
    step, chunk = export_onnx(model, byte_tokenizer(), tmp_path)

    assert (step.name, chunk.name) == ("step.onnx", "chunk.onnx")
    for path in (step, chunk):
        for rows, length in ((1, 3), (5, 40)):
            assert difference(model, path, rows, length) < 1e-3


@pytest.mark.parametrize("name", ["stacked", "residual_narrow", "hybrid"])
def test_the_state_of_one_graph_continues_in_the_other(name, tmp_path):
    model = byte_model(**CONFIGS[name])
    step, chunk = (onnxruntime.InferenceSession(path) for path in export_onnx(model, byte_tokenizer(), tmp_path))
    ids = torch.randint(260, (2, 12))
    state = {part.name: numpy.zeros((2, *part.shape[1:]), numpy.float32) for part in step.get_inputs()[1:]}

    _, *following = chunk.run(None, {"input_ids": ids[:, :-1].numpy(), **state})
    logits, *_ = step.run(None, {"input_ids": ids[:, -1:].numpy(), **dict(zip(state, following, strict=True))})

    expected = model(ids).logits[:, -1:].detach().numpy()
    assert logits.shape == (2, 1, 260)
    assert abs(logits - expected).max() < 1e-5 * abs(expected).max()


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_with_a_bias_is_exported(tied, tmp_path):
    model = byte_model(output_bias=True)
    if not tied:
        model.lm_head = torch.nn.Linear(12, 260)

    for path in export_onnx(model, byte_tokenizer(), tmp_path):
        assert difference(model, path) < 1e-4


def test_a_model_in_training_is_exported_without_dropout(tmp_path):
    model = byte_model(weight_dropout=0.5)

    for path in export_onnx(model.train(), byte_tokenizer(), tmp_path):
        assert difference(model.eval(), path) < 1e-4
        model.train()


def test_8_bit_graphs_are_small_and_close_to_the_model(tmp_path):
    model = byte_model(hidden_size=256)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.02)

    for path in export_onnx(model, byte_tokenizer(), tmp_path):
        quantized = quantize_onnx(path)

        assert quantized.name == f"{path.stem}_int8.onnx"
        assert quantized.stat().st_size < 0.3 * path.stat().st_size
        assert 1e-5 < difference(model, quantized) < 0.2


def test_an_activation_without_an_operator_is_refused(tmp_path):
    model = byte_model(**CONFIGS["residual_narrow"] | {"hidden_act": "gelu"})

    with pytest.raises(ValueError, match=r"`hidden_act` \('gelu'\).*silu"):
        export_onnx(model, byte_tokenizer(), tmp_path)


@pytest.mark.parametrize("act", ["relu", "tanh"])
def test_other_activations_are_exported(act, tmp_path):
    model = byte_model(**CONFIGS["residual_narrow"] | {"hidden_act": act})

    assert difference(model, export_onnx(model, byte_tokenizer(), tmp_path)[0]) < 1e-3


TEXT = "the cat sat on the mat, 東風吹雁上\n" * 3


@pytest.mark.parametrize(
    ("make", "dtype"),
    [(char_tokenizer, torch.float32), (lambda texts: bpe_tokenizer(texts, 280), torch.bfloat16)],
    ids=["char", "bpe"],
)
def test_run_onnx_generates_from_the_exported_folder(make, dtype, tmp_path, run):
    tokenizer = make([TEXT])
    tokenizer.add_tokens(["the user says", "東風"])
    model = make_model(dtype, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    folder = tmp_path / "onnx"

    printed = run("convert.py", "--to", "onnx", "--model", tmp_path / "model", "--output_dir", folder)

    assert "chunk_int8.onnx, 0.0 MB" in printed
    nats = [float(line.split()[-4]) for line in printed.splitlines() if line.startswith("written to")]
    assert max(nats[:2]) < 1e-3  # in float32, whatever the dtype of the model
    metadata = onnxruntime.InferenceSession(folder / "step.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(metadata["ends"]) == []  # from the saved generation config
    for prompt, code in (("the cat 東", 0), ("the dog", 0 if make is not char_tokenizer else 1)):
        wrote = subprocess.run([sys.executable, folder / "run_onnx.py", folder, prompt], capture_output=True)
        assert wrote.returncode == code
        if code:  # a token without text is never used
            assert b"the model has no token for the beginning of 'dog'" in wrote.stderr
        else:
            assert wrote.stdout.strip()
    asked = subprocess.run(
        [sys.executable, folder / "run_onnx.py", folder, b"?!\xff"], capture_output=True, timeout=60
    )
    assert asked.returncode == (1 if make is char_tokenizer else 0)
    assert b"Traceback" not in asked.stderr  # the last byte is not valid UTF-8


@pytest.mark.parametrize("prompt", ["the quick", " the\n\nquick\tthe ", "\nquick  fox"])
def test_a_prompt_of_words_begins_without_a_space(tmp_path, monkeypatch, capfdbinary, prompt):
    """As the tokenizer reads it."""
    tokenizer = word_tokenizer(["the quick\nfox"])
    export_onnx(make_model(torch.float32, vocab_size=len(tokenizer)), tokenizer, tmp_path)
    read, session = [], onnxruntime.InferenceSession

    class Session(session):
        def run(self, outputs, inputs):
            read.append(inputs["input_ids"].tolist())
            return super().run(outputs, inputs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(sys, "argv", ["run_onnx.py", str(tmp_path), prompt])

    runpy.run_path(str(SCRIPTS / "run_onnx.py"))

    assert read[0] == [tokenizer(prompt)["input_ids"]]


def test_run_onnx_needs_only_numpy_and_onnxruntime():
    lines = (SCRIPTS / "run_onnx.py").read_text().splitlines()

    assert len(lines) < 50
    assert {line.split()[1] for line in lines if line.startswith("import")} == {"json", "sys", "numpy", "onnxruntime"}
