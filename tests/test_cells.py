"""A cell is that of torch with the same weights, by whichever kernel; and only a model of the same cell takes its state."""

import copy
import functools

import pytest
import torch
from conftest import make_ids, make_model
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import DynamicCache

from hf_lstm import LSTMConfig, LSTMForCausalLM, LSTMModel, byte_tokenizer, load_state, save_state
from hf_lstm.convert.torch_export import difference as torch_difference
from hf_lstm.convert.torch_export import export_step
from hf_lstm.model.cells_lstm import CELLS, Cell, explicit, fused, masked
from hf_lstm.model.recurrence_lstm import Rows

IDS = make_ids(3, 9)
OF_TORCH = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": functools.partial(nn.RNN, nonlinearity="tanh"),
    "rnn_relu": functools.partial(nn.RNN, nonlinearity="relu"),
}
PRECISION = {torch.float64: 1e-12, torch.float32: 1e-6}  # of the largest element
UNTIED = {"embedding_size": 10, "tie_word_embeddings": False, "num_hidden_layers": 3}
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def weights_of(layer):
    """W, U, b and the bias of U, or `None`."""
    gates = (layer.input_gates.weight, layer.hidden_gates.weight, layer.input_gates.bias, layer.hidden_gates.bias)
    return dict(zip(NAMES, gates, strict=True))


@torch.no_grad()
def torch_module(model):
    """torch's module with the weights of the layers."""
    layers, config = model.model.layers, model.config
    module = OF_TORCH[config.cell_type](
        config.embedding_size, config.hidden_size, num_layers=len(layers), batch_first=True, dtype=model.dtype
    )
    for index, layer in enumerate(layers):
        for name, weight in weights_of(layer).items():
            getattr(module, f"{name}_l{index}").copy_(torch.zeros(()) if weight is None else weight)
    return module


def assert_close(actual, expected, precision):
    """Within `precision` of the largest element."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=precision * expected.abs().max().item())


@pytest.mark.parametrize("lengths", [(9, 9, 9), (4, 9, 1)], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("cell_type", OF_TORCH)
def test_a_cell_is_that_of_torch(cell_type, dtype, lengths, kernel):
    """Outputs, last states, and the gradients of both with respect to the embeddings and all weights."""
    model = make_model(dtype, cell_type=cell_type, **UNTIED)
    with torch.no_grad():  # back to the size of new weights: larger ones let a tanh network double rounding errors
        for parameter in model.model.layers.parameters():
            parameter.mul_(0.5)
    module, embeddings = torch_module(model), model.model.embed_tokens(IDS).detach()
    inputs, other_inputs = embeddings.clone().requires_grad_(True), embeddings.clone().requires_grad_(True)
    lengths = torch.tensor(lengths)
    mask = torch.arange(9) < lengths[:, None]

    output = model.model(inputs_embeds=inputs, attention_mask=mask.long())
    packed, state = module(pack_padded_sequence(other_inputs, lengths, batch_first=True, enforce_sorted=False))

    outputs, expected = output.last_hidden_state * mask[:, :, None], pad_packed_sequence(packed, batch_first=True)[0]
    layers = [layer.get_state() for layer in output.past_key_values.layers]
    states = [torch.stack(parts) for parts in zip(*layers, strict=True)]
    wanted = list(state) if cell_type == "lstm" else [state]
    objectives = [
        values.square().sum() + sum(part.sin().sum() for part in parts)
        for values, parts in ((outputs, states), (expected, wanted))
    ]
    for objective in objectives:
        objective.backward()
    for one, other in zip([outputs, *states, inputs.grad], [expected, *wanted, other_inputs.grad], strict=True):
        assert_close(one, other, PRECISION[dtype])
    for index, layer in enumerate(model.model.layers):
        for name, weight in weights_of(layer).items():
            if weight is not None:
                assert_close(weight.grad, getattr(module, f"{name}_l{index}").grad, PRECISION[dtype])


def mogrifier_outputs(layer, x):
    """Run a layer's Mogrifier, row by row and token by token, by the paper's equations and torch's LSTM cell."""
    W, U, b, _ = weights_of(layer).values()
    matrices, outputs = [], []
    for part in layer.mogrifier:
        matrices.append(part[0].weight if len(part) == 1 else part[1].weight @ part[0].weight)
    for row in x:
        h = c = row.new_zeros(U.shape[1])
        for token in row:
            for k, matrix in enumerate(matrices, 1):
                if k % 2 == 1:
                    token = 2 * torch.sigmoid(matrix @ h) * token
                else:
                    h = 2 * torch.sigmoid(matrix @ token) * h
            h, c = (part[0] for part in torch.lstm_cell(token[None], (h[None], c[None]), W, U, b))
            outputs.append(h)
    return torch.stack(outputs).view(*x.shape[:2], -1)


