"""A saved model loads everywhere, the same to the last digit: with hf_lstm, and where it is not installed."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, make_ids, make_model
from processes import run_program
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

import hf_lstm
from hf_lstm import LSTMForCausalLM, LSTMModel, byte_tokenizer

IDS = make_ids(2, 7)
MLP = ("norm", "gate_proj", "up_proj", "down_proj")
CODE = {path.name for path in (Path(hf_lstm.__file__).parent / "model").glob("*_lstm.py")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_reloaded_models_are_the_same(tmp_path, dtype, model):
    model = model.to(dtype)
    model.save_pretrained(tmp_path)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)

    assert type(loaded) is LSTMForCausalLM
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    differences = {"_name_or_path", "dtype", "architectures", "transformers_version"}
    saved, kept = (
        {name: value for name, value in config.to_dict().items() if name not in differences}
        for config in (loaded.config, model.config)
    )
    assert saved == kept
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings


def test_embeddings_that_were_untied_are_saved(tmp_path):
    model = make_model(torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 3)
    model.save_pretrained(tmp_path)

    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def set_output_embeddings(model, layer):
    model.set_output_embeddings(layer)


def set_lm_head(model, layer):
    model.lm_head = layer


def set_weight(model, layer):
    model.lm_head.weight = layer.weight


@pytest.mark.parametrize("change", [set_output_embeddings, set_lm_head, set_weight])
def test_an_output_layer_made_apart_is_saved(tmp_path, change):
    """The tensors decide, as in Llama, and not the config, which goes on saying that they are tied."""
    model = make_model(torch.float32)
    change(model, torch.nn.Linear(12, 31, bias=False))
    model.save_pretrained(tmp_path)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(IDS).logits, model(IDS).logits)


def test_an_output_layer_that_is_the_embedding_is_saved_once(tmp_path):
    model = make_model(torch.float32)
    set_output_embeddings(model, torch.nn.Linear(12, 31, bias=False))
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)

    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  it is no dict
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_base_model_loads_from_a_language_model(tmp_path, model):
    model.save_pretrained(tmp_path)

    base, report = AutoModel.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)

    assert type(base) is LSTMModel
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    assert not report["missing_keys"]


def test_training_goes_on_from_a_saved_model(tmp_path):
    model = make_model(torch.float32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()

    for one in (model.train(), loaded):
        one(IDS, labels=IDS).loss.backward()

    for parameter, expected in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


def test_a_folder_holds_code_and_a_complete_map(tmp_path):
    make_model().save_pretrained(tmp_path)

    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_lstm.LSTMConfig",
        "AutoModel": "modeling_lstm.LSTMModel",
        "AutoModelForCausalLM": "modeling_lstm.LSTMForCausalLM",
        "AutoModelForSequenceClassification": "heads_lstm.LSTMForSequenceClassification",
        "AutoModelForTokenClassification": "heads_lstm.LSTMForTokenClassification",
    }


ELSEWHERE = """
import sys
sys.modules["hf_lstm"] = None  # importing it raises, as where it is not installed
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
folder, copy, ids = sys.argv[1], sys.argv[2], torch.tensor(eval(sys.argv[3]))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
assert type(model).__module__.startswith("transformers_modules"), type(model)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["hf_lstm"] == type(model).__name__  # label smoothing looks it up
from transformers import Trainer, TrainingArguments
trainer = Trainer(model, TrainingArguments(copy, label_smoothing_factor=0.1, report_to="none", use_cpu=True))
smoothed = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
logprobs = model(ids).logits[:, :-1].log_softmax(-1)
expected = -0.9 * logprobs.gather(-1, ids[:, 1:, None]).mean() - 0.1 * logprobs.mean()
torch.testing.assert_close(smoothed, expected)
static = model.generate(ids, max_new_tokens=5, do_sample=False, cache_implementation="static")
assert torch.equal(static, model.generate(ids, max_new_tokens=5, do_sample=False))
base = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto")
assert torch.equal(model.lm_head(base(ids).last_hidden_state), model(ids).logits)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
generator = pipeline("text-generation", model=folder, trust_remote_code=True)
options = dict(max_new_tokens=5, do_sample=False)
print([model(ids).logits.double().tolist(), model.generate(ids, num_beams=3, **options).tolist(),
       [text[0]["generated_text"] for text in generator(["ab", "cde"], batch_size=2, **options)]])
