"""Keras' files, in small ones of its layouts and against its equations in numpy; tests/test_convert_keras_library.py asks Keras."""

import json
import os
import pickle
import random
import sys
import types
import zipfile

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lstm.convert import convert_checkpoint, keras
from hf_lstm.convert.keras_tokenizer import read_keras_vocabulary
from hf_lstm.convert.source import build_model
from hf_lstm.convert.torch_lstm import Options
from hf_lstm.convert.vocabulary import make_tokenizer
from hf_lstm.tokenizers import encode
from hf_lstm.unknown import dropped_characters

h5py = pytest.importorskip("h5py", reason="needs the extra `convert`")

import keras_files as files
from keras_files import D, H, V, cell, dense, embedding, layer

LAYOUTS = ("keras", "older.keras", "h5", "weights.h5")
IDS = numpy.random.default_rng(0).integers(1, V, (3, 9))
TEXTS = ["The cat sat on the mat, and I saw the cat.", "A dog's life\tin ΟΔΥΣΣΕΥΣ, straße; İstanbul!", "a I"]


def write_letters(folder, padded=False):
    path = folder / "letters.json"
    path.write_text(json.dumps((["<pad>"] if padded else ["a"]) + list("bcdefg")))
    return str(path)


def options_for(path, vocabulary):
    config = str(path.with_suffix(".json")) if path.name.endswith(".weights.h5") else None
    return Options(vocabulary=vocabulary, config=config)


def read_model(path, vocabulary):
    return build_model(keras.read(path, options_for(path, vocabulary)))


def keras_checkpoint(tmp_path):
    """A file of Keras and the options to convert it with."""
    layers = [embedding(), cell("LSTM"), dense()]
    path = files.write(tmp_path / "model.keras", files.sequential(layers), layers)
    return path, Options(vocabulary=write_letters(tmp_path))


def largest_difference(model, layers, ids=IDS, mask=None, **settings):
    with torch.no_grad():
        found = model(torch.tensor(ids), attention_mask=mask).logits.log_softmax(-1).numpy()
    difference = numpy.abs(found - files.log_probabilities(layers, ids, **settings))
    return (difference if mask is None else difference[mask.numpy() == 1]).max()


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("kind", "settings"), [("LSTM", {}), ("GRU", {}), ("SimpleRNN", {}), ("SimpleRNN", {"activation": "relu"})]
)
def test_two_widths_give_the_source_s_probabilities(tmp_path, kind, settings, layout, use_bias):
    layers = [
        embedding(),
        cell(kind, use_bias=use_bias, **settings),
        layer("Dropout", rate=0.2),
        cell(kind, H, H + 1, use_bias, **settings),
        dense(H + 1, use_bias=use_bias),
    ]
    path = files.write(tmp_path / f"model.{layout}", files.sequential(layers), layers)

    model = read_model(path, write_letters(tmp_path))

    assert largest_difference(model, layers) < 1e-5
    assert (model.lm_head.bias is not None) == use_bias


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("version", [2, 3])
def test_a_functional_model_is_followed_from_its_output(tmp_path, version, layout):
    inner, weights = dense()
    wrapped = layer("TimeDistributed", *weights, layer=inner)
    layers = [embedding(), layer("SpatialDropout1D", rate=0.1), cell("GRU"), wrapped]
    path = files.write(tmp_path / f"model.{layout}", files.functional(layers, version), layers)

    assert largest_difference(read_model(path, write_letters(tmp_path)), layers) < 1e-5


@pytest.mark.parametrize("units", [1, H])
def test_one_hot_input_becomes_an_embedding(tmp_path, units):
    """Of the smaller size: the identity, or the columns of the first kernel."""
    layers = [cell("LSTM", V, units, batch_input_shape=[None, 9, V], return_sequences=False), dense(units)]
    layers.append(layer("Activation", activation="linear"))
    path = files.write(tmp_path / "model.h5", files.sequential(layers), layers)

    source = keras.read(path, Options(vocabulary=write_letters(tmp_path)))

    assert source.embedding.shape == (V, min(V, 4 * units))
    assert largest_difference(build_model(source), layers) < 1e-5
    assert any("after the last token only" in note for note in source.notes)
    assert any("optimizer" in note for note in source.notes)


