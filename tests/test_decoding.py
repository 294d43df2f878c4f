"""`generate()` writes with the bare cells what it writes without them, wherever a model is nothing else."""

import copy
import gc
import inspect
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_ids, make_model
from torch import nn
from transformers import LogitsProcessor
from transformers.generation import GenerationMixin

from hf_lstm import LSTMForCausalLM
from hf_lstm.model import decoding_lstm
from hf_lstm.model.decoding_lstm import COPY_AFTER, BareCells, writing_with
from hf_lstm.model.modeling_lstm import ResidualLSTMLayer

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


SIZES = [
    {"hidden_size": 24, "embedding_size": 16, "num_hidden_layers": 3},
    {"hidden_size": 128},
]  # the second has V << D


@pytest.mark.parametrize("sizes", SIZES, ids=["narrow", "wide"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_the_cells_say_what_the_model_says(rows, dtype, tolerance, sizes):
    model = make_model(dtype, **sizes)
    ids = make_ids(rows, TOKENS)
    cache = model(ids[:, :1]).past_key_values
    other, cells = copy.deepcopy(cache), model.bare_cells()

    for index in range(1, TOKENS):
        hidden = cells.read(ids[:, index], cache)
        expected = model.model(ids[:, index : index + 1], past_key_values=other).last_hidden_state[:, 0]
        torch.testing.assert_close(hidden, expected, rtol=0, atol=tolerance)
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
    assert taken == [(model.model, rows)] * (TOKENS - 1)

    monkeypatch.setattr(LSTMForCausalLM, "bare_cells", lambda self: None)
    torch.manual_seed(0)
    assert found.tolist() == generate(model, **options).tolist()
    assert len(taken) == TOKENS - 1


def test_a_large_model_is_not_copied(monkeypatch):
    model = make_model()
    monkeypatch.setattr(decoding_lstm, "COPY_UP_TO", sum(p.numel() for p in model.model.layers.parameters()) - 1)
    monkeypatch.setattr(BareCells, "_copy", None)

    assert generate(model, IDS[:1]).shape == (1, 6 + TOKENS)


def test_the_copy_is_of_one_row_and_goes_when_the_text_ends(monkeypatch):
    model, copies, read = make_model(), [], BareCells.read

    def watched(cells, tokens, cache):
        scores = read(cells, tokens, cache)
        weight = cells.weights[0][1]
        if weight is not model.model.layers[0].hidden_gates.weight:
            assert torch.equal(weight, model.model.layers[0].hidden_gates.weight)
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


def with_an_adapter(model):
    class Adapter(nn.Linear):
        pass

    model.model.layers[0].hidden_gates.__class__ = Adapter


def with_a_largest_norm(model):
    model.model.embed_tokens.max_norm = 1.0


def with_something_in_between(model):
    model.model.norm = nn.Linear(12, 12).double()


def with_gates_of_another_kind(model):
    """Which have neither a weight nor a bias."""

    class Gates(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear, self.in_features, self.out_features = linear, linear.in_features, linear.out_features

        def forward(self, x):
            return self.linear(x)

    for layer in model.model.layers:
        layer.input_gates, layer.hidden_gates = Gates(layer.input_gates), Gates(layer.hidden_gates)


def without_a_bias(model):
    model.model.layers[0].input_gates = nn.Linear(12, 48, bias=False).double()


def residual(model):
    model.model.layers[0].__class__ = ResidualLSTMLayer


ANYTHING_ELSE = [
    in_bfloat16,
    with_an_adapter,
    with_a_largest_norm,
    with_something_in_between,
    without_a_bias,
    with_gates_of_another_kind,
    residual,
]


@pytest.mark.parametrize("change", ANYTHING_ELSE)
def test_a_model_that_is_anything_else_has_no_bare_cells(change):
    model = make_model()
    assert model.bare_cells() is not None

    change(model)

    assert model.bare_cells() is None


def in_training(model):
    model.training = True  # for `output_dropout`


def inside_in_training(model):
    model.model.train()


def with_a_hook(model):
    model.model.layers[0].register_forward_hook(lambda module, inputs, outputs: (outputs[0] * -3, *outputs[1:]))


def with_a_hook_on_the_embeddings(model):
    model.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: (30 - inputs[0],))


def with_another_forward(model):
    forward = model.model.forward
    model.model.forward = lambda *a, **k: forward(*a, **k)


def compiled_in_place(model):
    model.model.compile(backend="eager")


def with_fewer_layers(model):
    model.config.num_hidden_layers = 1


def asked_for_hidden_states(model):
    model.config.output_hidden_states = True


WHAT_MAY_CHANGE = [in_training, inside_in_training, with_a_hook, with_a_hook_on_the_embeddings, with_another_forward]
WHAT_MAY_CHANGE += [compiled_in_place, with_fewer_layers, asked_for_hidden_states]


@pytest.mark.parametrize("change", WHAT_MAY_CHANGE)
def test_what_changes_in_the_middle_of_a_text_is_seen(taken, change):
    model = make_model()

    class Change(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == 9:
                change(model)
            return scores

    generate(model, logits_processor=[Change()], use_cache=True)

    assert len(taken) == 3  # the seventh to the ninth token


def with_another_output_layer(model):
    model.lm_head = nn.Linear(12, 31).double()


def with_a_hook_on_the_output_layer(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: -output)


def with_a_hook_on_itself(model):
    def hook(module, inputs, output):
        output.logits = -output.logits

    model.register_forward_hook(hook)


OUTSIDE = [with_another_output_layer, with_a_hook_on_the_output_layer, with_a_hook_on_itself]


@pytest.mark.parametrize(
    "change", [*OUTSIDE, with_a_hook, with_a_hook_on_the_embeddings, in_bfloat16, with_gates_of_another_kind]
)
def test_whatever_else_a_model_does_is_done(taken, monkeypatch, change):
    model = make_model()
    change(model)
    found = generate(model)
    assert bool(taken) == (change in OUTSIDE)

    monkeypatch.setattr(LSTMForCausalLM, "bare_cells", lambda self: None)
    assert found.tolist() == generate(model).tolist()


@pytest.mark.parametrize(
    "config", [{"block_type": "residual"}, {"block_type": "residual", "intermediate_size": 8}], ids=str
)
def test_other_blocks_write_by_themselves(taken, config):
    model = make_model(**config)

    assert generate(model).shape == (2, 6 + TOKENS)
    assert not taken


def test_an_adaptive_softmax_is_written_with_them(taken, monkeypatch):
    model = make_model(adaptive_softmax_cutoffs=[9], tie_word_embeddings=False)
    found = generate(model)
    assert len(taken) == TOKENS - 1

    monkeypatch.setattr(LSTMForCausalLM, "bare_cells", lambda self: None)
    assert found.tolist() == generate(model).tolist()


@torch.no_grad()
def test_only_a_plain_step_is_read_with_them(taken):
    """Whoever asks the model itself, inside a text, for more than the next scores gets it."""
    model = make_model()
    cache, token = model(IDS).past_key_values, IDS[:, :1]

    def step(**options):
        return model(token, past_key_values=copy.deepcopy(cache), **options)

    with writing_with(model.bare_cells()):
        assert step(labels=token).loss is not None
        masked = step(attention_mask=torch.tensor([[1], [0]]))
        restarted = step(position_ids=torch.tensor([[0], [0]]))
        with torch.enable_grad():
            assert step().logits.requires_grad
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step()
        assert not taken
        plain = step()
        assert taken == [(model.model, 2)]
        assert step(output_hidden_states=True).hidden_states is not None
    assert (masked.logits[1] - plain.logits[1]).abs().max() > 0.01
    assert (restarted.logits - plain.logits).abs().max() > 0.01


@torch.no_grad()
def test_a_state_elsewhere_is_left_to_the_model():
    model = make_model()
    cache, cells = model(IDS).past_key_values, model.bare_cells()
    assert cells.can_read(IDS[:, :1], cache)

    cache.layers[1].values = cache.layers[1].values.to("meta")

    assert not cells.can_read(IDS[:, :1], cache)


@torch.no_grad()
def test_an_embedding_that_is_no_number_spoils_its_own_token_only():
    model = make_model(hidden_size=128, tie_word_embeddings=False)  # V << D
    model.model.embed_tokens.weight[0] = torch.nan

    written = generate(model, IDS[:1], output_logits=True, return_dict_in_generate=True, suppress_tokens=[0])

    assert all(logits.isfinite().all() for logits in written.logits)


@torch.no_grad()
def test_a_state_of_another_type_goes_on(taken):
    model = make_model(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model(IDS).past_key_values

    with writing_with(model.bare_cells()):
        model(IDS[:, :1], past_key_values=cache)

    assert not taken


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


def test_drafts_are_taken_back(taken):
    model, assistant = make_model(num_hidden_layers=3), make_model(hidden_size=8)
    expected = generate(model, IDS[:1])
    taken.clear()

    assert generate(model, IDS[:1], assistant_model=assistant).tolist() == expected.tolist()
    assert not taken  # both are asked for states to roll back to


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
    taken.clear()
    with torch.no_grad():
        model(IDS[:, :1], past_key_values=model(IDS).past_key_values)

    assert not taken


def test_threads_share_a_model_and_no_cells(taken):
    model = make_model()
    prompts = [make_ids(1 + seed % 2, 5, seed=seed) for seed in range(16)]
    expected = [generate(model, ids).tolist() for ids in prompts]

    with ThreadPoolExecutor(16) as pool:
        texts = [text.tolist() for text in pool.map(lambda ids: generate(model, ids), prompts)]

    assert texts == expected
    assert len(taken) == 2 * 16 * (TOKENS - 1)


def test_generate_is_called_and_read_as_every_model_s():
    ours, every = LSTMForCausalLM.generate, GenerationMixin.generate

    assert inspect.signature(ours) == inspect.signature(every)
    assert ours.__doc__ == every.__doc__
    assert inspect.unwrap(ours) is inspect.unwrap(every)


def test_gradients_of_what_is_written_are_to_be_had(taken):
    """By what others know as a trick: `generate()` without its `no_grad`."""
    model = make_model()

    written = model.generate.__wrapped__(
        model,
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=3,
        output_logits=True,
        return_dict_in_generate=True,
    )

    assert all(logits.requires_grad for logits in written.logits)
    assert not taken
