"""The first layer projects each distinct token of a call once, wherever that gives what projecting every token gives."""

import copy
import math

import pytest
import torch
from conftest import make_ids, make_model, recompute_activations
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from transformers import DynamicCache

from hf_lstm import LSTMConfig, LSTMForCausalLM
from hf_lstm.model import cells_lstm, modeling_lstm

FEW_PRODUCTS = cells_lstm.FEW_PRODUCTS  # before a fixture changes it
IDS = make_ids(4, 20)
WORDS = len(IDS.unique())
MASK = torch.ones_like(IDS)
MASK[0, :6] = MASK[2, 13:] = MASK[3, 5:8] = 0


@pytest.fixture
def widths(monkeypatch):
    """The width of the input of each call of a kernel, where every number of tokens is few."""
    seen = []
    for cell in cells_lstm.CELLS.values():

        def fused(x, *arguments, run=cell.fused):
            seen.append(x.shape[1])
            return run(x, *arguments)

        monkeypatch.setattr(cell, "fused", fused)
    monkeypatch.setattr(cells_lstm, "FEW_PRODUCTS", math.inf)
    return seen


def results(model, few=math.inf, **batch):
    """The loss, the logits and the gradients of a model."""
    before, cells_lstm.FEW_PRODUCTS = cells_lstm.FEW_PRODUCTS, few
    batch = {"input_ids": IDS, "labels": IDS} | batch
    try:
        torch.manual_seed(5)
        model.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
    finally:
        cells_lstm.FEW_PRODUCTS = before
    logits = [] if outputs.logits is None else [outputs.logits]
    return [outputs.loss, *logits, *(parameter.grad for parameter in model.parameters())]


def assert_equal(found, expected, atol=1e-10):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=atol)


BATCHES = {
    "rows": {},
    "padding": {"attention_mask": MASK},
    "documents": {"position_ids": torch.arange(20)[None] % 7},
    "targets": {"shift_labels": IDS.roll(-1, 1)},
    "int32": {"input_ids": IDS.int()},
}
SHAPES = {
    "two layers": {},
    "untied": {"cell_type": "gru", "embedding_size": 10, "tie_word_embeddings": False},
    "words dropped": {"cell_type": "rnn_tanh", "embedding_dropout": 0.4, "weight_dropout": 0.3, "output_dropout": 0.2},
    "chunked loss": {"cell_type": "rnn_relu", "loss_chunk_size": 8, "output_bias": True},
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients_are_those_of_every_position(widths, shape, batch, monkeypatch):
    model = make_model(**SHAPES[shape]).train()
    size = model.config.embedding_size

    found, expected = results(model, **BATCHES[batch]), results(model, few=0, **BATCHES[batch])

    assert widths == [WORDS, 12, size, 12]
    assert_equal(found, expected)
    monkeypatch.setattr(modeling_lstm, "reads_embeddings", lambda *arguments: False)
    assert_equal(found, results(model, **BATCHES[batch]))


def test_states_and_logits_of_chunks_are_those_of_the_whole(widths):
    model, cache = make_model(), DynamicCache(config=make_model().config)
    with torch.no_grad():
        expected = model(IDS.repeat(1, 2))
        parts = [model(chunk, past_key_values=cache).logits for chunk in IDS.repeat(1, 2).split(17, dim=1)]

    assert [width == 12 for width in widths] == [False, True] * 3  # in the first layer, the number of distinct tokens
    torch.testing.assert_close(torch.cat(parts, dim=1), expected.logits, rtol=0, atol=1e-10)
    for layer, other in zip(cache.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.get_state(), other.get_state(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [15, 16])
@torch.no_grad()
def test_few_tokens_are_read_as_they_come(widths, length):
    make_model()(IDS[:, :length])

    assert widths == ([] if length < 16 else [len(IDS[:, :16].unique()), 12])


@pytest.mark.parametrize(("vocabulary", "width", "is_few"), [(30, 128, True), (80, 128, False), (80, 256, True)])
def test_the_number_of_products_decides(vocabulary, width, is_few):
    embeddings, x = torch.empty(vocabulary, width), torch.empty(1024, width)

    assert cells_lstm.are_few(embeddings, x) == is_few
    assert not cells_lstm.are_few(embeddings, x[:16])


def dropped_features(model):
    model.config.input_dropout = 0.5


def of_low_precision(model):
    model.bfloat16()


def with_hook(model):
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output * 2)


def with_hook_of_the_layer(model):
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2, *inputs[1:]))


def with_hook_between(model):
    model.model.in_proj.register_forward_hook(lambda module, inputs, output: output * 2)


def with_hook_of_the_gates(model):
    model.model.layers[0].input_gates.register_forward_hook(lambda module, inputs, output: output * 2)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def with_parametrization(model):
    parametrize.register_parametrization(model.model.embed_tokens, "weight", Doubled())


class Adapter(nn.Embedding):
    """An embedding that also changes the rows it looks up, like LoRA's adapters."""

    def forward(self, ids):
        return super().forward(ids) * 2


def with_adapter(model):
    model.model.embed_tokens.__class__ = Adapter


def with_frequencies(model):
    model.model.embed_tokens.scale_grad_by_freq = True


OTHERWISE = [
    dropped_features,
    of_low_precision,
    with_hook,
    with_hook_of_the_layer,
    with_hook_between,
    with_hook_of_the_gates,
    with_parametrization,
    with_adapter,
    with_frequencies,
]


@pytest.mark.parametrize("change", OTHERWISE)
def test_what_is_more_than_a_lookup_reads_every_position(widths, change):
    model = make_model().train()
    before = results(model, few=0)[1]
    change(model)
    widths.clear()

    found = results(model)

    assert WORDS not in widths
    assert_equal(found, results(model, few=0), atol=0)
    is_seen = not torch.equal(found[1], before)
    assert is_seen == (change is not with_frequencies)


