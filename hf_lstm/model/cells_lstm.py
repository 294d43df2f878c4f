"""Recurrent cells: their equations, and the kernels that run one of them over many tokens.

A cell is an object without parameters: it says which gates and states there are, and how one step is taken. Its weights
lie in the modules of a layer (`Gates`). Everything else goes through this interface and asks no cell by name, so that a
new cell is a subclass of [`Cell`] with a `step`, and an entry of `CELLS`; a kernel makes it faster.

Shapes: S sequences of N tokens in all, n of them at one step, or B rows of T tokens; D width of the input, H width of the
cell, G its gates.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from .mogrifier_lstm import run_mogrifier

# Devices whose kernel needs the weights in one piece of memory, as in `torch.nn.LSTM`: cuDNN would compact others at
# each call, with a warning. They cannot be stored so here, since they are separate parameters, some under dropout.
IN_ONE_PIECE = ("cuda",)

# Up to this share of the products, multiplying W by each distinct token once is faster than by every position
# (`are_few`): measured by scripts/benchmarks/lookup.py.
FEW_PRODUCTS = 0.7

State = tuple[torch.Tensor, ...]
"""The state of a cell, a tensor `(B, H)` for each name in `Cell.states`: h first."""


class Weights(NamedTuple):
    """
    The weights of a cell, for kernels that call no modules.

    Args:
        W (`(G H, D)`), U (`(G H, H)`), b (`(G H,)`): Those of the gates.
        hidden_bias (`(G H,)`, *optional*): The bias of U, in a GRU.
        rounds (`tuple`): Q and R of a Mogrifier: for each round a matrix, or two to be applied in this order.
    """

    W: torch.Tensor
    U: torch.Tensor
    b: torch.Tensor
    hidden_bias: torch.Tensor | None
    rounds: tuple[tuple[torch.Tensor, ...], ...]


@dataclass
class Gates:
    """
    The modules of a layer's cell.

    Args:
        input_gates (`nn.Module`): W with b.
        hidden_gates (`nn.Module`): U, in a GRU with a bias.
        hidden_weight (`(G H, H)`, *optional*): Used instead of U, under weight dropout.
        rounds (`nn.ModuleList`, *optional*): Q and R of a Mogrifier, a sequence of linear layers for each round.
    """

    input_gates: Any
    hidden_gates: Any
    hidden_weight: torch.Tensor | None = None
    rounds: Any = None

    def modules(self) -> list[nn.Module]:
        """Return the linear layers."""
        return [self.input_gates, self.hidden_gates, *(module for part in self.rounds or () for module in part)]

    def weights(self) -> Weights:
        """Return the weights of plain modules."""
        U = self.hidden_gates.weight if self.hidden_weight is None else self.hidden_weight
        rounds = tuple(tuple(module.weight for module in part) for part in self.rounds or ())
        return Weights(self.input_gates.weight, U, self.input_gates.bias, self.hidden_gates.bias, rounds)

    def are_plain(self) -> bool:
        """Return whether the modules only apply their weights, which a kernel may then read instead."""
        rounds = all(
            is_untouched(part, {nn.Sequential}) and all(module.bias is None for module in part)
            for part in self.rounds or ()
        )
        return rounds and all(is_plain(module) for module in self.modules())

    def hidden(self, h: torch.Tensor) -> torch.Tensor:
        """Return U h, `(n, G H)`."""
        if self.hidden_weight is None:
            return self.hidden_gates(h)
        return F.linear(h, self.hidden_weight, self.hidden_gates.bias)


class Cell(ABC):
    """
    A recurrent cell.

    Attributes:
        title (`str`): Its name before "language model", with the article.
        num_gates (`int`): G, the blocks of H rows in W and U.
        states (`tuple[str, ...]`): Names of the tensors of its state; the first is h, its output.
        accumulating (`tuple[str, ...]`):
            Those that add up small changes over thousands of tokens, and are kept in float32 or wider.
        forget_gate, input_gate (`int`, *optional*): The blocks of these gates, where the cell has them.
        has_hidden_bias (`bool`): Whether U has a bias of its own.
        has_rounds (`bool`): Whether h and x gate each other before the cell reads them (`Gates.rounds`).
    """

    title = "a recurrent"
    num_gates = 1
    states: tuple[str, ...] = ("h",)
    accumulating: tuple[str, ...] = ()
    forget_gate: int | None = None
    input_gate: int | None = None
    has_hidden_bias = False
    has_rounds = False

    def zero_state(self, x: torch.Tensor, size: int) -> State:
        """Return the state of H = `size` before the first token of `x` `(B, ...)`."""
        return self.as_state([x.new_zeros(x.shape[0], size) for _ in self.states], x.dtype)

    def as_state(self, parts: Sequence[torch.Tensor], dtype: torch.dtype) -> State:
        """Return a state in the types of steps in `dtype`."""
        return tuple(
            part.to(at_least_float32(dtype) if name in self.accumulating else dtype)
            for name, part in zip(self.states, parts, strict=True)
        )

    def read(self, x: Any, gates: Gates) -> Any:
        """Return the part of the steps that does not depend on the state: W x + b, `(..., G H)` from `(..., D)`."""
        return gates.input_gates(x)

    @abstractmethod
    def step(self, read: Any, state: Any, gates: Gates) -> tuple[Any, ...]:
        """
        Take one step of n sequences, from `read`, `(n, G H)`, and the state before it. The methods of tensors that it
        calls are those of convert/onnx.py's `_Value` too, by which the equations become a graph.
        """

    def fused(self, x: torch.Tensor, steps: list[int], state: State, weights: Weights) -> State:
        """
        Run packed tokens `(N, D)`, `steps[t]` of them at step t, by a kernel; by default by the equations. Returns h after
        each, `(N, H)`, and the last state of each sequence.
        """
        past, last = explicit(self, x, state, steps, as_functions(weights))
        return torch.cat([parts[0] for parts in past]), *last

    def single(self, x: torch.Tensor, state: State, weights: Weights) -> State:
        """
        Take one step of every row, from x `(B, D)` and the weights in one type, without gradients, by a kernel; by default by
        the equations.
        """
        gates = as_functions(weights)
        return self.step(self.read(x, gates), state, gates)


class LSTM(Cell):
    """
    Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000), in torch's order of the gates:

        i, f, g, o = W x_t + U h_{t-1} + b
        c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ tanh(g)
        h_t = σ(o) ⊙ tanh(c_t)
    """

    title, num_gates, states, accumulating = "an LSTM", 4, ("h", "c"), ("c",)
    input_gate, forget_gate = 0, 1

    def step(self, read, state, gates):
        h, c = state
        i, f, g, o = (read + gates.hidden(h)).to(c.dtype).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return (o.sigmoid() * c.tanh()).to(h.dtype), c

    def fused(self, x, steps, state, weights):
        return _of_torch(torch.lstm, x, steps, state, weights)

    def single(self, x, state, weights):
        return torch.lstm_cell(x, state, *weights[:4])


class GRU(Cell):
    """
    Gated recurrent unit (Cho et al. 2014), in the form and order of torch and cuDNN: r gates the product U h + b', not h.

        r, z = σ(W x_t + b + U h_{t-1} + b')        the blocks of r and z
        n = tanh(W x_t + b + r ⊙ (U h_{t-1} + b'))  the block of n
        h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}
    """

    title, num_gates = "a GRU", 3
    has_hidden_bias = True

    def step(self, read, state, gates):
        (h,) = state
        x_r, x_z, x_n = read.chunk(3, dim=-1)
        h_r, h_z, h_n = gates.hidden(h).chunk(3, dim=-1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        n = (x_n + r * h_n).tanh()
        return ((1 - z) * n + z * h,)

    def fused(self, x, steps, state, weights):
        return _of_torch(torch.gru, x, steps, state, weights)

    def single(self, x, state, weights):
        return (torch.gru_cell(x, *state, *weights[:4]),)


class TanhRNN(Cell):
    """
    Plain recurrent network (Elman 1990):

        h_t = tanh(W x_t + U h_{t-1} + b)
    """

    title, kernel, cell = "a tanh RNN", torch.rnn_tanh, torch.rnn_tanh_cell

    def step(self, read, state, gates):
        return ((read + gates.hidden(*state)).tanh(),)

    def fused(self, x, steps, state, weights):
        return _of_torch(self.kernel, x, steps, state, weights)

    def single(self, x, state, weights):
        return (self.cell(x, *state, *weights[:4]),)


class ReluRNN(TanhRNN):
    """
    Plain recurrent network with rectified units (Le, Jaitly & Hinton 2015):

        h_t = max(0, W x_t + U h_{t-1} + b)
    """

    title, kernel, cell = "a ReLU RNN", torch.rnn_relu, torch.rnn_relu_cell

    def step(self, read, state, gates):
        return ((read + gates.hidden(*state)).relu(),)


class Mogrifier(LSTM):
    """
    Mogrifier LSTM (Melis, Kočiský & Blunsom 2020): x and h gate each other in r rounds, k = 1 ... r, then an LSTM reads them.

        x = 2 σ(Q_k h) ⊙ x      for odd k
        h = 2 σ(R_k x) ⊙ h      for even k

    Since h gates x first, W x cannot be computed before the steps, nor once for each distinct token.
    """

    title, has_rounds = "a Mogrifier LSTM", True

    def read(self, x, gates):
        return x

    def step(self, read, state, gates):
        x, (h, c) = read, state
        for index, part in enumerate(gates.rounds):
            if index % 2 == 0:
                x = (2 * part(h).sigmoid() * x).to(x.dtype)
            else:
                h = (2 * part(x).sigmoid() * h).to(h.dtype)
        return super().step(gates.input_gates(x), (h, c), gates)

    single = Cell.single  # by the equations

    def fused(self, x, steps, state, weights):
        one_type = {x.dtype, *(part.dtype for part in state)} == {at_least_float32(x.dtype)}
        if not (torch.is_grad_enabled() and one_type and x.device.type == "cpu" and weights.hidden_bias is None):
            return Cell.fused(self, x, steps, state, weights)

        def by_equations(x, h, c, W, U, b, rounds):
            return Cell.fused(self, x, steps, (h, c), Weights(W, U, b, None, rounds))

        return run_mogrifier(by_equations, steps, x, *state, *weights[:3], weights.rounds)


CELLS: dict[str, Cell] = {
    "lstm": LSTM(),
    "gru": GRU(),
    "rnn_tanh": TanhRNN(),
    "rnn_relu": ReluRNN(),
    "mogrifier": Mogrifier(),
}
"""The cells by their names in a config (`cell_type`)."""


def _of_torch(kernel, x, steps, state, weights):
    """
    Run a kernel of torch; see `Cell.fused`. On a CPU the gradients of packed sequences take quadratic time, so the steps that
    read equally many sequences are a call of their own there.
    """
    W, U, b, hidden_bias, _ = weights
    weights = [W, U, b, torch.zeros_like(b) if hidden_bias is None else hidden_bias]
    if x.device.type in IN_ONE_PIECE:
        weights = in_one_piece(weights)
    state = tuple(part[None].to(x.dtype) for part in state)
    options = (True, 1, 0.0, torch.is_grad_enabled(), False)  # biases, layers, dropout, training, directions
    if x.device.type != "cpu":
        packed = (x, torch.tensor(steps, device="cpu"), state if len(state) > 1 else state[0], weights, *options)
        outputs, *last = kernel(*packed)
        return outputs, *(part[0] for part in last)
    sizes = Counter(steps)  # by the number of sequences, which never grows, the steps that read so many
    outputs, ended = [], []
    for (n, length), tokens in zip(sizes.items(), x.split([n * length for n, length in sizes.items()]), strict=True):
        ended.append(tuple(part[0, n:] for part in state))
        state = tuple(part[:, :n] for part in state)
        rows = (tokens.unflatten(0, (length, n)), state if len(state) > 1 else state[0], weights, *options, False)
        read, *state = kernel(*rows)
        outputs.append(read.flatten(0, 1))
    ended.append(tuple(part[0] for part in state))
    return torch.cat(outputs), *(torch.cat(parts[::-1]) for parts in zip(*ended, strict=True))


def as_functions(weights: Weights) -> Gates:
    """Return gates that multiply by these weights, in place of modules."""

    def product(matrices: Sequence[torch.Tensor], bias: torch.Tensor | None = None):
        return lambda x: F.linear(reduce(F.linear, matrices[:-1], x), matrices[-1], bias)

    W, U, b, hidden_bias, rounds = weights
    return Gates(product([W], b), product([U], hidden_bias), rounds=[product(part) for part in rounds])


def explicit(
    cell: Cell, x: torch.Tensor, state: State, batch_sizes: list[int], gates: Gates
) -> tuple[list[State], State]:
    """
    Run the equations step by step.

    Args:
        cell (`Cell`): The cell.
        x (`(N, D)`): The first token of every sequence, then the second of every one that has a second, and so on.
        state (`tuple` of `(S, H)`): The state to start from; the longest sequence comes first.
        batch_sizes (`list[int]`): Number of sequences that have a first token, a second, ...
        gates (`Gates`): The cell's modules.

    Returns:
        A list of states, an empty one and then one `(n, H)` for each step; and the state at the end of each sequence,
        `(S, H)`.
    """
    read = cell.read(x, gates)
    state = cell.as_state(state, read.dtype)
    steps = [tuple(part[:0] for part in state)]
    for part in read.split(batch_sizes):  # n of the S sequences have another token
        n = part.shape[0]  # `len` would make it a constant in an export
        new = cell.step(part, tuple(before[:n] for before in state), gates)
        steps.append(new)
        if n < state[0].shape[0]:
            new = tuple(torch.cat([after, before[n:]]) for after, before in zip(new, state, strict=True))
        state = new
    return steps, state


def masked(
    cell: Cell, x: torch.Tensor, state: State, real: torch.Tensor, restarts: torch.Tensor, gates: Gates
) -> tuple[list[State], State]:
    """
    Run rows of one length: every row takes part in every step, and keeps its state at tokens that are not read.

    Args:
        x (`(B, T, D)`): Input.
        state (`tuple` of `(B, H)`): The state to start from.
        real, restarts (`(B, T)`): Whether each token is read, and whether the state is reset to zero before it.
        cell, gates: See [`explicit`].

    Returns:
        The states after each token, `(B, H)`, and the last of them.
    """
    read = cell.read(x, gates)
    state = cell.as_state(state, read.dtype)
    steps = []
    for part, is_real, restart in zip(read.unbind(1), real.unbind(1), restarts.unbind(1), strict=True):
        is_real, restart = is_real[:, None], restart[:, None]
        new = cell.step(part, tuple(before.masked_fill(restart, 0) for before in state), gates)
        state = tuple(torch.where(is_real, after, before) for after, before in zip(new, state, strict=True))
        steps.append(state)
    return steps, state


@torch.compiler.disable  # traced, it would be unrolled: seconds of compilation for every step
def fused(
    cell: Cell,
    x: torch.Tensor,
    state: State,
    batch_sizes: list[int],
    gates: Gates,
    embeddings: torch.Tensor | None = None,
) -> tuple[torch.Tensor, State]:
    """
    Run the cell's kernel, which returns no states between. Where the `embeddings` of the K distinct tokens are given, `(K, D)`,
    x holds for each token its row among them, `(N,)`. The kernel then reads one-hot vectors with the weights W E, so that W
    multiplies each embedding once; one that is not finite spreads to every token.

    Returns:
        h after each token, `(N, H)`, and the state at the end of each sequence, `(S, H)`.
    """
    weights = gates.weights()
    # On a CPU autocast gives the kernel mixed dtypes, which it does not support: pytorch/pytorch#88136.
    autocast = x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=autocast):
        if embeddings is not None:
            weights = weights._replace(W=weights.W @ embeddings.to(weights.W.dtype).T)  # (G H, K)
            x = weights.W.new_zeros(len(x), len(embeddings)).scatter_(1, x[:, None], 1)
        outputs, *last = cell.fused(x.to(weights.W.dtype), batch_sizes, state, weights)
    return outputs, cell.as_state(last, outputs.dtype)


def are_few(embeddings: torch.Tensor, x: torch.Tensor) -> bool:
    """
    Return whether W E and one-hot vectors are faster than W x. For each row of W they take K D + N K products, with
    `embeddings` `(K, D)`, instead of N D, with x `(N, D)`.
    """
    return 0 < len(embeddings) * (len(x) + x.shape[1]) <= FEW_PRODUCTS * x.numel()


def in_one_piece(weights: list[Any]) -> list[torch.Tensor]:
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