@pytest.mark.parametrize(
    "frozen", ["", "embed", "input_gates", "hidden_gates", "mogrifier.0", "mogrifier.1", "layers"]
)
@pytest.mark.parametrize(("rounds", "rank"), [(5, None), (2, 3), (0, None)])
def test_a_mogrifiers_own_gradients_are_those_of_its_equations(rounds, rank, frozen, monkeypatch):
    """Of first and second order, in padded rows that continue from a state, whatever needs a gradient."""
    options = {"cell_type": "mogrifier", "mogrifier_rounds": rounds, "mogrifier_rank": rank}
    model = make_model(**options, embedding_size=10, tie_word_embeddings=False)
    parameters = [
        parameter for name, parameter in model.named_parameters() if not (frozen and frozen in name) or "head" in name
    ]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is other for other in parameters))
    mask = torch.arange(9) < torch.tensor([4, 9, 1])[:, None]

    results = []
    for cell in (CELLS["mogrifier"], None):
        if cell is None:
            monkeypatch.setattr(type(CELLS["mogrifier"]), "fused", Cell.fused)
        cache = model(IDS[:, :3], use_cache=True).past_key_values
        loss = model(IDS, attention_mask=mask.long(), past_key_values=cache).logits.square().mean()
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), parameters, retain_graph=True)
        plain = torch.autograd.grad(loss, parameters)
        results.append([*first, *second, *plain])

    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-10)


@pytest.mark.parametrize(("rounds", "rank"), [(5, None), (4, 3), (1, 2), (0, None)])
def test_a_mogrifier_is_that_of_its_paper(rounds, rank, kernel):
    options = {"cell_type": "mogrifier", "mogrifier_rounds": rounds, "mogrifier_rank": rank}
    model = make_model(**options, embedding_size=10, tie_word_embeddings=False)
    parameters, expected = list(model.model.parameters()), model.model.embed_tokens(IDS)

    outputs = model.model(IDS).last_hidden_state

    assert [len(layer.mogrifier) for layer in model.model.layers] == [rounds] * 2
    for layer in model.model.layers:
        expected = mogrifier_outputs(layer, expected)
    assert_close(outputs, expected, 1e-12)
    gradients = (torch.autograd.grad(values.square().sum(), parameters) for values in (outputs, expected))
    for gradient, other in zip(*gradients, strict=True):
        assert_close(gradient, other, 1e-12)


@pytest.mark.parametrize("cell_type", CELLS)
def test_all_kernels_of_a_cell_agree(cell_type):
    """From a state other than zero; the single step, which takes no gradients, in its results alone."""
    layer = make_model(cell_type=cell_type, **UNTIED).model.layers[0]
    cell, gates, generator = layer.cell, layer.gates(), torch.Generator().manual_seed(0)
    x, *state = (
        torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        for shape in [(9, 10)] + [(12,)] * len(cell.states)
    )
    state, reading = tuple(part / 2 for part in state), Rows(3, 9)
    steps, last = explicit(cell, reading.pack(x), state, reading.batch_sizes, gates)
    outputs = reading.unpack(torch.cat([parts[0] for parts in steps]), None)
    found = {"explicit": (outputs, *last)}
    outputs, last = fused(cell, reading.pack(x), state, reading.batch_sizes, gates)
    found["fused"] = (reading.unpack(outputs, None), *last)
    everywhere = torch.ones(3, 9, dtype=torch.bool)
    steps, last = masked(cell, x, state, everywhere, ~everywhere, gates)
    found["masked"] = (torch.stack([parts[0] for parts in steps], dim=1), *last)
    outputs = []
    for token in x.unbind(1):
        state = cell.single(token, state, gates.weights())
        outputs.append(state[0])
    found["single"] = (torch.stack(outputs, dim=1), *state)

    weights = list(layer.parameters())
    expected, gradients = found["explicit"], None
    for name in ("explicit", "fused", "masked", "single"):
        for one, other in zip(found[name], expected, strict=True):
            assert_close(one, other, 1e-12)
        of_kernel = torch.autograd.grad(sum(part.square().sum() for part in found[name]), weights)
        gradients = gradients or of_kernel
        for one, other in zip(of_kernel, gradients, strict=True):
            assert_close(one, other, 1e-12)