@pytest.mark.parametrize("mask_zero", [True, False])
def test_mask_zero_decides_whether_zeros_are_padding(tmp_path, mask_zero):
    layers = [embedding(mask_zero=mask_zero), cell("LSTM"), dense()]
    path = files.write(tmp_path / "model.keras", files.sequential(layers), layers)
    ids = IDS.copy()
    ids[0, :4] = ids[1, :2] = ids[2, 5] = 0
    source = keras.read(path, Options(vocabulary=write_letters(tmp_path, padded=True)))
    mask = torch.tensor(ids != 0).long() if mask_zero else None

    tokenizer = make_tokenizer(source.vocabulary)

    assert tokenizer.pad_token_id == (0 if mask_zero else None)
    assert largest_difference(build_model(source), layers, ids, mask, skip_zeros=mask_zero) < 1e-5
    assert any(("skips id 0" if mask_zero else "reads id 0 like any token") in note for note in source.notes)


def with_mask(config, second_argument=0, input_name="my inputlayer 0"):
    """A functional model whose cell reads the mask of the input by a layer of its own, as Keras 3 writes it."""
    tensor = {"class_name": "__keras_tensor__", "config": {"keras_history": [input_name, 0, 0]}}
    mask = layer("NotEqual", name="not_equal")[0]
    mask |= {"name": "not_equal", "inbound_nodes": [{"args": [tensor, second_argument], "kwargs": {}}]}
    read = {"class_name": "__keras_tensor__", "config": {"keras_history": ["not_equal", 0, 0]}}
    config["config"]["layers"][2]["inbound_nodes"][0]["kwargs"]["mask"] = read
    config["config"]["layers"].insert(2, mask)
    return config


def test_the_mask_of_a_functional_model_is_that_of_its_embedding(tmp_path):
    layers = [embedding(mask_zero=True), cell("LSTM"), dense()]
    path = files.write(tmp_path / "model.keras", with_mask(files.functional(layers)), layers)

    assert largest_difference(read_model(path, write_letters(tmp_path, padded=True)), layers) < 1e-5


@pytest.mark.parametrize(
    ("mask_zero", "arguments"), [(False, {}), (True, {"second_argument": 1}), (True, {"input_name": "my lstm 2"})]
)
def test_another_mask_is_refused(tmp_path, mask_zero, arguments):
    layers = [embedding(mask_zero=mask_zero), cell("LSTM"), dense()]
    path = files.write(tmp_path / "model.keras", with_mask(files.functional(layers), **arguments), layers)

    with pytest.raises(ValueError, match="not_equal is not the mask of the input"):
        keras.read(path, Options(vocabulary=write_letters(tmp_path, padded=True)))


def test_a_skipped_id_is_not_a_word(tmp_path):
    layers = [embedding(mask_zero=True), cell("LSTM"), dense()]
    path = files.write(tmp_path / "model.keras", files.sequential(layers), layers)

    with pytest.raises(ValueError, match=r"entry 0 is 'a', and the model skips id 0 \(`mask_zero`\)"):
        keras.read(path, Options(vocabulary=write_letters(tmp_path)))


@pytest.mark.parametrize("layout", ["keras", "h5"])
def test_bfloat16_is_read_exactly(tmp_path, layout):
    layers = [embedding(), cell("LSTM"), dense()]
    config = files.sequential(layers)
    stored = [torch.tensor(array).bfloat16() for _, weights in layers for array in weights]
    halves = [
        (config, [torch.tensor(a).bfloat16().view(torch.int16).numpy().view("V2") for a in w]) for config, w in layers
    ]
    path = files.write(tmp_path / f"model.{layout}", config, halves)

    source = keras.read(path, Options(vocabulary=write_letters(tmp_path)))

    assert torch.equal(source.embedding, stored[0].float())
    assert torch.equal(source.layers[0].W, stored[1].float().t())


