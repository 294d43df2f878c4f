"""What a config can say, and what it refuses to."""

import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, DynamicCache

from hf_lstm import LSTMConfig, LSTMForCausalLM


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({"hidden_size": 6, "num_hidden_layers": 3}, [6, 6, 6, 6]),
        ({"hidden_size": 23, "embedding_size": 8, "num_hidden_layers": 3}, [8, 23, 23, 8]),
        ({"hidden_size": 5, "embedding_size": 8, "tie_word_embeddings": False}, [8, 5, 5]),
        ({"hidden_size": 5, "embedding_size": 8, "tie_word_embeddings": False, "num_hidden_layers": 1}, [8, 5]),
    ],
    ids=str,
)
def test_widths_from_embedding_to_output(config, sizes):
    model = LSTMForCausalLM(LSTMConfig(vocab_size=9, **config))

    layers = [(layer.input_gates.in_features, layer.hidden_gates.in_features) for layer in model.model.layers]
    assert layers == list(pairwise(sizes))
    assert model.model.embed_tokens.weight.shape == (9, sizes[0])
    assert model.lm_head.weight.shape == (9, sizes[-1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 0}, r"`hidden_size` \(0\) must be at least 1"),
        ({"vocab_size": -3}, r"`vocab_size` \(-3\) must be at least 1"),
        ({"num_hidden_layers": 0}, r"`num_hidden_layers` \(0\) must be at least 1"),
        ({"embedding_size": 0, "tie_word_embeddings": False}, r"`embedding_size` \(0\) must be at least 1"),
        (
            {"embedding_size": 8, "num_hidden_layers": 1},
            r"`embedding_size` \(8\) must equal `hidden_size` \(512\) .* add a layer, or set `tie_word_embeddings=False`",
        ),
        ({"hidden_size": "512"}, "hidden_size"),
        ({"forget_gate_bias": math.nan}, r"`forget_gate_bias` \(nan\) must be a number from -1000 to 1000"),
        ({"forget_gate_bias": -math.inf}, r"`forget_gate_bias` \(-inf\) must be a number from"),
        ({"initializer_range": math.inf}, r"`initializer_range` \(inf\) is a standard deviation: .* finite"),
        ({"initializer_range": math.nan}, r"`initializer_range` \(nan\) is a standard deviation: .* finite"),
        ({"rms_norm_eps": math.inf}, r"`rms_norm_eps` \(inf\) must be at least 0 and finite"),
        (
            {"rms_norm_eps": math.nan, "block_type": "residual"},
            r"`rms_norm_eps` \(nan\) must be at least 0 and finite",
        ),
        ({"rms_norm_eps": -1e-6}, r"`rms_norm_eps` \(-1e-06\) must be at least 0"),
        ({"cell_type": "LSTM"}, r"`cell_type` \('LSTM'\) must be one of lstm, gru, rnn_tanh, rnn_relu, mogrifier\."),
        (
            {"mogrifier_rounds": 3},
            r'`mogrifier_rounds` \(3\) needs `cell_type="mogrifier"`, and it is \'lstm\': leave one',
        ),
        (
            {"mogrifier_rank": 3, "cell_type": "gru"},
            r'`mogrifier_rank` \(3\) needs `cell_type="mogrifier"`, and it is',
        ),
        (
            {"mogrifier_rounds": -1, "cell_type": "mogrifier"},
            r"`mogrifier_rounds` \(-1\) must be at least 0 and at most",
        ),
        (
            {"mogrifier_rank": 0, "cell_type": "mogrifier"},
            r"`mogrifier_rank` \(0\) must be at least 1, or None for full",
        ),
        ({"forget_gate_bias": 1.0, "cell_type": "gru"}, r"`forget_gate_bias` \(1\.0\) .* `cell_type` \('gru'\) lacks"),
        ({"chrono_max_distance": 9, "cell_type": "rnn_relu"}, r"`chrono_max_distance` \(9\) .* `cell_type` .* lacks"),
        ({"chrono_max_distance": 2}, r"`chrono_max_distance` \(2\) must be at least 3 and at most"),
        (
            {"chrono_max_distance": 9, "forget_gate_bias": 0.5},
            r"`forget_gate_bias` \(0\.5\) and `chrono_max_distance` \(9\) exclude each other",
        ),
        ({"last_cell_size": 0, "tie_word_embeddings": False}, r"`last_cell_size` \(0\) must be at least 1"),
        (
            {"last_cell_size": 7},
            r'`last_cell_size` \(7\) needs `block_type="stacked"` and either `tie_word_embeddings=False` or',
        ),
        (
            {"last_cell_size": 7, "tie_word_embeddings": False, "block_type": "residual"},
            r'`last_cell_size` \(7\) needs `block_type="stacked"`',
        ),
        (
            {"output_projection_size": 7},
            r"`output_projection_size` \(7\) must equal `embedding_size` \(512\) with tied",
        ),
        (
            {"output_bias": True, "adaptive_softmax_cutoffs": [9], "tie_word_embeddings": False},
            r"`adaptive_softmax_cutoffs` \(\[9\]\) excludes tied embeddings, `loss_chunk_size` and `output_bias`: set",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["made", "updated", "loaded"])
