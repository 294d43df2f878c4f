"""Corpora: texts from files, folders, the Hub or Python itself, as `datasets` that lie on disk and are read as needed.

A corpus has a column `text`, a document in each row. A document may also lie in several rows, so that none must fit into
memory: a column `continues` is then true in each row that goes on with the document of the row before.
"""

import codecs
import errno
import glob
import hashlib
import json
import sysconfig
import tokenize
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch

from hf_lstm.tokenizers import PIECE_LENGTH, pieces_of

SPLITS = ("train", "validation", "test")
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_corpus(
    name: str | Path | None = None,
    config_name: str | None = None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    text_column: str = "text",
    validation_fraction: float = 0.1,
    join_records: bool = False,
):
    """
    A corpus as a `datasets.DatasetDict` of texts in a column `text`, split into `train`, `validation` and, where there
    is one, `test`.

    Args:
        name (`str` or `Path`, *optional*): As `load_documents` takes it. Without it: Python's own standard library.
        config_name (`str`, *optional*): Which configuration of a data set on the Hub.
        validation_file, test_file (`str` or `Path`, *optional*): Files of these kinds for the other splits.
        text_column (`str`, defaults to `"text"`): Where records hold their text.
        validation_fraction (`float`, defaults to 0.1):
            What is kept for validation where `name` has no such split and no file is given: the last part of a single
            text, in characters, or documents drawn with a fixed seed.
        join_records (`bool`, defaults to `False`): Whether the records are pieces of one text, as WikiText's lines are.

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
        raise ValueError(f"{name} has the splits {', '.join(sorted(corpus))}: there must be one called `train`.")
    if join_records:
        corpus = {split: _joined(documents) for split, documents in corpus.items()}
    if "validation" not in corpus:
        corpus |= _hold_out(corpus["train"], validation_fraction)
    return DatasetDict({split: corpus[split] for split in SPLITS if split in corpus})


def load_documents(
    name: str | Path, config_name: str | None = None, text_column: str = "text", streaming: bool = False
):
    """
    One source as a `datasets.DatasetDict` of texts in a column `text`, with the splits it has; a file is all `train`.

    Args:
        name (`str` or `Path`):
            A text file in UTF-8, which is one document; a .jsonl, .json, .csv or .parquet file, one document per record; a
            folder that `save_to_disk` made; or a data set on the Hub.
        config_name (`str`, *optional*): Which configuration of a data set on the Hub.
        text_column (`str`, defaults to `"text"`): Where records hold their text.
        streaming (`bool`, defaults to `False`):
            Whether to read records when they are needed, as a `datasets.IterableDatasetDict`, instead of preparing all
            of them in the cache folder of `datasets`.

    Raises:
        ValueError: for what cannot be found or read, with the file, its line or byte, and the remedy.
    """
    from datasets import DatasetDict, IterableDatasetDict

    path = Path(name)
    is_text = path.suffix == ".txt" or (path.is_file() and path.suffix not in READERS)
    if is_text or path.suffix in READERS:
        _check_file(path)
        kind = "text" if is_text else path.suffix[1:]
        source = f"be read as {kind}"
    else:
        source = "be read as what `save_to_disk` writes" if path.is_dir() else "be found, on this disk or on the Hub"
    try:
        with writable_cache():
            corpus = _open(name, is_text, config_name, streaming)
    except Exception as error:  # the readers behind `datasets` raise classes of their own
        for known in (error, error.__cause__):
            if isinstance(known, CorpusError):
                raise known from None
        if path.suffix == ".jsonl":
            _check_lines(path)
        raise ValueError(f"{name} cannot {source}: {error.__cause__ or error}") from error
    if not isinstance(corpus, dict):
        corpus = {"train": corpus}
    if not is_text:
        corpus = {split: _text_column(rows, text_column, name, streaming) for split, rows in corpus.items()}
    return (IterableDatasetDict if streaming else DatasetDict)(corpus)


def _open(name, is_text, config_name, streaming):
    """What `datasets` makes of a source: one data set, or several by split."""
    from datasets import Dataset, IterableDataset, load_dataset, load_from_disk

    path = Path(name)
    if is_text and streaming:
        return IterableDataset.from_generator(_text_rows, gen_kwargs={"path": path})
    if is_text:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        key = {"digest": digest, "piece_length": PIECE_LENGTH}
        return Dataset.from_generator(_text_rows, gen_kwargs={"path": path.resolve(), "key": key})
    if path.suffix in READERS:
        return load_dataset(READERS[path.suffix], data_files=glob.escape(str(path)), streaming=streaming)
    if not path.is_dir():
        return load_dataset(str(name), config_name, streaming=streaming)
    corpus = load_from_disk(str(path))
    if not streaming:
        return corpus
    if not isinstance(corpus, dict):
        return corpus.to_iterable_dataset()
    return {split: rows.to_iterable_dataset() for split, rows in corpus.items()}


class CorpusError(ValueError):
    """What is wrong, in words that need no others around them."""


@contextmanager
def writable_cache():
    """Raises `ValueError` where `datasets` cannot write what it prepares."""
    from datasets import config

    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        path = Path(error.filename or config.HF_DATASETS_CACHE)
        if path.is_relative_to(config.HF_DATASETS_CACHE):
            raise CorpusError(
                f"The cache folder {config.HF_DATASETS_CACHE} cannot be written ({error.strerror}): name another one in "
                "the environment variable HF_DATASETS_CACHE."
            ) from error
        raise CorpusError(
            f"{path} cannot be written ({error.strerror}), where `datasets` keeps what it makes of the data set beside it: "
            "copy the data set to a folder that can be."
        ) from error


def read_text(path: str | Path) -> str:
    """A UTF-8 file as it is, line ends included, without a byte order mark. Raises `ValueError` for anything else."""
    path = Path(path)
    _check_file(path)
    return "".join(_decoded(path))


def count_documents(rows) -> int:
    """How many documents lie in the rows of a data set."""
    if "continues" not in rows.column_names:
        return len(rows)
    return len(rows) - int(numpy.sum(rows.with_format("numpy")["continues"][:]))


def _text_rows(path, key=None):
    """The pieces of a text file. By the key `datasets` tells its contents, and ways of reading them, apart."""
    rest, continues = "", False
    for text in _decoded(path):
        *whole, rest = list(pieces_of(rest + text)) or [""]
        for piece in whole:
            yield {"text": piece, "continues": continues}
            continues = True
    yield {"text": rest, "continues": continues}


def _decoded(path):
    """The text of a file, a little at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, data = 0, None
    with path.open("rb") as file:
        while data != b"":
            data = file.read(PIECE_LENGTH)
            if b"\0" in data:
                raise CorpusError(
                    f"{path} is no text, since byte {position + data.index(0)} is NUL: it is damaged, or in UTF-16, which "
                    "`iconv` converts."
                )
            start = position - len(decoder.getstate()[0])  # of what is decoded now
            try:
                text = decoder.decode(data, final=data == b"")
            except UnicodeDecodeError as error:
                raise CorpusError(
                    f"{path} is not UTF-8 (byte {start + error.start}: {error.reason}): convert it first, for example "
                    "with `iconv`."
                ) from error
            yield text.removeprefix("\ufeff") if position == 0 else text
            position += len(data)


