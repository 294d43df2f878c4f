"""What a config can say, and what it refuses to."""

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
    ],
    ids=str,
)
def test_numbers_that_contradict_each_other_are_refused(config, message):
    with pytest.raises(StrictDataclassError, match=message):
        LSTMConfig(**config)


def test_configs_come_back(tmp_path):
    config = LSTMConfig(vocab_size=77, hidden_size=23, embedding_size=8, forget_gate_bias=0.5, eos_token_id=[3, 4])
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
