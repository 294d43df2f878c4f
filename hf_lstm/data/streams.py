"""Token streams: a corpus as one sequence of tokens, tokenized once and read from disk as needed.

A stream of several documents begins with `<eos>`, has one between them and ends with one. The `<eos>` before a document
is its first input, from which its first token is predicted, and where the state may restart. The stream of a single text
has no `<eos>` at its ends.
"""

import bisect
import copy
import hashlib
import inspect
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_lstm.tokenizers import (
    BATCH_CHARACTERS,
    PIECE_LENGTH,
    check_texts,
    check_unicode,
    encode,
    in_direction,
    pieces_of,
    pieces_of_all,
)

from .corpora import check_text, document_begins, writable_cache
from .readers import CONTINUES

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

Tokens: TypeAlias = "TokenStream | torch.Tensor | numpy.ndarray | Sequence[int] | pyarrow.ChunkedArray"
TEXT_SIZES = ("num_bytes", "num_characters", "num_words")
CACHE_VERSION = 5  # of the tokens in the cache: a new number invalidates those of earlier versions
# The normalizers that change the characters of a text; the others only change spaces and line ends.
FORMS: tuple[type, ...] = (
    normalizers.NFC,
    normalizers.NFD,
    normalizers.NFKC,
    normalizers.NFKD,
    normalizers.Nmt,
    normalizers.Precompiled,
)
FORMS += (normalizers.Lowercase, normalizers.StripAccents, normalizers.BertNormalizer)


