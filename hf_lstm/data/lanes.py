"""Datasets for `Trainer`: parallel lanes with a carried state, and single documents."""

import itertools
from collections.abc import Sequence
from numbers import Integral

import numpy
import torch
from torch.utils.data import Dataset

from .streams import Tokens, TokenStream, as_stream


class LaneDataset(Dataset):
    """
    Dataset for truncated backpropagation through time (Williams & Peng 1990): a stream cut into `lanes` of equal length
    that are read side by side, `bptt_length` tokens a step. Item i is chunk `i // lanes` of lane `i % lanes`, so that in
    consecutive batches of `lanes` items each row continues its lane; `TruncatedBPTTCallback` carries the state.

    Items hold, each of shape `(chunk length,)`: `input_ids`; `labels`, the same, not shifted;
    `shift_labels`, the next tokens; `position_ids`, counted from 0 where the state restarts.

    Args:
        tokens (`torch.Tensor`, array or `TokenStream`): The stream, a single dimension of integers.
        lanes (`int`): The number of processes times the batch size per device.
        bptt_length (`int`): Tokens that gradients flow back through.
        reset_at_documents (`bool`, defaults to `False`):
            Whether the state restarts at every document, not only with the lane; needs a `TokenStream`.
        length_seed (`int`, *optional*):
            Draw the length of each chunk with this seed, so that gradients flow back through varying numbers of tokens
            (Merity et al. 2018, section 5): from N(`bptt_length`, 5²), or once in 20 from N(`bptt_length` / 2, 5²), and
            at least 5. The lengths are the same in every epoch and lane, so that a run can be resumed at any step;
            `TruncatedBPTTCallback` scales the learning rate to them.
        shuffle_seed (`int`, *optional*):
            Shuffle the documents in each epoch, as a function of this seed and the epoch, which Trainer sets by
            `set_epoch`; needs a `TokenStream` of several documents.

        partial_shuffle_seed (`int`, *optional*):
            Begin each lane at another place in each epoch, a function of this seed and the epoch, and read its beginning
            after its end, so that the chunks have other limits and histories (Press 2019). The state is carried over
            this seam, as in the paper, and each token still predicts the one that follows it in the text.

    Raises:
        ValueError: if the stream is too short for one chunk in every lane, or documents are needed and unknown.
    """

    def __init__(
        self,
        tokens: Tokens,
        lanes: int,
        bptt_length: int,
        reset_at_documents: bool = False,
        length_seed: int | None = None,
        shuffle_seed: int | None = None,
        partial_shuffle_seed: int | None = None,
    ):
        check_at_least_one(lanes=lanes, bptt_length=bptt_length)
        seeds = {
            "length_seed": length_seed,
            "shuffle_seed": shuffle_seed,
            "partial_shuffle_seed": partial_shuffle_seed,
        }
        for name, seed in seeds.items():
            if seed is not None and (not isinstance(seed, int) or seed < 0):
                raise ValueError(f"`{name}` ({seed!r}) must be an integer of at least 0, or None for no randomness.")
        if length_seed is not None and bptt_length < 10:
            raise ValueError(
                f"`bptt_length` ({bptt_length}) must be at least 10 where lengths are drawn, since no chunk gets fewer than 5."
            )
        if reset_at_documents and not isinstance(tokens, TokenStream):
            raise ValueError("`reset_at_documents=True` needs a `TokenStream`, which knows where documents start.")
        self.stream = self._epoch_stream = as_stream(tokens)
        self.lanes, self.bptt_length, self.reset_at_documents = lanes, bptt_length, reset_at_documents
        self.length_seed, self.shuffle_seed = length_seed, shuffle_seed
        self.partial_shuffle_seed, self._offsets = partial_shuffle_seed, torch.zeros(lanes, dtype=torch.long)
        chunks = (len(self.stream) - 1) // (lanes * bptt_length)
        if chunks < 1:
            raise ValueError(
                f"The stream holds {len(self.stream):,} tokens, and {lanes} lanes of one chunk of {bptt_length} need "
                f"{lanes * bptt_length + 1:,}: give more text, or lower the batch size or `bptt_length`."
            )
        self.lane_length = chunks * bptt_length
        if length_seed is None:
            self.chunk_lengths = torch.full((chunks,), bptt_length)
        else:
            self.chunk_lengths = _random_lengths(self.lane_length, bptt_length, length_seed)
        self._chunk_starts = self.chunk_lengths.cumsum(0) - self.chunk_lengths
        self.set_epoch(0)

    @property
    def fingerprint(self) -> dict:
        """Fingerprint of the batches and their order, stored in checkpoints to validate a resume."""
        names = ("lanes", "bptt_length", "reset_at_documents", "length_seed", "shuffle_seed", "partial_shuffle_seed")
        settings = {name: getattr(self, name) for name in names}
        return {"streaming": False} | settings | {"tokens": len(self.stream), "digest": self.stream.digest()}

    def set_epoch(self, epoch: int) -> None:
        """Shuffle the documents for an epoch, and rotate the lanes, if their seeds were given."""
        if self.shuffle_seed is not None:
            self._epoch_stream = self.stream.shuffled([self.shuffle_seed, epoch])
        if self.partial_shuffle_seed is not None:
            drawn = numpy.random.default_rng([self.partial_shuffle_seed, epoch])
            self._offsets = torch.from_numpy(drawn.integers(self.lane_length, size=self.lanes))

    @property
    def changes_with_epoch(self) -> bool:
        """Whether an epoch differs from the last one, so that whoever reads it must learn of a new epoch."""
        return self.shuffle_seed is not None or self.partial_shuffle_seed is not None

    def __len__(self) -> int:
        return len(self.chunk_lengths) * self.lanes

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._items([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """
        Return the items of a batch, which torch's `DataLoader` asks for together; in a subclass with a `__getitem__` of its
        own, by that.
        """
        if type(self).__getitem__ is not LaneDataset.__getitem__:
            return [self[index] for index in indices]
        return self._items(indices)

    def _items(self, indices):
        """Make items together, chunk by chunk."""
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"Item {index} of {len(self)}.")
        items = []
        for chunk, group in itertools.groupby(indices, lambda index: index // self.lanes):
            items += self._read(chunk, torch.tensor([index % self.lanes for index in group]))
        return items

    def _read(self, chunk, lanes):
        """Make the items of some lanes, `(rows,)`, of one chunk."""
        start, length = self._chunk_starts[chunk].item(), self.chunk_lengths[chunk].item()
        lane_starts = lanes[:, None] * self.lane_length  # (rows, 1)
        steps = torch.arange(start, start + length)
        indices = lane_starts + (self._offsets[lanes][:, None] + steps) % self.lane_length  # (rows, length)
        position_ids = steps.expand_as(indices)
        if self.reset_at_documents:
            since = indices - self._epoch_stream.starts_of(indices)
            position_ids = torch.minimum(position_ids, since)
        ends = (indices[:, 0].tolist(), indices[:, -1].tolist(), lane_starts[:, 0].tolist())
        inputs, targets = zip(*(self._window(*row) for row in zip(*ends, strict=True)), strict=True)
        return lane_items(torch.stack(inputs), torch.stack(targets), position_ids)

    def _window(self, first: int, last: int, lane_start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the tokens from `first` to `last`, over the seam of a lane if that comes before, and the token after each."""
        if first <= last:
            tokens = self._epoch_stream[first : last + 2]
            return tokens[:-1], tokens[1:]
        parts = (
            self._window(first, lane_start + self.lane_length - 1, lane_start),
            self._window(lane_start, last, lane_start),
        )
        inputs, targets = zip(*parts, strict=True)
        return torch.cat(inputs), torch.cat(targets)


class DocumentDataset(Dataset):
    """
    Dataset of single documents, each read from a zero state, for `DataCollatorWithFlattening`, which packs them, or for a
    collator that pads them; Trainer may draw them in any order.

    An item holds the `input_ids` of a document, from the `<eos>` before it to the one after it, and the same as
    `labels`. One of more than `max_length` targets is cut into several: the last token of each is the first of the
    next, so that every token is predicted once.

    Args:
        stream (`TokenStream`): The documents.
        max_length (`int`): The most targets in an item, and tokens that gradients flow back through.
        truncate (`bool`, defaults to `False`):
            Whether a longer document ends there and the rest is left out, so that each is one item, as private training
            needs.

    Raises:
        ValueError: for a `max_length` below 1, or a stream without a target.
    """

    def __init__(self, stream: TokenStream, max_length: int, truncate: bool = False):
        check_at_least_one(max_length=max_length)
        if len(stream) < 2:
            raise ValueError(
                f"The stream holds {len(stream)} tokens: it must hold at least two, one to predict another."
            )
        self.stream, self.max_length = stream, max_length
        self._starts, self._ends = stream.document_starts, stream.document_ends
        items = (self._ends - self._starts + max_length - 1) // max_length  # of each document
        self._items = (items.clamp(max=1) if truncate else items).cumsum(0)  # up to each document

    def __len__(self) -> int:
        return int(self._items[-1])

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not 0 <= index < len(self):
            raise IndexError(f"Item {index} of {len(self)}.")
        document = int(torch.searchsorted(self._items, index, right=True))
        earlier = int(self._items[document - 1]) if document > 0 else 0
        start = int(self._starts[document]) + (index - earlier) * self.max_length
        tokens = self.stream[start : min(start + self.max_length, int(self._ends[document])) + 1].tolist()
        return {"input_ids": tokens, "labels": list(tokens)}


def lane_items(
    inputs: torch.Tensor, targets: torch.Tensor, position_ids: torch.Tensor
) -> list[dict[str, torch.Tensor]]:
    """Make the model inputs of chunks from their tokens, the token after each and their positions, `(rows, length)` each."""
    rows = zip(inputs.unbind(), targets.clone().unbind(), position_ids.unbind(), strict=True)
    return [
        {"input_ids": inputs, "labels": inputs, "shift_labels": targets, "position_ids": positions}
        for inputs, targets, positions in rows
    ]


def check_at_least_one(**sizes: int | None) -> None:
    """Raise `ValueError` for anything but an `int` of at least 1; `None` stands for a default."""
    for name, value in sizes.items():
        if value is not None and not isinstance(value, Integral):
            raise ValueError(f"`{name}` ({value!r}) must be an int, at least 1.")
        if value is not None and value < 1:
            raise ValueError(f"`{name}` ({value}) must be at least 1.")


def _random_lengths(total: int, bptt_length: int, seed: int) -> torch.Tensor:
    """Draw chunk lengths that sum to `total` tokens."""
    generator = torch.Generator().manual_seed(seed)
    enough = total // 5 + 1
    means = torch.where(torch.rand(enough, generator=generator) < 0.95, bptt_length, bptt_length / 2)
    ends = torch.normal(means, 5.0, generator=generator).int().clamp(min=5).cumsum(0)
    ends = torch.cat([ends[ends <= total - 5], torch.tensor([total])])  # the last chunk absorbs a short remainder
    return ends.diff(prepend=torch.tensor([0]))