def test_a_folder_loads_and_keeps_the_tokenizer_s_ids(tmp_path):
    fields = files.fit(["a b c d e f"])
    (tmp_path / "tokenizer.json").write_text(files.tokenizer_json(fields))
    layers = [embedding(mask_zero=True), cell("LSTM", dropout=0.3), dense()]
    path = files.write(tmp_path / "model.keras", files.sequential(layers), layers)

    result = convert_checkpoint("keras", path, tmp_path / "out", Options(vocabulary=str(tmp_path / "tokenizer.json")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")

    assert result.loss == pytest.approx(result.source_loss, abs=1e-5)
    assert largest_difference(model, layers) < 1e-5
    assert tokenizer("F, xyz a!").input_ids == [6, 1]
    assert tokenizer.decode([6, 1, 2]) == "f a b"
    assert dropped_characters(["f xyz a"], tokenizer) == set()
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, None, None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "converted from Keras" in card
    assert "word that it does not know is dropped" in card
    assert "dropout of its training (0.3)" in card


AWKWARD = [
    *("the", "The", "CAT", "cat", "dog's", "unknown", "mat", "a", "I", "oov", "<OOV>", "<pad>", "<id 0>", "unk"),
    *(" ", "  ", "\n", "\r\n", "\t", ".", ",", "!", "-", "_", "<", "'", "\x00", "\u00a0", "\u3000", ""),
    *("Σ", "ς", "ΑΣ", "ΟΔΥΣΣΕΥΣ", "İ", "ß", "é", "e\u0301", "Ǆ", "猫", "😀"),
]


def awkward_lines():
    chosen = random.Random(0)
    return ["", "   ", "\n"] + ["".join(chosen.choices(AWKWARD, k=chosen.randint(0, 12))) for _ in range(997)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lower": False},
        {"filters": ""},
        {"filters": "]^-\\", "lower": False, "oov_token": "<OOV>"},
        {"split": "\n"},
        {"split": ", ", "oov_token": "unk"},
        {"num_words": 4},
        {"num_words": 4, "oov_token": "<OOV>"},
        {"num_words": 100, "oov_token": "OOV"},
        {"char_level": True},
        {"char_level": True, "lower": False, "num_words": 9, "oov_token": "UNK"},
    ],
    ids=str,
)
def test_ids_are_those_of_the_tokenizer(tmp_path, settings):
    fields = files.fit(TEXTS, **settings)
    path = tmp_path / "tokenizer.json"
    path.write_text(files.tokenizer_json(fields))
    lines = awkward_lines()

    vocabulary, _ = read_keras_vocabulary(str(path), len(fields["word_index"]) + 1, mask_zero=True)
    found = encode(lines, make_tokenizer(vocabulary))

    assert [ids.tolist() for ids in found] == files.texts_to_sequences(fields, lines)


def fake_module(monkeypatch, name):
    """Make a class with the name of Keras' Tokenizer, so that pickle writes it."""
    parts = name.split(".")
    for index in range(len(parts)):
        module = types.ModuleType(".".join(parts[: index + 1]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.Tokenizer = type("Tokenizer", (), {"__module__": name})
    return module.Tokenizer


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", ["keras_preprocessing.text", "keras.src.legacy.preprocessing.text"])
def test_a_pickled_tokenizer_is_read(tmp_path, monkeypatch, name, protocol):
    tokenizer = fake_module(monkeypatch, name)()
    fields = files.fit(TEXTS)
    vars(tokenizer).update(fields)
    path = tmp_path / "tokenizer.pickle"
    path.write_bytes(pickle.dumps(tokenizer, protocol))

    vocabulary, _ = read_keras_vocabulary(str(path), len(fields["word_index"]) + 1, mask_zero=False)

    assert [ids.tolist() for ids in encode(TEXTS, make_tokenizer(vocabulary))] == files.texts_to_sequences(
        fields, TEXTS
    )


def test_json_within_json_is_read(tmp_path):
    fields = files.fit(TEXTS)
    (tmp_path / "tokenizer.json").write_text(json.dumps(files.tokenizer_json(fields)))

    vocabulary, _ = read_keras_vocabulary(str(tmp_path / "tokenizer.json"), len(fields["word_index"]) + 1, False)

    assert vocabulary.entries[:2] == ["<id 0>", " the"]


class Planted:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("function", "name"), [(os.system, f"{os.name}.system"), (eval, "builtins.eval")])
def test_a_planted_pickle_is_refused_and_runs_nothing(tmp_path, monkeypatch, function, name, nested, protocol):
    marker = tmp_path / "marker"
    planted = Planted(function, f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w')")
    if nested:
        tokenizer = fake_module(monkeypatch, "keras.preprocessing.text")()
        vars(tokenizer).update(files.fit(TEXTS), word_docs={"cat": [planted]})
        planted = tokenizer
    (tmp_path / "tokenizer.pickle").write_bytes(pickle.dumps(planted, protocol))
    path, options = keras_checkpoint(tmp_path)
    options.vocabulary = str(tmp_path / "tokenizer.pickle")

    with pytest.raises(ValueError, match=f"is refused: its pickle names `{name}`"):
        convert_checkpoint("keras", path, tmp_path / "out", options)

    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("size", "settings", "fits"),
    [
        (6, {}, True),
        (7, {}, False),
        (5, {}, False),
        (6, {"num_words": 3}, True),
        (3, {"num_words": 3}, True),
        (4, {"num_words": 3}, True),
        (2, {"num_words": 3}, False),
        (10, {"num_words": 10}, True),
        (11, {"num_words": 10}, True),
        (12, {"num_words": 10}, False),
    ],
)
def test_a_tokenizer_of_another_size_is_refused(tmp_path, size, settings, fits):
    path = tmp_path / "tokenizer.json"
    path.write_text(files.tokenizer_json(files.fit(["a b c d e"], **settings)))
    if fits:
        vocabulary, _ = read_keras_vocabulary(str(path), size, False)
        assert len(set(vocabulary.entries)) == size
        assert encode(["a b <id 0>"], make_tokenizer(vocabulary))[0].tolist() == [1, 2]
    else:
        with pytest.raises(ValueError, match=f"holds 5 words .* and the model has {size} tokens"):
            read_keras_vocabulary(str(path), size, False)


def test_a_word_with_the_id_0_is_padding_too(tmp_path):
    """As some tutorials add one by hand."""
    fields = files.fit(["a"]) | {"word_index": {"<pad>": 0, "a": 1, "<unk>": 2}, "oov_token": "<unk>", "filters": ""}
    (tmp_path / "tokenizer.json").write_text(files.tokenizer_json(fields))

    masked, plain = (read_keras_vocabulary(str(tmp_path / "tokenizer.json"), 3, mask)[0] for mask in (True, False))

    assert (masked.entries, masked.roles["pad_token"]) == (["<pad>", "a", "<unk>"], "<pad>")
    assert "pad_token" not in plain.roles
    assert encode(["a <pad> b"], make_tokenizer(plain))[0].tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("word_index", None),
        ("word_index", {}),
        ("word_index", {"a": -1}),
        ("word_index", {"a": 1, "b": 1}),
        ("word_index", "{"),
        ("num_words", "5"),
        ("oov_token", "b"),
        ("oov_token", ["a"]),
        ("split", ""),
        ("split", None),
        ("filters", 5),
    ],
)
def test_a_damaged_tokenizer_is_refused(tmp_path, field, value):
    fields = files.fit(["a"]) | {field: value}
    text = json.dumps({"class_name": "Tokenizer", "config": fields})
    (tmp_path / "tokenizer.json").write_text(text)

    with pytest.raises(ValueError, match=f"`{field}`|not valid JSON"):
        read_keras_vocabulary(str(tmp_path / "tokenizer.json"), 2, False)


