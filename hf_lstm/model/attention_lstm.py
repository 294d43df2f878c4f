"""Attention over a window of tokens, for the layers of a hybrid model that are not LSTMs.

    x = x + O attention(Q y, K y, V y)        y = norm(x); Vaswani et al. 2017
    x = x + D (act(G norm(x)) ⊙ F norm(x))    gated MLP, optional: Shazeer 2020

A token attends to itself and the W - 1 real tokens of its document before it (Beltagy et al. 2020: a sliding window).
There are no positions: the LSTM layers know the order. Together they are the model of Merity 2019 (SHA-RNN) and of De et
al. 2024 (Griffin).

The state of a layer is its window: keys and values of the last W real tokens of each row's document, the newest last, and
which of them are there. Padding and former documents leave no trace in it. Tokens are read in blocks of at most W, so that
memory does not grow with their number.

Shapes: B batch, T tokens of this call or block, H width of the model, A heads, D = H / A; W tokens of a window; n entries,
carried ones and then those of T tokens.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_lstm import LAST, MAX_HISTORY, StateCacheLayer, StaticTensors
from .cells_lstm import State, at_least_float32, is_transformed
from .configuration_lstm import WINDOW_LAYER, LSTMConfig
from .layers_lstm import GatedMLP, RMSNorm, linear
from .recurrence_lstm import Reading
from .training_lstm import locked_dropout


class Entries(NamedTuple):
    """
    Entries of a window, the newest last.

    Args:
        keys, values (`(B, A, n, D)`): Those of each entry.
        real (`(B, n)`, *optional*): Whether an entry is a real token of the row's present document; `None` if all are.
    """

    keys: torch.Tensor
    values: torch.Tensor
    real: torch.Tensor | None

    def part(self, start: int, stop: int | None = None) -> "Entries":
        """Return some of them, as views."""
        real = None if self.real is None else self.real[:, start:stop]
        return Entries(self.keys[:, :, start:stop], self.values[:, :, start:stop], real)

    def followed_by(self, others: "Entries") -> "Entries":
        """Return these and then others."""
        keys, values = (torch.cat([old.to(new.dtype), new], 2) for old, new in zip(self[:2], others[:2], strict=True))
        real = None if self.real is None or others.real is None else torch.cat([self.real, others.real], 1)
        return Entries(keys, values, real)

    def last(self, size: int, document: torch.Tensor | None = None) -> "Entries":
        """
        Return the last `size` entries, or all of fewer. With `document` `(B, n)`, the number of the document of each entry,
        they are those that are real and of the last document, after zeros where a row has fewer.
        """
        first = max(0, self.keys.shape[2] - size)
        if document is None or self.real is None:
            if first == 0:
                return self
            keys, values, real = self.part(first)  # views, which would keep all entries alive
            return Entries(keys.clone(), values.clone(), None if real is None else real.clone())
        kept = self.real & (document == document[:, -1:])
        order = kept.long().argsort(dim=1, stable=True)[:, first:]  # (B, size)
        real = kept.gather(1, order)
        wide = order[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        keys, values = (part.gather(2, wide).masked_fill(~real[:, None, :, None], 0) for part in self[:2])
        return Entries(keys, values, real)

    def filled(self, size: int) -> "Entries":
        """Return `size` entries: these after zeros, which are not real."""
        keys, values, real = self
        real = keys.new_ones(keys.shape[0], keys.shape[2], dtype=torch.bool) if real is None else real
        if (missing := size - keys.shape[2]) == 0:
            return Entries(keys, values, real)
        keys, values = (F.pad(part, (0, 0, missing, 0)) for part in (keys, values))
        return Entries(keys, values, F.pad(real, (missing, 0)))


def visible(entries: Entries, length: int, window: int, document: torch.Tensor | None = None) -> torch.Tensor:
    """
    Return which of n entries each of the last T = `length` tokens attends to, `(T, n)` or `(B, T, n)`: itself and the
    `window` - 1 real ones of its document before it. `document` `(B, n)` numbers the documents; without it there are one and
    no padding among the T tokens.
    """
    at = torch.arange(entries.keys.shape[2], device=entries.keys.device)
    now = at[len(at) - length :, None]
    if document is None or entries.real is None:
        seen = (at <= now) & (at > now - window)
        return seen if entries.real is None else seen & entries.real[:, None]
    rank = entries.real.cumsum(1)
    first = len(at) - length
    near = rank[:, first:, None] - rank[:, None] < window
    same = document[:, first:, None] == document[:, None]
    seen = (at <= now) & near & same & entries.real[:, None]
    return seen | (at == now)  # padding sees itself, since the softmax of nothing is undefined


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compute attention by its equation, with the softmax in at least float32.

    Args:
        query (`(B, A, T, D)`), key, value (`(B, A, n, D)`): The heads.
        attention_mask (`(..., T, n)`): Whether a token attends to an entry.
        scaling (`float`): Factor of the products of queries and keys.

    Returns:
        The outputs, `(B, T, A, D)`, and the shares of the entries, `(B, A, T, n)`.
    """
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores.to(at_least_float32(scores.dtype)).masked_fill(~attention_mask, float("-inf"))
    weights = scores.softmax(dim=-1).to(value.dtype)
    return (weights @ value).transpose(1, 2), weights


