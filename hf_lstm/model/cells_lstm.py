"""The LSTM cell: its equations step by step, and torch's kernel for them.

Shapes: S sequences of N tokens in all, or B rows of T tokens; D width of the input, H width of the cell.
"""

from functools import partial

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

# Devices whose kernel needs the weights in one piece of memory, as in `torch.nn.LSTM`: cuDNN would compact others at
# each call, with a warning. They cannot be stored so here, since they are separate parameters, some under dropout.
IN_ONE_PIECE = ("cuda",)

# Up to this share of the products, multiplying W by each distinct token once is faster than by every position
# (`are_few`): measured by scripts/benchmarks/lookup.py.
FEW_PRODUCTS = 0.7


def explicit_lstm(x, h, c, batch_sizes, input_gates, hidden_gates, hidden_weight=None):
    """
    Run the equations step by step.

    Args:
        x (`(N, D)`): The first token of every sequence, then the second of every one that has a second, and so on.
        h, c (`(S, H)`): The states to start from; the longest sequence comes first.
        batch_sizes (`list[int]`): Number of sequences that have a first token, a second, ...
        input_gates, hidden_gates (`nn.Module`): W with b, and U.
        hidden_weight (`(4 H, H)`, *optional*): Used instead of U.

    Returns:
        h after each token, `(N, H)`; c after each step, a list; h and c at the end of each sequence, `(S, H)`.
    """
    from_input, h, c, hidden_gates = _prepare(x, h, c, input_gates, hidden_gates, hidden_weight)
    outputs, cells = [h[:0]], [c[:0]]  # in case of zero steps
    for read in from_input.split(batch_sizes):  # (n, 4 H), n of the S sequences have another token
        n = read.shape[0]  # `len` would make it a constant in an export
        new_h, new_c = _step(read, h[:n], c[:n], hidden_gates)
        outputs.append(new_h)
        cells.append(new_c)
        h = torch.cat([new_h, h[n:]]) if n < h.shape[0] else new_h
        c = torch.cat([new_c, c[n:]]) if n < c.shape[0] else new_c
    return torch.cat(outputs), cells, h, c


def masked_lstm(x, h, c, real, restarts, input_gates, hidden_gates, hidden_weight=None):
    """
    Run rows of one length: every row takes part in every step, and keeps its state at tokens that are not read.

    Args:
        x (`(B, T, D)`): Input.
        h, c (`(B, H)`): The states to start from.
        real, restarts (`(B, T)`): Whether each token is read, and whether the state is reset to zero before it.
        input_gates, hidden_gates, hidden_weight: See [`explicit_lstm`].

    Returns:
        h and c after each token, `(B, T, H)`; h and c at the end of each row, `(B, H)`.
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
    """Return W x + b of all tokens, the states in the dtypes of the steps, and U."""
    if hidden_weight is not None:
        hidden_gates = partial(F.linear, weight=hidden_weight)
    from_input = input_gates(x)  # (..., 4 H)
    return from_input, h.to(from_input.dtype), c.to(at_least_float32(from_input.dtype)), hidden_gates


def _step(from_input, h, c, hidden_gates):
    """Take one step of every sequence."""
    i, f, g, o = (from_input + hidden_gates(h)).to(c.dtype).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return (o.sigmoid() * c.tanh()).to(h.dtype), c


@torch.compiler.disable  # traced, it would be unrolled: seconds of compilation for every step
def fused_lstm(x, h, c, batch_sizes, input_gates, hidden_gates, hidden_weight=None, embeddings=None):
    """
    Run torch's own kernel, which does not return the c of each step; otherwise see [`explicit_lstm`]. Where the `embeddings`
    of the K distinct tokens are given, `(K, D)`, x holds for each token its row among them, `(N,)`. The kernel then reads
    one-hot vectors with the weights W E, so that W multiplies each embedding once; one that is not finite spreads to every
    token.
    """
    input_weight, zeros = input_gates.weight, torch.zeros_like(input_gates.bias)
    hidden_weight = hidden_gates.weight if hidden_weight is None else hidden_weight
    # On a CPU autocast gives the kernel mixed dtypes, which it does not support: pytorch/pytorch#88136.
    autocast = x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=autocast):
        if embeddings is not None:
            input_weight = input_weight @ embeddings.to(input_weight.dtype).T  # (4 H, K)
            x = input_weight.new_zeros(len(x), len(embeddings)).scatter_(1, x[:, None], 1)
        weights = [input_weight, hidden_weight, input_gates.bias, zeros]
        if x.device.type in IN_ONE_PIECE:
            weights = in_one_piece(weights)
        x, h, c = (tensor.to(input_weight.dtype) for tensor in (x, h, c))
        steps, training = torch.tensor(batch_sizes, device="cpu"), torch.is_grad_enabled()
        outputs, h, c = torch.lstm(x, steps, (h[None], c[None]), weights, True, 1, 0.0, training, False)
    return outputs, None, h[0], c[0].to(at_least_float32(c.dtype))


def are_few(embeddings: torch.Tensor, x: torch.Tensor) -> bool:
    """
    Return whether W E and one-hot vectors are faster than W x. For each row of W they take K D + N K products, with
    `embeddings` `(K, D)`, instead of N D, with x `(N, D)`.
    """
    return 0 < len(embeddings) * (len(x) + x.shape[1]) <= FEW_PRODUCTS * x.numel()


def in_one_piece(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copy weights into one contiguous piece of memory; gradients flow back to each original."""
    whole = torch.cat([weight.flatten() for weight in weights])
    parts = whole.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of c, which accumulates over thousands of steps, and of sums of squares."""
    return torch.promote_types(dtype, torch.float32)


def is_plain(module: nn.Module, kind: type = nn.Linear) -> bool:
    """Return whether a module only applies its weights: no adapter, quantiser, pruning, offloading or hook."""
    weight = type(getattr(module, "weight", None))
    return is_untouched(module, {kind}) and weight in (nn.Parameter, torch.Tensor, type(None))


def is_untouched(module: nn.Module, kinds: set[type]) -> bool:
    """Return whether calling a module runs the forward of one of the classes and nothing else."""
    own = vars(module)
    return (
        type(module) in kinds
        and "forward" not in own  # accelerate replaces it where weights are offloaded
        and own.get("_compiled_call_impl") is None
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
        and not (own["_backward_hooks"] or own["_backward_pre_hooks"] or any(ALL_HOOKS))
    )


# Where torch keeps the hooks of a module, and the global ones, which a direct call of a kernel would skip. Private
# names: torch has no public ones; tests/test_kernels.py registers each kind and fails when one is not found any more.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
ALL_HOOKS = [getattr(torch_module, f"_global{hooks}") for hooks in HOOKS]


def is_traced() -> bool:
    """Return whether a compiler, an export or a tracer records the operations, whose number may not depend on values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None


def is_transformed() -> bool:
    """
    Return whether a `torch.func` transform (grad, vmap, jvp, ...) or forward-mode differentiation is active: torch's
    kernels support neither. Private names: torch has no public ones; tests/test_kernels.py fails when they change.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0