def test_numbers_that_contradict_each_other_are_refused(way, config, message, saved_config):
    existing = LSTMConfig()
    before = existing.to_dict()
    with pytest.raises(StrictDataclassError, match=message):
        {
            "made": lambda: LSTMConfig(**config),
            "updated": lambda: existing.update(config),
            "loaded": lambda: AutoConfig.from_pretrained(saved_config, **config),
        }[way]()

    assert existing.to_dict() == before


@pytest.fixture(scope="module")
def saved_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    LSTMConfig().save_pretrained(folder)
    return folder


def test_a_single_field_is_validated_when_it_is_set():
    config = LSTMConfig(hidden_size=6)

    with pytest.raises(StrictDataclassError, match=r"`hidden_size` \(0\) must be at least 1"):
        config.hidden_size = 0
    with pytest.raises(StrictDataclassError, match=r"`num_hidden_layers` \(1000000000000\) must be at most 10,000"):
        config.num_hidden_layers = 10**12
    with pytest.raises(StrictDataclassError, match="must be at least 1"):
        config.update_from_string("num_hidden_layers=3,hidden_size=0")

    assert config.cell_sizes == [6, 6]


@pytest.mark.parametrize("way", ["set", "update", "update_from_string", "from_pretrained"])
def test_what_a_default_was_derived_from_is_followed(way, saved_config):
    config = AutoConfig.from_pretrained(saved_config)  # the file says `"embedding_size": 512`
    if way == "set":
        config.num_hidden_layers, config.hidden_size, config.block_type = 3, 64, "residual"
    elif way == "update":
        config.update({"hidden_size": 64, "block_type": "residual", "num_hidden_layers": 3})
    elif way == "update_from_string":
        config.update_from_string("hidden_size=64,num_hidden_layers=3,block_type=residual")
    else:
        config = AutoConfig.from_pretrained(saved_config, num_hidden_layers=3, hidden_size=64, block_type="residual")

    expected = LSTMConfig(hidden_size=64, num_hidden_layers=3, block_type="residual")
    assert (config.embedding_size, config.initializer_range) == (64, 0.02)
    assert config.to_diff_dict() == expected.to_diff_dict()


DERIVED_BY_CELL = {
    "lstm": (1.0, None),
    "gru": (None, None),
    "rnn_tanh": (None, None),
    "rnn_relu": (None, None),
    "mogrifier": (1.0, 5),
}


@pytest.mark.parametrize("way", ["made", "set", "update", "update_from_string", "from_pretrained", "saved"])
@pytest.mark.parametrize("cell_type", DERIVED_BY_CELL)
def test_defaults_are_those_of_the_cell(cell_type, way, saved_config, tmp_path):
    """A saved config of an LSTM, with a `forget_gate_bias` of 1, becomes one of another cell."""
    config = LSTMConfig(cell_type=cell_type) if way in ("made", "saved") else AutoConfig.from_pretrained(saved_config)
    if way == "set":
        config.cell_type = "mogrifier"
        config.cell_type = cell_type
    elif way == "update":
        config.update({"cell_type": cell_type})
    elif way == "update_from_string":
        config.update_from_string(f"cell_type={cell_type}")
    elif way == "from_pretrained":
        config = AutoConfig.from_pretrained(saved_config, cell_type=cell_type)
    elif way == "saved":
        config.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)

    assert (config.forget_gate_bias, config.mogrifier_rounds) == DERIVED_BY_CELL[cell_type]
    assert config.to_diff_dict() == LSTMConfig(cell_type=cell_type).to_diff_dict()


def test_given_values_of_one_cell_are_refused_for_another():
    config = LSTMConfig(forget_gate_bias=0.5)
    with pytest.raises(StrictDataclassError, match=r"`forget_gate_bias` \(0\.5\) .* `cell_type` \('gru'\) lacks"):
        config.cell_type = "gru"
    assert (config.cell_type, config.forget_gate_bias) == ("lstm", 0.5)
    config.update({"cell_type": "gru", "forget_gate_bias": None})
    assert (config.cell_type, config.forget_gate_bias) == ("gru", None)

    config = LSTMConfig(cell_type="mogrifier", mogrifier_rounds=2)
    with pytest.raises(StrictDataclassError, match=r"`mogrifier_rounds` \(2\) needs"):
        config.cell_type = "lstm"
    assert (config.cell_type, config.mogrifier_rounds) == ("mogrifier", 2)


def test_chrono_biases_take_the_place_of_the_derived_constant(tmp_path):
    config = LSTMConfig()
    config.chrono_max_distance = 50
    config.save_pretrained(tmp_path)

    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.forget_gate_bias, config.chrono_max_distance) == (None, 50)
    config.chrono_max_distance = None
    assert config.forget_gate_bias == 1.0


