"""Padding and documents: which tokens are read, in which order, and where the state starts anew.

A segment is a run of real tokens of one row that share a state: padded tokens are left out of it, and a document's
first token begins the next one. The segments of all rows are read side by side, as the rows of a packed sequence
(`torch.nn.utils.rnn.PackedSequence`): each step reads one token of every segment that still has one, longest first.

Shapes: B rows, T tokens of each, N real tokens in all, S segments.
"""

from dataclasses import dataclass

import torch


@dataclass
class Segments:
    """
    Args:
        tokens (`(N,)`): Where each token to read, in the order of reading, stands among the `B T` of the batch.
        starts (`(S,)`): The row whose carried state a segment continues; `B` stands for the zero state.
        outputs (`(B T,)`): Which of the `N` outputs each token of the batch gets: its own, or for padding the last
            before it; `N + b` stands for the carried h of row `b`.
        holds (`(B T,)`): Where the last real token up to each token of the batch stands; `B T` if there is none.
        firsts (`(B T,)`): Whether each token of the batch is the first of its segment.
        ends (`(B,)`): The segment that ends each row; `S + b` stands for the carried state of row `b`, unchanged.
        batch_sizes (`list[int]`): How many segments are read at each step.
    """

    tokens: torch.Tensor
    starts: torch.Tensor
    outputs: torch.Tensor
    holds: torch.Tensor
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

    def hold(self, x):  # (B, T, D) -> (B, T, D)
        return torch.cat([x.flatten(0, 1), x.new_zeros(1, x.shape[2])])[self.holds].unflatten(0, x.shape[:2])

    def start(self, carried):  # (B, D) -> (S, D)
        return torch.cat([carried, carried.new_zeros(1, carried.shape[1])])[self.starts]

    def end(self, state, carried):  # (S, D), (B, D) -> (B, D)
        return torch.cat([state, carried])[self.ends]


@torch.compiler.disable  # index arithmetic on the host, whose results are lists and data-dependent shapes
def find_segments(shape, attention_mask, position_ids, seq_idx, cu_seq_lens, carried, device) -> Segments | None:
    """
    The segments of a batch of shape `(B, T)`, or `None` where each row is one segment without padding. A document
    starts where `position_ids` is 0, where `seq_idx` changes, and at each of `cu_seq_lens[:-1]`. `carried` tells
    whether rows come with a state. Copies to the host once.

    Raises:
        ValueError: where a tensor does not fit the batch.
    """
    rows, length = shape
    host = [_real(attention_mask, shape, carried, device), _restarts(position_ids, cu_seq_lens, shape, device)]
    if seq_idx is not None:
        host.append(_of_batch("seq_idx", seq_idx, shape, device))
    real, restarts, *documents = torch.stack(host).cpu()

    tokens = real.flatten().nonzero().squeeze(1)  # (N,) row by row
    row = tokens // length
    new_row = torch.ones_like(tokens, dtype=torch.bool)
    new_row[1:] = row[1:] != row[:-1]
    restart = restarts.flatten()[tokens].bool()
    for document in documents:
        document = document.flatten()[tokens]
        restart[1:] |= (document[1:] != document[:-1]) & ~new_row[1:]
    if len(tokens) == rows * length and not (restart if carried else restart & ~new_row).any():
        return None

    first = new_row | restart
    segment = first.cumsum(0) - 1  # (N,) the segment of each token
    lengths = segment.bincount()  # (S,)
    step = torch.arange(len(tokens)) - first.nonzero().squeeze(1)[segment]  # (N,) its place in the segment
    longest = lengths.argsort(descending=True, stable=True)  # (S,)
    rank = longest.argsort()  # (S,) the place of each segment in the packed sequence
    order = (step * len(lengths) + rank[segment]).argsort()  # (N,) of reading
    place = order.argsort()  # (N,) of each token in it

    last = real.flatten().cumsum(0) - 1  # (B T,) the last real token so far, of whatever row
    every_row = torch.arange(rows)
    row_of = every_row.repeat_interleave(length)
    if len(tokens) == 0:  # nothing to read: all that was carried stays
        outputs, holds, ends = row_of, torch.full_like(row_of, rows * length), every_row
    else:
        known = (last >= 0) & (row[last] == row_of)
        outputs = torch.where(known, place[last], len(tokens) + row_of)
        holds = torch.where(known, tokens[last], rows * length)
        last, known = last.view(shape)[:, -1], known.view(shape)[:, -1]
        ends = torch.where(known, rank[segment[last]], len(lengths) + every_row)
    starts = torch.where(restart, rows, row)[first][longest]
    firsts = torch.zeros(rows * length, dtype=torch.bool)
    firsts[tokens[first]] = True
    return Segments(tokens[order], starts, outputs, holds, firsts, ends, step.bincount().tolist()).to(device)


def _real(attention_mask, shape, carried, device):
    """`(B, T)`: 1 on tokens to read. A mask may begin with the columns that a cache has seen."""
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.long, device=device)
    wider = carried and attention_mask.ndim == 2 and attention_mask.shape[1] > shape[1]
    if attention_mask.shape != shape and not (wider and len(attention_mask) == shape[0]):
        raise ValueError(
            f"`attention_mask` of shape {tuple(attention_mask.shape)} must be {tuple(shape)}, a column for each token of "
            "the input; with a state in `past_key_values` it may begin with columns for the tokens read before."
        )
    return (attention_mask[:, -shape[1] :] != 0).long().to(device)


def _restarts(position_ids, cu_seq_lens, shape, device):
    """`(B, T)`: above 0 where positions or lengths say that a document starts."""
    restarts = torch.zeros(shape[0] * shape[1] + 1, dtype=torch.long, device=device)
    if cu_seq_lens is not None:
        restarts.index_fill_(0, cu_seq_lens.flatten().to(device, torch.long), 1)  # the last lies behind the batch
    restarts = restarts[:-1].view(shape)
    if position_ids is not None:
        restarts = restarts + (_of_batch("position_ids", position_ids, shape, device) == 0)
    return restarts


def _of_batch(name, value, shape, device):
    if value.ndim != 2 or value.shape[0] not in (1, shape[0]) or value.shape[1] != shape[1]:
        raise ValueError(
            f"`{name}` of shape {tuple(value.shape)} must be {tuple(shape)}, or (1, {shape[1]}) for all rows: give one "
            "for each token of the input."
        )
    return value.to(device, torch.long).expand(shape)
