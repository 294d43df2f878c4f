"""The model computes the equations: outputs, states and gradients, by both kernels."""

import functools
from dataclasses import dataclass

import pytest
import reference
import torch
from conftest import CONFIGS, make_ids, make_model
from transformers import AutoModel, DynamicCache

from hf_lstm import LSTMConfig

IDS = make_ids(1, 5)


@dataclass
class Equations:
    """Results of the equations for the model of a config."""

    logits: list
    states: list
    loss: float
    loss_gradients: dict  # by the names of the weights
    squares_gradients: dict  # of the squares of the last logits and of the last part of the first layer's state


@functools.cache
def equations_of(config):
    """Computed once for all tests of a config, since it takes a second."""
    model = make_model(**CONFIGS[config])
    weights = reference.weights_of(model)
    logits, states = reference.language_model(IDS[0].tolist(), weights, *reference.fields_of(model))
    loss = reference.mean_cross_entropy(logits[:-1], IDS[0, 1:].tolist())
    squares = reference.dot([*logits[-1], *states[0][-1]], [*logits[-1], *states[0][-1]])
    return Equations(
        reference.values(logits),
        reference.values(states),
        loss.value,
        *(reference.gradients(result, weights) for result in (loss, squares)),
    )


@pytest.fixture
def equations(model, request):
    return equations_of(request.node.callspec.params["model"])


def test_logits_and_states_are_those_of_the_equations(model, equations, kernel):
    output = model(IDS)

    assert_equal(output.logits[0], equations.logits)
    for layer, expected in zip(output.past_key_values.layers, equations.states, strict=True):
        for part, numbers in zip(layer.get_state(), expected, strict=True):
            assert_equal(part[0], numbers)


def test_a_carried_state_is_that_of_the_equations(model, equations, kernel):
    cache = DynamicCache(config=model.config)
    model(IDS[:, :3], past_key_values=cache)
    actual = model(IDS[:, 3:], past_key_values=cache).logits

    assert_equal(actual[0], equations.logits[3:])


def test_loss_and_gradients_are_those_of_the_equations(model, equations, kernel):
    loss = model(IDS, labels=IDS).loss
    loss.backward()

    # transformers computes the loss in float32, so no more of it can agree
    torch.testing.assert_close(loss.item(), equations.loss, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        assert_equal(parameter.grad, equations.loss_gradients[name], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_of_logits_and_states_are_those_of_the_equations(model, equations, dtype, kernel):
    model = model.to(dtype)

    output = model(IDS, use_cache=True)
    (output.logits[0, -1].square().sum() + output.past_key_values.layers[0].get_state()[-1].square().sum()).backward()

    precision = 1e-10 if dtype == torch.float64 else 1e-5
    for name, parameter in model.named_parameters():
        assert_equal(parameter.grad, equations.squares_gradients[name], precision)


@pytest.mark.parametrize("options", [{"mogrifier_rounds": 2, "mogrifier_rank": 2}, {"mogrifier_rounds": 0}], ids=str)
def test_rounds_of_a_mogrifier_are_those_of_the_equations(options, kernel):
    """Low-rank matrices; and without rounds an LSTM."""
    model = make_model(cell_type="mogrifier", hidden_size=5, embedding_size=4, tie_word_embeddings=False, **options)
    weights = reference.weights_of(model)

    output = model(IDS)

    logits, states = reference.language_model(IDS[0].tolist(), weights, "mogrifier")
    assert_equal(output.logits[0], reference.values(logits))
    for layer, expected in zip(output.past_key_values.layers, states, strict=True):
        assert_equal(torch.stack(layer.get_state())[:, 0], reference.values(expected))
    if options["mogrifier_rounds"] == 0:
        lstm = make_model(hidden_size=5, embedding_size=4, tie_word_embeddings=False)
        lstm.load_state_dict(model.state_dict())
        assert_equal(output.logits, lstm(IDS).logits.tolist(), 1e-14)
        return
    output.logits[0, -1].square().sum().backward()
    gradients = reference.gradients(reference.dot(logits[-1], logits[-1]), weights)
    for name, parameter in model.named_parameters():
        assert_equal(parameter.grad, gradients[name])


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