model.save_pretrained(copy)
tokenizer.save_pretrained(copy)
"""


def test_models_load_where_hf_lstm_is_not_installed(tmp_path):
    model = make_model(torch.float32, vocab_size=260, cell_type="mogrifier", output_bias=True)
    folder, copy = tmp_path / "model", tmp_path / "copy"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    environment = {"PATH": "", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["MKL_CBWR"] = os.environ["MKL_CBWR"]

    ran = run_program(ELSEWHERE, folder, copy, IDS.tolist(), environment=environment)

    assert ran.returncode == 0, ran.stderr
    logits, beams, texts = eval(ran.stdout.splitlines()[-1])
    generator = pipeline("text-generation", model=model, tokenizer=byte_tokenizer())
    options = {"max_new_tokens": 5, "do_sample": False}
    torch.testing.assert_close(torch.tensor(logits).double(), model(IDS).logits.double(), rtol=0, atol=0)
    assert beams == model.generate(IDS, num_beams=3, **options).tolist()
    assert texts == [text[0]["generated_text"] for text in generator(["ab", "cde"], batch_size=2, **options)]

    assert {path.name for path in copy.glob("*.py")} == CODE
    again = AutoModelForCausalLM.from_pretrained(copy)
    assert type(again) is LSTMForCausalLM
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert AutoTokenizer.from_pretrained(copy)("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]


def test_code_of_version_0_1_0_does_not_stay_in_a_folder(tmp_path):
    """Its files had other names, which a model that is saved again no longer needs."""
    make_model().save_pretrained(tmp_path)
    for name in ("decoding", "kernels", "loss", "outputs", "regularization", "segments", "mine"):
        (tmp_path / f"{name}_lstm.py").write_text("")

    make_model().save_pretrained(tmp_path)

    assert {path.name for path in tmp_path.glob("*.py")} == CODE | {"mine_lstm.py"}


def test_parameters_keep_the_order_in_which_optimizers_save_them():
    """`optimizer.pt` knows a parameter by its number: in another order, a resumed run would mix up their moments."""
    layer = ["input_gates.weight", "input_gates.bias", "hidden_gates.weight"]
    branches = ["norm.weight", "o_proj.weight", *(f"mlp.{name}.weight" for name in MLP)]
    outside = ["norm.weight", "in_proj.weight", "out_proj.weight"]
    orders = {
        "stacked": [f"layers.{index}.{name}" for index in range(2) for name in layer],
        "residual_narrow": [f"layers.{index}.{name}" for index in range(2) for name in layer + branches] + outside,
    }

    for kind, names in orders.items():
        model = make_model(**CONFIGS[kind])
        assert [name for name, _ in model.named_parameters()] == [
            f"model.{n}" for n in ["embed_tokens.weight", *names]
        ]


def test_keys_set_by_others_are_ignored_on_save_too(tmp_path):
    model = make_model(torch.float32)
    model._keys_to_ignore_on_save = {"model.layers.1.input_gates.bias"}
    model.save_pretrained(tmp_path)

    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert not {"lm_head.weight", "model.layers.1.input_gates.bias"} & set(file.keys())


def test_a_folder_without_a_model_is_named(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"Unrecognized model in .*config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_default_config_makes_a_model_for_bytes():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("hf_lstm"))

    assert model.config.vocab_size == len(byte_tokenizer())
    assert model(IDS, labels=IDS).loss.item() == pytest.approx(torch.tensor(260.0).log().item(), rel=0.05)
