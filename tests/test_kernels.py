"""Which of the two ways a layer is computed: torch's kernel only where the gates are nothing but their weights."""

import pytest
import torch
from accelerate import cpu_offload
from conftest import make_ids, make_model
from torch import nn
from torch.nn.utils import prune

from hf_lstm.model import modeling_lstm

IDS = make_ids(2, 20)


@pytest.fixture
def taken(monkeypatch):
    """The names of the kernels that were run, one for each layer."""
    names = []
    for name in ("fused_lstm", "explicit_lstm"):
        kernel = getattr(modeling_lstm, name)
        monkeypatch.setattr(
            modeling_lstm,
            name,
            lambda *arguments, kernel=kernel, name=name: (names.append(name), kernel(*arguments))[1],
        )
    return names


@pytest.mark.parametrize(
    ("gradients", "length", "expected"),
    [(True, 1, "fused_lstm"), (True, 20, "fused_lstm"), (False, 15, "explicit_lstm"), (False, 16, "fused_lstm")],
)
def test_the_choice_depends_on_gradients_and_length(taken, gradients, length, expected):
    with torch.set_grad_enabled(gradients):
        make_model()(IDS[:, :length])

    assert taken == [expected] * 2


def test_states_are_recorded_by_the_explicit_steps(taken):
    model = make_model()
    cache = model(IDS).past_key_values
    cache.activate_past_recording()
    model(IDS, past_key_values=cache)

    assert taken == ["fused_lstm"] * 2 + ["explicit_lstm"] * 2


class Adapter(nn.Linear):
    pass


def with_adapter(model):
    gates = model.model.layers[0].hidden_gates
    adapter = Adapter(gates.in_features, gates.out_features, bias=False).double()
    adapter.weight = gates.weight
    model.model.layers[0].hidden_gates = adapter


def with_hook(model):
    model.model.layers[0].input_gates.register_forward_hook(lambda module, inputs, output: output)


def with_pruning(model):
    prune.identity(model.model.layers[0].hidden_gates, "weight")


@pytest.mark.parametrize("change", [with_adapter, with_hook, with_pruning, cpu_offload])
def test_whatever_a_module_does_is_done(taken, change):
    model = make_model()
    expected = model(IDS).logits.detach()
    change(model)
    taken.clear()

    for _ in range(2):  # a second step too: pruning makes its weight anew in each
        model.zero_grad()
        logits = model(IDS).logits
        if change is not cpu_offload:
            logits.sum().backward()

    assert taken[0] == "explicit_lstm"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
