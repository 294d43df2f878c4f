"""Token after token through the bare cells of a stacked model on a CPU: what `generate()` and `Session` write with.

What lies between the cells is left out. Two layers of 512 in `generate()`, on two cores and in one run: 3.0 ms a token by
the model's own step, 2.3 through its cells, 1.9 once the weights lie column by column; and a small vocabulary spares a
quarter of what is read then.

Shapes: B batch, H width of the last cell; one token of each row.
"""

import itertools
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache

COPY_AFTER, COPY_UP_TO = 8, 2**24
"""Tokens of one row after which the layers' weights are copied, and how many weights at most: 5 ms, for two layers of 512,
that are regained in about fifteen tokens. Two or three rows lose by it, and a row of 1,024 gains nothing."""


class BareCells:
    """
    What a model does between `input_ids` and the output layer, for one text: made where that begins and dropped where it
    ends, with the copy of the layers' weights that a single row is written with from its ninth token on. Weights that
    change in the middle of a text go unnoticed.

    Args:
        model (`LSTMModel`): One of `LSTMLayer`s, between which there is nothing, on a CPU.
    """

    def __init__(self, model):
        self.model, self.count = model, 0
        gates = [(layer.input_gates, layer.hidden_gates) for layer in model.layers]
        self.embeddings, self.weights = model.embed_tokens.weight, [(W.weight, U.weight, W.bias) for W, U in gates]
        between = [model.norm, model.in_proj, model.out_proj]
        bypassed = [model, model.embed_tokens, *between, *model.layers, *itertools.chain(*gates)]
        self.size = sum(weight.numel() for weights in self.weights for weight in weights)
        self.modules = [vars(module) for module in bypassed]
        self.hooks = [hooks for module in bypassed for hooks in (module._forward_hooks, module._forward_pre_hooks)]

    def can_read(self, input_ids: torch.Tensor | None, cache: Cache | None, others: tuple = ()) -> bool:
        """
        Whether that is one token of each row after a state, no more is asked than what comes next, and the modules do
        nothing but what their weights say. `others` are the other arguments of a forward.
        """
        if input_ids is None or cache is None or input_ids.shape[1] != 1 or torch.is_grad_enabled():
            return False
        if any(self.hooks) or torch.is_autocast_enabled("cpu") or self.model.config.output_hidden_states:
            return False
        for module in self.modules:
            if module["training"] or "forward" in module or module.get("_compiled_call_impl"):
                return False
        if len(cache.layers) != len(self.weights) or len(self.weights) != self.model.config.num_hidden_layers:
            return False
        place = (self.embeddings.dtype, self.embeddings.device)
        for layer in cache.layers:
            if not layer.is_initialized or getattr(layer, "record_past", True) or layer.is_compileable:
                return False
            if len(layer.keys) != len(input_ids):
                return False
            if (layer.keys.dtype, layer.keys.device) != place or (layer.values.dtype, layer.values.device) != place:
                return False
        return all(other is None or other is False for other in others)

    def read(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """h of the last cell `(B, H)` after `tokens` `(B,)`; the cache is brought up to them."""
        self.count += 1
        if self.count == COPY_AFTER and len(tokens) == 1 and self.size <= COPY_UP_TO:
            self._copy()
        x = F.embedding(tokens, self.embeddings)
        for layer, weights in zip(cache.layers, self.weights, strict=True):
            x, c = torch.lstm_cell(x, layer.get_state(), *weights)
            layer.update(x, c)
        return x

    def _copy(self):
        """A quarter less is read at each token of a small vocabulary if W E is kept, for W_1 (E_v) = (W_1 E)_v."""
        (W, U, b), *others = self.weights
        size, width = self.embeddings.shape
        folded = W @ self.embeddings.t() if 4 * size <= width else None
        if folded is not None and folded.isfinite().all():  # or a zero of x would make nothing of what is none
            W = folded
            self.embeddings = torch.eye(size, dtype=W.dtype, device=W.device)  # x is a column's number, one-hot
        self.weights = [(_by_column(W), _by_column(U), b) for W, U, b in [(W, U, b), *others]]


def _by_column(weight: torch.Tensor) -> torch.Tensor:
    return weight.t().contiguous().t()


_IN_USE: ContextVar[BareCells | None] = ContextVar("bare_cells", default=None)


@contextmanager
def writing_with(cells: BareCells | None):
    """In this, the forwards of this thread, and no others, may write with them."""
    token = _IN_USE.set(cells)
    try:
        yield
    finally:
        _IN_USE.reset(token)


def cells_in_use(model) -> BareCells | None:
    """Those that this thread writes with, if they are this `LSTMModel`'s: an assistant has others."""
    cells = _IN_USE.get()
    return cells if cells is not None and cells.model is model else None
