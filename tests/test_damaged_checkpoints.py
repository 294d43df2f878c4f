"""A checkpoint that is not whole, or not the config's, is refused in one sentence; what was saved long ago still loads."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_ids, make_model
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_lstm import LSTMConfig, LSTMForCausalLM

CONFIGS = sorted((Path(__file__).parent / "configs").glob("*.json"))


@pytest.fixture
def folder(tmp_path):
    make_model(torch.float32, tie_word_embeddings=False).save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def a_weight_is_missing(folder):
    change_weights(folder, lambda weights: weights.pop("model.layers.0.hidden_gates.weight"))


def the_output_layer_is_missing(folder):
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))


def a_weight_is_too_many(folder):
    change_weights(folder, lambda weights: weights.update({"model.layers.7.hidden_gates.weight": torch.ones(4, 4)}))


def a_weight_has_another_shape(folder):
    change_weights(folder, lambda weights: weights.update({"model.layers.0.input_gates.bias": torch.ones(8)}))


def a_weight_is_no_number(folder):
    change_weights(folder, lambda weights: weights["model.layers.1.input_gates.bias"][3:4].fill_(float("nan")))


def the_file_is_cut_off(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def the_file_is_something_else(folder):
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def the_layers_are_fewer(folder):
    change_config(folder, num_hidden_layers=1)


def a_billion_units(folder):
    change_config(folder, hidden_size=10**9, embedding_size=10**9)


def a_hundred_thousand_units(folder):
    change_config(folder, hidden_size=10**5, embedding_size=10**5)  # 640 GB of weights: none is made


def a_wide_mlp(folder):
    change_config(folder, block_type="residual", intermediate_size=10**12)


def a_billion_layers(folder):
    change_config(folder, num_hidden_layers=10**9, hidden_size=1, embedding_size=1)


DAMAGES = {
    a_weight_is_missing: "lack model.layers.0.hidden_gates.weight",
    the_output_layer_is_missing: "lack lm_head.weight",
    a_weight_is_too_many: "hold, beside those of the model, model.layers.7.hidden_gates.weight",
    a_weight_has_another_shape: "have other shapes than its config.json says",
    a_weight_is_no_number: "hold numbers in `model.layers.1.input_gates.bias` that are none",
    the_file_is_cut_off: "are no safetensors file, or were cut off",
    the_file_is_something_else: "are no safetensors file, or were cut off",
    the_layers_are_fewer: "hold, beside those of the model, model.layers.1.hidden_gates.weight",
    a_billion_units: r"`hidden_size` \(1000000000\).*parameters: at most 1e\+12 are built",
    a_hundred_thousand_units: "have other shapes than its config.json says",
    a_wide_mlp: r"parameters: at most 1e\+12 are built",
    a_billion_layers: r"`num_hidden_layers` \(1000000000\) must be at most 10,000",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_refused(folder, damage):
    damage(folder)

    with pytest.raises((ValueError, StrictDataclassError), match=DAMAGES[damage]):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_pickle_is_never_read(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")

    with pytest.raises((OSError, ValueError), match=r"model\.safetensors|is a pickle"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False)


def test_a_pickle_that_another_file_names_is_never_read(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "weights.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, "weights.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(ValueError, match=r"weights\.bin is a pickle"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "weights.bin").rename(folder / "adapter_model.bin")
    change_config(folder, transformers_weights="adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_whoever_asks_for_the_report_gets_it(folder):
    a_weight_is_missing(folder)

    model, report = LSTMForCausalLM.from_pretrained(folder, output_loading_info=True)

    assert report["missing_keys"] == {"model.layers.0.hidden_gates.weight"}
    assert model.model.layers[0].hidden_gates.weight.isfinite().all()


def test_whoever_wants_other_shapes_gets_new_weights(folder):
    change_config(folder, vocab_size=50)

    model = LSTMForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)

    assert model.lm_head.weight.shape[0] == 50


def test_the_base_model_of_an_untied_one_loads(folder):
    base, model = AutoModel.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)

    ids = make_ids(2, 5)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_there_is_a_config_of_every_release():
    assert {path.stem.split("_")[0] for path in CONFIGS} >= {"0.1.0"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_of_any_release_loads(path, tmp_path):
    stored = json.loads(path.read_text())
    (tmp_path / "config.json").write_text(path.read_text())

    config = AutoConfig.from_pretrained(tmp_path)

    assert type(config) is LSTMConfig
    found = config.to_dict()
    assert {name: found[name] for name in stored if name != "transformers_version"} == {
        name: value for name, value in stored.items() if name != "transformers_version"
    }
    logits = AutoModelForCausalLM.from_config(config)(make_ids(2, 5) % config.vocab_size).logits
    assert logits.shape == (2, 5, config.vocab_size)
