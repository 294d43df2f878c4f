"""The state of a recurrent model as layers of a transformers `Cache`, for every mode of `generate()`.

A layer keeps named tensors with a row for each of the batch (`KEPT`). Whatever happens to a state happens to all of them
by one protocol: map a function over them, detach, forget rows, record them after each token and crop the last of these.
attention_lstm.py has the layer for attention.

Shapes: B batch, T tokens of one call, H the width of the layer's cell, D that of the model's output.
"""

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin
from transformers.utils import is_torchdynamo_compiling

from .cells_lstm import CELLS, State
from .configuration_lstm import LSTM_LAYER, LSTMConfig
from .recurrence_lstm import UNKNOWN, hold

LAST = {"held": 0, "document": UNKNOWN, "read": False}
"""Data about the last token of each row, in the first layer, and the value of each in a row without tokens so far."""
MAX_HISTORY = 1024
"""Tokens that can be rolled back: more than any assistant drafts between two checks, and a limit on memory."""


class StateCacheLayer(CacheLayerMixin):
    """
    The state of one layer: tensors with a row for each of the batch, of a size that does not depend on the tokens read.
    `update` replaces the tensors and never writes into them, so a state may be part of an autograd graph.

    The first layer also keeps data about the last token of each row that is not part of the state (`remember`):
    `held`, the model's output `(B, D)`, which padding repeats; `document` `(B,)`, its `seq_idx`; and `read` `(B,)`,
    whether there was one. Each is `None` where not needed: without `read`, all rows have read.

    After `activate_past_recording()` the states of the last `MAX_HISTORY` tokens are kept too, until `crop` rolls some
    of them back or `crop(0)` accepts them.

    Attributes:
        layer_type (`str`): The type of the layer in `config.layer_types`.
        STATE (`dict`): The tensors of the state, and the value of each in a row without tokens so far.
        KEPT (`dict`): These and `LAST`.
        BY_TOKEN (`tuple`): Those that are recorded after each token.
        TENSORS (`tuple`): Names of all tensors, those of the record too, each with a row for each of the batch.
        SAVED_AS (`dict`): Names of kept tensors in files, where they differ.
    """

    layer_type: ClassVar[str]
    STATE: ClassVar[dict[str, Any]]
    KEPT: ClassVar[dict[str, Any]]
    BY_TOKEN: ClassVar[tuple[str, ...]]
    TENSORS: ClassVar[tuple[str, ...]]
    SAVED_AS: ClassVar[dict[str, str]] = {}
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    held: torch.Tensor | None
    document: torch.Tensor | None
    read: torch.Tensor | None
    past_keys: Any

    def __init__(self, **kwargs) -> None:
        super().__init__()
        # Columns read, padding included, by which `generate()` slices its inputs: an `int`, or a tensor in a static
        # layer.
        self.cumulative_length: Any = 0
        self.record_past = False
        self.plain_step: Any = None  # in the first layer: the generation_lstm.PlainStep that reads this text
        # `past_...`, (B, n + 1, ...): the same tensors before the last n tokens and after each of them
        vars(self).update(dict.fromkeys(self.TENSORS))

    @property
    def nbytes(self) -> int:
        """Size of the state in bytes, without the history kept for rolling back."""
        return sum(state.nbytes for name in self.KEPT if (state := getattr(self, name)) is not None)

    @property
    def recorded(self) -> int:
        """Number of tokens that can be taken back."""
        return 0 if self.past_keys is None else self.past_keys.shape[1] - 1

    @staticmethod
    @abstractmethod
    def shapes_of(config: LSTMConfig, index: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the state of one row in layer `index`, by the names of the tensors in files."""

    def lazy_initialization(self, first: torch.Tensor, *others: torch.Tensor) -> None:
        self.dtype, self.device = first.dtype, first.device
        self.is_initialized = True

    def get_state(self, device: torch.device | None = None) -> State | None:
        """Return the tensors of the state, on a device if asked; `None` before the first token."""
        if self.keys is None:
            return None
        state = tuple(part for name in self.STATE if (part := getattr(self, name)) is not None)
        return state if device is None else tuple(part.to(device) for part in state)

    def hold(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Repeat the output `x` `(B, T, D)` of the last real token, of this call or an earlier one, over padding."""
        return hold(x, x.new_zeros(x.shape[0], x.shape[2]) if self.held is None else self.held.to(x), real)

    def rows_read(self) -> torch.Tensor | None:
        """Return which rows have read a token, `(B,)`; `None` if none has."""
        if self.keys is None or self.read is not None:
            return self.read
        return torch.ones(len(self.keys), dtype=torch.bool, device=self.keys.device)

    def read_after(self, real: torch.Tensor) -> torch.Tensor:
        """Return whether each row has read a token after each of this call, `(B, T)`, of which `real` `(B, T)` are read."""
        read, before = real.cumsum(dim=1) > 0, self.rows_read()
        if before is None:
            return read
        if self.read is None:
            self._set("read", before)
        return read | before[:, None].to(read.device)

    def remember(
        self,
        num_tokens: int,
        held: torch.Tensor | None = None,
        document: torch.Tensor | None = None,
        read: torch.Tensor | None = None,
    ) -> None:
        """
        Replace the data that the first layer keeps about the last token of each row.

        Args:
            num_tokens (`int`): T.
            held (`torch.Tensor` of shape `(B, T, D)`, *optional*): The model's output at each token of the call.
            document (`torch.LongTensor` of shape `(B, T)`, *optional*): The `seq_idx` after each token.
            read (`torch.BoolTensor` of shape `(B, T)`, *optional*):
                Whether the row has read a token by then, in this call or an earlier one; needed where rows are padded.
        """
        if read is None and self.read is not None:
            read = torch.ones_like(self.read)[:, None].expand(-1, num_tokens)
        for name, states in (("held", held), ("document", document), ("read", read)):
            kept = getattr(self, name)
            if states is None and kept is not None and self.record_past:
                states = kept[:, None].expand(-1, num_tokens, *kept.shape[1:])  # unchanged by these tokens
            if states is None:
                continue
            self._replace(name, states[:, -1].clone(), states)  # a view would keep the whole call alive

    def _set(self, name, state):
        setattr(self, name, state)

    def _replace(self, name, last, states):
        if self.record_past:
            past = getattr(self, f"past_{name}")
            if past is None:
                start = getattr(self, name)
                past = (torch.full_like(last, self.KEPT[name]) if start is None else start.clone())[:, None]
            setattr(self, f"past_{name}", torch.cat([past, states], dim=1)[:, -MAX_HISTORY - 1 :])
        self._set(name, last)

    def activate_past_recording(self) -> None:
        """Start recording the states of new tokens, so that `crop` can remove tokens."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """
        Remove the last tokens.

        Args:
            tokens_to_remove (`int`): Their number, negated; 0 accepts all and drops the recorded states.

        Raises:
            ValueError: if the states of those tokens were not recorded.
        """
        removed, recorded = -tokens_to_remove, self.recorded
        if not 0 <= removed <= recorded:
            raise ValueError(
                f"`tokens_to_remove` ({tokens_to_remove}) must lie in [-{recorded}, 0], the tokens whose states were "
                f"recorded: call `activate_past_recording()` before they are read (at most {MAX_HISTORY} are kept)."
            )
        for name in self.BY_TOKEN:
            past = getattr(self, f"past_{name}")
            if removed and past is not None:
                # `document` may be recorded later than the others; a view would keep the whole history alive
                self._set(name, past[:, max(0, past.shape[1] - 1 - removed)].clone())
            setattr(self, f"past_{name}", None)
        self.cumulative_length -= removed

    def detach_(self) -> None:
        """Detach the state from its autograd graph, for truncated backpropagation through time."""
        self._map(torch.Tensor.detach)

    def forget(self, rows: torch.Tensor) -> None:
        """Set the state of some rows, `(B,)`, to that before the first token."""
        for name, initial in self.STATE.items():
            if (state := getattr(self, name)) is not None:
                chosen = rows.to(state.device).view(-1, *(1 for _ in state.shape[1:]))
                self._set(name, state.masked_fill(chosen, initial))

    def reset(self) -> None:
        """Drop the state and the history: the next batch may have another number of rows."""
        vars(self).update(dict.fromkeys(self.TENSORS))
        self.is_initialized = False
        self.cumulative_length = 0
        self.plain_step = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda state: state[indices])

    def offload(self) -> None:
        self._map(lambda state: state.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.keys is not None and self.keys.device != self.device:
            self._map(lambda state: state.to(self.device, non_blocking=True))

    def __deepcopy__(self, memo):
        """Return a detached copy, since torch refuses to copy tensors that are part of an autograd graph."""
        copied = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(copied, name, value.detach().clone())
        return copied

    def __getstate__(self):
        """Leave the copy of the weights out of a pickle."""
        return vars(self) | {"plain_step": None}

    def _map(self, function) -> None:
        for name in self.TENSORS:
            if (state := getattr(self, name)) is not None:
                setattr(self, name, function(state))

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length + self.cumulative_length, 0


class LSTMCacheLayer(StateCacheLayer):
    """
    The state of a cell: `keys` holds h and `values` holds c, or `None` for a cell without c, each of shape `(B, H)`
    however many tokens were read.
    """

    _layer_type: str | None = LSTM_LAYER  # registers the class for `DynamicCache(config=...)`
    layer_type = LSTM_LAYER
    STATE: ClassVar = {"keys": 0, "values": 0}
    KEPT: ClassVar = STATE | LAST
    BY_TOKEN = tuple(KEPT)
    TENSORS = (*KEPT, *(f"past_{name}" for name in BY_TOKEN))
    SAVED_AS: ClassVar = {"keys": "h", "values": "c"}

    def get_state(self, device=None):  # the same, faster: it is called for every token
        if self.keys is None:
            return None
        state = (self.keys,) if self.values is None else (self.keys, self.values)
        return state if device is None else tuple(part.to(device) for part in state)

    @staticmethod
    def shapes_of(config, index):
        return dict.fromkeys(CELLS[config.cell_type].states, (config.cell_sizes[index],))

    def update(  # type: ignore[override]  # a state has its own shape here
        self, *state: torch.Tensor, num_tokens: int = 1, past: State = (), **kwargs
    ) -> State:
        """
        Replace the state, and return it.

        Args:
            state (`(B, H)` each): h and, where the cell has it, c after the last token.
            num_tokens (`int`, defaults to 1): Number of columns read since the last update.
            past (`tuple` of `(B, T, H)`, *optional*): The same after each of them; needed while past states are recorded.

        Raises:
            ValueError: if it is needed and not given.
        """
        if self.record_past and len(past) < len(state):
            raise ValueError(
                f"`past` ({len(past)} tensors) must hold the state after each token while past states are recorded: give it, "
                "or call `update` before `activate_past_recording()`."
            )
        if not self.is_initialized:
            self.lazy_initialization(*state)
        for name, last, states in zip(self.STATE, state, past or (None, None), strict=False):
            self._replace(name, last, states)
        self.cumulative_length += num_tokens
        return state


class StaticTensors(StateCacheLayer):
    """A state in tensors with fixed addresses, for compiled decoding and CUDA graphs."""

    is_compileable = True

    def __init__(self, max_cache_len: int | None = None, **kwargs):
        super().__init__()
        self.cumulative_length = torch.tensor(0)  # an `int` would recompile the graph at every step

    def lazy_initialization(self, first, *others):
        super().lazy_initialization(first)
        self.cumulative_length = self.cumulative_length.to(first.device)
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
        """Set the state to that before the first token, in the same tensors."""
        vars(self).update(dict.fromkeys(name for name in self.TENSORS if name not in self.KEPT))
        for name, initial in self.KEPT.items():
            if (state := getattr(self, name)) is not None:
                state.fill_(initial)
        self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx):
        for name in self.KEPT:
            if (state := getattr(self, name)) is not None:
                self._set(name, state.index_select(0, beam_idx.to(state.device)))


class LSTMStaticCacheLayer(StaticTensors, LSTMCacheLayer):
    """The state of a cell in tensors with fixed addresses."""

    _layer_type = None  # registered below: `CacheLayerMixin` takes only subclasses of `StaticLayer` for static


def rows_that_read(cache: Cache | None) -> torch.Tensor | None:
    """Return which rows of a cache have read a token, `(B,)`; `None` for an empty one."""
    layer: Any = cache.layers[0] if isinstance(cache, Cache) and cache.layers else None
    return layer.rows_read() if hasattr(layer, "rows_read") else None


def prepare_cache_layers(cache: Cache | None, rows: int, layers: Sequence[Any], all_layers: Any) -> Sequence[Any]:
    """
    Return the layers of a cache, after checking kinds, rows and widths; new ones without a cache or for an empty one.

    Args:
        cache (`Cache`, *optional*): The `past_key_values` of a forward.
        rows (`int`): B.
        layers (`Sequence`): The model's layers that are run: fewer in an assistant that exits early.
        all_layers (`nn.ModuleList`): All its layers.

    Raises:
        ValueError: if the cache is not that of a recurrent model, or its state belongs to another model or number of rows.
    """
    if cache is None:
        return [layer.cache_layer() for layer in layers]
    if not isinstance(cache, Cache):
        raise ValueError(
            f"`past_key_values` ({type(cache).__name__}) must be a transformers `Cache`, "
            "such as `DynamicCache(config=model.config)`."
        )
    if not cache.layers:  # `DynamicCache()` does not know the model yet
        cache.layers.extend(layer.cache_layer() for layer in all_layers)
        cache.layer_class_to_replicate = None
    kept: list[Any] = cache.layers
    for found in kept:
        if not hasattr(found, "get_state"):
            raise ValueError(
                f"`past_key_values` holds a {type(found).__name__}, not the state of an LSTM: pass "
                "`DynamicCache(config=model.config)`, since an LSTM cannot use the keys and values of attention that "
                "prefix tuning and other models give."
            )
    if len(kept) != len(all_layers) == len(layers):
        raise ValueError(
            f"`past_key_values` has {len(kept)} layers and the model {len(all_layers)}: it belongs to another model."
        )
    for index, (found, layer) in enumerate(zip(kept, layers, strict=False)):
        if found.layer_type != layer.cache_layer.layer_type:
            raise ValueError(
                f"`past_key_values` has layer {index} of type {found.layer_type!r} and the model's is "
                f"{layer.cache_layer.layer_type!r}: it belongs to a model of other `layer_types`."
            )
        if not found.is_initialized:
            continue
        if found.keys.shape[0] != rows:
            raise ValueError(
                f"`past_key_values` holds the state of {len(found.keys)} rows and the input has {rows}, and they must "
                "be equal: give each beam or sequence its own state with "
                "`past_key_values.batch_repeat_interleave(n)`, or start from a new cache."
            )
        names = layer.state_names
        if (number := len(found.get_state())) != len(names):
            raise ValueError(
                f"`past_key_values` holds {number} tensors a layer and the model's cells have {len(names)} "
                f"({', '.join(names)}): it belongs to a model of another `cell_type`."
            )
        if found.keys.shape[1:] != layer.state_shape:
            size, expected = (" x ".join(map(str, shape)) for shape in (found.keys.shape[1:], layer.state_shape))
            raise ValueError(
                f"`past_key_values` holds a state of {size} numbers a row and the model's has {expected}: it belongs to another model."
            )
    return kept


def state_tensors(cache: Cache) -> dict[str, torch.Tensor]:
    """Return the tensors of a state by their names in files: `layers.{index}.h`, `.c` and, where kept, others."""
    layers: list[Any] = cache.layers
    return {
        f"layers.{index}.{layer.SAVED_AS.get(name, name)}": state.detach().contiguous()
        for index, layer in enumerate(layers)
        for name in layer.KEPT
        if (state := getattr(layer, name)) is not None
    }


def load_state_tensors(
    cache: Cache, tensors: dict[str, torch.Tensor], num_tokens: int = 1, device: torch.device | str | None = None
) -> None:
    """Fill an empty cache with the tensors of `state_tensors`, the state after `num_tokens` tokens."""
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        found = {name: tensors.get(f"layers.{index}.{layer.SAVED_AS.get(name, name)}") for name in layer.KEPT}
        states = {name: state.to(device) for name, state in found.items() if state is not None}
        layer.update(*(states.pop(name) for name in layer.STATE if name in states), num_tokens=num_tokens)
        for name, state in states.items():
            setattr(layer, name, state)


STATIC_LAYER_TYPE_MAPPING[LSTM_LAYER] = LSTMStaticCacheLayer
