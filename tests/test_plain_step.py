"""The single-token step by the weights alone computes what the modules compute, wherever these do no more."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_ids, make_model
from torch import nn
from transformers import DynamicCache, LogitsProcessor

from hf_lstm.model import modeling_lstm
from hf_lstm.model.generation_lstm import PlainStep
from hf_lstm.model.modeling_lstm import LSTMLayer, LSTMModel, ResidualLSTMLayer

IDS = make_ids(2, 6)
TOKENS = PlainStep.COPY_AFTER + 8


def generate(model, ids=IDS, **options):
    options = {"max_new_tokens": TOKENS, "eos_token_id": None, "do_sample": False} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


@pytest.fixture
def taken(monkeypatch):
    """The steps that were taken, and of how many rows each."""
    steps, take = [], PlainStep.take

    def watched(step, input_ids, cache):
        steps.append((step, len(input_ids)))
        return take(step, input_ids, cache)

    monkeypatch.setattr(PlainStep, "take", watched)
    return steps


@pytest.fixture
def through_modules(monkeypatch):
    """Call it, and from then on every step is taken through the modules."""
    return lambda: monkeypatch.setattr(modeling_lstm, "take_plain_step", lambda *_, **__: None)


SIZES = [
    {"hidden_size": 24, "embedding_size": 16, "num_hidden_layers": 3},
    {"hidden_size": 128},  # V << D
    {"hidden_size": 24, "embedding_size": 16, "last_cell_size": 20, "output_projection_size": 16, "output_bias": True},
]


@pytest.mark.parametrize("sizes", SIZES, ids=["narrow", "wide", "projected"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_a_plain_step_equals_one_through_the_modules(rows, dtype, tolerance, sizes, cell, taken, through_modules):
    model, ids = make_model(dtype, **sizes, **cell), make_ids(rows, TOKENS)
    cache = model(ids[:, :1]).past_key_values
    other = copy.deepcopy(cache)
    logits = [model(ids[:, index : index + 1], past_key_values=cache).logits for index in range(1, TOKENS)]
    assert [count for _, count in taken] == [rows] * (TOKENS - 1)
    assert (taken[-1][0].copy is not None) == (rows == 1)

    through_modules()

    expected = [model(ids[:, index : index + 1], past_key_values=other).logits for index in range(1, TOKENS)]
    largest = max(part.abs().max().item() for part in expected)
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * largest)
    assert cache.get_seq_length() == other.get_seq_length() == TOKENS
    for layer, alike in zip(cache.layers, other.layers, strict=True):
        torch.testing.assert_close(layer.get_state(), alike.get_state(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "rows", "cell_type"),
    [
        ({}, 2, "gru"),
        ({"do_sample": True}, 2, "rnn_tanh"),
        ({"num_beams": 3}, 6, "mogrifier"),
        ({"num_beams": 2}, 4, "rnn_relu"),
        ({"num_return_sequences": 2, "do_sample": True}, 4, "lstm"),
    ],
)
def test_generate_takes_plain_steps_after_the_prompt(taken, through_modules, options, rows, cell_type):
    model = make_model(cell_type=cell_type)
    torch.manual_seed(0)
    found = generate(model, **options)
    assert [count for _, count in taken] == [rows] * (TOKENS - 1)

    through_modules()

    torch.manual_seed(0)
    assert found.tolist() == generate(model, **options).tolist()


def test_a_large_model_is_not_copied(monkeypatch, taken):
    model = make_model()
    monkeypatch.setattr(PlainStep, "COPY_UP_TO", sum(p.numel() for p in model.model.layers.parameters()) - 1)

    generate(model, IDS[:1])

    assert len(taken) == TOKENS - 1
    assert taken[-1][0].copy is None


@torch.no_grad()
def test_texts_share_a_copy_that_goes_with_the_last_of_them(taken):
    model, caches = make_model(), []
    for _ in range(50):
        caches.append(model(IDS[:1]).past_key_values)
        for index in range(PlainStep.COPY_AFTER):
            model(IDS[:1, index % 6][:, None], past_key_values=caches[-1])
    step = weakref.ref(taken[-1][0])
    assert {id(one) for one, _ in taken} == {id(step())}
    assert step().copy is not None

    del caches[1:]
    taken.clear()
    assert step() is not None
    caches[0].reset()

    gc.collect()
    assert step() is None


@pytest.mark.parametrize("made", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@torch.no_grad()
def test_copies_of_a_cache_or_a_model_hold_no_weights(made, taken):
    model = make_model()
    cache = model(IDS[:1]).past_key_values
    expected = model(IDS[:1, :1], past_key_values=copy.deepcopy(cache)).logits
    model(IDS[:1, :1], past_key_values=copy.copy(cache))

    other, twin = made(cache), made(model)

    assert other.layers[0].plain_step is None
    assert torch.equal(
        twin(IDS[:1, :1], past_key_values=DynamicCache(config=model.config)).logits.isfinite().all(),
        torch.tensor(True),
    )
    other = made(model(IDS[:1]).past_key_values)
    torch.testing.assert_close(twin(IDS[:1, :1], past_key_values=other).logits, expected)
    assert len({id(step.embeddings) for step, _ in taken}) == 2  # the twin reads its own


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
def test_a_model_of_another_kind_takes_no_plain_step(change, taken):
    model = make_model()
    assert PlainStep.is_possible(model.model, {LSTMModel, LSTMLayer})

    change(model)

    assert not PlainStep.is_possible(model.model, {LSTMModel, LSTMLayer})


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


def with_another_module(model):
    model.model.layers[1].hidden_gates = nn.Sequential(model.model.layers[1].hidden_gates)
    model.model.layers[1].hidden_gates.in_features = 12


def with_a_hook_on_a_round(model):
    model.model.layers[0].mogrifier[1].register_forward_hook(lambda module, inputs, output: -output)


def with_a_hook_on_a_matrix(model):
    model.model.layers[1].mogrifier[4][0].register_forward_hook(lambda module, inputs, output: -output)


def with_a_round_of_two_matrices(model):
    model.model.layers[0].mogrifier[2].append(nn.Linear(12, 12, bias=False, dtype=torch.float64).eval())


WHAT_MAY_CHANGE = [inside_in_training, with_a_hook, with_a_hook_on_the_embeddings, with_another_forward]
WHAT_MAY_CHANGE += [compiled_in_place, asked_for_hidden_states, with_another_module]
OF_ROUNDS = [with_a_hook_on_a_round, with_a_hook_on_a_matrix]


class Change(LogitsProcessor):
    """Changes a model after the third token."""

    def __init__(self, model, change):
        self.model, self.change = model, change

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == 9:
            self.change(self.model)
        return scores


@pytest.mark.parametrize("change", WHAT_MAY_CHANGE + OF_ROUNDS)
def test_a_change_in_the_middle_of_a_text_ends_plain_steps(taken, change):
    model = make_model(cell_type="mogrifier" if change in OF_ROUNDS else "lstm")

    generate(model, logits_processor=[Change(model, change)], use_cache=True)

    assert len(taken) == 3  # the seventh to the ninth token


def by_an_optimizer(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def by_loading(model):
    model.load_state_dict({name: weight * -0.5 for name, weight in model.state_dict().items()})


def by_other_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * -0.5


def by_an_operation_in_place(model):
    model.model.layers[1].hidden_gates.weight.mul_(-0.5)


def by_another_parameter(model):
    model.model.layers[0].input_gates.bias = nn.Parameter(-model.model.layers[0].input_gates.bias)


def by_more_tokens(model):
    model.resize_token_embeddings(40, mean_resizing=False)
    model.get_input_embeddings().weight[31:].fill_(-9)


CHANGED = [by_an_optimizer, by_loading, by_other_data, by_an_operation_in_place, by_another_parameter, by_more_tokens]
OF_CELLS = [(change, cell) for change in CHANGED for cell in ("lstm", "gru", "mogrifier")]


@pytest.mark.parametrize(("change", "cell_type"), [*OF_CELLS, (with_a_round_of_two_matrices, "mogrifier")])
@torch.no_grad()
def test_weights_changed_in_the_middle_of_a_text_are_used(taken, through_modules, change, cell_type):
    ids, logits = make_ids(1, 30), []
    for reference in (False, True):
        if reference:
            through_modules()
        model, parts = make_model(cell_type=cell_type), []
        cache = model(ids[:, :1]).past_key_values
        for index in range(1, 30):
            if index == 15:
                torch.manual_seed(1)
                change(model)
            parts.append(model(ids[:, index : index + 1], past_key_values=cache).logits)
        logits.append(parts)

    torch.testing.assert_close(*logits, rtol=0, atol=1e-12)
    assert len(taken) == 29
    assert taken[-1][0].copy is not None  # of the new weights


@torch.inference_mode()
def test_a_model_made_in_inference_mode_is_not_copied(taken):
    model = make_model()

    generate(model, IDS[:1])

    assert len(taken) == TOKENS - 1
    assert taken[-1][0].copy is None


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
def test_whatever_else_a_model_does_is_done(taken, through_modules, change):
    model = make_model()
    change(model)
    found = generate(model)
    assert bool(taken) == (change in OUTSIDE)

    through_modules()

    assert found.tolist() == generate(model).tolist()


@pytest.mark.parametrize(
    "change", [with_a_hook_on_itself, with_a_hook_on_the_output_layer, compiled_in_place, with_a_hook]
)
@torch.no_grad()
def test_next_logits_are_those_of_a_forward(change):
    model = make_model()
    change(model)
    cache = model(IDS).past_key_values
    expected = model(IDS[:, :1], past_key_values=copy.deepcopy(cache)).logits[:, -1]

    torch.testing.assert_close(model.next_logits(IDS[:, :1], cache), expected)


@torch.no_grad()
def test_a_call_that_asks_for_more_is_no_plain_step(taken):
    model = make_model()
    cache, token = model(IDS).past_key_values, IDS[:, :1]

    def step(**options):
        return model(token, past_key_values=copy.deepcopy(cache), **options)

    masked = step(attention_mask=torch.tensor([[1], [0]]))
    restarted = step(position_ids=torch.tensor([[0], [0]]))
    with torch.enable_grad():
        assert step().logits.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step()
    assert not taken
    plain = step()
    assert step(output_hidden_states=True).hidden_states is not None
    assert len(taken) == 1
    assert (masked.logits[1] - plain.logits[1]).abs().max() > 0.01
    assert (restarted.logits - plain.logits).abs().max() > 0.01


def of_another_row(part):
    return part[:1]


def of_another_width(part):
    return part[:, :6]


def elsewhere(part):
    return part.to("meta")


@pytest.mark.parametrize("change", [of_another_row, of_another_width, elsewhere, torch.Tensor.float])
@torch.no_grad()
def test_a_state_of_another_kind_does_not_fit(change, cell):
    model = make_model(**cell)
    cache = model(IDS).past_key_values
    step = PlainStep(model.model)
    assert step.fits(IDS[:, :1], cache)

    layer = cache.layers[1]
    layer.update(*layer.get_state()[:-1], change(layer.get_state()[-1]))

    assert not step.fits(IDS[:, :1], cache)


@torch.no_grad()
def test_an_embedding_of_nan_spoils_its_own_token_alone():
    model = make_model(hidden_size=128, tie_word_embeddings=False)  # V << D
    model.model.embed_tokens.weight[0] = torch.nan

    written = generate(model, IDS[:1], output_logits=True, return_dict_in_generate=True, suppress_tokens=[0])

    assert all(logits.isfinite().all() for logits in written.logits)


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
def test_options_that_need_the_modules_get_them(taken, options):
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


def test_threads_share_a_model(taken):
    model = make_model()
    prompts = [make_ids(1 + seed % 2, 5, seed=seed) for seed in range(16)]
    expected = [generate(model, ids).tolist() for ids in prompts]

    with ThreadPoolExecutor(16) as pool:
        texts = [text.tolist() for text in pool.map(lambda ids: generate(model, ids), prompts)]

    assert texts == expected
    assert len(taken) == 2 * 16 * (TOKENS - 1)
