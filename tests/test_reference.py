"""The model computes the equations: outputs, states and gradients, by both kernels."""

import pytest
import reference
import torch
from conftest import make_ids
from transformers import AutoModel, DynamicCache

from hf_lstm import LSTMConfig

IDS = make_ids(1, 5)


def test_logits_and_states_are_those_of_the_equations(model, kernel):
    expected, states = reference.language_model(IDS[0].tolist(), reference.weights_of(model))

    output = model(IDS)

    assert_equal(output.logits[0], reference.values(expected))
    for layer, (h, c) in zip(output.past_key_values.layers, states, strict=True):
        assert_equal(layer.keys[0], reference.values(h))
        assert_equal(layer.values[0], reference.values(c))


def test_a_carried_state_is_that_of_the_equations(model, kernel):
    weights = reference.weights_of(model)
    _, states = reference.language_model(IDS[0, :3].tolist(), weights)
    expected, _ = reference.language_model(IDS[0, 3:].tolist(), weights, states)

    cache = DynamicCache(config=model.config)
    model(IDS[:, :3], past_key_values=cache)
    actual = model(IDS[:, 3:], past_key_values=cache).logits

    assert_equal(actual[0], reference.values(expected))


def test_loss_and_gradients_are_those_of_the_equations(model, kernel):
    weights = reference.weights_of(model)
    logits, _ = reference.language_model(IDS[0].tolist(), weights)
    expected = reference.mean_cross_entropy(logits[:-1], IDS[0, 1:].tolist())
    expected.backward()

    loss = model(IDS, labels=IDS).loss
    loss.backward()

    # transformers computes the loss in float32, so no more of it can agree
    torch.testing.assert_close(loss.item(), expected.value, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        assert_equal(parameter.grad, reference.values(weights[name], "gradient"), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_of_logits_and_cells_are_those_of_the_equations(model, dtype, kernel):
    model = model.to(dtype)
    weights = reference.weights_of(model)
    logits, states = reference.language_model(IDS[0].tolist(), weights)
    total = reference.dot([*logits[-1], *states[0][1]], [*logits[-1], *states[0][1]])  # of logits and of a cell
    total.backward()

    output = model(IDS, use_cache=True)
    (output.logits[0, -1].square().sum() + output.past_key_values.layers[0].values.square().sum()).backward()

    precision = 1e-10 if dtype == torch.float64 else 1e-5
    for name, parameter in model.named_parameters():
        assert_equal(parameter.grad, reference.values(weights[name], "gradient"), precision)


def test_new_models_remember_and_do_not_explode():
    model = AutoModel.from_config(LSTMConfig(vocab_size=31, hidden_size=12, forget_gate_bias=1.5))

    for layer in model.layers:
        i, f, g, o = layer.input_gates.bias.chunk(4)
        assert (f == 1.5).all()
        assert not any(gate.any() for gate in (i, g, o))
        columns = layer.hidden_gates.weight  # (4 H, H), orthonormal
        torch.testing.assert_close(columns.T @ columns, torch.eye(12), atol=1e-5, rtol=0)


def assert_equal(actual, expected, precision=1e-10):
    """Within `precision` of the largest element."""
    expected = torch.tensor(expected, dtype=torch.float64)
    error = (actual.detach().double() - expected).abs().max()
    assert error <= precision * expected.abs().max(), f"{error} of {expected.abs().max()}"
