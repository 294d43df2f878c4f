"""Which of the three ways a layer is computed: torch's kernels only where the gates are nothing but their weights."""

import itertools

import pytest
import torch
from accelerate import cpu_offload
from conftest import make_ids, make_model
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune

from hf_lstm.model import cells_lstm, recurrence_lstm

IDS = make_ids(2, 20)


@pytest.fixture
def taken(monkeypatch):
    """The kernels that were run, one for each layer."""
    names, select = [], recurrence_lstm.select_kernel
    monkeypatch.setattr(
        recurrence_lstm, "select_kernel", lambda *arguments: (names.append(select(*arguments)), names[-1])[1]
    )
    return names


@pytest.mark.parametrize(
    ("gradients", "length", "expected"),
    [
        (True, 1, "fused"),
        (True, 20, "fused"),
        (False, 1, "single"),
        (False, 2, "explicit"),
        (False, 15, "explicit"),
        (False, 16, "fused"),
    ],
)
def test_the_choice_depends_on_gradients_and_length(taken, gradients, length, expected, cell):
    with torch.set_grad_enabled(gradients):
        make_model(**cell)(IDS[:, :length])

    assert taken == [expected] * 2


def in_bfloat16(model):
    return model.bfloat16()  # c stays in float32, and torch's cell knows one type


def in_training(model):
    model.config.weight_dropout = 0.5
    return model.train()


@pytest.mark.parametrize("change", [in_bfloat16, in_training])
@torch.no_grad()
def test_a_single_step_that_is_more_than_a_cell_is_explicit(taken, change):
    change(make_model())(IDS[:, :1])

    assert taken == ["explicit"] * 2


@torch.no_grad()
def test_a_masked_step_and_one_under_autocast_are_explicit(taken):
    model = make_model(torch.float32)
    model(IDS[:, :1], attention_mask=torch.tensor([[1], [0]]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(IDS[:, :1])

    assert taken == ["explicit"] * 4


@torch.no_grad()
def test_a_cell_equals_an_explicit_step(model, taken, monkeypatch):
    expected = model(IDS[:, :1])
    assert set(taken) == {"single"}
    monkeypatch.setattr(recurrence_lstm, "select_kernel", lambda *arguments: "explicit")

    found = model(IDS[:, :1])

    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-12)
    for layer, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.get_state(), other.get_state(), rtol=0, atol=1e-12)