def test_another_pickle_is_not_a_vocabulary(tmp_path):
    (tmp_path / "words.pickle").write_bytes(pickle.dumps(["a", "b"], 4))

    with pytest.raises(ValueError, match="holds a list, not a Tokenizer of Keras"):
        read_keras_vocabulary(str(tmp_path / "words.pickle"), 2, False)


def test_half_a_pickle_is_refused(tmp_path):
    (tmp_path / "words.pickle").write_bytes(pickle.dumps(["a" * 100], 4)[:50])

    with pytest.raises(ValueError, match=r"damaged|neither"):
        read_keras_vocabulary(str(tmp_path / "words.pickle"), 2, False)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [embedding(), cell("LSTM", recurrent_activation="hard_sigmoid"), dense()],
            "`recurrent_activation` 'hard_sig",
        ),
        ([embedding(), cell("GRU", recurrent_activation="hard_sigmoid"), dense()], "`recurrent_activation` 'hard_sig"),
        ([embedding(), cell("LSTM", activation="relu"), dense()], "`activation` 'relu'"),
        ([embedding(), cell("GRU", activation={"class_name": "f"}), dense()], "`activation` {'class_name': 'f'}"),
        ([embedding(), cell("SimpleRNN", activation="sigmoid"), dense()], "`activation` 'sigmoid'"),
        ([embedding(), cell("LSTM", go_backwards=True), dense()], "`go_backwards` True"),
        ([embedding(), cell("GRU", reset_after=False), dense()], "`reset_after` False"),
        ([embedding(), cell("LSTM", zero_output_for_mask=True), dense()], "`zero_output_for_mask` True"),
        ([embedding(), layer("Bidirectional", layer=cell("LSTM")[0]), dense()], r"\(Bidirectional\) reads in both"),
        ([embedding(), layer("BatchNormalization"), cell("LSTM"), dense()], r"\(BatchNormalization\) scales by"),
        ([embedding(), cell("LSTM"), layer("Lambda"), dense()], r"\(Lambda\) runs Python code"),
        (
            [embedding(), cell("LSTM"), layer("AttentionWeightedAverage"), dense()],
            r"averages over all steps \(textgenrnn\)",
        ),
        ([embedding(), cell("LSTM"), layer("Strange"), dense()], r"\(Strange\) computes what no layer"),
        ([embedding(), layer("TimeDistributed", layer=cell("LSTM")[0]), dense()], r"TimeDistributed\(LSTM\)"),
        ([embedding(), cell("LSTM"), dense(H, H), dense()], "one Dense layer, in this order"),
        ([embedding(), dense(D)], "one Dense layer, in this order"),
        ([cell("LSTM", V, batch_input_shape=[None, 9, V]), embedding(), dense()], "one Dense layer, in this order"),
        ([embedding(), cell("LSTM"), cell("GRU", H), dense()], "mixes GRU and LSTM"),
        ([embedding(), cell("SimpleRNN"), cell("SimpleRNN", H, activation="relu"), dense()], "tanh and of relu"),
        ([embedding(), cell("LSTM", return_sequences=False), cell("LSTM", H), dense()], "returns the last step only"),
        ([embedding(), cell("LSTM"), dense(units=V + 1)], f"reads {V} tokens and writes {V + 1} numbers"),
        ([embedding(), cell("LSTM"), dense(activation="sigmoid")], "activation of the output is sigmoid"),
        ([embedding(), cell("LSTM"), dense(), layer("Activation", activation="softmax")], "softmax and softmax"),
        ([embedding(), cell("LSTM"), dense(activation="linear"), layer("Softmax", axis=1)], "softmax over time"),
        ([cell("LSTM", 1, batch_input_shape=[None, 9, 1]), dense()], "is not one-hot"),
        ([cell("LSTM", V), dense()], "is not one-hot"),
        ([layer("InputLayer"), layer("InputLayer"), embedding(), cell("LSTM"), dense()], "has 2 inputs"),
        ([embedding(), cell("LSTM", units=0), dense()], r"`units` \(0\) must be"),
        ([embedding(rows=V), cell("LSTM"), dense(activation=None)], "activation of the output is None"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_by_name(tmp_path, layers, message):
    path = files.write(tmp_path / "model.keras", files.sequential(layers), layers)

    with pytest.raises(ValueError, match=message):
        convert_checkpoint("keras", path, tmp_path / "out", Options(vocabulary=write_letters(tmp_path)))

    assert not (tmp_path / "out").exists()


def several_outputs(config):
    config["config"]["output_layers"] = [["my lstm 2", 0, 0], ["my dense 3", 0, 0]]


def read_twice(config):
    nodes = config["config"]["layers"][2]["inbound_nodes"]
    nodes.append(nodes[0])


def read_the_state(config):
    dense_layer = config["config"]["layers"][3]
    dense_layer["inbound_nodes"][0]["args"][0]["config"]["keras_history"][2] = 1


def initial_state(config):
    node = config["config"]["layers"][2]["inbound_nodes"][0]
    node["kwargs"]["initial_state"] = [node["args"][0]]


def own_class(config):
    config["config"]["layers"][2]["module"] = "my_layers"


def subclassed(config):
    config["class_name"] = "MyModel"


def without_layers(config):
    config["config"]["layers"] = []


def training(config):
    """A dropout that is drawn at each call, after training too."""
    config["config"]["layers"][2]["inbound_nodes"][0]["kwargs"]["training"] = True


def own_class_of_a_like_name(config):
    config["config"]["layers"][3]["module"] = "keras_things"


def without_nodes(config):
    del config["config"]["layers"][3]["inbound_nodes"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (several_outputs, "has 2 outputs"),
        (read_twice, "used more than once"),
        (read_the_state, "or its state is"),
        (initial_state, r"reads my embedding 1, an argument \(initial_state\)"),
        (training, r"an argument \(training\)"),
        (own_class, "is a class of its own"),
        (own_class_of_a_like_name, "is a class of its own"),
        (subclassed, "is a MyModel"),
        (without_layers, "without layers"),
        (without_nodes, "not that of a Keras model"),
    ],
)
def test_a_functional_model_of_another_form_is_refused(tmp_path, change, message):
    layers = [embedding(), cell("LSTM"), dense()]
    config = files.functional(layers)
    change(config)
    path = files.write(tmp_path / "model.keras", config, layers)

    with pytest.raises(ValueError, match=message):
        keras.read(path, Options(vocabulary=write_letters(tmp_path)))


