"""Corpora: texts from files, folders, the Hub or Python itself; one stream of tokens; lanes to train on.

A stream of several documents begins with `<eos>`, has one between them and ends with one. The `<eos>` before a document
is its first input, from which its first token is predicted, and where the state starts anew if it is to. A single text
is a stream without beginning or end and has none.
"""

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

SPLITS = ("train", "validation", "test")
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
PIECE_LENGTH = 1 << 16  # characters given to the tokenizer at once: it keeps about 200 bytes for each of them


@dataclass
class TokenStream:
    """
    A corpus as one line of tokens.

    Args:
        tokens (`torch.IntTensor` of shape `(N,)`): Token ids.
        document_starts (`torch.LongTensor` of shape `(documents,)`): Where each document begins, ascending, first 0.
        num_bytes (`int`): UTF-8 bytes that the targets spell: all tokens but the first, which nothing predicts.
    """

    tokens: torch.Tensor
    document_starts: torch.Tensor
    num_bytes: int

    @classmethod
    def from_documents(cls, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> "TokenStream":
        """
        Tokenize `texts`, one document each, with a progress bar. A text of more than `PIECE_LENGTH` characters is cut
        after a line end for the tokenizer, which matters to none that reads characters or bytes.

        Raises:
            ValueError: if no text holds a token, or `tokenizer` has no `eos_token` to put between several.
        """
        if isinstance(texts, str):
            raise ValueError("`texts` is one str: it must be an iterable of texts. Wrap it in a list.")
        documents, num_bytes = [], 0
        for text in logging.tqdm(texts, desc="tokenizing", unit=" documents"):
            pieces = [torch.tensor(_encode(piece, tokenizer), dtype=torch.int32) for piece in _pieces(text or "")]
            if sum(map(len, pieces)) > 0:
                documents.append(torch.cat(pieces))
                num_bytes += len(text.encode())
                only_text = text
        if not documents:
            raise ValueError("The corpus holds no text: every document is empty.")
        if len(documents) == 1:
            num_bytes -= _first_bytes(only_text, tokenizer)
            return cls(documents[0], torch.zeros(1, dtype=torch.long), num_bytes)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer's `eos_token` (None) must be set, since it separates the {len(documents)} documents: "
                'call `tokenizer.add_special_tokens({"eos_token": "<eos>"})`.'
            )
        eos = torch.tensor([tokenizer.eos_token_id], dtype=torch.int32)
        tokens = torch.cat([part for document in documents for part in (eos, document)] + [eos])
        lengths = torch.tensor([0] + [1 + len(document) for document in documents[:-1]])
        return cls(tokens, lengths.cumsum(0), num_bytes)

    def __len__(self) -> int:
        return len(self.tokens)

    def starts_of(self, indices: torch.Tensor) -> torch.Tensor:
        """Where the documents begin that the tokens at `indices` belong to; both of any one shape."""
        return self.document_starts[torch.searchsorted(self.document_starts, indices, right=True) - 1]


class LaneDataset(Dataset):
    """
    A stream cut into `lanes` of equal length that are read side by side, `bptt_length` tokens a step: item i is chunk
    `i // lanes` of lane `i % lanes`, so that batches of `lanes` items in order let every lane run on from step to step.
    `TruncatedBPTTCallback` then carries the state. Made for truncated backpropagation through time (Williams & Peng
    1990).

    Items hold, each of shape `(chunk length,)`: `input_ids`; `labels`, the same, which whoever uses them shifts;
    `shift_labels`, the next tokens; `position_ids`, counted from 0 where the state is to start anew.

    Args:
        tokens (`torch.Tensor`, array or `TokenStream`): The stream, a single dimension of integers.
        lanes (`int`): Processes times batch size per device.
        bptt_length (`int`): Tokens that gradients run back through.
        reset_at_documents (`bool`, defaults to `False`):
            Whether the state starts anew with every document, not only with the lane; needs a `TokenStream`.
        length_seed (`int`, *optional*):
            Draw the length of each chunk with this seed, so that gradients run back through various numbers of tokens
            (Merity et al. 2018, section 5): from N(`bptt_length`, 5²), or once in 20 from N(`bptt_length` / 2, 5²), and
            at least 5. The lengths are the same in every epoch and lane, so that a run can be resumed at any step;
            `TruncatedBPTTCallback` scales the learning rate to them.

    Raises:
        ValueError: if the stream is too short to give every lane one chunk.
    """

    def __init__(
        self, tokens, lanes: int, bptt_length: int, reset_at_documents: bool = False, length_seed: int | None = None
    ):
        for name, value in (("lanes", lanes), ("bptt_length", bptt_length)):
            if value < 1:
                raise ValueError(f"`{name}` ({value}) must be at least 1.")
        if length_seed is not None and not isinstance(length_seed, int):
            raise ValueError(f"`length_seed` ({length_seed!r}) must be an integer, or None for chunks of one length.")
        if length_seed is not None and bptt_length < 10:
            raise ValueError(
                f"`bptt_length` ({bptt_length}) must be at least 10 where lengths are drawn, since no chunk gets fewer than 5."
            )
        if reset_at_documents and not isinstance(tokens, TokenStream):
            raise ValueError("`reset_at_documents=True` needs a `TokenStream`, which knows where documents start.")
        self.stream = as_stream(tokens)
        self.lanes, self.bptt_length, self.reset_at_documents = lanes, bptt_length, reset_at_documents
        self.length_seed = length_seed
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

    def __len__(self) -> int:
        return len(self.chunk_lengths) * self.lanes

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"Item {index} of {len(self)}.")
        chunk, lane = divmod(index, self.lanes)
        length = self.chunk_lengths[chunk].item()
        lane_start = lane * self.lane_length
        start = lane_start + self._chunk_starts[chunk].item()
        window = self.stream.tokens[start : start + length + 1].long()
        indices = torch.arange(start, start + length)
        first = torch.full_like(indices, lane_start)
        if self.reset_at_documents:
            first = torch.maximum(first, self.stream.starts_of(indices))
        return {
            "input_ids": window[:-1],
            "labels": window[:-1],
            "shift_labels": window[1:].clone(),
            "position_ids": indices - first,
        }