@pytest.mark.parametrize("cell_type", ["lstm", "mogrifier"])
def test_chrono_biases_spread_over_the_distances(cell_type):
    """Tallec & Ollivier 2018: log u with u ~ U(1, T - 1) at the forget gate, and -log u at the input gate."""
    torch.manual_seed(0)
    config = LSTMConfig(vocab_size=31, hidden_size=500, cell_type=cell_type, chrono_max_distance=100)

    for layer in LSTMForCausalLM(config).model.layers:
        i, f, g, o = layer.input_gates.bias.chunk(4)
        distances = f.exp()
        assert 1 <= distances.min() < 2
        assert 98 < distances.max() <= 99
        assert distances.mean().item() == pytest.approx(50, abs=4)
        assert torch.equal(i, -f)
        assert not torch.cat([g, o]).any()


@pytest.mark.parametrize("cell_type", CELLS)
def test_new_weights_by_cell(cell_type):
    """Orthonormal columns of U, and no bias but that of a forget gate."""
    for layer in LSTMForCausalLM(LSTMConfig(vocab_size=31, hidden_size=12, cell_type=cell_type)).model.layers:
        biases = layer.input_gates.bias.view(layer.cell.num_gates, 12).mean(dim=1).tolist()
        assert biases == [float(gate == layer.cell.forget_gate) for gate in range(layer.cell.num_gates)]
        assert layer.hidden_gates.bias is None or not layer.hidden_gates.bias.any()
        torch.testing.assert_close(layer.hidden_gates.weight.T @ layer.hidden_gates.weight, torch.eye(12))


@pytest.mark.parametrize("cell_type", CELLS)
def test_a_state_of_another_type_goes_on_in_that_of_the_weights(cell_type, kernel):
    """A model may be cast between two chunks of a text: of an LSTM in bfloat16, c is in float32 already and h is not."""
    model = make_model(torch.bfloat16, cell_type=cell_type)
    with torch.no_grad():
        cache = model(IDS).past_key_values
    wide = copy.deepcopy(cache)
    for layer in wide.layers:
        layer.update(*(part.float() for part in layer.get_state()))
    model = model.float()

    logits = model(IDS, past_key_values=cache).logits

    assert_close(logits, model(IDS, past_key_values=wide).logits, 1e-6)
    logits.sum().backward()


@pytest.mark.parametrize("cell_type", CELLS)
def test_a_state_is_as_large_as_the_cell_needs(cell_type, tmp_path):
    model, parts = make_model(cell_type=cell_type), 2 if cell_type in ("lstm", "mogrifier") else 1
    cache = model(IDS).past_key_values

    assert sum(layer.nbytes for layer in cache.layers) == 2 * 3 * 12 * 8 * parts  # layers, rows, width, bytes
    save_state(model, cache, tmp_path / "state")
    assert (tmp_path / "state").stat().st_size < 2 * 3 * 12 * 8 * parts + 1000


OTHERS = [("gru", "lstm", 1, r"2 \(h, c\)"), ("mogrifier", "rnn_relu", 2, r"1 \(h\)")]


@pytest.mark.parametrize(("cell_type", "other", "found", "expected"), OTHERS)
def test_a_cache_of_another_cell_is_refused(cell_type, other, found, expected):
    cache, model = make_model(cell_type=cell_type)(IDS).past_key_values, make_model(cell_type=other)

    message = f"`past_key_values` holds {found} tensors a layer and the model's cells have {expected}: .* `cell_type`"
    with pytest.raises(ValueError, match=message):
        model(IDS, past_key_values=cache)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize(("cell_type", "other"), [(cell, other) for cell, other, *_ in OTHERS])