def external_link(group, name, data):
    group[name] = h5py.ExternalLink("other.h5", "/secret")


def soft_link(group, name, data):
    group[name] = h5py.SoftLink("/layers/dense/vars/0")


def external_storage(group, name, data):
    group.create_dataset(name, data.shape, "f4", external=[("outside.bin", 0, h5py.h5f.UNLIMITED)])


def virtual(group, name, data):
    layout = h5py.VirtualLayout(data.shape, "f4")
    layout[:] = h5py.VirtualSource("other.h5", "data", data.shape)
    group.create_virtual_dataset(name, layout)


def packed(group, name, data):
    group.create_dataset(name, data=numpy.zeros_like(data), compression="gzip")


def without_numbers(group, name, data):
    group.create_dataset(name, data.shape, "f4")


def text(group, name, data):
    group[name] = numpy.full(data.shape, b"abcd")


def quantised(group, name, data):
    group[name] = data.astype("i1")


def infinite(group, name, data):
    group[name] = data * numpy.inf


def another_shape(group, name, data):
    group[name] = data.T


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (external_link, "HDF5 ExternalLink"),
        (soft_link, "HDF5 SoftLink"),
        (external_storage, "external storage"),
        (virtual, "a virtual dataset"),
        (packed, "would unpack to"),
        (without_numbers, "would unpack to"),
        (text, "weights are numbers"),
        (quantised, "quantised weights"),
        (infinite, "NaN or infinite"),
        (another_shape, "of another model, or the file is damaged"),
    ],
)
@pytest.mark.parametrize("layout", ["weights.h5", "h5"])
def test_hdf5_that_leads_elsewhere_or_lies_is_refused(tmp_path, put, message, layout):
    layers = [embedding(), cell("LSTM"), dense()]
    path = files.write(tmp_path / f"model.{layout}", files.sequential(layers), layers)
    place = (
        "layers/embedding/vars/0" if layout == "weights.h5" else "model_weights/my embedding 0/my embedding 0/kernel:0"
    )
    with h5py.File(path, "a") as file:
        group, name = file[place.rpartition("/")[0]], place.rpartition("/")[2]
        data = group[name][()]
        del group[name]
        put(group, name, data)

    with pytest.raises(ValueError, match=message):
        convert_checkpoint("keras", path, tmp_path / "out", options_for(path, write_letters(tmp_path)))

    assert not (tmp_path / "out").exists()


