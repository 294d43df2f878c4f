"""Token after token through the bare cells of a stacked model on a CPU: what `generate()` and `Session` write with.

What lies between the modules is left out: two layers of 512 in `generate()` take two thirds of the time of the model's
own step, and half of it once the weights lie column by column (scripts/benchmarks/decode.py).

Shapes: B batch, V vocabulary; one token of each row.
"""

from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache

COPY_AFTER = 8
"""Tokens of one row after which the weights are copied: the 5 ms that it takes, for two layers of 512, are regained in
about twelve. A product of several rows gains nothing from it."""


class BareCells:
    """
    The cells of a model, for one text: made where that begins and dropped where it ends, with the copy of the layers'
    weights that a single row is written with from its ninth token on.

    Args:
        model (`LSTMForCausalLM`): One whose `bare_cells()` is not `None`.
    """

    def __init__(self, model):
        self.model, self.count = model, 0
        self.embeddings, self.output = model.model.embed_tokens.weight, model.lm_head.weight
        layers = model.model.layers
        self.gates = [
            (layer.input_gates.weight, layer.hidden_gates.weight, layer.input_gates.bias) for layer in layers
        ]

    def can_read_on(self, cache: Cache) -> bool:
        """Whether all that is asked of this state is what comes next: no states to roll back to, no compiled graph."""
        return all(
            layer.is_initialized and not layer.record_past and not layer.is_compileable for layer in cache.layers
        )

    @torch.no_grad()
    def read(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Scores `(B, V)` of what comes after `tokens` `(B,)`; the cache is brought up to them."""
        self.count += 1
        if self.count == COPY_AFTER and len(tokens) == 1:
            self.gates = [(_by_column(W), _by_column(U), b) for W, U, b in self.gates]
        x = F.embedding(tokens, self.embeddings)
        for layer, weights in zip(cache.layers, self.gates, strict=True):
            x, c = torch.lstm_cell(x, layer.get_state(), *weights)
            layer.update(x, c)
        return F.linear(x, self.output)


def _by_column(weight: torch.Tensor) -> torch.Tensor:
    return weight.t().contiguous().t()


_IN_USE: ContextVar[BareCells | None] = ContextVar("bare_cells", default=None)


@contextmanager
def writing_with(cells: BareCells | None):
    """What `generate()` runs in: its own thread's, and no other's."""
    token = _IN_USE.set(cells)
    try:
        yield
    finally:
        _IN_USE.reset(token)


def cells_in_use(model) -> BareCells | None:
    """Those of the `generate()` that is running, if it is this model's: an assistant has others."""
    cells = _IN_USE.get()
    return cells if cells is not None and cells.model is model else None
