"""Lanes over a corpus that is tokenized as it is read, and never lies on disk as tokens."""

from collections.abc import Iterator

import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from .lanes import check_sizes, lane_item
from .readers import CONTINUES, check_continues
from .streams import encode

BATCH_SIZE = 16  # rows that are tokenized at once


class StreamingLanes(IterableDataset):
    """
    Lanes as those of `LaneDataset`, over documents that are read one after the other: whichever lane comes to its end
    goes on with the next document, after an `<eos>`. When there are no more, the first one follows: the lanes never end,
    and Trainer needs `max_steps`.

    In each pass, a process reads and tokenizes documents of its own: whole files where the number of shards of `documents`
    divides by that of the processes, or else every n-th document. The items of other processes are `None`, and
    accelerate leaves them out where `dispatch_batches` is off, as it is in `LSTMTrainingArguments`. A resumed run reads
    up to where it stopped and goes on with the same batches.

    A row that goes on with a document (`hf_lstm.continues`) starts from a zero state, since another lane has read what
    stands before it; the first one that a process reads in a pass begins a document.

    Args:
        documents (`datasets.IterableDataset`):
            Texts in a column `text`, as `load_documents(..., streaming=True)` gives them; shuffled ones
            (`documents.shuffle(seed)`) come in another order each time.
        tokenizer (`PreTrainedTokenizerBase`): Any tokenizer with an `eos_token`.
        lanes (`int`): Processes times batch size per device.
        bptt_length (`int`): Tokens that gradients run back through.
        reset_at_documents (`bool`, defaults to `False`): Whether the state starts anew with every document.
        process_index, num_processes (`int`, defaults to 0 and 1):
            Which process reads, and of how many: `args.process_index` and `args.world_size`.

    Raises:
        ValueError: if `tokenizer` has no `eos_token`, the processes do not share the lanes evenly, several workers would
            read the same, a row holds no text, or no row of this process does.
    """

    def __init__(
        self,
        documents,
        tokenizer: PreTrainedTokenizerBase,
        lanes: int,
        bptt_length: int,
        reset_at_documents: bool = False,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        check_sizes(lanes=lanes, bptt_length=bptt_length, num_processes=num_processes)
        if not hasattr(documents, "set_epoch"):
            raise ValueError(
                f"`documents` ({type(documents).__name__}) must be a `datasets.IterableDataset`: give one split of what "
                "`load_documents(..., streaming=True)` returns."
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "The tokenizer's `eos_token` (None) must be set, since it separates documents: call "
                '`tokenizer.add_special_tokens({"eos_token": "<eos>"})`.'
            )
        if lanes % num_processes or not 0 <= process_index < num_processes:
            raise ValueError(
                f"{lanes} lanes cannot be those of process {process_index} of {num_processes}: `lanes` must be a multiple "
                "of `num_processes`, and `process_index` less than it."
            )
        self.documents, self.tokenizer = documents, tokenizer
        self.lanes, self.bptt_length, self.reset_at_documents = lanes, bptt_length, reset_at_documents
        self.process_index, self.num_processes = process_index, num_processes
        self.ended = False  # whether a run that has had all its steps finds nothing more

    @property
    def description(self) -> dict:
        """What a run's batches depend on, as far as it is known: a checkpoint can be resumed where it is the same."""
        names = ("lanes", "bptt_length", "reset_at_documents")
        return {"streaming": True} | {name: getattr(self, name) for name in names}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor] | None]:
        if self.ended:
            return
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"`dataloader_num_workers` ({worker.num_workers}) must be 0 or 1: each worker would read the same."
            )
        documents, own = self._tokenized(), self.lanes // self.num_processes
        lanes = [_Lane(self.reset_at_documents) for _ in range(own)]
        before, behind = self.process_index * own, (self.num_processes - self.process_index - 1) * own
        while True:
            yield from (None for _ in range(before))
            yield from (lane.take(self.bptt_length, documents) for lane in lanes)
            yield from (None for _ in range(behind))

    def _tokenized(self):
        """The tokens of one document after the other, without end, and whether it is the rest of one."""
        from datasets.distributed import split_dataset_by_node

        documents = self.documents.with_format(None)  # Python's own str
        documents = split_dataset_by_node(documents, self.process_index, self.num_processes)
        epoch, eos = 0, torch.tensor([self.tokenizer.eos_token_id])
        while True:
            documents.set_epoch(epoch)
            empty = begins = True
            for batch in _batches(documents):
                texts = batch["text"]
                if wrong := [text for text in texts if not isinstance(text, str | None)]:
                    raise ValueError(f"A row of `text` holds {wrong[0]!r}: it must hold text.")
                continuing = batch.get(CONTINUES, [False] * len(texts))
                if wrong := [value for value in continuing if not isinstance(value, bool | None)]:
                    check_continues(type(wrong[0]).__name__, "`documents`")
                for ids, continues in zip(encode(texts, self.tokenizer), continuing, strict=True):
                    begins = begins or not continues  # also where the first rows of a document are empty
                    if len(ids) > 0:
                        ids = torch.from_numpy(ids).long()
                        yield (torch.cat([eos, ids]) if begins else ids), not begins
                        empty = begins = False
            if empty:
                raise ValueError(
                    f"Process {self.process_index} of {self.num_processes} finds no text: every document is empty, or there "
                    "are too few for all processes."
                )
            epoch += 1


def _batches(documents):
    try:
        yield from documents.iter(BATCH_SIZE)
    except UnicodeDecodeError as error:  # what others prepared may hold any bytes
        raise ValueError(
            f"A row of `text` is not UTF-8 ({error.reason} after {error.object[: error.start]!r:.50}): write the data set "
            "anew, from text."
        ) from error


class _Lane:
    """Tokens that have been read and not yet been used."""

    def __init__(self, reset_at_documents):
        self.reset_at_documents = reset_at_documents
        self.tokens = self.positions = torch.empty(0, dtype=torch.long)
        self.length = 0  # since the state last started anew

    def take(self, length, documents):
        parts, missing = [(self.tokens, self.positions)], length + 1 - len(self.tokens)
        while missing > 0:
            tokens, continues = next(documents)
            if self.reset_at_documents or continues:
                self.length = 0
            parts.append((tokens, torch.arange(self.length, self.length + len(tokens))))
            self.length += len(tokens)
            missing -= len(tokens)
        tokens, positions = (torch.cat(part) for part in zip(*parts, strict=True))
        self.tokens, self.positions = tokens[length:], positions[length:]
        return lane_item(tokens[: length + 1], positions[:length])
