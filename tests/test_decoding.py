"""`generate()` writes with the bare cells what it writes without them, wherever a model is nothing else."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_ids, make_model
from torch import nn
from transformers import LogitsProcessor

from hf_lstm import LSTMForCausalLM
from hf_lstm.model.decoding_lstm import COPY_AFTER, BareCells

IDS = make_ids(2, 6)
TOKENS = COPY_AFTER + 8


def generate(model, ids=IDS, **options):
    options = {"max_new_tokens": TOKENS, "eos_token_id": None, "do_sample": False} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


@pytest.fixture
def taken(monkeypatch):
    """How many rows the bare cells read, each time, and of which model."""
    rows, read = [], BareCells.read

    def watched(cells, tokens, cache):
        rows.append((cells.model, len(tokens)))
        return read(cells, tokens, cache)

    monkeypatch.setattr(BareCells, "read", watched)
    return rows


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_the_cells_say_what_the_model_says(rows, dtype, tolerance):
    model = make_model(dtype, hidden_size=24, embedding_size=16, num_hidden_layers=3)
    ids = make_ids(rows, TOKENS)
    cache = model(ids[:, :1]).past_key_values
    other, cells = copy.deepcopy(cache), model.bare_cells()

    for index in range(1, TOKENS):
        scores = cells.read(ids[:, index], cache)
        expected = model(ids[:, index : index + 1], past_key_values=other).logits[:, 0]
        torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)
    assert cache.get_seq_length() == other.get_seq_length() == TOKENS
    for layer, expected in zip(cache.layers, other.layers, strict=True):
        torch.testing.assert_close(layer.get_state(), expected.get_state(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "rows"),
    [({}, 2), ({"do_sample": True}, 2), ({"num_beams": 3}, 6), ({"num_return_sequences": 2, "do_sample": True}, 4)],
)
def test_all_tokens_but_the_first_are_written_with_them(taken, monkeypatch, options, rows):
    model = make_model()
    torch.manual_seed(0)
    found = generate(model, **options)
    assert taken == [(model, rows)] * (TOKENS - 1)

    monkeypatch.setattr(LSTMForCausalLM, "bare_cells", lambda self: None)
    torch.manual_seed(0)
    assert found.tolist() == generate(model, **options).tolist()
    assert len(taken) == TOKENS - 1


def test_the_copy_is_of_one_row_and_goes_when_the_text_ends(monkeypatch):
    model, copies, read = make_model(), [], BareCells.read

    def watched(cells, tokens, cache):
        scores = read(cells, tokens, cache)
        weight = cells.gates[0][0]
        if weight is not model.model.layers[0].input_gates.weight:
            assert torch.equal(weight, model.model.layers[0].input_gates.weight)
            assert not weight.requires_grad
            copies.append(weakref.ref(weight))
        return scores

    monkeypatch.setattr(BareCells, "read", watched)
    generate(model)
    assert not copies
    generate(model, IDS[:1])
    gc.collect()

    assert len(copies) == TOKENS - COPY_AFTER
    assert all(reference() is None for reference in copies)


def in_bfloat16(model):
    model.bfloat16()


def in_training(model):
    model.train()


def with_hook(model):
    model.model.layers[0].register_forward_hook(lambda module, inputs, outputs: (outputs[0] * -3, *outputs[1:]))


def with_another_forward(model):
    forward = model.model.forward
    model.model.forward = lambda *a, **k: forward(*a, **k)


def with_another_output_layer(model):
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())


def compiled_in_place(model):
    model.model.compile(backend="eager")


def with_fewer_layers(model):
    model.config.num_hidden_layers = 1


CHANGES = [in_bfloat16, in_training, with_hook, with_another_forward, with_another_output_layer, compiled_in_place]


@pytest.mark.parametrize("change", [*CHANGES, with_fewer_layers])
def test_a_model_that_is_anything_else_has_none(change):
    model = make_model()
    assert model.bare_cells() is not None

    change(model)

    assert model.bare_cells() is None


@pytest.mark.parametrize(
    "config", [{"block_type": "residual"}, {"adaptive_softmax_cutoffs": [9], "tie_word_embeddings": False}], ids=str
)
def test_other_blocks_and_output_layers_write_by_themselves(taken, config):
    model = make_model(**config)

    assert generate(model).shape == (2, 6 + TOKENS)
    assert not taken


def test_under_autocast_there_are_none():
    model = make_model(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.bare_cells() is None


@pytest.mark.parametrize(
    "options",
    [
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_what_asks_for_more_than_the_next_token_gets_it_from_the_model(taken, options):
    model, ids = make_model(), IDS[:1]
    expected = generate(model, ids)
    taken.clear()

    found = generate(model, ids, **options)

    assert not taken
    sequences = found if torch.is_tensor(found) else found.sequences
    assert sequences.tolist() == expected.tolist()
    if not torch.is_tensor(found):
        assert all(len(states) == 3 for states in found.hidden_states)


def test_a_config_that_asks_for_hidden_states_gets_them(taken):
    model = make_model()
    model.config.output_hidden_states = True

    generate(model)

    assert not taken


def test_an_assistant_has_its_own(taken):
    model, assistant = make_model(num_hidden_layers=3), make_model(hidden_size=8)
    expected = generate(model, IDS[:1])
    taken.clear()

    assert generate(model, IDS[:1], assistant_model=assistant).tolist() == expected.tolist()
    assert all(reader is assistant for reader, _ in taken)


def test_a_text_within_a_text(taken):
    """A processor that lets the same model, and another, write something else in between."""
    model, other = make_model(), make_model(hidden_size=8)
    expected, inner = generate(model), [generate(model, IDS[:1]), generate(other)]

    class Writer(LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert generate(model, IDS[:1]).tolist() == inner[0].tolist()
            assert generate(other).tolist() == inner[1].tolist()
            return scores

    assert generate(model, logits_processor=[Writer()]).tolist() == expected.tolist()


def test_an_interrupted_text_leaves_nothing_behind(taken):
    class Interruption(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 9:
                raise KeyboardInterrupt
            return scores

    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        generate(model, logits_processor=[Interruption()])
    cache, taken[:] = model(IDS).past_key_values, []

    inputs = model.prepare_inputs_for_generation(IDS, next_sequence_length=1, past_key_values=cache)

    assert "cells" not in inputs


def test_threads_share_a_model_and_no_cells(taken):
    model = make_model()
    prompts = [make_ids(1 + seed % 2, 5, seed=seed) for seed in range(16)]
    expected = [generate(model, ids).tolist() for ids in prompts]

    with ThreadPoolExecutor(16) as pool:
        texts = [text.tolist() for text in pool.map(lambda ids: generate(model, ids), prompts)]

    assert texts == expected
    assert len(taken) == 2 * 16 * (TOKENS - 1)


def test_generate_is_called_and_read_as_every_model_s():
    import inspect

    from transformers.generation import GenerationMixin

    assert inspect.signature(LSTMForCausalLM.generate) == inspect.signature(GenerationMixin.generate)
    assert LSTMForCausalLM.generate.__doc__ == GenerationMixin.generate.__doc__
