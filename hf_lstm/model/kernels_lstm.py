"""The recurrence of one layer, computed in three ways that agree (tests/test_properties.py).

Shapes: N tokens in all, S sequences read side by side, D width of the input, H width of the cell.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

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
    if hidden_weight is not None:
        hidden_gates = partial(F.linear, weight=hidden_weight)
    from_input = input_gates(x)  # (N, 4 H)
    h, c = h.to(from_input.dtype), c.to(at_least_float32(from_input.dtype))
    outputs, cells = [h[:0]], [c[:0]]  # should there be nothing to read
    for read in from_input.split(batch_sizes):  # (n, 4 H), n of the S sequences go on
        n = read.shape[0]  # `len` would fix it in an export
        i, f, g, o = (read + hidden_gates(h[:n])).to(c.dtype).chunk(4, dim=-1)
        new_c = f.sigmoid() * c[:n] + i.sigmoid() * g.tanh()
        new_h = (o.sigmoid() * new_c.tanh()).to(h.dtype)
        outputs.append(new_h)
        cells.append(new_c)
        h = torch.cat([new_h, h[n:]]) if n < h.shape[0] else new_h
        c = torch.cat([new_c, c[n:]]) if n < c.shape[0] else new_c
    return torch.cat(outputs), cells, h, c


@torch.compiler.disable  # traced, it would be unrolled: seconds of compiling for every step
def fused_lstm(x, h, c, batch_sizes, input_gates, hidden_gates, hidden_weight=None):
    """The same by torch's own kernel, which does not tell the c in between."""
    hidden_weight = hidden_gates.weight if hidden_weight is None else hidden_weight
    weights = [input_gates.weight, hidden_weight, input_gates.bias, torch.zeros_like(input_gates.bias)]
    if x.device.type in IN_ONE_PIECE:
        weights = in_one_piece(weights)
    x, h, c = (tensor.to(weights[0].dtype) for tensor in (x, h, c))
    steps, training = torch.tensor(batch_sizes), torch.is_grad_enabled()
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
        and not (module._forward_hooks or module._forward_pre_hooks)
    )