def test_a_value_that_is_given_is_no_default():
    config = LSTMConfig(embedding_size=8, initializer_range=0.1)

    config.update({"hidden_size": 64, "block_type": "residual"})
    assert (config.embedding_size, config.initializer_range) == (8, 0.1)
    config.update({"embedding_size": 64, "hidden_size": 32})  # 64 is what the default was, and is asked for here
    assert config.embedding_size == 64
    config.embedding_size = None
    assert config.embedding_size == 32


def test_fields_set_together_are_validated_after_the_last():
    config = LSTMConfig()

    config.update({"embedding_size": 8, "num_hidden_layers": 1, "tie_word_embeddings": False})

    assert config.cell_sizes == [512]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_of_a_config_are_validated_too(copied):
    original = LSTMConfig(hidden_size=6)

    config = copied(original)
    config.hidden_size = 4

    assert (config.embedding_size, original.embedding_size) == (4, 6)
    with pytest.raises(StrictDataclassError, match=r"`vocab_size` \(0\) must be at least 1"):
        config.vocab_size = 0


def test_configs_come_back(tmp_path):
    fields = {
        "vocab_size": 77,
        "hidden_size": 23,
        "embedding_size": 8,
        "forget_gate_bias": 0.5,
        "eos_token_id": [3, 4],
    }
    fields |= {"cell_type": "mogrifier", "mogrifier_rounds": 3, "mogrifier_rank": 2, "output_bias": True}
    config = LSTMConfig(**fields | {"last_cell_size": 6, "output_projection_size": 8})
    config.save_pretrained(tmp_path)

    loaded = AutoConfig.from_pretrained(tmp_path)

    assert type(loaded) is LSTMConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_ids_outside_the_vocabulary_and_of_other_shapes_are_refused():
    model = LSTMForCausalLM(LSTMConfig(vocab_size=9, hidden_size=4))

    for ids in ([[1, 9]], [[-1, 3]]):
        with pytest.raises(IndexError, match="index out of range"):
            model(torch.tensor(ids))
    with pytest.raises(ValueError, match=r"The input, of shape \(2,\), must be of shape \(rows, tokens\)"):
        model(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"The input, of shape \(1, 0\), must hold at least one token"):
        model(torch.empty(1, 0, dtype=torch.long))


def test_a_cache_has_a_layer_for_each_lstm_layer():
    cache = DynamicCache(config=LSTMConfig(num_hidden_layers=3))

    assert [type(layer).__name__ for layer in cache.layers] == ["LSTMCacheLayer"] * 3


HYBRID = {"block_type": "residual", "num_hidden_layers": 3, "layer_types": ["hf_lstm", "hf_lstm_window", "hf_lstm"]}


@pytest.mark.parametrize("way", ["made", "set", "update", "update_from_string", "from_pretrained"])
def test_layers_are_lstms_and_follow_their_number(way, saved_config):
    config = AutoConfig.from_pretrained(saved_config)
    if way == "made":
        config = LSTMConfig(num_hidden_layers=4)
    elif way == "set":
        config.num_hidden_layers = 4
    elif way == "update":
        config.update({"num_hidden_layers": 4})
    elif way == "update_from_string":
        config.update_from_string("num_hidden_layers=4")
    else:
        config = AutoConfig.from_pretrained(saved_config, num_hidden_layers=4)

    assert config.layer_types == ["hf_lstm"] * 4
    assert "layer_types" not in config.to_dict()


def test_a_list_of_layers_that_was_given_comes_back(tmp_path):
    LSTMConfig(**HYBRID).save_pretrained(tmp_path)

    config = AutoConfig.from_pretrained(tmp_path)

    assert config.layer_types == HYBRID["layer_types"]
    assert (config.attention_window, config.num_attention_heads) == (512, 1)
    assert [type(layer).__name__ for layer in DynamicCache(config=config).layers] == [
        "LSTMCacheLayer",
        "WindowCacheLayer",
        "LSTMCacheLayer",
    ]
    with pytest.raises(StrictDataclassError, match=r"`layer_types` \(3 entries\) must have one for each"):
        AutoConfig.from_pretrained(tmp_path, num_hidden_layers=4)
    config.layer_types = None
    assert (config.layer_types, config.attention_window) == (["hf_lstm"] * 3, None)
    assert "layer_types" not in config.to_dict()


def test_fewer_layers_are_the_first_ones_until_there_are_all_again():
    """As `assistant_early_exit` sets the number, and sets it back."""
    config = LSTMConfig(**HYBRID, attention_window=7)

    config.num_hidden_layers = 1
    assert (config.layer_types, config.attention_window) == (["hf_lstm"], 7)
    config.num_hidden_layers = 3

    assert config.to_dict() == LSTMConfig(**HYBRID, attention_window=7).to_dict()
