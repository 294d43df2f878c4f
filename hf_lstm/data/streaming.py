"""Lanes over a streamed corpus, tokenized as it is read."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from hf_lstm.tokenizers import encode

from .lanes import check_at_least_one, lane_items
from .readers import CONTINUES, check_continues

if TYPE_CHECKING:
    import datasets

BATCH_SIZE = 16  # rows that are tokenized at once


class StreamingLanes(IterableDataset):
    """
    Iterable version of `LaneDataset`, over documents that are read one after another: a lane that has used up its tokens
    takes the next document, after an `<eos>`. After the last document comes the first one again: the lanes never end, and
    Trainer needs `max_steps`.

    In each pass, every process reads and tokenizes its own documents: whole files where the number of shards of
    `documents` is a multiple of the number of processes, or else every n-th document. The items of other processes are
    `None`; accelerate drops them where `dispatch_batches` is off, the default of `LSTMTrainingArguments`. A resumed run
    reads up to where it stopped and continues with the same batches.

    A row that continues a document (`hf_lstm.continues`) starts from a zero state, since another lane has read the text
    before it; the first row that a process reads in a pass begins a document. For a model that reads backward each row is
    reversed, and a document of several rows, whose last one would come first, is refused.

    Args:
        documents (`datasets.IterableDataset`):
            Texts in a column `text`, one split of what `load_documents(..., streaming=True)` returns; shuffled ones
            (`documents.shuffle(seed)`) come in another order in each pass.
        tokenizer (`PreTrainedTokenizerBase`): Any tokenizer with an `eos_token`.
        lanes (`int`): The number of processes times the batch size per device.
        bptt_length (`int`): Tokens that gradients flow back through.
        reset_at_documents (`bool`, defaults to `False`): Whether the state restarts at every document.
        process_index, num_processes (`int`, defaults to 0 and 1):
            The process that reads, and the number of processes: `args.process_index` and `args.world_size`.
        direction (`str`, defaults to `"forward"`): The model's `config.direction`.

    Raises:
        ValueError: if `tokenizer` has no `eos_token`, `lanes` is not a multiple of `num_processes`, there are several
            workers, which would read the same, a row does not hold text, all rows of this process are empty, or a row
            continues a document and `direction` is `"backward"`.
    """

    def __init__(
        self,
        documents: "datasets.IterableDataset",
        tokenizer: PreTrainedTokenizerBase,
        lanes: int,
        bptt_length: int,
        reset_at_documents: bool = False,
        process_index: int = 0,
        num_processes: int = 1,
        direction: str = "forward",
    ):
        check_at_least_one(lanes=lanes, bptt_length=bptt_length, num_processes=num_processes)
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
        self.process_index, self.num_processes, self.direction = process_index, num_processes, direction
        self.ended = False  # set by a resumed run that has done all its steps

    @property
    def fingerprint(self) -> dict:
        """Fingerprint of the batches, without the text, which is not known in advance; stored to validate a resume."""
        names = ("lanes", "bptt_length", "reset_at_documents", "direction")
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
        """Yield the tokens of each row, in endless passes, and whether it continues a document."""
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
                if self.direction == "backward" and any(continuing):
                    raise ValueError(
                        f"A row of `documents` continues the document of the row before it (`{CONTINUES}`), and a model that "
                        "reads backward needs the last row first: put each document into one record, or read the corpus "
                        "without streaming."
                    )
                rows = encode(texts, self.tokenizer, direction=self.direction)
                for ids, continues in zip(rows, continuing, strict=True):
                    begins = begins or not continues  # also where the first rows of a document are empty
                    if len(ids) > 0:
                        ids = torch.from_numpy(ids).long()
                        yield (torch.cat([eos, ids]) if begins else ids), not begins
                        empty = begins = False
            if empty:
                raise ValueError(
                    f"Process {self.process_index} of {self.num_processes} finds no text: give at least one document with "
                    "text to every process."
                )
            epoch += 1


def _batches(documents):
    """Yield the batches of documents. Raises `ValueError` for a text that is not UTF-8."""
    try:
        yield from documents.iter(BATCH_SIZE)
    except UnicodeDecodeError as error:  # which `datasets` does not check
        raise ValueError(
            f"A row of `text` is not UTF-8 ({error.reason} after {error.object[: error.start]!r:.50}): write the data set "
            "anew, from text."
        ) from error


class _Lane:
    """The tokens of a lane that were read and not yet returned."""

    def __init__(self, reset_at_documents):
        self.reset_at_documents = reset_at_documents
        self.tokens = self.positions = torch.empty(0, dtype=torch.long)
        self.length = 0  # since the state last restarted

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
        (item,) = lane_items(tokens[None, :length], tokens[None, 1 : length + 1], positions[None, :length])
        return item