def test_a_saved_state_of_another_cell_is_refused(cell_type, other, tmp_path):
    model = make_model(cell_type=cell_type)
    save_state(model, model(IDS).past_key_values, tmp_path / "state")

    with pytest.raises(
        ValueError, match=f"belongs to a model with `cell_type` '{cell_type}', and this one has '{other}'"
    ):
        load_state(make_model(cell_type=other), tmp_path / "state")
    with pytest.raises(ValueError, match="`cache` holds states of the shapes"):
        save_state(make_model(cell_type=other), model(IDS).past_key_values, tmp_path / "other")


def test_a_saved_state_of_a_cell_with_the_same_weights_is_refused(tmp_path):
    """A tanh and a ReLU network have weights of the same names and shapes."""
    model, other = make_model(cell_type="rnn_relu"), make_model(cell_type="rnn_tanh")
    other.load_state_dict(model.state_dict())
    save_state(model, model(IDS).past_key_values, tmp_path / "state")

    with pytest.raises(
        ValueError, match="belongs to a model with `cell_type` 'rnn_relu', and this one has 'rnn_tanh'"
    ):
        load_state(other, tmp_path / "state")


@pytest.mark.parametrize(
    ("cell_type", "other", "message"),
    [
        ("lstm", "gru", "have other shapes than its config.json says"),
        ("rnn_tanh", "lstm", "have other shapes than its config.json says"),
        ("lstm", "mogrifier", r"lack model\.layers\.0\.mogrifier\.0\.0\.weight, .* belong to another model"),
        (
            "mogrifier",
            "lstm",
            r"contain, beside those of the model, model\.layers\.0\.mogrifier\.0\.0\.weight, .* and 6 more",
        ),
    ],
)
def test_weights_of_another_cell_are_refused(cell_type, other, message, tmp_path):
    make_model(torch.float32, cell_type=cell_type).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=message):
        LSTMForCausalLM.from_pretrained(tmp_path, cell_type=other)


@pytest.mark.parametrize(
    ("config", "cells", "projection", "output"),
    [
        ({"last_cell_size": 7, "tie_word_embeddings": False}, [12, 7], None, 7),
        ({"last_cell_size": 7, "tie_word_embeddings": False, "num_hidden_layers": 1}, [7], None, 7),
        ({"last_cell_size": 7, "output_projection_size": 5, "tie_word_embeddings": False}, [12, 7], (7, 5), 5),
        ({"embedding_size": 5, "output_projection_size": 5}, [12, 12], (12, 5), 5),
        ({"embedding_size": 5, "output_projection_size": 5, "last_cell_size": 7}, [12, 7], (7, 5), 5),
        ({"embedding_size": 5, "output_projection_size": 5, "num_hidden_layers": 1}, [12], (12, 5), 5),
        ({"block_type": "residual", "output_projection_size": 5, "tie_word_embeddings": False}, [12, 12], (12, 5), 5),
        ({"block_type": "residual", "embedding_size": 5, "output_projection_size": 5}, [12, 12], (12, 5), 5),
    ],
    ids=str,
)
def test_widths_of_the_last_cell_and_of_the_projection(config, cells, projection, output, tmp_path):
    model = make_model(torch.float32, **config)

    assert model.config.cell_sizes == [layer.hidden_gates.in_features for layer in model.model.layers] == cells
    out_proj = model.model.out_proj
    assert getattr(out_proj, "weight", torch.empty(0)).shape == (() if projection is None else projection[::-1]) or (
        projection is None and isinstance(out_proj, nn.Identity)
    )
    hidden = model.model(IDS).last_hidden_state
    assert hidden.shape == (3, 9, output)
    assert model.config.output_size == output
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    assert torch.equal(LSTMForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_the_bias_of_the_output_layer_is_saved_and_resized(tied, tmp_path):
    model = make_model(torch.float32, output_bias=True, tie_word_embeddings=tied)
    expected, bias = model(IDS).logits, model.lm_head.bias.detach().clone()
    assert bias.abs().min() > 0
    model.save_pretrained(tmp_path)

    loaded, report = LSTMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)

    assert not [*report["missing_keys"], *report["unexpected_keys"]]
    assert torch.equal(loaded(IDS).logits, expected)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for size in (33, 29):
        loaded.resize_token_embeddings(size, mean_resizing=False)
        assert loaded.lm_head.bias.shape == (size,)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded.lm_head.bias, bias[:29])
    assert torch.equal(loaded(IDS.clamp(max=28)).logits, model(IDS.clamp(max=28)).logits[..., :29])


