"""The layers of a model: a recurrent cell, alone or in a residual block.

A residual block reads and writes a stream x (He et al. 2016; normalised before each branch, Xiong et al. 2020):

    x = x + O cell(norm(x))
    x = x + D (act(G norm(x)) ⊙ F norm(x))    gated MLP, optional: Shazeer 2020

A layer is a pure function of its input and the state it starts from. It says of its state what the model and the cache
need (`cache_layer`, `state_names`, `state_shape`, `zero_state`, `returns_maps`), and so do the layers of attention_lstm.py.

Shapes: B batch, T tokens of this call, D width of a layer's input, H width of its cell.
"""

import itertools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_lstm import LSTMCacheLayer
from .cells_lstm import CELLS, Gates, State
from .configuration_lstm import LSTMConfig
from .recurrence_lstm import Reading, run_cell
from .training_lstm import locked_dropout, weight_dropout


class LSTMLayer(GradientCheckpointingLayer):
    """One layer of an LSTM, or of another cell."""

    cache_layer: type[Any] = LSTMCacheLayer
    returns_maps = False  # of attention

    def __init__(self, input_size: int, cell_size: int, config: LSTMConfig):
        super().__init__()
        self.config = config
        self.cell = CELLS[config.cell_type]
        rows = self.cell.num_gates * cell_size
        self.input_gates = linear(input_size, rows, "gates", bias=True)  # W, b
        self.hidden_gates = linear(cell_size, rows, "recurrent", bias=self.cell.has_hidden_bias)  # U
        self.mogrifier = mogrifier(input_size, cell_size, config)  # Q and R

    @property
    def output_size(self) -> int:
        """H."""
        return self.hidden_gates.in_features

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the tensors of the state."""
        return self.cell.states

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of the first of them for one row."""
        return (self.hidden_gates.in_features,)

    def zero_state(self, x: torch.Tensor) -> State:
        """Return the state before the first token of `x` `(B, T, D)`."""
        return self.cell.zero_state(x, self.hidden_gates.in_features)

    def forward(
        self,
        x: torch.Tensor,
        *state: torch.Tensor,
        reading: Reading | None = None,
        record: bool = False,
        tokens: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            x (`(B, T, D)`): Input.
            state (`(B, H)` each): State to start from: h and, where the cell has it, c.
            reading (`Segments` or `Steps`, *optional*): The tokens to read, where rows are padded or documents start.
            record (`bool`, defaults to `False`): Whether to return the states after each token too.
            tokens (`(B, T)`), embeddings (`(K, D)`) (*optional*): x as `embeddings[tokens]`, of K distinct tokens.

        Returns:
            `tuple`: h after each token, `(B, T, H)`; the state at each row's end; and, if recorded, after each token,
            `(B, T, H)` each. A padded token leaves the state as it was.
        """
        outputs, last, past = run_cell(self.cell, x, state, self.gates(), reading, record, tokens, embeddings)
        return outputs, *last, *past

    def gates(self) -> Gates:
        """Return the modules of the cell; while training with weight dropout, on U with entries dropped."""
        hidden_weight = weight_dropout(self.hidden_gates, self.config.weight_dropout if self.training else 0)
        return Gates(self.input_gates, self.hidden_gates, hidden_weight, self.mogrifier)


class ResidualLSTMLayer(LSTMLayer):
    """A layer with a residual connection, and the gated MLP that may follow it."""

    def __init__(self, config: LSTMConfig):
        super().__init__(config.hidden_size, config.hidden_size, config)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.o_proj = linear(config.hidden_size, config.hidden_size, "branch")
        self.mlp = GatedMLP(config, config.intermediate_size) if config.intermediate_size is not None else None

    def forward(self, x: torch.Tensor, *state: torch.Tensor, **options) -> tuple[torch.Tensor, ...]:
        """See [`LSTMLayer`]; x and the outputs are the residual stream, `(B, T, H)`."""
        outputs, *states = super().forward(self.norm(x), *state, **options)
        p = self.config.hidden_dropout if self.training else 0
        x = x + locked_dropout(self.o_proj(outputs), p)
        if self.mlp is not None:
            x = x + locked_dropout(self.mlp(x), p)
        return x, *states


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang & Sennrich 2019), computed in at least float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps).to(x.dtype)


class GatedMLP(nn.Module):
    """Gated MLP of a residual layer (Shazeer 2020)."""

    def __init__(self, config: LSTMConfig, intermediate_size: int):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate_proj = linear(config.hidden_size, intermediate_size)
        self.up_proj = linear(config.hidden_size, intermediate_size)
        self.down_proj = linear(intermediate_size, config.hidden_size, "branch")
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def linear(inputs: int, outputs: int, role: str = "plain", bias: bool = False) -> nn.Linear:
    """Create a linear layer, initialised by its role: `"plain"`, `"gates"`, `"recurrent"`, or the end of a `"branch"`."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.role = role  # type: ignore[assignment]  # torch types the attributes of modules as tensors and modules
    return layer


def mogrifier(input_size: int, cell_size: int, config: LSTMConfig) -> nn.ModuleList | None:
    """
    Create the rounds of a Mogrifier, each a matrix, or two by way of `mogrifier_rank` features: the first from h to the
    width of x, the second back, and so on. Other cells have none, `None`.
    """
    if config.mogrifier_rounds is None:
        return None
    sizes = [cell_size, *([config.mogrifier_rank] if config.mogrifier_rank else []), input_size]
    rounds = [itertools.pairwise(sizes if index % 2 == 0 else sizes[::-1]) for index in range(config.mogrifier_rounds)]
    return nn.ModuleList(nn.Sequential(*(linear(*pair) for pair in pairs)) for pairs in rounds)
