"""Padding and documents: which tokens are read, in which order, and where the state starts anew.

A segment is a run of real tokens of one row that share a state: padded tokens are left out of it, and a document's
first token begins the next one. The segments of all rows are read side by side, as the rows of a packed sequence
(`torch.nn.utils.rnn.PackedSequence`): each step reads one token of every segment that still has one, longest first.

Shapes: B rows, T tokens of each, N real tokens in all, S segments.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

UNKNOWN = torch.iinfo(torch.int64).min
"""The number of the document of a row that has read nothing."""


@dataclass
class Segments:
    """
    Args:
        tokens (`(N,)`): Where each token to read, in the order of reading, stands among the `B T` of the batch.
        starts (`(S,)`): The row whose carried state a segment continues; `B` stands for the zero state.
        outputs (`(B T,)`): Which of the `N` outputs each token of the batch gets: its own, or for padding the last
            before it; `N + b` stands for the carried h of row `b`.
        real (`(B, T)`): Whether each token of the batch is read.
        firsts (`(B, T)`): Whether it is the first of its segment.
        ends (`(B,)`): The segment that ends each row; `S + b` stands for the carried state of row `b`, unchanged.
        batch_sizes (`list[int]`): How many segments are read at each step.
    """

    tokens: torch.Tensor
    starts: torch.Tensor
    outputs: torch.Tensor
    real: torch.Tensor
    firsts: torch.Tensor
    ends: torch.Tensor
    batch_sizes: list[int]

    def to(self, device, **kwargs) -> "Segments":
        """A copy on `device`: accelerate calls this when layers lie on several devices."""
        *indices, batch_sizes = vars(self).values()
        return Segments(*(index.to(device, **kwargs) for index in indices), batch_sizes)

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
    The same where nothing may be copied to the host or have a shape that depends on numbers: every row takes part in every
    step (kernels_lstm.masked_lstm).

    Args:
        real, restarts (`(B, T)`): Whether each token is read, and whether a document starts with it.
    """

    real: torch.Tensor
    restarts: torch.Tensor

    def to(self, device, **kwargs) -> "Steps":
        return Steps(self.real.to(device, **kwargs), self.restarts.to(device, **kwargs))

    @property
    def firsts(self) -> torch.Tensor:
        """`(B, T)`: whether each token is the first that its row reads, or the first of a document."""
        return self.restarts | (self.real & (self.real.long().cumsum(1) == 1))


def hold(x, held, real):
    """
    What each token of a row leaves behind, `(B, T, ...)`: `x` `(B, T, ...)` of the last real token up to it, or `held`
    `(B, ...)` before the first.
    """
    places = _last_real(real) + 1  # (B, T) in what follows
    known = torch.cat([held[:, None], x], dim=1)  # (B, T + 1, ...)
    return known.gather(1, places.view(*places.shape, *(1 for _ in x.shape[2:])).expand_as(x))


def find_limits(shape, attention_mask, position_ids, seq_idx, cu_seq_lens, carried, document, device):
    """
    Where the tokens of a batch of shape `(B, T)` are read, and where documents start: where `position_ids` is 0, where
    `seq_idx` changes, and at each of `cu_seq_lens[:-1]`. `carried` tells whether rows come with a state, and `document`
    `(B,)` is the `seq_idx` of the last token that each has read, if it is known.

    Returns:
        `real` and `restarts`, `(B, T)`; and the `seq_idx` that each token leaves behind, `(B, T)`, if it is given.

    Raises:
        ValueError: where a tensor does not fit the batch.
    """
    real = _real(attention_mask, shape, carried, device)
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
    return real, restarts & real, documents