def _random_lengths(total: int, bptt_length: int, seed: int) -> torch.Tensor:
    """Lengths of chunks that fill `total` tokens."""
    generator = torch.Generator().manual_seed(seed)
    enough = total // 5 + 1
    means = torch.where(torch.rand(enough, generator=generator) < 0.95, bptt_length, bptt_length / 2)
    ends = torch.normal(means, 5.0, generator=generator).int().clamp(min=5).cumsum(0)
    ends = torch.cat([ends[ends <= total - 5], torch.tensor([total])])  # the last chunk takes what would be too short
    return ends.diff(prepend=torch.tensor([0]))


def as_stream(tokens) -> TokenStream:
    """`tokens` as a `TokenStream`: of one document and unknown bytes (0), unless it is one."""
    if isinstance(tokens, TokenStream):
        return tokens
    tokens = torch.as_tensor(tokens)
    if tokens.ndim != 1 or tokens.is_floating_point():
        raise ValueError(
            f"`tokens` of shape {tuple(tokens.shape)} and type {tokens.dtype} must be integers in a single dimension."
        )
    if tokens.dtype in (torch.uint16, torch.uint32):  # torch computes with few of these
        tokens = tokens.long()
    return TokenStream(tokens, torch.zeros(1, dtype=torch.long), num_bytes=0)


def load_corpus(
    name: str | Path | None = None,
    config_name: str | None = None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    text_column: str = "text",
    validation_fraction: float = 0.1,
):
    """
    A corpus as a `datasets.DatasetDict` of documents in a column `text`, split into `train`, `validation` and, where
    there is one, `test`.

    Args:
        name (`str` or `Path`, *optional*): As `load_documents` takes it. Without it: Python's own standard library.
        config_name (`str`, *optional*): Which configuration of a data set on the Hub.
        validation_file, test_file (`str` or `Path`, *optional*): Files of these kinds for the other splits.
        text_column (`str`, defaults to `"text"`): Where records hold their text.
        validation_fraction (`float`, defaults to 0.1):
            What is kept for validation where `name` has no such split and no file is given: the last part of a text, or
            documents drawn with a fixed seed.

    Returns:
        `datasets.DatasetDict`: the splits, `train` and `validation` at least.

    Raises:
        ValueError: for what cannot be found or read, with the file and the remedy.
    """
    from datasets import Dataset, DatasetDict

    if not 0 < validation_fraction < 1:
        raise ValueError(f"`validation_fraction` ({validation_fraction}) must lie between 0 and 1.")
    if name is None:
        corpus = {split: Dataset.from_dict({"text": texts}) for split, texts in standard_library().items()}
    else:
        corpus = dict(load_documents(name, config_name, text_column))
    for split, file in (("validation", validation_file), ("test", test_file)):
        if file is not None:
            corpus[split] = load_documents(file, text_column=text_column)["train"]
    if "train" not in corpus:
        raise ValueError(f"{name} has the splits {sorted(corpus)}: there must be one called `train`.")
    if "validation" not in corpus:
        corpus |= _hold_out(corpus["train"], validation_fraction)
    return DatasetDict({split: corpus[split] for split in SPLITS if split in corpus})


