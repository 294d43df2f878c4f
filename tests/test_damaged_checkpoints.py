"""A checkpoint that is not whole, or not the config's, is refused in one sentence; what was saved long ago still loads."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import make_ids, make_model
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hf_lstm
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
    a_weight_is_too_many: "contain, beside those of the model, model.layers.7.hidden_gates.weight",
    a_weight_has_another_shape: "have other shapes than its config.json says",
    a_weight_is_no_number: "contain NaN or infinite values in `model.layers.1.input_gates.bias`",
    the_file_is_cut_off: "are not a valid safetensors file, or truncated",
    the_file_is_something_else: "are not a valid safetensors file, or truncated",
    the_layers_are_fewer: "contain, beside those of the model, model.layers.1.hidden_gates.weight",
    a_billion_units: r"`hidden_size` \(1000000000\).*parameters: at most 1e\+12 are allowed",
    a_hundred_thousand_units: "have other shapes than its config.json says",
    a_wide_mlp: r"parameters: at most 1e\+12 are allowed",
    a_billion_layers: r"`num_hidden_layers` \(1000000000\) must be at most 10,000",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_refused(folder, damage):
    damage(folder)

    with pytest.raises((ValueError, StrictDataclassError), match=DAMAGES[damage]):
        AutoModelForCausalLM.from_pretrained(folder)


class Trap:
    """Whoever unpickles it without care makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def set_a_trap(folder, name):
    """The weights are in a pickle of that name, and in no other file."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights | {"trap": Trap(folder / "executed")}, folder / name)
    return weights


def test_a_pickle_is_never_read(folder):
    set_a_trap(folder, "pytorch_model.bin")

    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder, weights_only=False)
    for argument, value in (("use_safetensors", False), ("gguf_file", "x.gguf")):
        with pytest.raises(ValueError, match=rf"`{argument}` \('?{value}'?\) asks for weights of another format"):
            LSTMForCausalLM.from_pretrained(folder, **{argument: value})
    with pytest.raises(ValueError, match=r"names the weights 'pytorch_model\.bin'"):
        LSTMForCausalLM.from_pretrained(folder / "pytorch_model.bin", config=LSTMConfig(), weights_only=False)
    assert not (folder / "executed").exists()


FOREIGN = ["weights.bin", "x.dat", "x.pickle", "x.BIN", "x.SAFETENSORS", "x.safetensors.bin", "model", "dir/x.pt"]
FOREIGN += ["../outside.safetensors", "in/../../outside.safetensors", "..\\outside.safetensors", "./x.safetensors"]
FOREIGN += ["/outside.safetensors", "C:/outside.safetensors", "x.safetensors\n", "", ".safetensors"]


@pytest.mark.parametrize("written", FOREIGN, ids=repr)
@pytest.mark.parametrize("place", ["index", "config", "index that the config names"])
def test_weights_are_read_from_safetensors_files_inside_the_folder_only(folder, written, place):
    weights = set_a_trap(folder, "trap.pickle")
    change_config(folder, dtype=None)  # then transformers looks into the file to find it
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, written)}
    name = "model.safetensors.index.json" if place == "index" else "other.safetensors.index.json"
    (folder / name).write_text(json.dumps(index))
    if place != "index":
        change_config(folder, transformers_weights=written if place == "config" else name)
    if written and Path(written).suffix != ".safetensors":
        (folder / written).parent.mkdir(exist_ok=True)
        (folder / "trap.pickle").rename(folder / written)

    for cls in (LSTMForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=re.escape(f"names the weights {written!r}")):
            cls.from_pretrained(folder, weights_only=False)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("named", ["adapter_model.bin", ["x.safetensors"], "../x.safetensors.index.json", 3])
def test_a_config_names_safetensors_files_or_an_index_of_such(folder, named):
    change_config(folder, transformers_weights=named)

    with pytest.raises(ValueError, match=r"`transformers_weights` in the config of .* names the weights"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}'])
def test_a_damaged_index_is_named(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)

    with pytest.raises(ValueError, match=r"index\.json does not say in which file each weight lies"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_variant_has_an_index_of_its_own(folder):
    weights = set_a_trap(folder, "x.dat")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, "x.dat")}
    (folder / "model.safetensors.index.fp16.json").write_text(json.dumps(index))

    with pytest.raises(ValueError, match=r"names the weights 'x\.dat'"):
        AutoModelForCausalLM.from_pretrained(folder, variant="fp16")


def test_weights_that_come_another_way_are_checked_too(folder, monkeypatch):
    """An adapter's, and its base model's; here peft's part is played by nobody having looked before."""
    weights = set_a_trap(folder, "x.dat")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, "x.dat")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr("hf_lstm.model.loading_lstm.check_sources", lambda *_: None)

    with pytest.raises(ValueError, match=r"names the weights 'x\.dat'"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("shard", ["1GB", "1KB"])
def test_names_count_as_written_wherever_they_link_to(folder, tmp_path_factory, shard):
    model = AutoModelForCausalLM.from_pretrained(folder)
    blobs, snapshot = tmp_path_factory.mktemp("blobs"), tmp_path_factory.mktemp("snapshot")
    model.save_pretrained(blobs, max_shard_size=shard)
    for number, path in enumerate(sorted(blobs.iterdir())):
        (snapshot / path.name).symlink_to(path.rename(blobs / f"{number}"))  # as the cache of the Hub has it

    loaded = AutoModelForCausalLM.from_pretrained(snapshot)

    assert len(list(snapshot.glob("*.safetensors"))) == (1 if shard == "1GB" else 7)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


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
    assert {path.stem.split("_")[0] for path in CONFIGS} >= {"0.1.0", hf_lstm.__version__}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_of_any_release_loads(path, tmp_path):
    stored = json.loads(path.read_text())
    (tmp_path / "config.json").write_text(path.read_text())

    config = AutoConfig.from_pretrained(tmp_path)

    assert type(config) is LSTMConfig
    found, moving = config.to_dict(), ("transformers_version", "auto_map")
    assert {name: found[name] for name in stored if name not in moving} == {
        name: value for name, value in stored.items() if name not in moving
    }
    assert found["auto_map"].items() >= stored["auto_map"].items()  # later versions have more classes
    logits = AutoModelForCausalLM.from_config(config)(make_ids(2, 5) % config.vocab_size).logits
    assert logits.shape == (2, 5, config.vocab_size)