@pytest.mark.parametrize("config", [{"block_type": "residual"}, {"cell_type": "mogrifier"}], ids=str)
def test_a_layer_that_changes_embeddings_first_reads_every_position(widths, config):
    model = make_model(**config).train()

    assert_equal(results(model), results(model, few=0), atol=0)
    assert WORDS not in widths


def test_embeddings_in_place_of_tokens_are_read_as_they_are(widths):
    model = make_model().train()
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()

    loss = model(inputs_embeds=embeds, labels=IDS).loss
    loss.backward()

    assert widths == [12, 12]
    assert embeds.grad.abs().sum() > 0
    torch.testing.assert_close(loss, results(model)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("wrong", [31, -1])
def test_a_token_outside_the_vocabulary_is_an_error_of_torch(widths, wrong):
    ids = IDS.clone()
    ids[1, 3] = wrong

    with pytest.raises(IndexError, match="out of range"):
        make_model()(ids)


def with_padding_idx(model):
    model.model.embed_tokens.padding_idx = 7  # its row gets no gradient from here


def with_max_norm(model):
    model.model.embed_tokens.max_norm = 1.0  # rows that are looked up are shortened in place


def with_other_vocabulary(model):
    model.resize_token_embeddings(40, mean_resizing=False)


def frozen(model):
    model.get_input_embeddings().weight.requires_grad_(False)


@pytest.mark.parametrize("change", [with_padding_idx, with_max_norm, with_other_vocabulary, frozen])
def test_an_embedding_of_another_kind_is_looked_up_once_a_token(widths, change):
    model = make_model(tie_word_embeddings=False).train()
    change(model)
    other = copy.deepcopy(model)

    found, expected = results(model), results(other, few=0)

    assert widths == [WORDS, 12, 12, 12]
    assert_equal(found, expected)
    if change is with_padding_idx:
        assert IDS.eq(7).any()
        assert not model.get_input_embeddings().weight.grad[7].any()
    if change is with_max_norm:
        assert torch.equal(*(one.get_input_embeddings().weight for one in (model, other)))
        assert model.get_input_embeddings().weight[IDS[0, 0]].norm() < 1.0001


def test_sparse_gradients_stay_sparse(widths):
    model = make_model(tie_word_embeddings=False).train()
    model.model.embed_tokens.sparse = True

    found, expected = results(model), results(model, few=0)

    assert found[2].is_sparse
    assert widths[0] == WORDS
    torch.testing.assert_close(found[2].to_dense(), expected[2].to_dense(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_give_the_same_gradients(widths, reentrant):
    model = make_model(embedding_dropout=0.3).train()
    expected = results(model)
    recompute_activations(model, reentrant)
    widths.clear()

    assert_equal(results(model), expected)
    model.disable_input_require_grads()  # a hook of transformers, which needs the output of the embedding
    assert_equal(results(model), expected)
    assert WORDS not in widths  # recomputation takes gradients of arguments by position only


def test_autocast_leaves_the_projection_in_float32(widths):
    model = make_model(torch.float32).train()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = results(model), results(model, few=0)

    assert widths == [WORDS, 12, 12, 12]
    assert found[1].dtype == torch.bfloat16
    assert_equal(found, expected, atol=0.05)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-3)


def test_second_derivatives_are_those_of_every_position(widths):
    gradients = []
    for few in (math.inf, 0):
        cells_lstm.FEW_PRODUCTS = few
        model = make_model(num_hidden_layers=1)
        parameters = list(model.parameters())
        first = torch.autograd.grad(model(IDS, labels=IDS).loss, parameters, create_graph=True)
        gradients.append(torch.autograd.grad(sum(one.square().sum() for one in first), parameters))

    assert widths == [WORDS, 12]
    assert_equal(*gradients)


def test_hidden_states_are_recorded_from_every_position(widths):
    """By hooks of transformers, which see the layer's input."""
    model = make_model()
    found = model(IDS, output_hidden_states=True).hidden_states

    assert widths == [12, 12]
    torch.testing.assert_close(found[0], model.get_input_embeddings()(IDS))


def test_no_rows_give_no_logits():
    ids = torch.zeros(0, 20, dtype=torch.long)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=31, hidden_size=128, num_hidden_layers=1))

    assert model(ids).logits.shape == (0, 20, 31)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


TRACERS = {
    "torch.jit": lambda module, ids: torch.jit.trace(module, ids, check_trace=False),
    "make_fx": lambda module, ids: make_fx(module)(ids),
}


@pytest.mark.filterwarnings("ignore")  # the tracer is deprecated, and warns of whatever it does not see
@pytest.mark.parametrize("tracer", TRACERS)
@torch.no_grad()
def test_a_trace_reads_other_tokens_than_those_it_was_made_with(widths, tracer):
    module = Logits(make_model(num_hidden_layers=1))
    other = IDS.clamp(max=10)

    traced = TRACERS[tracer](module, IDS)

    torch.testing.assert_close(traced(other), module(other), rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at one
def test_a_compiled_model_gives_the_same(widths):
    torch._dynamo.reset()
    model = make_model().train()
    expected = results(model)

    assert_equal(results(torch.compile(model, backend="aot_eager")), expected)


def test_a_wide_model_over_few_characters_does_so_unasked(widths, monkeypatch):
    monkeypatch.setattr(cells_lstm, "FEW_PRODUCTS", FEW_PRODUCTS)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=31, hidden_size=128, num_hidden_layers=1))

    model(IDS.repeat(4, 4), labels=IDS.repeat(4, 4)).loss.backward()

    assert widths == [WORDS]