@torch.compiler.disable  # index arithmetic on the host, whose results are lists and data-dependent shapes
def find_segments(real, restarts, carried: bool, cu_seq_lens=None) -> Segments | None:
    """
    The segments of a batch whose tokens are `real` and start documents at `restarts`, each `(B, T)`; `None` where each row
    is one segment without padding. `carried` tells whether rows come with a state. Copies to the host once.

    Raises:
        ValueError: if `cu_seq_lens` does not ascend from 0 to `B T`.
    """
    (rows, length), shape, device = real.shape, real.shape, real.device
    on_device = [real, restarts]
    if cu_seq_lens is not None:
        places = F.pad(cu_seq_lens.flatten().long(), (1, 1), value=0)
        places[-1] = rows * length
        is_wrong = (places.diff() < 0).any() | (places[1] != 0) | (places[-2] != places[-1])
        on_device.append(is_wrong.to(device).expand(shape))
    real, restarts, *is_wrong = torch.stack(on_device).cpu()
    if is_wrong and is_wrong[0].any():
        raise ValueError(
            f"`cu_seq_lens_q` ({str(cu_seq_lens.flatten().tolist())[:60]}) must ascend from 0 to {rows * length}, the tokens of "
            "the batch: it says where each document starts among them, and ends with their number. For beams, several "
            "sequences or prompts in chunks give `position_ids` instead, which are 0 where a document starts."
        )

    tokens = real.flatten().nonzero().squeeze(1)  # (N,) row by row
    row = tokens // length
    new_row = torch.ones_like(tokens, dtype=torch.bool)
    new_row[1:] = row[1:] != row[:-1]
    restart = restarts.flatten()[tokens]
    if len(tokens) == rows * length and not (restart if carried else restart & ~new_row).any():
        return None

    first = new_row | restart
    segment = first.cumsum(0) - 1  # (N,) the segment of each token
    lengths = segment.bincount()  # (S,)
    step = (
        torch.arange(len(tokens), device="cpu") - first.nonzero().squeeze(1)[segment]
    )  # (N,) its place in the segment
    longest = lengths.argsort(descending=True, stable=True)  # (S,)
    rank = longest.argsort()  # (S,) the place of each segment in the packed sequence
    order = (step * len(lengths) + rank[segment]).argsort()  # (N,) of reading
    place = order.argsort()  # (N,) of each token in it

    last = real.flatten().cumsum(0) - 1  # (B T,) the last real token so far, of whatever row
    every_row = torch.arange(rows, device="cpu")
    row_of = every_row.repeat_interleave(length)
    if len(tokens) == 0:  # nothing to read: all that was carried stays
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


def _last_real(real):
    """`(B, T)`: the place of the last real token up to each; -1 if there is none."""
    places = torch.arange(real.shape[1], device=real.device).expand_as(real)
    return torch.where(real, places, -1).cummax(dim=1).values


def _real(attention_mask, shape, carried, device):
    """`(B, T)`: whether each token is read. A mask may begin with the columns that a cache has seen."""
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    wider = carried and attention_mask.ndim == 2 and attention_mask.shape[1] > shape[1]
    if attention_mask.shape != shape and not (wider and len(attention_mask) == shape[0]):
        raise ValueError(
            f"`attention_mask` of shape {tuple(attention_mask.shape)} must be {tuple(shape)}, a column for each token of "
            "the input; with a state in `past_key_values` it may begin with columns for the tokens read before."
        )
    return (attention_mask[:, -shape[1] :] != 0).to(device)


def _starts(cu_seq_lens, shape, device):
    """`(B, T)`: whether one of the lengths says that a document starts."""
    size = shape[0] * shape[1]
    places = cu_seq_lens.flatten().to(device, torch.long).clamp(0, size)  # `find_segments` refuses others
    starts = torch.zeros(size + 1, dtype=torch.bool, device=device)  # the last lies behind the batch
    return starts.index_fill(0, places, True)[:-1].view(shape)


def _of_batch(name, value, shape, device):
    if value.ndim != 2 or value.shape[0] not in (1, shape[0]) or value.shape[1] != shape[1]:
        raise ValueError(
            f"`{name}` of shape {tuple(value.shape)} must be {tuple(shape)}, or (1, {shape[1]}) for all rows: give one "
            "for each token of the input."
        )
    return value.to(device, torch.long).expand(shape)