def test_weights_without_a_config_are_refused(tmp_path):
    layers = [embedding(), cell("LSTM"), dense()]
    path = files.write(tmp_path / "model.weights.h5", files.sequential(layers), layers)

    with pytest.raises(ValueError, match="holds weights without the model: give `--config`"):
        keras.read(path, Options(vocabulary=write_letters(tmp_path)))


def test_a_missing_config_is_named(tmp_path):
    layers = [embedding(), cell("LSTM"), dense()]
    path = files.write(tmp_path / "model.weights.h5", files.sequential(layers), layers)

    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        keras.read(path, Options(config=str(tmp_path / "missing.json")))


def test_two_configs_are_refused(tmp_path):
    path, options = keras_checkpoint(tmp_path)
    options.config = write_letters(tmp_path)

    with pytest.raises(ValueError, match="`--config`"):
        keras.read(path, options)


def test_flags_for_other_formats_are_refused(tmp_path):
    path, options = keras_checkpoint(tmp_path)
    options.decoder = "dense"

    with pytest.raises(ValueError, match="`--decoder` has no meaning"):
        keras.read(path, options)


@pytest.mark.parametrize("layout", ["weights.h5", "h5"])
@pytest.mark.parametrize(
    "others",
    [
        [embedding(), cell("LSTM"), cell("LSTM", H), dense()],
        [embedding(), dense(D)],
        [embedding(), cell("GRU"), dense()],
        [embedding(), cell("LSTM", use_bias=False), dense()],
        [embedding(V + 1), cell("LSTM"), dense(units=V + 1)],
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, others, layout):
    layers = [embedding(), cell("LSTM"), dense()]
    path = files.write(tmp_path / f"model.{layout}", files.sequential(layers), files.named(others))

    with pytest.raises(ValueError, match="of another model"):
        keras.read(path, options_for(path, write_letters(tmp_path)))


@pytest.mark.parametrize("name", ["optimizer_weights", "optimizer"])
def test_a_file_of_an_optimizer_alone_is_refused(tmp_path, name):
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file[f"{name}/adam/iteration"] = 5

    with pytest.raises(ValueError, match=f"holds no weights of layers but {name}"):
        keras.read(tmp_path / "model.h5", Options())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.98])