class TokenStream:
    """
    Sequence of the N tokens of a corpus; `stream[start:stop]` reads a part as a `torch.LongTensor`.

    Args:
        tokens (`torch.Tensor`, array, list or `pyarrow.ChunkedArray`): Token ids, N integers in a single dimension.
        document_starts (`torch.LongTensor` of shape `(documents,)`, *optional*):
            The index at which each document begins, ascending from 0; by default there is one document.
        num_bytes, num_characters, num_words (`int`, defaults to 0):
            The length of the text that the targets spell (all tokens but the first, which is never predicted): bytes
            of UTF-8, Unicode characters and words between white space; 0 if unknown. Counted is the predicted text: in
            the Unicode form that a fast tokenizer's normalizer gives it (NFC, NFD, NFKC, NFKD, SentencePiece's, lower
            case, without accents) and otherwise as written, whatever the tokenizer uses for spaces and line ends.

    Raises:
        ValueError: if `tokens` are not integers in a single dimension, or `document_starts` do not ascend from 0 within
            them.
    """

    def __init__(
        self,
        tokens: "Tokens",
        document_starts: torch.Tensor | None = None,
        num_bytes: int = 0,
        num_characters: int = 0,
        num_words: int = 0,
    ):
        self._hold(_as_arrow(tokens))
        self.document_starts = torch.zeros(1, dtype=torch.long)
        if document_starts is not None:
            self.document_starts = _checked_starts(document_starts, len(self))
        self.num_bytes, self.num_characters, self.num_words = num_bytes, num_characters, num_words
        self._document_offsets: torch.Tensor | None = (
            None  # of each document in `tokens`, if the documents are shuffled
        )
        self._rows: Dataset | None = None  # the data set that holds the tokens, if there is one
        self._end: list[int] = []  # the tokens after its last row

    @classmethod
    def from_documents(
        cls,
        texts: "Iterable[str | None] | Dataset",
        tokenizer: PreTrainedTokenizerBase,
        direction: str = "forward",
    ) -> "TokenStream":
        """
        Tokenize texts, with a progress bar, on as many cores as the tokenizer uses, into the smallest integers that
        hold its ids. A data set on disk is tokenized once: `datasets` keeps the tokens beside it (for a file, in the cache
        folder), by its contents and the tokenizer, and they are read from there as needed.

        A text of more than `PIECE_LENGTH` characters is cut for the tokenizer, after a line end or before a space where
        there is one, which changes no token of characters, bytes or words.

        Args:
            texts (`Iterable[str]` or `datasets.Dataset`):
                One document each, or a split returned by `load_documents` or `load_corpus`.
            tokenizer (`PreTrainedTokenizerBase`): Any tokenizer.
            direction (`str`, defaults to `"forward"`):
                The model's `config.direction`: `"backward"` reverses each document whole, by Unicode code point. The
                documents keep their order.

        Raises:
            ValueError: if `texts` are a str, several splits, have no column `text` or hold anything but text, every text
                is empty, `tokenizer` has no `eos_token` to separate documents, `direction` is neither `"forward"` nor
                `"backward"`, or the tokens cannot be written.
        """
        import pyarrow.compute
        from datasets import Features, List, Value

        texts = _rows_of(texts)
        documents = int(document_begins(texts).sum())
        if documents > 1 and tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer's `eos_token` (None) must be set, since it separates the {documents} documents: "
                'call `tokenizer.add_special_tokens({"eos_token": "<eos>"})`.'
            )
        tokenization = _Tokenization(tokenizer, documents > 1, direction)
        mean_bytes = max(1, texts.data.nbytes // max(1, texts.data.num_rows))
        with writable_cache():
            if direction == "backward":
                texts = _from_last_row(texts)
            rows = texts.map(
                tokenization,
                with_indices=True,
                batched=True,
                batch_size=min(max(1, BATCH_CHARACTERS // mean_bytes), 10_000),
                remove_columns=texts.column_names,
                features=Features(
                    {"tokens": List(Value(tokenization.dtype.name)), "starts": Value("bool")}
                    | dict.fromkeys(TEXT_SIZES, Value("int64"))
                ),
                keep_in_memory=not texts.cache_files,
                desc="tokenizing",
            )
        if len(rows) == 0 or len(_flat(rows)) == 0:
            raise ValueError(
                "The corpus holds no text, since every document is empty: name another file, or another column."
            )

        columns = rows.data
        sizes = {name: pyarrow.compute.sum(columns[name]).as_py() for name in TEXT_SIZES}
        document_starts = None
        if documents > 1:
            ends = pyarrow.compute.list_value_length(columns["tokens"]).to_numpy().cumsum(dtype=numpy.int64)
            row_starts = numpy.concatenate([[0], ends[:-1]])
            document_starts = torch.from_numpy(row_starts[columns["starts"].to_numpy()])
        else:
            first = _first_sizes((in_direction(text, direction) for text in texts["text"]), tokenizer)
            sizes = {name: size - first[name] for name, size in sizes.items()}
        stream = cls(_flat(rows, tokenization.separator), document_starts, **sizes)
        stream._rows, stream._end = rows, tokenization.separator
        return stream

    def _hold(self, tokens):
        self.tokens = tokens
        self._chunks = [chunk.to_numpy() for chunk in tokens.chunks]  # without copies
        self._chunk_starts = [0, *itertools.accumulate(map(len, tokens.chunks))]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, span: slice) -> torch.Tensor:
        start, stop, step = span.indices(len(self))
        if step != 1:
            raise ValueError(f"The step of a slice of a stream ({step}) must be 1.")
        if self._document_offsets is None:
            return self._read(start, stop)
        parts = [self._read(start, start)]
        document = int(torch.searchsorted(self.document_starts, start, right=True)) - 1
        while start < stop:
            ends_here = document + 1 == len(self.document_starts)
            end = stop if ends_here else min(stop, int(self.document_starts[document + 1]))
            shift = int(self._document_offsets[document] - self.document_starts[document])
            parts.append(self._read(start + shift, end + shift))
            start, document = end, document + 1
        return torch.cat(parts)

    def _read(self, start, stop):
        """Read chunk by chunk from `start`; `ChunkedArray.slice` would walk through all chunks before it."""
        parts, chunk = [numpy.empty(0, dtype=numpy.int64)], bisect.bisect_right(self._chunk_starts, start) - 1
        while start < stop:
            begin = self._chunk_starts[chunk]
            parts.append(self._chunks[chunk][start - begin : stop - begin])
            start, chunk = start + len(parts[-1]), chunk + 1
        return torch.from_numpy(numpy.concatenate(parts, dtype=numpy.int64))

    @property
    def document_ends(self) -> torch.Tensor:
        """The index at which each document ends, `(documents,)`: the start of the next, or the last token."""
        return torch.cat([self.document_starts[1:], torch.tensor([len(self) - 1])])

    def starts_of(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the start of the document that each token at `indices` belongs to, in the shape of `indices`."""
        return self.document_starts[torch.searchsorted(self.document_starts, indices, right=True) - 1]

    def check_ids(self, vocab_size: int) -> None:
        """Raise `ValueError` for ids outside a vocabulary."""
        import pyarrow.compute

        least, most = pyarrow.compute.min_max(self.tokens).as_py().values()
        if not 0 <= least <= most < vocab_size:
            raise ValueError(
                f"The stream holds ids from {least} to {most}: they must lie within the model's vocabulary of "
                f"{vocab_size}, so make it with the model's own tokenizer."
            )

    def counts(self, vocab_size: int) -> torch.Tensor:
        """Count each token, `(vocab_size,)`. Raises `ValueError` for ids outside the vocabulary."""
        self.check_ids(vocab_size)
        counts = numpy.zeros(vocab_size, dtype=numpy.int64)
        for chunk in self.tokens.chunks:
            counts += numpy.bincount(chunk.to_numpy(), minlength=vocab_size)
        return torch.from_numpy(counts)

    def digest(self) -> str:
        """SHA-256 of the tokens and document boundaries."""
        digest = hashlib.sha256(self.document_starts.numpy().tobytes())
        for chunk in self.tokens.chunks:
            digest.update(numpy.ascontiguousarray(chunk.to_numpy()).data)
        return digest.hexdigest()

    def shuffled(self, seed: int | Sequence[int]) -> "TokenStream":
        """
        Return a stream of the same documents, shuffled by the seed; the last `<eos>` stays last.

        Raises:
            ValueError: for a single document.
        """
        if len(self.document_starts) < 2:
            raise ValueError("A stream of a single document cannot be shuffled: give the text as several documents.")
        order = numpy.random.default_rng(seed).permutation(len(self.document_starts))
        lengths = (self.document_ends - self.document_starts)[order]
        stream = copy.copy(self)
        stream._document_offsets = (
            self.document_starts if self._document_offsets is None else self._document_offsets
        )[order]
        stream.document_starts = lengths.cumsum(0) - lengths
        return stream

    def __getstate__(self):
        """Pickle the name of the file that holds the tokens, not the tokens."""
        state = vars(self).copy()
        del state["_chunks"]
        if self._rows is not None:
            del state["tokens"]
        return state

    def __setstate__(self, state):
        vars(self).update(state)
        self._hold(self.tokens if self._rows is None else _flat(self._rows, self._end))


class _Tokenization:
    """Tokenize rows of texts, for `Dataset.map`."""

    def __init__(self, tokenizer, separated, direction="forward"):
        self.tokenizer, self.direction = tokenizer, direction
        self.separator = [tokenizer.eos_token_id] if separated else []
        self.dtype = numpy.min_scalar_type(max(tokenizer.get_vocab().values()))
        # Of the document that is read, row after row: the sizes of the rows before its first token (`None` after it), and
        # whether the last row ended within a word.
        self.waiting, self.within_word = Counter(), False

    def __call__(self, batch, indices):
        try:
            texts, continuing = batch["text"], batch.get(CONTINUES)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"The column `text` is not UTF-8 in one of the rows {indices[0]:,} to {indices[-1]:,} ({error.reason}): write "
                "the data set anew, from text."
            ) from error
        texts = [in_direction(text, self.direction) for text in texts]
        rows, form = {name: [] for name in ("tokens", "starts", *TEXT_SIZES)}, _form_of(self.tokenizer)
        for number, (text, ids) in enumerate(zip(texts, encode(texts, self.tokenizer), strict=True)):
            if continuing is None or not continuing[number] or indices[number] == 0:
                self.waiting, self.within_word = Counter(), False
            text = "".join(_formed(piece, form) for piece in pieces_of(text))  # as it is tokenized
            sizes = Counter(_sizes(text))
            if text:
                sizes["num_words"] -= self.within_word and not text[0].isspace()  # begun in the row before
                self.within_word = not text[-1].isspace()
            begins = self.waiting is not None
            if begins and len(ids) == 0:
                self.waiting.update(sizes)
                continue  # empty documents are left out
            if begins:
                sizes.update(self.waiting)
                self.waiting = None
                ids = numpy.concatenate([numpy.array(self.separator, dtype=numpy.int32), ids])
            rows["tokens"].append(ids.astype(self.dtype))
            rows["starts"].append(begins)
            for name, size in sizes.items():
                rows[name].append(size)
        return rows

    def __getstate__(self):
        """Pickle key that `datasets` hashes for its cache; the tokenizer itself changes as it is used."""
        tokenizer = self.tokenizer
        state = tokenizer
        if tokenizer.is_fast:
            parts = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
            stock = vars(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())))
            own = {name: value for name, value in sorted(vars(tokenizer).items()) if name not in stock}
            roles = sorted(tokenizer.special_tokens_map.items())  # the same backend may be used with another `<eos>`
            state = (parts, tokenizer.split_special_tokens, roles, own)
        libraries = (transformers.__version__, tokenizers.__version__)
        return (
            state,
            _code_of(type(tokenizer)),
            libraries,
            self.separator,
            self.direction,
            self.dtype.name,
            PIECE_LENGTH,
            CACHE_VERSION,
        )


KEPT_BY_PYTHON = (
    "__dict__",
    "__weakref__",
    "__slotnames__",
)  # members of a class; the last appears once an instance was copied


def _code_of(kind):
    """
    Represent a class and its bases so that the hash changes with their code: by the source of the module, or by the members
    of a class that cannot be imported. `datasets` would hash the name of an importable class alone.
    """
    code = []
    for part in kind.__mro__:
        if part.__module__.split(".")[0] in ("transformers", "builtins"):
            continue
        try:
            source = inspect.getsource(sys.modules[part.__module__])
        except (KeyError, OSError, TypeError):  # defined in an interactive session
            source = None
        members = None
        if source is None or "<locals>" in part.__qualname__:
            members = {name: value for name, value in vars(part).items() if name not in KEPT_BY_PYTHON}
        code.append((part.__module__, part.__qualname__, source, members))
    return kind.__module__, kind.__qualname__, code


def _checked_starts(document_starts, length):
    starts = torch.as_tensor(document_starts)
    if starts.dim() != 1 or len(starts) == 0 or starts.is_floating_point():
        raise ValueError(
            f"`document_starts` of shape {tuple(starts.shape)} and type {starts.dtype} must be integers in a single dimension."
        )
    if starts[0] != 0 or starts[-1] >= max(length, 1) or (starts.diff() <= 0).any():
        raise ValueError(
            f"`document_starts` ({str(starts.tolist())[:50]}) must ascend from 0, where the first document begins, to less "
            f"than {length}, the number of tokens."
        )
    return starts


def _rows_of(texts):
    """Make a data set of texts."""
    from datasets import Dataset, Features, IterableDataset, Value

    check_texts(texts)
    if isinstance(texts, IterableDataset):
        raise ValueError("`texts` is streamed, so its length is unknown: make `StreamingLanes` of it.")
    if not isinstance(texts, Dataset):
        texts = list(texts)
        for number, text in enumerate(texts):
            if text is not None and not isinstance(text, str):
                raise ValueError(f"Text {number} of `texts` is {text!r}: it must be a str.")
            check_unicode(text or "", f"Text {number} of `texts`")
        return Dataset.from_dict({"text": texts}, features=Features({"text": Value("string")}))
    if texts.format["type"] != "custom":  # a custom format is a function of the user's, which changes the texts
        texts = texts.with_format(None)
    if "text" not in texts.column_names:
        raise ValueError(
            f"`texts` has no column `text`, only {', '.join(texts.column_names)}: rename the one that holds the text."
        )
    check_text(texts, "text", "`texts`")
    return texts


def _from_last_row(rows):
    """Reverse the order of the rows of each document, where it has several."""
    begins = document_begins(rows)
    if begins.all():
        return rows
    ends = numpy.append(begins[1:], True)
    document, row = begins.cumsum(), numpy.arange(len(rows))
    rows = rows.remove_columns(CONTINUES).add_column(CONTINUES, ~ends)  # its last row comes first
    return rows.select(numpy.lexsort((-row, document)))


def as_stream(tokens: "Tokens") -> TokenStream:
    """Return `tokens` as a `TokenStream`; plain tokens are one document of unknown text."""
    return tokens if isinstance(tokens, TokenStream) else TokenStream(tokens)


def _as_arrow(tokens):
    import pyarrow

    if isinstance(tokens, pyarrow.ChunkedArray):
        shape, integers = (len(tokens),), pyarrow.types.is_integer(tokens.type)
        kind = tokens.type
    else:
        tokens = numpy.asarray(tokens.cpu() if torch.is_tensor(tokens) else tokens)
        shape, integers, kind = tokens.shape, numpy.issubdtype(tokens.dtype, numpy.integer), tokens.dtype
    if len(shape) != 1 or not integers:
        raise ValueError(f"`tokens` of shape {shape} and type {kind} must be integers in a single dimension.")
    return tokens if isinstance(tokens, pyarrow.ChunkedArray) else pyarrow.chunked_array([pyarrow.array(tokens)])


def _flat(rows, end=()):
    """Concatenate the tokens of all rows, without a copy, and `end`."""
    import pyarrow

    chunks = [chunk.flatten() for chunk in rows.data["tokens"].chunks]
    return pyarrow.chunked_array([*chunks, pyarrow.array(end, type=chunks[0].type)])


def _form_of(tokenizer):
    """Return the part of a tokenizer's normalizer that changes characters, or `None`."""
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    parts = normalizer if isinstance(normalizer, normalizers.Sequence) else [normalizer]
    kept = [copy.deepcopy(part) for part in parts if isinstance(part, FORMS)]
    for part in kept:
        if isinstance(part, normalizers.BertNormalizer):  # it also puts spaces around Chinese characters
            part.clean_text = part.handle_chinese_chars = False
    return normalizers.Sequence(kept) if kept else None


def _formed(piece: str, form) -> str:
    return piece if form is None else form.normalize_str(piece)


def _sizes(text: str) -> dict[str, int]:
    return dict(zip(TEXT_SIZES, (len(text.encode()), len(text), len(text.split())), strict=True))


def _first_sizes(texts: Iterable[str | None], tokenizer) -> dict[str, int]:
    """Return the sizes of the first token's text; a character of several tokens counts in equal shares."""
    form = _form_of(tokenizer)
    for piece in pieces_of_all(texts):
        piece = _formed(piece, form)  # the tokens are the same, and their offsets are those of the counted text
        if tokenizer.is_fast:
            (spans,) = encode([piece], tokenizer, offsets=True)[1]
            if len(spans) == 0:
                continue
            (start, end), tokens = spans[0].tolist(), int((spans == spans[0]).all(axis=1).sum())
        else:
            (ids,) = encode([piece], tokenizer)
            if len(ids) == 0:
                continue
            start, end, tokens = 0, len(tokenizer.decode(ids[:1])), 1
        spelled = _sizes(piece[start:end])
        words = len(piece.split()) - len(piece[end:].split())
        return {name: size // tokens for name, size in spelled.items()} | {"num_words": words if tokens == 1 else 0}
    return dict.fromkeys(TEXT_SIZES, 0)
