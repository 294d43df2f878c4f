"""The state of an LSTM as a layer of a transformers `Cache`, so that every mode of `generate()` can carry it.

Shapes: B batch, T tokens of one call, H the width of the layer's cell, D that of the model's output.
"""

import copy

import torch
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin
from transformers.utils import is_torchdynamo_compiling

from .segments_lstm import UNKNOWN

LAYER_TYPE = "hf_lstm"
KEPT = {"keys": 0, "values": 0, "held": 0, "document": UNKNOWN}
"""The tensors that a layer keeps, and what each holds of a row that has read nothing."""
MAX_HISTORY = 1024
"""Tokens that can be rolled back: more than any assistant drafts between two checks, and a bound on the memory."""


class LSTMCacheLayer(CacheLayerMixin):
    """
    The state of one LSTM layer: `keys` holds h and `values` holds c, each of shape `(B, H)` however many tokens were
    read. `update` replaces the tensors and never writes into them, so a state may be part of an autograd graph.

    The first layer also keeps what no state says of the last token that each row has read (`remember`): `held`, the model's
    output `(B, D)`, which padding repeats, and `document` `(B,)`, its `seq_idx`. Each is `None` where it is not needed.

    After `activate_past_recording()` the states of the last `MAX_HISTORY` tokens are kept too, until `crop` rolls some
    of them back or `crop(0)` accepts them.
    """

    _layer_type = LAYER_TYPE  # registers the class for `DynamicCache(config=...)`
    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        self.cumulative_length = 0  # columns read, padding included: `generate()` slices its inputs with it
        self.record_past = False
        self.held = self.document = None
        # (B, n + 1, ...): the same after each of the last n tokens, and before them
        self.past_keys = self.past_values = self.past_held = self.past_document = None

    @property
    def nbytes(self) -> int:
        """Bytes of the state itself, without the history kept for rolling back."""
        return sum(state.nbytes for name in KEPT if (state := getattr(self, name)) is not None)

    def lazy_initialization(self, h: torch.Tensor, c: torch.Tensor) -> None:
        self.dtype, self.device = h.dtype, h.device
        self.is_initialized = True

    def get_state(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(h, c), each `(B, H)`, or `None` before the first token."""
        return (self.keys, self.values) if self.is_initialized else None

    def update(self, h, c, num_tokens: int = 1, trajectory=None, **kwargs):
        """
        Replace the state.

        Args:
            h, c (`torch.Tensor` of shape `(B, H)`): The state after the last token.
            num_tokens (`int`, defaults to 1): Columns read since the last update.
            trajectory (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
                h and c after each of them, `(B, T, H)`; needed while past states are recorded.
        """
        if self.record_past:
            for name, last, states in zip(("keys", "values"), (h, c), trajectory, strict=True):
                self._record(name, last, states)
        if not self.is_initialized:
            self.lazy_initialization(h, c)
        self._set("keys", h)
        self._set("values", c)
        self.cumulative_length += num_tokens
        return self.keys, self.values

    def remember(self, num_tokens: int, held=None, document=None) -> None:
        """
        Replace what the first layer keeps of each row's last token.

        Args:
            num_tokens (`int`): T.
            held (`torch.Tensor` of shape `(B, T, D)`, *optional*): The model's output at each token of the call.
            document (`torch.LongTensor` of shape `(B, T)`, *optional*): The `seq_idx` that each token leaves behind.
        """
        for name, states in (("held", held), ("document", document)):
            kept = getattr(self, name)
            if states is None and kept is not None and self.record_past:
                states = kept[:, None].expand(-1, num_tokens, *kept.shape[1:])  # none is told: they go on
            if states is None:
                continue
            last = states[:, -1].clone()  # a view would keep the whole call alive
            if self.record_past:
                self._record(name, last, states)
            self._set(name, last)

    def _set(self, name, state):
        setattr(self, name, state)

    def _record(self, name, last, states):
        past = getattr(self, f"past_{name}")
        if past is None:
            start = getattr(self, name)
            past = (torch.full_like(last, KEPT[name]) if start is None else start.clone())[:, None]
        setattr(self, f"past_{name}", torch.cat([past, states], dim=1)[:, -MAX_HISTORY - 1 :])

    def activate_past_recording(self) -> None:
        """Keep the states of the coming tokens, so that `crop` can take tokens back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """
        Take the last tokens back.

        Args:
            tokens_to_remove (`int`): How many, as a number of at most 0; 0 forgets the recorded states.

        Raises:
            ValueError: if those tokens' states were not recorded.
        """
        removed = -tokens_to_remove
        recorded = 0 if self.past_keys is None else self.past_keys.shape[1] - 1
        if not 0 <= removed <= recorded:
            raise ValueError(
                f"`tokens_to_remove` ({tokens_to_remove}) must lie in [-{recorded}, 0], the tokens whose states were "
                f"recorded: call `activate_past_recording()` before they are read (at most {MAX_HISTORY} are kept)."
            )
        for name in KEPT:
            past = getattr(self, f"past_{name}")
            if removed and past is not None:
                # a document may have been told after the recording began; a view would keep the whole history alive
                self._set(name, past[:, max(0, past.shape[1] - 1 - removed)].clone())
            setattr(self, f"past_{name}", None)
        self.cumulative_length -= removed

    def detach_(self) -> None:
        """Cut the state from the autograd graph that made it: truncated backpropagation through time."""
        self._map(torch.Tensor.detach)

    def reset(self) -> None:
        """Forget everything: the next row count may differ."""
        for name in KEPT:
            setattr(self, name, None)
            setattr(self, f"past_{name}", None)
        self.is_initialized = False
        self.cumulative_length = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda state: state[indices])

    def __deepcopy__(self, memo):
        """A copy of the numbers: torch refuses to copy what belongs to an autograd graph."""
        copied = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(copied, name, value.detach().clone())
        return copied

    def _map(self, function) -> None:
        for name in (*KEPT, *(f"past_{name}" for name in KEPT)):
            if (state := getattr(self, name)) is not None:
                setattr(self, name, function(state))

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length + self.cumulative_length, 0


class LSTMStaticCacheLayer(LSTMCacheLayer):
    """The same state in tensors whose addresses never change, for compiled decoding and CUDA graphs."""

    _layer_type = None  # registered below: `CacheLayerMixin` takes only subclasses of `StaticLayer` for static
    is_compileable = True

    def __init__(self, max_cache_len: int | None = None, **kwargs):
        super().__init__()
        self.cumulative_length = torch.tensor(0)  # a number would recompile the graph at every step

    def lazy_initialization(self, h, c):
        super().lazy_initialization(h, c)
        self.cumulative_length = self.cumulative_length.to(h.device)
        self._fix(self.cumulative_length)

    def _set(self, name, state):
        if getattr(self, name) is None:
            setattr(self, name, torch.empty_like(state))
            self._fix(getattr(self, name))
        getattr(self, name).copy_(state)

    def _fix(self, tensor):
        if not is_torchdynamo_compiling():
            torch._dynamo.mark_static_address(tensor)  # as transformers' StaticLayer does

    def reset(self):
        """Back to the zero state, in the same tensors."""
        for name, nothing in KEPT.items():
            setattr(self, f"past_{name}", None)
            if (state := getattr(self, name)) is not None:
                state.fill_(nothing)
        self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx):
        for name in KEPT:
            if (state := getattr(self, name)) is not None:
                self._set(name, state.index_select(0, beam_idx.to(state.device)))