def test_half_a_file_is_refused(tmp_path, layout, part):
    layers = [embedding(), cell("LSTM"), dense()]
    path = files.write(tmp_path / f"model.{layout}", files.sequential(layers), layers)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])

    with pytest.raises(ValueError, match="damaged"):
        keras.read(path, options_for(path, write_letters(tmp_path)))


@pytest.mark.parametrize("size", [2**64 - 16, 2**63, 10**6])
def test_a_heap_that_contradicts_itself_is_refused(tmp_path, size):
    """The library of HDF5 would follow the first of these sizes forever."""
    layers = [embedding(), cell("LSTM"), dense()]
    path = files.write(tmp_path / "model.h5", files.sequential(layers), layers)
    content = bytearray(path.read_bytes())
    place = content.find(b"GCOL") + 24
    content[place : place + 8] = size.to_bytes(8, "little")
    path.write_bytes(content)

    with pytest.raises(ValueError, match="a heap contradicts itself"):
        keras.read(path, Options(vocabulary=write_letters(tmp_path)))


@pytest.mark.parametrize("part", ["config.json", "model.weights.h5"])
def test_a_changed_byte_of_a_zip_is_noticed(tmp_path, part):
    path, options = keras_checkpoint(tmp_path)
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo(part).header_offset + 200
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)

    with pytest.raises(ValueError, match="damaged"):
        keras.read(path, options)


@pytest.mark.parametrize(
    ("records", "compression", "message"),
    [
        (
            {"config.json": "{}", "model.weights.npz": "x"},
            zipfile.ZIP_STORED,
            "may hold pickled objects: it is refused",
        ),
        ({"config.json": "{}"}, zipfile.ZIP_STORED, "without model.weights.h5"),
        ({"data.pkl": "x"}, zipfile.ZIP_STORED, "without config.json and model.weights.h5"),
        (
            {"config.json": "{}", "model.weights.h5": bytes(10**7)},
            zipfile.ZIP_DEFLATED,
            "would unpack to 10,000,002 bytes",
        ),
        ({"config.json": "{", "model.weights.h5": "x"}, zipfile.ZIP_STORED, "not valid JSON"),
        ({"config.json": "[" * 10**5, "model.weights.h5": "x"}, zipfile.ZIP_STORED, "not valid JSON"),
        ({"config.json": "5", "model.weights.h5": "x"}, zipfile.ZIP_STORED, "damaged, or not an HDF5 file"),
    ],
)
def test_another_zip_is_refused(tmp_path, records, compression, message):
    files.write_zip(tmp_path / "model.keras", records, compression)

    with pytest.raises(ValueError, match=message):
        keras.read(tmp_path / "model.keras", Options())