def standard_library(max_bytes: int = 4_000_000) -> dict[str, list[str]]:
    """
    Python source that every machine has: the modules of the running interpreter's standard library, tests left out,
    up to `max_bytes` in all. A hash of the path decides the order and the split: 18 in 20 files for training, 1 for
    validation, 1 for testing.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in root.rglob("*.py") if not _LEFT_OUT.intersection(path.relative_to(root).parts)]
    digests = {path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest() for path in paths}
    corpus, size = {split: [] for split in SPLITS}, 0
    for path in sorted(paths, key=digests.get):
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # a few modules are written in other encodings on purpose
            continue
        size += len(text.encode())
        if size > max_bytes:
            break
        if not text:
            continue
        corpus[{0: "validation", 1: "test"}.get(digests[path][-1] % 20, "train")].append(text)
    return corpus


_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def load_documents(name: str | Path, config_name: str | None = None, text_column: str = "text"):
    """
    One source as a `datasets.DatasetDict` of documents in a column `text`, with the splits it has; a file is all `train`.

    Args:
        name (`str` or `Path`):
            A text file, which is one document; a .jsonl, .csv or .parquet file, one document per record; a folder that
            `save_to_disk` made; or a data set on the Hub.
        config_name (`str`, *optional*): Which configuration of a data set on the Hub.
        text_column (`str`, defaults to `"text"`): Where records hold their text.

    Raises:
        ValueError: for what cannot be found or read, with the file and the remedy.
    """
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    path = Path(name)
    if path.suffix == ".txt" or (path.is_file() and path.suffix not in READERS):
        return DatasetDict({"train": Dataset.from_dict({"text": [read_text(path)]})})
    if path.suffix in READERS:
        _check_file(path)
        source, load = (
            f"be read as {path.suffix[1:]}",
            lambda: load_dataset(READERS[path.suffix], data_files=str(path)),
        )
    elif path.is_dir():
        source, load = "be read as what `save_to_disk` writes", lambda: load_from_disk(str(path))
    else:
        source, load = "be found, on this disk or on the Hub", lambda: load_dataset(str(name), config_name)
    try:
        corpus = load()
    except Exception as error:  # the readers behind `datasets` raise classes of their own
        raise ValueError(f"{name} cannot {source}: {error.__cause__ or error}") from error
    corpus = corpus if isinstance(corpus, DatasetDict) else {"train": corpus}
    return DatasetDict({split: _text_column(dataset, text_column, name) for split, dataset in corpus.items()})


def read_text(path: str | Path) -> str:
    """A UTF-8 file as it is, line ends included, without a byte order mark. Raises `ValueError` for anything else."""
    path = Path(path)
    _check_file(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start}: {error.reason}): convert it first, for example with `iconv`."
        ) from error
    return text


def _check_file(path):
    if not path.is_file():
        raise ValueError(f"The file {path} does not exist.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: there is nothing to read.")


def _text_column(dataset, text_column, name):
    if text_column not in dataset.column_names:
        raise ValueError(
            f"{name} has no column `{text_column}`, only {', '.join(dataset.column_names)}: name the one that holds the "
            "text with `text_column`."
        )
    feature = dataset.features[text_column]
    kind = getattr(feature, "dtype", type(feature).__name__)  # lists and mixtures are features without one
    if kind not in ("string", "large_string"):
        raise ValueError(f"The column `{text_column}` of {name} holds {kind}: it must hold text.")
    return dataset.select_columns(text_column).rename_columns({text_column: "text"})


def _hold_out(dataset, fraction) -> dict:
    from datasets import Dataset

    if len(dataset) > 1:  # both parts keep the order of the documents, which may tell one story
        drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
        validation, train = drawn.tensor_split([max(1, int(len(dataset) * fraction))])
        return {"train": dataset.select(train.sort()[0]), "validation": dataset.select(validation.sort()[0])}
    text = dataset[0]["text"] or ""
    cut = int(len(text) * (1 - fraction))
    if not 0 < cut < len(text):
        raise ValueError(f"The text has {len(text)} characters: too few to keep a part for validation.")
    return {
        "train": Dataset.from_dict({"text": [text[:cut]]}),
        "validation": Dataset.from_dict({"text": [text[cut:]]}),
    }


def _pieces(text):
    """Pieces of at most `PIECE_LENGTH` characters, cut after a line or a word where there is one."""
    start = 0
    while start < len(text):
        end = start + PIECE_LENGTH
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or text.rfind(" ", start, end) + 1 or end
        yield text[start:end]
        start = end


def _encode(text, tokenizer):
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _first_bytes(text, tokenizer) -> int:
    """Bytes that the first token of `text` spells: its share of them where several tokens spell one character."""
    if not tokenizer.is_fast:
        return len(tokenizer.decode(_encode(text[:PIECE_LENGTH], tokenizer)[:1]).encode())
    for piece in _pieces(text):
        offsets = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if offsets:
            text = piece
            break
    start, end = offsets[0]
    return len(text[start:end].encode()) // offsets.count(offsets[0])