class Quantised(nn.Module):
    """As torch's own quantised layers: its `weight` is a method."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.in_features, self.out_features = linear, linear.in_features, linear.out_features

    def weight(self):
        return self.linear.weight

    def forward(self, x):
        return self.linear(x)


@torch.no_grad()
def test_gates_without_a_weight_are_called(taken):
    model = make_model(torch.float32)
    expected = model(IDS[:, :1]).logits
    for layer in model.model.layers:
        layer.input_gates, layer.hidden_gates = Quantised(layer.input_gates), Quantised(layer.hidden_gates)
    taken.clear()

    torch.testing.assert_close(model(IDS[:, :1]).logits, expected)
    assert taken == ["explicit"] * 2


@torch.no_grad()
def test_a_state_of_another_type_goes_on(taken):
    model = make_model(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model(IDS[:, :3]).past_key_values
    expected = model(IDS[:, :4]).logits[:, 3]

    torch.testing.assert_close(model(IDS[:, 3:4], past_key_values=cache).logits[:, 0], expected, rtol=0, atol=0.2)


@torch.no_grad()
def test_a_step_has_a_shape_where_it_has_no_numbers():
    model = make_model(torch.float32).to("meta")

    assert model(IDS[:, :1].to("meta")).logits.shape == (2, 1, model.config.vocab_size)


def test_states_are_recorded_by_the_explicit_steps(taken):
    model = make_model()
    cache = model(IDS).past_key_values
    cache.activate_past_recording()
    model(IDS, past_key_values=cache)

    assert taken == ["fused"] * 2 + ["explicit"] * 2


class Adapter(nn.Linear):
    pass


def with_adapter(model):
    gates = model.model.layers[0].hidden_gates
    adapter = Adapter(gates.in_features, gates.out_features, bias=False).double()
    adapter.weight = gates.weight
    model.model.layers[0].hidden_gates = adapter


def with_hook(model):
    model.model.layers[0].input_gates.register_forward_hook(lambda module, inputs, output: output)


def with_backward_hook(model):
    model.model.layers[0].hidden_gates.register_full_backward_hook(lambda module, inputs, outputs: None)


def with_backward_pre_hook(model):
    model.model.layers[0].hidden_gates.register_full_backward_pre_hook(lambda module, outputs: None)


def with_hook_in_a_round(model):
    model.model.layers[0].mogrifier[1].register_forward_hook(lambda module, inputs, output: output)


def with_hook_of_a_matrix(model):
    model.model.layers[0].mogrifier[4][0].register_forward_hook(lambda module, inputs, output: output)


def with_pruning(model):
    prune.identity(model.model.layers[0].hidden_gates, "weight")


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize(
    ("change", "cell_type"),
    [
        (with_adapter, "lstm"),
        (with_adapter, "rnn_relu"),
        (with_hook, "gru"),
        (with_hook_in_a_round, "mogrifier"),
        (with_hook_of_a_matrix, "mogrifier"),
        (with_backward_hook, "rnn_tanh"),
        (with_backward_hook, "lstm"),
        (with_backward_pre_hook, "gru"),
        (with_pruning, "mogrifier"),
        (with_pruning, "lstm"),
        (cpu_offload, "lstm"),
        (cpu_offload, "mogrifier"),
    ],
)
def test_whatever_a_module_does_is_done(taken, change, cell_type):
    model = make_model(cell_type=cell_type)
    expected = model(IDS).logits.detach()
    change(model)
    taken.clear()

    for _ in range(2):  # a second step too: pruning makes its weight anew in each
        model.zero_grad()
        logits = model(IDS).logits
        if change is not cpu_offload:
            logits.sum().backward()

    assert taken[0] == "explicit"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("weight_dropout", [0.0, 0.5])
def test_weights_in_one_piece_are_the_same_weights(monkeypatch, weight_dropout, cell):
    """As cuDNN takes them; the CPU's kernel does not mind."""
    results, pieces, has_kernel = [], [], cell["cell_type"] != "mogrifier"

    def watched(weights, run=cells_lstm.in_one_piece):
        parts = run(weights)
        pieces.append(all(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in itertools.pairwise(parts)))
        return parts

    monkeypatch.setattr(cells_lstm, "in_one_piece", watched)
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(cells_lstm, "IN_ONE_PIECE", devices)
        model = make_model(weight_dropout=weight_dropout, **cell).train()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])

    assert pieces == [True] * 2 * has_kernel  # layers
    for separate, together in zip(*results, strict=True):
        assert torch.equal(separate, together)


GLOBAL_HOOKS = {
    "forward": lambda seen: nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)),
    "forward_pre": lambda seen: nn.modules.module.register_module_forward_pre_hook(
        lambda module, *_: seen.append(module)
    ),
    "backward": lambda seen: nn.modules.module.register_module_full_backward_hook(
        lambda module, *_: seen.append(module)
    ),
    "backward_pre": lambda seen: nn.modules.module.register_module_full_backward_pre_hook(
        lambda module, *_: seen.append(module)
    ),
}


BEFORE_INPUTS = pytest.mark.filterwarnings("ignore:(Full|For) backward hook")  # the first h has no gradient
SCRIPTED = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated"
)  # by torch itself, for some derivatives


@BEFORE_INPUTS
@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_hooks_of_all_modules_see_the_gates(kind):
    """Profilers register them."""
    model, seen = make_model(), []
    hook = GLOBAL_HOOKS[kind](seen)
    try:
        model(IDS, labels=IDS).loss.backward()
    finally:
        hook.remove()

    assert {layer.hidden_gates for layer in model.model.layers} <= set(seen)