def test_a_saved_model_of_tensorflow_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "saved" / "variables").mkdir(parents=True)
    (tmp_path / "saved" / "saved_model.pb").touch()

    with pytest.raises(ValueError, match="TensorFlow SavedModel") as caught:
        convert_checkpoint("keras", tmp_path / "saved", tmp_path / "out")

    *_, load, save = str(caught.value).splitlines()
    assert load.strip() == f"model = tf.keras.models.load_model({str(tmp_path / 'saved')!r})"
    assert save.strip() == 'model.save("model.keras")'


def test_an_unpacked_keras_file_is_named_by_its_parts(tmp_path):
    path, options = keras_checkpoint(tmp_path)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "model")

    with pytest.raises(ValueError, match=r"is an unpacked \.keras file: give .*model\.weights\.h5 with `--config "):
        convert_checkpoint("keras", tmp_path / "model", tmp_path / "out", options)

    options.config = str(tmp_path / "model" / "config.json")
    assert keras.read(tmp_path / "model" / "model.weights.h5", options).cell_type == "lstm"


def test_h5py_is_asked_for(tmp_path, monkeypatch):
    path, options = keras_checkpoint(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)

    with pytest.raises(ValueError, match=r'pip install "hf-lstm\[convert\]"'):
        keras.read(path, options)


def test_long_lists_of_names_are_read_from_their_parts(tmp_path):
    layers = [embedding(), cell("LSTM"), dense()]
    path = files.write(tmp_path / "model.h5", files.sequential(layers), layers)
    with h5py.File(path, "a") as file:
        attributes = file["model_weights"].attrs
        names = list(attributes["layer_names"])
        del attributes["layer_names"]
        attributes["layer_names0"], attributes["layer_names1"] = names[:2], [name.encode() for name in names[2:]]

    assert largest_difference(read_model(path, write_letters(tmp_path)), layers) < 1e-5


@pytest.mark.parametrize(
    "names", [numpy.arange(3), [b"\xff"], h5py.Empty("S5")], ids=["numbers", "not UTF-8", "empty"]
)
def test_damaged_names_are_refused(tmp_path, names):
    layers = [embedding(), cell("LSTM"), dense()]
    path = files.write(tmp_path / "model.h5", files.sequential(layers), layers)
    with h5py.File(path, "a") as file:
        file["model_weights"].attrs["layer_names"] = names

    with pytest.raises(ValueError, match=r"must hold strings|UTF-8|damaged"):
        keras.read(path, Options(vocabulary=write_letters(tmp_path)))


def test_weights_of_an_older_save_weights_are_read_with_a_config(tmp_path):
    layers = [embedding(), cell("LSTM"), dense()]
    (tmp_path / "config.json").write_text(json.dumps(json.dumps(files.sequential(layers))))
    with h5py.File(tmp_path / "model.h5", "w") as file:
        files.write_legacy_weights(file, layers)

    source = keras.read(
        tmp_path / "model.h5", Options(vocabulary=write_letters(tmp_path), config=str(tmp_path / "config.json"))
    )

    assert largest_difference(build_model(source), layers) < 1e-5


def test_float64_is_kept(tmp_path):
    layers = [(config, [array.astype(">f8") for array in w]) for config, w in (embedding(), cell("LSTM"), dense())]
    path = files.write(tmp_path / "model.keras", files.sequential(layers), layers)

    source = keras.read(path, Options(vocabulary=write_letters(tmp_path)))

    assert source.embedding.dtype == torch.float64
    assert torch.equal(source.embedding, torch.tensor(layers[0][1][0].astype("f8")))
