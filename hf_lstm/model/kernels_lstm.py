"""The recurrence of one layer, computed in ways that agree (tests/test_properties.py).

Shapes: N tokens in all, S sequences read side by side, D width of the input, H width of the cell; B rows of T tokens.
"""

from functools import partial

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

# Steps from which torch's fused LSTM beats the explicit one where no gradient is wanted. Two CPU cores, 512 wide,
# batch 1: one step 0.77 against 0.26 ms, 16 steps 1.6 against 2.1 ms.
FUSED_STEPS = {"cpu": 16, "cuda": 2}

# Where weights must lie as `torch.nn.LSTM` keeps them: cuDNN would put others so itself at each call, with a warning. They
# cannot be kept so here, since they are parameters of their own, some of which are dropped in each step.
IN_ONE_PIECE = ("cuda",)


def explicit_lstm(x, h, c, batch_sizes, input_gates, hidden_gates, hidden_weight=None):
    """
    The equations, one step after the other.

    Args:
        x (`(N, D)`): The first token of every sequence, then the second of every one that has a second, and so on.
        h, c (`(S, H)`): The states to start from; the longest sequence comes first.
        batch_sizes (`list[int]`): How many sequences have a first token, a second, ...
        input_gates, hidden_gates (`nn.Module`): W with b, and U.
        hidden_weight (`(4 H, H)`, *optional*): What stands for U this time.

    Returns:
        h after each token, `(N, H)`; c after each step's, a list; h and c at each sequence's end, `(S, H)`.
    """
    from_input, h, c, hidden_gates = _prepare(x, h, c, input_gates, hidden_gates, hidden_weight)
    outputs, cells = [h[:0]], [c[:0]]  # should there be nothing to read
    for read in from_input.split(batch_sizes):  # (n, 4 H), n of the S sequences go on
        n = read.shape[0]  # `len` would fix it in an export
        new_h, new_c = _step(read, h[:n], c[:n], hidden_gates)
        outputs.append(new_h)
        cells.append(new_c)
        h = torch.cat([new_h, h[n:]]) if n < h.shape[0] else new_h
        c = torch.cat([new_c, c[n:]]) if n < c.shape[0] else new_c
    return torch.cat(outputs), cells, h, c


def masked_lstm(x, h, c, real, restarts, input_gates, hidden_gates, hidden_weight=None):
    """
    The same for rows of one length: every row takes part in every step, and keeps its state where it has nothing to read.

    Args:
        x (`(B, T, D)`): Input.
        h, c (`(B, H)`): The states to start from.
        real, restarts (`(B, T)`): Where a token is read, and where the state is zero before it.
        input_gates, hidden_gates, hidden_weight: As in [`explicit_lstm`].

    Returns:
        h and c after each token, `(B, T, H)`; h and c at each row's end, `(B, H)`.
    """
    from_input, h, c, hidden_gates = _prepare(x, h, c, input_gates, hidden_gates, hidden_weight)
    outputs, cells = [], []
    for read, is_real, restart in zip(from_input.unbind(1), real.unbind(1), restarts.unbind(1), strict=True):
        is_real, restart = is_real[:, None], restart[:, None]
        new_h, new_c = _step(read, h.masked_fill(restart, 0), c.masked_fill(restart, 0), hidden_gates)
        h, c = torch.where(is_real, new_h, h), torch.where(is_real, new_c, c)
        outputs.append(h)
        cells.append(c)
    return torch.stack(outputs, dim=1), torch.stack(cells, dim=1), h, c


def _prepare(x, h, c, input_gates, hidden_gates, hidden_weight):
    """W x + b of all tokens, the states in the types of the steps, and U."""
    if hidden_weight is not None:
        hidden_gates = partial(F.linear, weight=hidden_weight)
    from_input = input_gates(x)  # (..., 4 H)
    return from_input, h.to(from_input.dtype), c.to(at_least_float32(from_input.dtype)), hidden_gates


def _step(from_input, h, c, hidden_gates):
    """One step of every sequence."""
    i, f, g, o = (from_input + hidden_gates(h)).to(c.dtype).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return (o.sigmoid() * c.tanh()).to(h.dtype), c


@torch.compiler.disable  # traced, it would be unrolled: seconds of compiling for every step
def fused_lstm(x, h, c, batch_sizes, input_gates, hidden_gates, hidden_weight=None):
    """The same by torch's own kernel, which does not tell the c in between."""
    hidden_weight = hidden_gates.weight if hidden_weight is None else hidden_weight
    weights = [input_gates.weight, hidden_weight, input_gates.bias, torch.zeros_like(input_gates.bias)]
    if x.device.type in IN_ONE_PIECE:
        weights = in_one_piece(weights)
    x, h, c = (tensor.to(weights[0].dtype) for tensor in (x, h, c))
    steps, training = torch.tensor(batch_sizes, device="cpu"), torch.is_grad_enabled()
    # On a CPU autocast asks the kernel for a mixture of types that it does not have: pytorch/pytorch#88136.
    autocast = x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=autocast):
        outputs, h, c = torch.lstm(x, steps, (h[None], c[None]), weights, True, 1, 0.0, training, False)
    return outputs, None, h[0], c[0].to(at_least_float32(c.dtype))


def in_one_piece(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same, one behind the other in memory; gradients go back to where each came from."""
    whole = torch.cat([weight.flatten() for weight in weights])
    parts = whole.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


def lstm_step(x, h, c, input_gates, hidden_gates):
    """
    The same for one token of every sequence, with no call from Python but one: `x` `(S, D)`; returns h and c `(S, H)`.
    """
    return torch.lstm_cell(x, (h, c), input_gates.weight, hidden_gates.weight, input_gates.bias)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type of c, which adds up over thousands of steps, and of sums of squares."""
    return torch.promote_types(dtype, torch.float32)


def is_plain(module: nn.Module, kind: type = nn.Linear) -> bool:
    """Whether calling `module` does what its weights say: no adapter, quantiser, pruning, offloading or hook."""
    return (
        type(module) is kind
        and type(getattr(module, "weight", None)) in (nn.Parameter, torch.Tensor, type(None))
        and "forward" not in vars(module)  # accelerate replaces it where weights are offloaded
        and not any(hooks for holder in (vars(module), vars(torch_module)) for hooks in map(holder.get, HOOKS))
    )


# Where torch keeps the hooks of a module and those of all modules, which calling the kernel would pass over. Private names,
# since no public one tells; tests/test_kernels.py registers each kind and fails when one is no longer seen.
HOOKS = tuple(
    f"_{where}{direction}_hooks"
    for where in ("", "global_")
    for direction in ("forward", "forward_pre", "backward", "backward_pre")
)


def is_transformed() -> bool:
    """
    Whether `torch.func` (grad, vmap, jvp, ...) or forward-mode differentiation is at work, for which the fused kernel has no
    rule. Private names, since no public one tells; tests/test_kernels.py fails when they change.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0