class WindowAttention(nn.Module):
    """Attention over the window of each token."""

    is_causal, num_key_value_groups = True, 1  # for transformers' attention functions

    def __init__(self, config: LSTMConfig):
        super().__init__()
        size, heads = config.hidden_size, cast(int, config.num_attention_heads)
        self.config = config
        self.head_dim = size // heads
        self.scaling = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj = (linear(size, size) for _ in range(3))
        self.o_proj = linear(size, size, "branch")

    def forward(
        self,
        x: torch.Tensor,
        *window: torch.Tensor,
        reading: Reading | None = None,
        record: bool = False,
        maps: bool = False,
    ) -> tuple[Any, ...]:
        """
        Args:
            x (`(B, T, H)`): Input.
            window (`tuple`): Carried keys, values and which are there, as of [`Entries`].
            reading, record, maps: See [`WindowAttentionLayer`].

        Returns:
            `tuple`: The outputs, `(B, T, H)`; the map of an eager attention, `(B, A, T, n)`, if asked for; the window after the
            call; and, if recorded, the keys, values and which are real of its tokens, and where documents start, `(B, T)`.
        """
        size, shape = cast(int, self.config.attention_window), x.shape[:2]
        if reading is not None:  # a key that is not finite would reach all tokens, though none attends to it
            x = x.masked_fill(~reading.real[..., None], 0)
        query, new_keys, new_values = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        real = restarts = None  # of `real`: all are
        if reading is not None:
            real, restarts = reading.real, reading.restarts
        elif window[0].shape[2] > 0 or record:
            real = x.new_ones(shape, dtype=torch.bool)
        keys, values, is_there = window
        read, entries = Entries(keys, values, None if real is None else is_there), Entries(new_keys, new_values, real)
        attend = self.function()
        block = shape[1] if maps else size  # the map of a call is that of one block
        outputs = []
        for start in range(0, shape[1], block):
            part = slice(start, start + block)
            restart = None if restarts is None else restarts[:, part]
            output, weights, read = self.read(
                attend, query[:, :, part], read, entries.part(part.start, part.stop), restart, maps
            )
            outputs.append(output)
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        past: tuple[Any, ...] = ()
        if record:
            past = (*entries, x.new_zeros(shape, dtype=torch.bool) if restarts is None else restarts)
        return self.o_proj(joined.flatten(2)), weights, *read.filled(size), *past

    def function(self) -> Callable:
        """Return the function of `config._attn_implementation`; kernels support no transforms of `torch.func`."""
        implementation = "eager" if is_transformed() else self.config._attn_implementation
        return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)

    def read(
        self,
        attend: Callable,
        query: torch.Tensor,
        old: Entries,
        new: Entries,
        restarts: torch.Tensor | None,
        maps: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Entries]:
        """
        Read a block of T tokens, `query` `(B, A, T, D)`, after the window `old`. `restarts` `(B, T)` says where documents
        start, and is `None` without documents and padding.

        Returns:
            The outputs, `(B, T, A, D)`, the map or `None`, and the window after the block.
        """
        size, length = cast(int, self.config.attention_window), query.shape[2]
        is_eager = attend is eager_attention
        document = None
        if restarts is not None:
            document = F.pad(restarts.cumsum(1), (old.keys.shape[2], 0))
        elif old.keys.shape[2] == size and not maps:
            old = old.part(1)  # the oldest entry is out of sight
        entries, mask = old.followed_by(new), None
        if is_eager or entries.real is not None or entries.keys.shape[2] > length:
            mask = visible(entries, length, size, document)
            mask = mask if mask.ndim == 2 else mask[:, None]
        output, weights = attend(
            self, query, entries.keys, entries.values, mask, dropout=0.0, scaling=self.scaling, sliding_window=size
        )
        return output, weights, entries.last(size, document)