def test_the_language_model_loads_as_its_layers_and_back(tmp_path):
    """The projection belongs to the layers, the bias of the output layer does not."""
    options = {"embedding_size": 5, "output_projection_size": 5, "output_bias": True}
    model = make_model(torch.float32, **options)
    model.save_pretrained(tmp_path)

    base = LSTMModel.from_pretrained(tmp_path)

    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


class CoupledGates(Cell):
    """A cell that no file knows, given by its equations alone: h = (1 - f) h + f tanh(n), where f = σ(...) shares n's input."""

    num_gates = 2

    def step(self, read, state, gates):
        (h,) = state
        f, n = (read + gates.hidden(h)).chunk(2, dim=-1)
        f = f.sigmoid()
        return ((1 - f) * h + f * n.tanh(),)


@pytest.fixture
def new_cell(monkeypatch):
    monkeypatch.setitem(CELLS, "coupled", CoupledGates())


@pytest.mark.usefixtures("new_cell")
def test_a_new_cell_is_one_entry(tmp_path):
    """A cell with nothing but a `step` pads, packs, generates, is saved and is loaded like the others."""
    model, mask = make_model(cell_type="coupled"), torch.ones_like(IDS)
    mask[0, :4] = mask[1, 5:] = mask[2, 3:5] = 0

    logits, whole = model(IDS, attention_mask=mask).logits, model(IDS)
    for row, real in enumerate(mask.bool()):
        assert_close(logits[row, real], model(IDS[row : row + 1, real]).logits[0], 1e-12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        steps = [model(token, past_key_values=cache).logits for token in IDS.split(1, dim=1)]
    assert_close(torch.cat(steps, dim=1), whole.logits.detach(), 1e-12)
    positions = torch.arange(9)[None] % 5
    assert_close(model(IDS, position_ids=positions).logits[:, 5:], model(IDS[:, 5:]).logits, 1e-12)

    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(IDS)}
    for way in ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        beams = {"num_beams": way.get("num_beams", 1)}
        assert model.generate(IDS, **options, **way).equal(model.generate(IDS, use_cache=False, **options, **beams))
    row = {name: value[:1] if name == "attention_mask" else value for name, value in options.items()}
    drafted = model.generate(IDS[:1], prompt_lookup_num_tokens=3, **row)
    assert drafted.equal(model.generate(IDS[:1], use_cache=False, **row))

    save_state(model, whole.past_key_values, tmp_path / "state")
    loaded = load_state(model, tmp_path / "state")
    assert_close(model(IDS, past_key_values=loaded).logits, model(IDS.repeat(1, 2)).logits[:, 9:], 1e-12)
    model.save_pretrained(tmp_path)
    assert torch.equal(LSTMForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)(IDS).logits, whole.logits)


@pytest.mark.usefixtures("new_cell")
def test_a_new_cell_learns(kernel):
    """Its default kernel has the gradients of the explicit steps; one step lowers the loss."""
    model = make_model(cell_type="coupled", weight_dropout=0.3, hidden_dropout=0.1).train()
    torch.manual_seed(1)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad.abs().max() > 0
            parameter.sub_(0.01 * parameter.grad)

    torch.manual_seed(1)
    assert model(IDS, labels=IDS).loss < loss


@pytest.mark.usefixtures("new_cell")
def test_a_new_cell_is_exported(tmp_path):
    pytest.importorskip("onnxruntime")
    from hf_lstm.convert.onnx import difference as onnx_difference
    from hf_lstm.convert.onnx import export_onnx

    model = make_model(torch.float32, cell_type="coupled", vocab_size=260)

    for path in export_onnx(model, byte_tokenizer(), tmp_path):
        assert onnx_difference(model, path) < 1e-4
    assert torch_difference(model, export_step(model, tmp_path / "step.pt2")) == 0
