"""The recurrence of a layer: given gates, a state and the tokens to read, run it.

A segment is a run of real tokens of one row that share a state: it excludes padded tokens, and the first token of a
document begins a new one. The segments of all rows are read side by side, as the rows of a packed sequence
(`torch.nn.utils.rnn.PackedSequence`): each step reads one token of every segment that still has one, longest first.

The kernels agree (tests/test_properties.py): `select_kernel` says which one runs where.

Shapes: B rows of T tokens, S segments, N real tokens in all, D width of the input, H width of the cell.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .cells_lstm import (
    Cell,
    Gates,
    State,
    are_few,
    explicit,
    fused,
    is_plain,
    is_traced,
    is_transformed,
    is_untouched,
    masked,
)

# Steps from which torch's fused LSTM is faster than the explicit one without gradients. Two CPU cores, 512 wide,
# batch 1: one step 0.77 against 0.26 ms, 16 steps 1.6 against 2.1 ms.
FUSED_STEPS = {"cpu": 16, "cuda": 2}

UNKNOWN = torch.iinfo(torch.int64).min
"""The document number of a row without tokens so far."""


class Recurrence(NamedTuple):
    """
    Result of a layer's recurrence: `outputs` `(B, T, H)`; the state at the end of each row, `(B, H)` for each of its
    tensors; and, if recorded, the state after each token, `(B, T, H)` for each.
    """

    outputs: torch.Tensor
    state: State
    past: State = ()


def run_cell(
    cell: Cell,
    x: torch.Tensor,
    state: State,
    gates: Gates,
    reading: "Rows | Reading | None" = None,
    record: bool = False,
    tokens: torch.Tensor | None = None,
    embeddings: torch.Tensor | None = None,
) -> Recurrence:
    """
    Run the recurrence of a layer.

    Args:
        cell (`Cell`): Its cell.
        x (`(B, T, D)`): Input.
        state (`tuple` of `(B, H)`): State to start from.
        gates (`Gates`): The cell's modules.
        reading (`Segments` or `Steps`, *optional*): The tokens to read; by default all, each row as one document.
        record (`bool`, defaults to `False`): Whether to return the states after each token too.
        tokens (`(B, T)`), embeddings (`(K, D)`) (*optional*): x as `embeddings[tokens]`, of K distinct tokens, on a CPU.
    """
    reading = reading or Rows(*x.shape[:2])
    kernel = select_kernel(x, state, gates, reading, record)
    if kernel == "single":
        state = cell.single(x[:, 0], state, gates.weights())
        return Recurrence(state[0][:, None], state)
    if isinstance(reading, Steps):  # the kernel is "masked"
        steps, state = masked(cell, x, state, reading.real, reading.restarts, gates)
        past = tuple(torch.stack(parts, dim=1) for parts in zip(*steps, strict=True))
        return Recurrence(past[0], state, past if record else ())
    packed, start = reading.pack(x), tuple(reading.start(part) for part in state)
    if kernel == "fused":
        lookup = embeddings is not None and are_few(embeddings, packed)
        packed, known = (reading.pack(tokens), embeddings) if lookup else (packed, None)
        outputs, last = fused(cell, packed, start, reading.batch_sizes, gates, known)
    else:
        steps, last = explicit(cell, packed, start, reading.batch_sizes, gates)
        outputs = torch.cat([parts[0] for parts in steps])
    past = ()
    outputs = reading.unpack(outputs, state[0])
    if record:
        others = [torch.cat(parts) for parts in list(zip(*steps, strict=True))[1:]]
        past = (outputs, *(reading.unpack(part, carried) for part, carried in zip(others, state[1:], strict=True)))
    ends = tuple(reading.end(part, carried) for part, carried in zip(last, state, strict=True))
    return Recurrence(outputs, ends, past)


def select_kernel(x: torch.Tensor, state: State, gates: Gates, reading: "Rows | Reading", record: bool) -> str:
    """
    Choose the kernel of [`run_cell`]. The first line that applies decides:

        masked      `Steps` are read
        explicit    gates with adapters, quantisers or hooks; recorded states; a device, an export or a `torch.func`
                    transform that torch's kernels do not support
        fused       gradients are needed
        single      one token of every row on a CPU
        fused       at least `FUSED_STEPS` steps
        explicit    fewer
    """
    device, steps = x.device.type, len(reading.batch_sizes)
    if isinstance(reading, Steps):
        return "masked"
    if record or not gates.are_plain():
        return "explicit"
    if steps == 0 or device not in FUSED_STEPS or torch.compiler.is_exporting() or is_transformed():
        return "explicit"
    if torch.is_grad_enabled():
        return "fused"
    if isinstance(reading, Rows) and steps == 1 and device == "cpu" and gates.hidden_weight is None:
        one_type = {x.dtype, gates.input_gates.weight.dtype, *(part.dtype for part in state)}
        if len(one_type) == 1 and not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()):
            return "single"
    return "fused" if steps >= FUSED_STEPS[device] else "explicit"


def reads_embeddings(model: Any, kind: type, input_ids: torch.Tensor) -> bool:
    """
    Return whether the first layer of an `LSTMModel` may multiply distinct tokens once: on a CPU, in float32 or float64, from
    `FUSED_STEPS` tokens a row on, neither traced nor transformed. The layer must be a `kind` whose activations are not
    recomputed, no features may be dropped or projected before it, and no module may do more than its own forward.
    """
    embed, layer = model.embed_tokens, model.layers[0]
    is_dropped = model.training and model.config.input_dropout > 0
    return (
        input_ids.shape[1] >= FUSED_STEPS["cpu"]
        and not (is_dropped or is_traced() or is_transformed())
        and is_plain(embed, nn.Embedding)
        and not embed.scale_grad_by_freq
        and embed.weight.device.type == input_ids.device.type == "cpu"
        and embed.weight.dtype in (torch.float32, torch.float64)
        and is_untouched(model.in_proj, {nn.Identity})
        and is_untouched(layer, {kind})
        and not (layer.cell.has_rounds or (layer.gradient_checkpointing and layer.training))
    )


@dataclass
class Rows:
    """Rows of one length, each read as a whole."""

    rows: int
    length: int

    @property
    def batch_sizes(self) -> list[int]:
        return [self.rows] * self.length

    def pack(self, x):  # (B, T, D) -> (T B, D)
        return x.transpose(0, 1).flatten(0, 1)

    def unpack(self, y, carried):  # (T B, D) -> (B, T, D)
        return y.unflatten(0, (self.length, self.rows)).transpose(0, 1)

    def start(self, carried):
        return carried

    def end(self, state, carried):
        return state


@dataclass
class Segments:
    """
    Segments of the rows of a batch, as index tensors.

    Args:
        tokens (`(N,)`): Index of each token among the `B T` of the batch, in the order of reading.
        starts (`(S,)`): The row whose carried state a segment continues; `B` stands for the zero state.
        outputs (`(B T,)`): Index of each batch token's output among the `N`: its own, or for padding the last
            before it; `N + b` stands for the carried h of row `b`.
        real (`(B, T)`): Whether each token of the batch is read.
        firsts (`(B, T)`): Whether it is the first of its segment.
        ends (`(B,)`): The last segment of each row; `S + b` stands for the carried state of row `b`, unchanged.
        batch_sizes (`list[int]`): Number of segments that are read at each step.
    """

    tokens: torch.Tensor
    starts: torch.Tensor
    outputs: torch.Tensor
    real: torch.Tensor
    firsts: torch.Tensor
    ends: torch.Tensor
    batch_sizes: list[int]

    def to(self, device: torch.device | str | int, **kwargs) -> "Segments":
        """Copy to `device`: accelerate calls this when layers are on several devices."""
        indices = {name: index for name, index in vars(self).items() if name != "batch_sizes"}
        return replace(self, **{name: index.to(device, **kwargs) for name, index in indices.items()})

    @property
    def restarts(self) -> torch.Tensor:
        """Whether a segment starts from the zero state at each token, `(B, T)`."""
        places = torch.zeros_like(self.real).flatten()
        places[self.tokens[: len(self.starts)]] = self.starts == len(self.real)
        return places.view_as(self.real)

    def pack(self, x):  # (B, T, D) -> (N, D)
        return x.flatten(0, 1)[self.tokens]

    def unpack(self, y, carried):  # (N, D), (B, D) -> (B, T, D)
        return torch.cat([y, carried])[self.outputs].unflatten(0, (len(carried), -1))

    def start(self, carried):  # (B, D) -> (S, D)
        return torch.cat([carried, carried.new_zeros(1, carried.shape[1])])[self.starts]

    def end(self, state, carried):  # (S, D), (B, D) -> (B, D)
        return torch.cat([state, carried])[self.ends]


@dataclass
class Steps:
    """
    Tokens to read where data may not be copied to the host and shapes may not depend on values: every row takes part
    in every step (`masked`).

    Args:
        real, restarts (`(B, T)`): Whether each token is read, and whether a document starts with it.
    """

    real: torch.Tensor
    restarts: torch.Tensor

    @property
    def batch_sizes(self) -> list[int]:
        return [self.real.shape[0]] * self.real.shape[1]

    def to(self, device: torch.device | str | int, **kwargs) -> "Steps":
        return Steps(self.real.to(device, **kwargs), self.restarts.to(device, **kwargs))

    @property
    def firsts(self) -> torch.Tensor:
        """Whether each token is the first real one of its row, or the first of a document, `(B, T)`."""
        return self.restarts | (self.real & (self.real.long().cumsum(1) == 1))


Reading = Segments | Steps
"""Tokens to read in rows with padding or several documents."""


def hold(x: torch.Tensor, held: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """
    Repeat `x` `(B, T, ...)` of the last real token over padding, and `held` `(B, ...)` before the first. `real`
    `(B, T)` marks real tokens.
    """
    steps = torch.arange(real.shape[1], device=real.device).expand_as(real)
    places = torch.where(real, steps, -1).cummax(dim=1).values + 1  # (B, T) indices into `known`
    known = torch.cat([held[:, None], x], dim=1)  # (B, T + 1, ...)
    return known.gather(1, places.view(*places.shape, *(1 for _ in x.shape[2:])).expand_as(x))


def find_reading(
    x: torch.Tensor,
    cache_layer: Any,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
) -> "tuple[Reading | None, torch.Tensor | None]":
    """
    Find which tokens of `x` `(B, T, D)` to read, and where documents start: where `position_ids` is 0, where `seq_idx`
    changes, and at each of `cu_seq_lens[:-1]`.

    Args:
        x (`(B, T, D)`): Input.
        cache_layer (`LSTMCacheLayer`): First layer of the carried state.
        attention_mask, position_ids, seq_idx, cu_seq_lens (*optional*): See [`LSTMModel`].

    Returns:
        The tokens to read, or `None` for rows that are read as a whole; and, if `seq_idx` is given, its value after
        each token, `(B, T)`.

    Raises:
        ValueError: if the shape of a tensor does not match the batch.
    """
    if attention_mask is position_ids is seq_idx is cu_seq_lens is None:
        return None, None
    shape, device = x.shape[:2], x.device
    carried, document = cache_layer.is_initialized, cache_layer.document
    real = _real(attention_mask, shape, cache_layer, device)
    restarts = torch.zeros(shape, dtype=torch.bool, device=device)
    if cu_seq_lens is not None:
        restarts = restarts | _starts(cu_seq_lens, shape, device)
    if position_ids is not None:
        restarts = restarts | (_of_batch("position_ids", position_ids, shape, device) == 0)
    documents = None
    if seq_idx is not None:
        seq_idx = _of_batch("seq_idx", seq_idx, shape, device)
        if document is None:
            document = seq_idx.new_full((shape[0],), UNKNOWN)
        document = document.to(device)
        documents = hold(seq_idx, document, real)
        before = torch.cat([document[:, None], documents[:, :-1]], dim=1)
        restarts = restarts | ((seq_idx != before) & (before != UNKNOWN))
    restarts = restarts & real
    if is_transformed() or (shape[1] == 1 and torch.compiler.is_compiling()):
        return Steps(real, restarts), documents
    return find_segments(real, restarts, carried, cu_seq_lens), documents


@torch.compiler.disable  # index arithmetic on the host, whose results are lists and data-dependent shapes
def find_segments(
    real: torch.Tensor, restarts: torch.Tensor, carried: bool, cu_seq_lens: torch.Tensor | None = None
) -> Segments | None:
    """
    Find the segments of a batch whose tokens are `real` and start documents at `restarts`, each `(B, T)`; `None` if
    each row is one segment without padding. `carried` says whether rows have a state. Copies to the host once.

    Raises:
        ValueError: if `cu_seq_lens` does not ascend from 0 to `B T`.
    """
    (rows, length), shape, device = real.shape, real.shape, real.device
    on_device = [real, restarts]
    if cu_seq_lens is not None:
        ascending = cu_seq_lens.new_tensor([0]), cu_seq_lens.flatten(), cu_seq_lens.new_tensor([rows * length])
        places = torch.cat(ascending)
        is_wrong = (places.diff() < 0).any() | (places[1] != 0) | (places[-2] != places[-1])
        on_device.append(is_wrong.to(device).expand(shape))
    real, restarts, *wrong = torch.stack(on_device).cpu()
    if cu_seq_lens is not None and wrong[0].any():
        raise ValueError(
            f"`cu_seq_lens_q` ({str(cu_seq_lens.flatten().tolist())[:60]}) must ascend from 0 to {rows * length}, the number of "
            "tokens: it says where each document starts among those of the batch. For beams, several sequences or prompts in "
            "chunks give `position_ids` instead, which are 0 where a document starts."
        )

    if real.all() and not (restarts if carried else restarts[:, 1:]).any():
        return None

    tokens = real.flatten().nonzero().squeeze(1)  # (N,) row by row
    row = tokens // length
    new_row = torch.ones_like(tokens, dtype=torch.bool)
    new_row[1:] = row[1:] != row[:-1]
    restart = restarts.flatten()[tokens]
    first = new_row | restart
    segment = first.cumsum(0) - 1  # (N,) the segment of each token
    lengths = segment.bincount()  # (S,)
    step = torch.arange(len(tokens), device="cpu") - first.nonzero().squeeze(1)[segment]  # (N,) in the segment
    longest = lengths.argsort(descending=True, stable=True)  # (S,)
    rank = longest.argsort()  # (S,) the position of each segment in the packed sequence
    order = (step * len(lengths) + rank[segment]).argsort()  # (N,) of reading
    place = order.argsort()  # (N,) position of each token in that order

    last = real.flatten().cumsum(0) - 1  # (B T,) the last real token so far, of any row
    every_row = torch.arange(rows, device="cpu")
    row_of = every_row.repeat_interleave(length)
    if len(tokens) == 0:  # only padding: the carried states stay
        outputs, ends = row_of, every_row
    else:
        known = (last >= 0) & (row[last] == row_of)
        outputs = torch.where(known, place[last], len(tokens) + row_of)
        last, known = last.view(shape)[:, -1], known.view(shape)[:, -1]
        ends = torch.where(known, rank[segment[last]], len(lengths) + every_row)
    starts = torch.where(restart, rows, row)[first][longest]
    firsts = torch.zeros_like(real).flatten()
    firsts[tokens[first]] = True
    batch_sizes = step.bincount().tolist()
    return Segments(tokens[order], starts, outputs, real, firsts.view(shape), ends, batch_sizes).to(device)


def _real(attention_mask, shape, cache_layer, device):
    """Return whether each token is read, `(B, T)`. A mask may begin with columns for tokens read earlier."""
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    wider = cache_layer.is_initialized and attention_mask.ndim == 2 and attention_mask.shape[1] > shape[1]
    if attention_mask.shape != shape and not (wider and len(attention_mask) == shape[0]):
        raise ValueError(
            f"`attention_mask` of shape {tuple(attention_mask.shape)} must be {tuple(shape)}, a column for each token of "
            "the input; with a state in `past_key_values` it may begin with columns for the tokens read before."
        )
    if wider and not is_traced() and attention_mask.shape[1] - shape[1] > (read := int(cache_layer.cumulative_length)):
        raise ValueError(
            f"`attention_mask` of shape {tuple(attention_mask.shape)} begins with {attention_mask.shape[1] - shape[1]} columns "
            f"for tokens read before, and `past_key_values` has read {read}: leave out those of other tokens."
        )
    return (attention_mask[:, -shape[1] :] != 0).to(device)


def _starts(cu_seq_lens, shape, device):
    """Return whether a document starts at each token by the cumulative lengths, `(B, T)`."""
    size = shape[0] * shape[1]
    places = cu_seq_lens.flatten().to(device, torch.long).clamp(0, size)  # `find_segments` refuses others
    starts = torch.zeros(size + 1, dtype=torch.bool, device=device)  # the last is the end of the batch
    return starts.index_fill(0, places, True)[:-1].view(shape)


def _of_batch(name, value, shape, device):
    """Return a tensor of the batch as integers, `(B, T)`, after checking its shape."""
    if value.ndim != 2 or value.shape[0] not in (1, shape[0]) or value.shape[1] != shape[1]:
        raise ValueError(
            f"`{name}` of shape {tuple(value.shape)} must be {tuple(shape)}, or (1, {shape[1]}) for all rows: give one "
            "for each token of the input."
        )
    return value.to(device, torch.long).expand(shape)