class WindowCacheLayer(StateCacheLayer):
    """
    The window of a layer of attention: `keys` and `values`, `(B, A, W, D)` each, and `real` `(B, W)`, which of these entries
    are there. While tokens are recorded, `past_...` hold the window before the first of them and then these.
    """

    _layer_type: str | None = WINDOW_LAYER  # registers the class for `DynamicCache(config=...)`
    layer_type = WINDOW_LAYER
    STATE: ClassVar = {"keys": 0, "values": 0, "real": False}
    KEPT: ClassVar = STATE | LAST
    BY_TOKEN = tuple(LAST)
    RECORD = ("past_keys", "past_values", "past_real", "past_starts")
    TENSORS = (*KEPT, *(f"past_{name}" for name in BY_TOKEN), *RECORD)

    real: Any
    past_values: Any
    past_real: Any
    past_starts: Any

    @staticmethod
    def shapes_of(config, index):
        heads, size = config.num_attention_heads, config.attention_window
        entries = (heads, size, config.hidden_size // heads)
        return {"keys": entries, "values": entries, "real": (size,)}

    @property
    def recorded(self) -> int:
        return 0 if self.past_real is None else self.past_real.shape[1] - self.real.shape[1]

    def update(  # type: ignore[override]  # a state has its own shape here
        self, *state: torch.Tensor, num_tokens: int = 1, past: State = (), **kwargs
    ) -> State:
        """
        Replace the window, and return it.

        Args:
            state (`tuple`): Keys, values and which are there, after the last token.
            num_tokens (`int`, defaults to 1): Number of columns read since the last update.
            past (`tuple`, *optional*):
                Keys and values of these columns, `(B, A, T, D)`, which are real and where documents start, `(B, T)`; needed
                while tokens are recorded.

        Raises:
            ValueError: if `past` is needed and not given.
        """
        if self.record_past and len(past) < len(self.RECORD):
            raise ValueError(
                f"`past` ({len(past)} tensors) must hold the keys and values of each token while tokens are recorded: give it, "
                "or call `update` before `activate_past_recording()`."
            )
        if not self.is_initialized:
            self.lazy_initialization(*state)
        if self.record_past:
            self._record(state, past)
        for name, part in zip(self.STATE, state, strict=True):
            self._set(name, part)
        self.cumulative_length += num_tokens
        return state

    def _record(self, state: State, new: State) -> None:
        """Append tokens to the record, the oldest of which go into the window before it."""
        size = state[0].shape[2]
        if self.past_keys is None:
            before = self.get_state() or tuple(torch.zeros_like(part) for part in state)
            self._set_record(Entries(*(part.clone() for part in before)), torch.zeros_like(before[2]))
        entries = self._entries().followed_by(Entries(*new[:3]))
        starts = torch.cat([self.past_starts, new[3]], 1)
        surplus = entries.keys.shape[2] - size - MAX_HISTORY
        if surplus > 0:
            first = size + surplus  # of the tokens that stay
            window = entries.part(0, first).last(size, starts[:, :first].cumsum(1))
            entries, starts = window.followed_by(entries.part(first)), F.pad(starts[:, first:], (size, 0))
        self._set_record(entries, starts)

    def _entries(self) -> Entries:
        return Entries(self.past_keys, self.past_values, self.past_real)

    def _set_record(self, entries: Entries, starts: torch.Tensor) -> None:
        vars(self).update(zip(self.RECORD, (*entries, starts), strict=True))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # checks the number
        if tokens_to_remove:
            stop = self.past_keys.shape[2] + tokens_to_remove
            left = self._entries().part(0, stop)
            for name, part in zip(
                self.STATE, left.last(self.real.shape[1], self.past_starts[:, :stop].cumsum(1)), strict=True
            ):
                self._set(name, part)
        vars(self).update(dict.fromkeys(self.RECORD))


class WindowStaticCacheLayer(StaticTensors, WindowCacheLayer):
    """The window of a layer of attention in tensors with fixed addresses."""

    _layer_type = None  # registered below: `CacheLayerMixin` takes only subclasses of `StaticLayer` for static


class WindowAttentionLayer(GradientCheckpointingLayer):
    """A layer of attention with a residual connection, and the gated MLP that may follow it."""

    cache_layer: type[Any] = WindowCacheLayer
    state_names = ("keys", "values", "real")
    returns_maps = True

    def __init__(self, config: LSTMConfig):
        super().__init__()
        self.config = config
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = WindowAttention(config)
        self.mlp = GatedMLP(config, config.intermediate_size) if config.intermediate_size is not None else None

    @property
    def output_size(self) -> int:
        """H."""
        return self.config.hidden_size

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of the keys of one row: (A, W, D)."""
        heads, window = cast(int, self.config.num_attention_heads), cast(int, self.config.attention_window)
        return (heads, window, self.self_attn.head_dim)

    def zero_state(self, x: torch.Tensor) -> State:
        """Return the window before the first token of `x` `(B, T, H)`, without entries."""
        heads, _, width = self.state_shape
        empty = x.new_zeros(len(x), heads, 0, width)
        return empty, empty, empty.new_zeros(len(x), 0, dtype=torch.bool)

    def forward(
        self,
        x: torch.Tensor,
        *window: torch.Tensor,
        reading: Reading | None = None,
        record: bool = False,
        maps: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            x (`(B, T, H)`): The residual stream.
            window (`tuple`): Carried keys and values, `(B, A, W, D)` each, and which are there, `(B, W)`.
            reading (`Segments` or `Steps`, *optional*): The tokens to read, where rows are padded or documents start.
            record (`bool`, defaults to `False`): Whether to return too what the cache keeps to take tokens back.
            maps (`bool`, defaults to `False`): Whether to return too the map of an eager attention.

        Returns:
            `tuple`: The stream, `(B, T, H)`; the window after the call; if recorded, keys and values of its tokens,
            `(B, A, T, D)` each, which are real and where documents start, `(B, T)` each; and the map, `(B, A, T, n)`.
        """
        p = self.config.hidden_dropout if self.training else 0
        output, weights, *states = self.self_attn(self.norm(x), *window, reading=reading, record=record, maps=maps)
        x = x + locked_dropout(output, p)
        if self.mlp is not None:
            x = x + locked_dropout(self.mlp(x), p)
        return x, *states, *((weights,) if maps else ())


STATIC_LAYER_TYPE_MAPPING[WINDOW_LAYER] = WindowStaticCacheLayer