def rows_that_read(cache: Cache | None) -> torch.Tensor | None:
    """`(B,)`: which rows have read a token, and so left the zero state; `None` if none has."""
    layer = cache.layers[0] if isinstance(cache, Cache) and cache.layers else None
    state = layer.get_state() if hasattr(layer, "get_state") else None
    return None if state is None else (state[0] != 0).any(dim=1)


def fitting_layers(cache: Cache | None, rows: int, num_layers: int, cell_sizes: list[int]) -> list | None:
    """
    The layers of `cache`, made here if it has none yet, once they are known to fit.

    Args:
        cache (`Cache`, *optional*): What came as `past_key_values`.
        rows (`int`): B.
        num_layers (`int`): Layers of the model.
        cell_sizes (`list[int]`): H of those that are run: fewer in an assistant that exits early.

    Raises:
        ValueError: if it is no cache of an LSTM, or the state in it is of another model or another number of rows.
    """
    if cache is None:
        return None
    if not isinstance(cache, Cache):
        raise ValueError(
            f"`past_key_values` ({type(cache).__name__}) must be a transformers `Cache`, "
            "such as `DynamicCache(config=model.config)`."
        )
    if not cache.layers:  # `DynamicCache()` does not know the model yet
        cache.layers.extend(LSTMCacheLayer() for _ in range(num_layers))
        cache.layer_class_to_replicate = None
    for layer in cache.layers:
        if not hasattr(layer, "get_state"):
            raise ValueError(
                f"`past_key_values` holds a {type(layer).__name__}, not the state of an LSTM: pass "
                "`DynamicCache(config=model.config)`. Keys and values of attention, as prefix tuning and other "
                "models give them, mean nothing here."
            )
    if len(cache.layers) != num_layers == len(cell_sizes):
        raise ValueError(
            f"`past_key_values` has {len(cache.layers)} layers and the model {num_layers}: it belongs to another model."
        )
    for layer, size in zip(cache.layers, cell_sizes, strict=False):
        if layer.is_initialized and layer.keys.shape[0] != rows:
            raise ValueError(
                f"`past_key_values` holds the state of {len(layer.keys)} rows and the input has {rows}: they must "
                "be equal. Give each beam or sequence its own state with "
                "`past_key_values.batch_repeat_interleave(n)`, or start from a new cache."
            )
        if layer.is_initialized and layer.keys.shape[1] != size:
            raise ValueError(
                f"`past_key_values` holds a state {layer.keys.shape[1]} wide and the model's is {size}: it belongs to "
                "another model."
            )
    return cache.layers


STATIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = LSTMStaticCacheLayer
