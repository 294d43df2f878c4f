"""The converter of Keras against the library itself, with its torch backend."""

import json
import os
import pickle

import numpy
import pytest
import torch
from test_convert_keras import TEXTS, awkward_lines

from hf_lstm.convert import convert_checkpoint
from hf_lstm.convert import keras as reader
from hf_lstm.convert.keras_layers import FILED_AS
from hf_lstm.convert.keras_tokenizer import read_keras_vocabulary
from hf_lstm.convert.torch_lstm import Options
from hf_lstm.convert.vocabulary import make_tokenizer
from hf_lstm.tokenizers import encode

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
V, D, H, T = 11, 4, 5, 9
CELLS = [("LSTM", {}), ("GRU", {}), ("SimpleRNN", {}), ("SimpleRNN", {"activation": "relu"})]


@pytest.fixture(scope="module")
def keras():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "KERAS_BACKEND", "torch")
        yield pytest.importorskip("keras")


def randomised(model):
    generator = numpy.random.default_rng(0)
    for weight in model.weights:
        if "seed" not in weight.path:
            weight.assign(generator.normal(scale=0.5, size=weight.shape).astype("float32"))
    return model


def convert(model, layout, folder, padded=False):
    """Save a model in a layout, and return what it becomes."""
    entries = ["<pad>" if padded else "a", *"bcdefghijk"]
    (folder / "letters.json").write_text(json.dumps(entries))
    options = Options(vocabulary=str(folder / "letters.json"))
    path = folder / f"model.{layout}"
    if layout == "weights.h5":
        model.save_weights(path)
        (folder / "config.json").write_text(model.to_json())
        options.config = str(folder / "config.json")
    else:
        model.save(path)
    return convert_checkpoint("keras", path, folder / "out", options).model


def logits(model, ids, mask=None):
    with torch.no_grad():
        return model(
            torch.tensor(ids), attention_mask=None if mask is None else torch.tensor(mask).long()
        ).logits.numpy()


def theirs(keras, model, values):
    return keras.ops.convert_to_numpy(model(values))


def ids(seed=0):
    return numpy.random.default_rng(seed).integers(1, V, (3, T))


@pytest.mark.parametrize("layout", ["keras", "h5", "weights.h5"])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("kind", "settings"), CELLS)
def test_two_widths(keras, tmp_path, kind, settings, use_bias, layout):
    cell = getattr(keras.layers, kind)
    model = keras.Sequential(
        [
            keras.Input((None,)),
            keras.layers.Embedding(V, D, name="any name"),
            cell(H, return_sequences=True, use_bias=use_bias, dropout=0.2, **settings),
            keras.layers.Dropout(0.3),
            cell(H + 2, return_sequences=True, use_bias=use_bias, name="second", **settings),
            keras.layers.Dense(V, use_bias=use_bias),
        ]
    )
    randomised(model)

    found = logits(convert(model, layout, tmp_path), ids())

    assert numpy.abs(found - theirs(keras, model, ids())).max() < 1e-5


@pytest.mark.parametrize("layout", ["keras", "h5", "weights.h5"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "SimpleRNN"])
@pytest.mark.parametrize("mask_zero", [True, False])
def test_a_functional_model_with_zeros(keras, tmp_path, mask_zero, kind, layout):
    cell = getattr(keras.layers, kind)
    given = keras.Input((None,))
    x = keras.layers.Embedding(V, D, mask_zero=mask_zero)(given)
    x = cell(H, return_sequences=True)(x)
    x = keras.layers.Dropout(0.1)(x)
    x = cell(H + 1, return_sequences=True)(x)
    model = randomised(keras.Model(given, keras.layers.TimeDistributed(keras.layers.Dense(V))(x)))
    padded = ids()
    padded[0, :4] = padded[1, :2] = padded[1, 6] = 0
    real = padded != 0 if mask_zero else numpy.ones_like(padded) == 1

    found = logits(convert(model, layout, tmp_path, padded=mask_zero), padded, real)

    assert numpy.abs(found - theirs(keras, model, padded))[real].max() < 1e-5


@pytest.mark.parametrize("layout", ["keras", "h5", "weights.h5"])
@pytest.mark.parametrize("is_one_hot", [True, False])
def test_the_tutorial_s_model_of_the_last_step(keras, tmp_path, is_one_hot, layout):
    first = [keras.Input((T, V))] if is_one_hot else [keras.Input((T,)), keras.layers.Embedding(V, D)]
    rest = [keras.layers.LSTM(H), keras.layers.Dense(V), keras.layers.Activation("softmax")]
    model = keras.Sequential(first + rest)
    model.compile("adam", "categorical_crossentropy")
    values = numpy.eye(V, dtype="float32")[ids()] if is_one_hot else ids()
    model.fit(values, numpy.eye(V)[ids()[:, 0]], verbose=0)
    randomised(model)

    found = logits(convert(model, layout, tmp_path), ids())[:, -1]

    wanted = numpy.log(theirs(keras, model, values))
    assert numpy.abs(torch.tensor(found).log_softmax(-1).numpy() - wanted).max() < 1e-5


@pytest.mark.parametrize("layout", ["keras", "h5"])
def test_bfloat16(keras, tmp_path, layout):
    layers = keras.layers
    cell = layers.LSTM(H, return_sequences=True, dtype="bfloat16", recurrent_initializer="glorot_uniform")
    given = keras.Input((None,), dtype="int32")
    model = keras.Sequential(
        [given, layers.Embedding(V, D, dtype="bfloat16"), cell, layers.Dense(V, dtype="bfloat16")]
    )
    (tmp_path / "letters.json").write_text(json.dumps(list("abcdefghijk")))
    model.save(tmp_path / f"model.{layout}")

    source = reader.read(tmp_path / f"model.{layout}", Options(vocabulary=str(tmp_path / "letters.json")))

    stored = [weight.value.detach().cpu().float() for weight in model.weights]
    found = [source.embedding, source.layers[0].W.t(), source.layers[0].U.t(), source.layers[0].input_bias]
    assert all(torch.equal(a, b) for a, b in zip(found, stored, strict=False))


def test_layers_are_filed_under_these_names(keras):
    from keras.src.utils.naming import to_snake_case

    assert {name: to_snake_case(name) for name in FILED_AS} == FILED_AS


@pytest.mark.parametrize("protocol", [None, 0, 2, 4, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lower": False, "filters": ""},
        {"num_words": 4},
        {"num_words": 4, "oov_token": "<OOV>"},
        {"split": ", ", "oov_token": "unk"},
        {"split": "e"},
        {"char_level": True},
        {"char_level": True, "oov_token": "UNK", "num_words": 9},
    ],
    ids=str,
)
def test_ids_are_those_of_the_tokenizer(keras, tmp_path, settings, protocol):
    """Of its JSON, or of a pickle of each protocol."""
    text = pytest.importorskip("keras.src.legacy.preprocessing.text")
    tokenizer = text.Tokenizer(**settings)
    tokenizer.fit_on_texts(TEXTS)
    path = tmp_path / ("tokenizer.json" if protocol is None else "tokenizer.pickle")
    path.write_bytes(tokenizer.to_json().encode() if protocol is None else pickle.dumps(tokenizer, protocol))
    lines = awkward_lines()

    vocabulary, _ = read_keras_vocabulary(str(path), len(tokenizer.word_index) + 1, mask_zero=True)

    assert [i.tolist() for i in encode(lines, make_tokenizer(vocabulary))] == tokenizer.texts_to_sequences(lines)