def _check_file(path):
    if not path.is_file():
        raise ValueError(f"The file {path} does not exist.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: there is nothing to read.")


def _check_lines(path, text_column=None):
    """Raise `ValueError` for the first line of a .jsonl file that is no record, or lacks a column."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line) if line.strip() else {text_column: ""}
            except ValueError as error:
                raise ValueError(
                    f"{path} cannot be read as jsonl: line {number} is not JSON ({error}): mend or remove it."
                ) from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path} cannot be read as jsonl: line {number} is no record but {type(record).__name__}."
                )
            if text_column is not None and text_column not in record:
                raise ValueError(
                    f"{path} has no `{text_column}` in line {number}, only {', '.join(record)}: give every record one."
                )


def _text_column(rows, text_column, name, streaming):
    columns = rows.column_names or list(next(iter(rows), {}))  # a stream may know them only when it is read
    if text_column not in columns:
        raise ValueError(
            f"{name} has no column `{text_column}`, only {', '.join(columns) or 'empty records'}: name the one that holds "
            "the text with `text_column`."
        )
    if rows.features is not None:
        feature = rows.features[text_column]
        kind = getattr(feature, "dtype", type(feature).__name__)  # lists and mixtures are features without one
        if kind not in ("string", "large_string"):
            raise ValueError(f"The column `{text_column}` of {name} holds {kind}: it must hold text.")
        if Path(name).suffix == ".jsonl" and not streaming and rows.data.column(text_column).null_count > 0:
            _check_lines(Path(name), text_column)
    rows = rows.select_columns([text_column, *(column for column in columns if column == "continues")])
    return rows if text_column == "text" else rows.rename_column(text_column, "text")


def _joined(rows):
    """The same rows as pieces of one document."""
    if "continues" in rows.column_names:
        return rows
    return rows.add_column("continues", numpy.arange(len(rows)) > 0)


def _hold_out(rows, fraction) -> dict:
    """The rows for training, and those kept for validation; both in order, which may tell one story."""
    documents = count_documents(rows)
    if documents > 1:
        drawn = torch.randperm(documents, generator=torch.Generator().manual_seed(0))
        kept = torch.zeros(documents, dtype=torch.bool)
        kept[drawn[: max(1, int(documents * fraction))]] = True
        if "continues" in rows.column_names:  # a document's rows stay together
            starts = ~torch.from_numpy(rows.with_format("numpy")["continues"][:])
            kept = kept[starts.cumsum(0) - 1]
        return {"train": rows.select(torch.where(~kept)[0]), "validation": rows.select(torch.where(kept)[0])}
    return _cut(rows, fraction)


def _cut(rows, fraction) -> dict:
    """One text in two."""
    import pyarrow.compute
    from datasets import Dataset, concatenate_datasets

    texts = rows.with_format("arrow")[:]["text"]
    ends = numpy.cumsum(pyarrow.compute.utf8_length(texts).fill_null(0).to_numpy())  # in characters
    cut = int(ends[-1] * (1 - fraction))
    if not 0 < cut < ends[-1]:
        raise ValueError(f"The text has {ends[-1]} characters: too few to keep a part for validation.")
    row = int(numpy.searchsorted(ends, cut, side="right"))  # that holds the first character behind the cut
    text = rows[row]["text"]
    inside = cut - (int(ends[row]) - len(text))
    rows = rows.select_columns("text")
    head, tail = (
        Dataset.from_dict({"text": [part]}, features=rows.features) for part in (text[:inside], text[inside:])
    )
    train, validation = [rows.select(range(row)), head], [tail]
    if row + 1 < len(rows):
        validation.append(rows.select(range(row + 1, len(rows))))
    return {"train": _joined(concatenate_datasets(train)), "validation": _joined(concatenate_datasets(validation))}


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