@BEFORE_INPUTS
def test_a_hook_sees_the_gradient_of_every_step():
    model, gradients = make_model(), []
    model.model.layers[0].hidden_gates.register_full_backward_hook(
        lambda module, inputs, outputs: gradients.append(outputs[0])
    )

    model(IDS, labels=IDS).loss.backward()

    assert len(gradients) == IDS.shape[1]


def test_a_default_device_leaves_the_kernel_alone():
    model = make_model()
    expected = model(IDS, attention_mask=MASK).logits

    with torch.device("meta"):
        actual = model(IDS, attention_mask=MASK.clone(), use_cache=False).logits

    assert torch.equal(actual, expected)


TRANSFORMED = {
    "plain": {},
    "gru": {"cell_type": "gru"},
    "residual": {"cell_type": "rnn_tanh", "block_type": "residual", "initializer_range": 0.2},
    "chunked": {"cell_type": "rnn_relu", "loss_chunk_size": 4, "output_bias": True},
    "adaptive": {
        "cell_type": "mogrifier",
        "adaptive_softmax_cutoffs": [8, 20],
        "tie_word_embeddings": False,
        "hidden_size": 16,
    },
}
MASK = torch.tensor([[0] * 3 + [1] * 17, [1] * 9 + [0] * 2 + [1] * 5 + [0] * 4])


@pytest.fixture(params=TRANSFORMED)
def example_losses(request):
    """A model, and the loss of one example as a function of its parameters, for `torch.func`."""
    model = make_model(**TRANSFORMED[request.param]).train()
    positions, documents = torch.arange(20) % 7, torch.arange(20) // 9

    def example_loss(parameters, ids, mask):
        batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}
        batch |= {"position_ids": positions, "seq_idx": documents}
        batch = {name: tensor[None] for name, tensor in batch.items()} | {"cu_seq_lens_q": torch.tensor([0, 5, 20])}
        return torch.func.functional_call(model, parameters, (), batch).loss

    return model, example_loss


def test_gradients_of_each_example_equal_a_loop_over_examples(example_losses):
    model, example_loss = example_losses
    parameters = dict(model.named_parameters())

    gradients = torch.func.vmap(torch.func.grad(example_loss), in_dims=(None, 0, 0))(parameters, IDS, MASK)

    for row in range(len(IDS)):
        expected = torch.autograd.grad(example_loss(parameters, IDS[row], MASK[row]), list(parameters.values()))
        for (name, gradient), one in zip(gradients.items(), expected, strict=True):
            torch.testing.assert_close(gradient[row], one, rtol=1e-10, atol=1e-10, msg=name)


@SCRIPTED
def test_forward_mode_derivatives_equal_those_of_backward_mode(model):
    parameters = dict(model.named_parameters())
    directions = {name: torch.ones_like(parameter) for name, parameter in parameters.items()}

    def score(parameters):
        logits = torch.func.functional_call(model, parameters, (), {"input_ids": IDS, "attention_mask": MASK}).logits
        return logits.square().mean()

    _, forward = torch.func.jvp(score, (parameters,), (directions,))
    backward = sum(gradient.sum() for gradient in torch.func.grad(score)(parameters).values())
    expected = sum(gradient.sum() for gradient in torch.autograd.grad(score(parameters), list(parameters.values())))

    torch.testing.assert_close(forward, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(backward, expected, rtol=1e-10, atol=0)


@SCRIPTED
def test_dual_numbers_pass_outside_of_transforms(model):
    embeddings = model.get_input_embeddings()(IDS).detach()

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(embeddings, torch.ones_like(embeddings))
        tangent = forward_ad.unpack_dual(model(inputs_embeds=dual).logits).tangent

    difference = (model(inputs_embeds=embeddings + 1e-6).logits - model(inputs_embeds=embeddings - 1e-6).logits) / 2e-6
    torch.testing.assert_close(tangent, difference, rtol=1e-5, atol=1e-6)
