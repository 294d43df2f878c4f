"""Corpora: texts from files, folders or the Hub, as memory-mapped `datasets`.

| source                                        | documents                                    | read by                   |
|-----------------------------------------------|----------------------------------------------|---------------------------|
| .jsonl, .ndjson                               | one per line, an object                      | `records.read_records`    |
| .json                                         | one per record: an array, or records in turn | `records.json_records`    |
| .csv                                          | one per row; the first row names the columns | `records.csv_records`     |
| .txt, any other file                          | one, the whole file                          | `readers.text_rows`       |
| these as .gz, .bz2, .xz, .zst, alone in a .zip | the same                                     | the same, while unpacking |
| .parquet                                      | one per row                                  | `records.parquet_rows`    |
| a pattern (`books/*.txt`), files of one kind  | those of each file                           | the same                  |
| a folder of .txt files, at any depth          | one per file                                 | `readers.text_rows`       |
| a folder made by `save_to_disk`               | one per row                                  | `datasets.load_from_disk` |
| a name on the Hub                             | one per row                                  | `datasets.load_dataset`   |

Our own readers keep text as it is written, which `datasets`' do not (dates, numbers, half characters, ragged rows), and
name the line of an error.

A corpus has a column `text`, with a document in each row. A document may also span several rows, so that it need not fit
into memory: a column `hf_lstm.continues` is then true in each row that continues the document of the row before. The column
is made here alone, from text files and by `join_records`, and is saved and loaded with the corpus; the first row of a
selection begins a document. Columns of other names, such as `continues`, do not affect documents.
"""

import errno
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from transformers.utils import logging

from hf_lstm.tokenizers import PIECE_LENGTH

from .readers import (
    CONTINUES,
    TEXT,
    CorpusError,
    check_continues,
    check_encoding,
    check_file,
    files_of,
    kind_of,
    text_rows,
)
from .records import choose_column, find_text_column, missing_column, parquet_columns, parquet_rows, record_rows

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDatasetDict

logger = logging.get_logger(__name__)

SPLITS = ("train", "validation", "test")
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR)
RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
SOURCES = {
    "folder": ("be read as a folder made by `save_to_disk`", "make it again"),
    "hub": ("be found, on this disk or on the Hub", "correct its name, or log in by `hf auth login`"),
}
CACHE_VERSION = 1  # of the rows in the cache: a new number invalidates those of earlier versions


def load_corpus(
    name: "str | Path | DatasetDict",
    config_name: str | None = None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    text_column: str | None = None,
    validation_fraction: float = 0.1,
    join_records: bool = False,
    encoding: str = "utf-8",
    csv_delimiter: str = ",",
) -> "DatasetDict":
    """
    Load a corpus as a `datasets.DatasetDict` with a column `text`, split into `train`, `validation` and, where there is
    one, `test`.

    Args:
        name (`str`, `Path` or `datasets.DatasetDict`): A source for [`load_documents`], or what it returns.
        config_name (`str`, *optional*): The configuration of a data set on the Hub.
        validation_file, test_file (`str` or `Path`, *optional*): Files of these kinds for the other splits.
        text_column (`str`, *optional*):
            The column or field of the records that holds the text; by default `text`, or else the only one with text.
        validation_fraction (`float`, defaults to 0.1):
            The share kept for validation where `name` has no such split and no file is given: the last part of a single
            text, in characters, or documents drawn with a fixed seed.
        join_records (`bool`, defaults to `False`): Whether the records are pieces of one text, like the lines of WikiText.
        encoding, csv_delimiter (`str`, defaults to `"utf-8"` and `","`): Of all files; see [`load_documents`].

    Returns:
        `datasets.DatasetDict`: the splits, `train` and `validation` at least.

    Raises:
        ValueError: if a source cannot be found or read, with the file and the remedy.
    """
    from datasets import DatasetDict

    if not 0 < validation_fraction < 1:
        raise ValueError(f"`validation_fraction` ({validation_fraction}) must lie between 0 and 1.")
    reading: dict[str, Any] = {"text_column": text_column, "encoding": encoding, "csv_delimiter": csv_delimiter}
    if isinstance(name, DatasetDict):
        corpus = {split: _text_column(rows, text_column, "`name`", "memory") for split, rows in name.items()}
        name = "`name`"
    else:
        corpus = dict(load_documents(name, config_name, **reading))
    for split, file in (("validation", validation_file), ("test", test_file)):
        if file is not None:
            corpus[split] = one_split(load_documents(file, **reading), split, file)
    if "train" not in corpus:
        raise ValueError(f"{name} has the splits {', '.join(sorted(corpus))}: there must be one called `train`.")
    if join_records:
        corpus = {split: joined(documents) for split, documents in corpus.items()}
    if "validation" not in corpus:
        corpus |= _hold_out(corpus["train"], validation_fraction)
    return DatasetDict({split: corpus[split] for split in SPLITS if split in corpus})


def load_documents(
    name: str | Path,
    config_name: str | None = None,
    text_column: str | None = None,
    streaming: bool = False,
    encoding: str = "utf-8",
    csv_delimiter: str = ",",
) -> "DatasetDict | IterableDatasetDict":
    """
    Load one source as a `datasets.DatasetDict` with a column `text` and the splits it has; a file is all `train`.

    Args:
        name (`str` or `Path`):
            A text file, which is one document; a .jsonl, .json, .csv or .parquet file, one document per record; one of
            these, .parquet excepted, compressed; a pattern of such files of one kind, or a folder of .txt files; a folder
            that `save_to_disk` made; or a data set on the Hub. Text is never converted to a number or a date. A .json file
            holds an array of records, or one record after another; the first row of a .csv file names its columns.
        config_name (`str`, *optional*): The configuration of a data set on the Hub.
        text_column (`str`, *optional*):
            The column or field of the records that holds the text; by default `text`, or else the only one with text.
        streaming (`bool`, defaults to `False`):
            Whether to read records as they are needed, as a `datasets.IterableDatasetDict`, instead of preparing all of
            them in the cache folder of `datasets`.
        encoding (`str`, defaults to `"utf-8"`): The encoding of text, .jsonl, .json and .csv files, as Python names it.
        csv_delimiter (`str`, defaults to `","`): The character between the columns of .csv files.

    Raises:
        ValueError: if the source cannot be found or read, with the file, its line or byte, and the remedy.
    """
    from datasets import DatasetDict, IterableDatasetDict

    if not isinstance(name, str | Path):
        raise ValueError(f"`name` ({name!r}) must be a str or a Path: name a file, a folder or a data set on the Hub.")
    check_encoding(encoding)
    kind, files = source_of(name)
    for file in files:
        check_file(file, may_be_empty=kind == "text" and len(files) > 1)
    try:
        with writable_cache():
            if files:
                corpus = _read(files, kind, text_column, streaming, encoding, csv_delimiter)
            else:
                corpus = _open(kind, str(name), config_name, streaming)
            if not isinstance(corpus, dict):
                corpus = {"train": corpus}
            if not files:
                corpus = {split: _text_column(rows, text_column, name, kind) for split, rows in corpus.items()}
    except Exception as error:  # the libraries that `datasets` uses raise classes of their own
        for known in (error, error.__cause__):
            if isinstance(known, CorpusError):
                raise known from None
        source, remedy = SOURCES.get(kind, (f"be read as {kind.removeprefix('.')}", "look whether it is damaged"))
        reason = str(error.__cause__ or error).partition("\n")[0].rstrip(".")
        raise ValueError(f"{name} cannot {source} ({reason}): {remedy}.") from error
    return (IterableDatasetDict if streaming else DatasetDict)(corpus)


def one_split(corpus: dict, split: str, name: str | Path):
    """Return the split of that name, or the only one. Raises `ValueError` for several without it."""
    if split in corpus:
        return corpus[split]
    if len(corpus) > 1:
        raise ValueError(f"{name} has the splits {', '.join(corpus)}, but not `{split}`: name a file with that split.")
    return next(iter(corpus.values()))


def source_of(name: str | Path) -> tuple[str, list[Path]]:
    """
    Return the kind of a source, `text`, the suffix of a kind of records, `folder` (made by `save_to_disk`) or `hub`, and,
    for the first two, its files.
    """
    from datasets import config

    path = Path(name)
    if any((path / file).is_file() for file in (config.DATASET_STATE_JSON_FILENAME, config.DATASETDICT_JSON_FILENAME)):
        return "folder", []
    files = files_of(name)
    if not path.exists() and files == [path] and kind_of(path) not in (".txt", *RECORDS):
        return "hub", []
    kinds = {kind if (kind := kind_of(file)) in RECORDS else "text" for file in files}
    if len(kinds) > 1:
        raise CorpusError(
            f"{name} matches files of several kinds, {', '.join(sorted(kinds))}: name those of one kind."
        )
    return kinds.pop(), files


def _open(kind, name, config_name, streaming):
    """Open a folder or a data set on the Hub with `datasets`: one data set, or several by split."""
    from datasets import load_dataset, load_from_disk

    if kind == "hub":
        return load_dataset(name, config_name, streaming=streaming)
    corpus = load_from_disk(name).with_format(None)  # as Python's own str, whatever it was saved with
    if not streaming:
        return corpus
    if not isinstance(corpus, dict):
        return corpus.to_iterable_dataset()
    return {split: rows.to_iterable_dataset() for split, rows in corpus.items()}


def _read(files, kind, text_column, streaming, encoding, csv_delimiter):
    """Read files of one kind."""
    from datasets import Dataset, Features, IterableDataset, Value

    rows, arguments, columns = text_rows, {"encoding": encoding}, {"text": Value("string"), CONTINUES: Value("bool")}
    if kind in RECORDS:
        column = find_text_column(files[0], encoding, csv_delimiter) if text_column is None else text_column
        rows, arguments, columns = record_rows, {"text_column": column}, {"text": Value("string")}
        if kind == ".parquet":
            rows, columns = parquet_rows, _parquet_features(files, column)
        else:
            arguments |= {"encoding": encoding, "csv_delimiter": csv_delimiter}
    if streaming:
        return IterableDataset.from_generator(
            rows, gen_kwargs={"paths": files} | arguments, features=Features(columns)
        )
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    key = {"digest": digest.hexdigest(), "piece_length": PIECE_LENGTH, "format": CACHE_VERSION}
    arguments |= {"paths": [path.resolve() for path in files], "key": key}
    return Dataset.from_generator(rows, gen_kwargs=arguments, features=Features(columns))


def _parquet_features(files, text_column):
    from datasets import Value

    columns = parquet_columns(files[0], text_column)
    for path in files[1:]:
        if (others := parquet_columns(path, text_column)) != columns:
            raise CorpusError(f"{path} has the columns {others}, and {files[0]} {columns}: make them alike.")
    return {name: Value(type) for name, type in columns.items()}


@contextmanager
def writable_cache() -> Iterator[None]:
    """Raise `ValueError` where `datasets` cannot write to its cache."""
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
            f"{path} cannot be written ({error.strerror}), where `datasets` keeps its cache of the data set beside it: "
            "copy the data set to a folder that can be."
        ) from error


def document_begins(rows: "Dataset") -> numpy.ndarray:
    """Return a mask of the rows that begin a document, `(rows,)`; the first row always does."""
    if CONTINUES not in rows.column_names:
        return numpy.ones(len(rows), dtype=bool)
    continues = rows.select_columns(CONTINUES).with_format("arrow")[:][CONTINUES]
    begins = ~continues.fill_null(False).to_numpy()  # null where `datasets` put rows without the column beside others
    begins[:1] = True
    return begins


def check_text(rows, column: str, name: str | Path) -> None:
    """Raise `ValueError` for a column whose declared type is not text."""
    if rows.features is None:
        return
    feature = rows.features[column]
    kind = getattr(feature, "dtype", type(feature).__name__)  # lists and structures are features without a dtype
    if kind not in TEXT:
        raise CorpusError(f"The column `{column}` of {name} holds {kind}: it must hold text.")
    if CONTINUES in rows.features:
        feature = rows.features[CONTINUES]
        check_continues(getattr(feature, "dtype", type(feature).__name__), name)


def _text_column(rows, text_column, name, kind):
    from datasets import Value

    if rows.features is None:  # a stream that is known only when it is read
        columns = {column: isinstance(value, str) for column, value in next(iter(rows), {}).items()}
    else:
        columns = {column: getattr(feature, "dtype", None) in TEXT for column, feature in rows.features.items()}
    if text_column is None:
        text_column = choose_column(columns, name)
    if text_column not in columns:
        raise missing_column(name, f"column `{text_column}`", columns)
    check_text(rows, text_column, name)
    if kind == "folder" and "continues" in columns and CONTINUES not in columns:
        logger.warning(
            f"{name} has a column `continues`, and each of its rows is read as a document of its own. Version 0.1.0 called "
            f"the rest of a document so: if it wrote the folder, make it again, or rename the column to `{CONTINUES}`."
        )
    rows = rows.select_columns([text_column, *(column for column in columns if column == CONTINUES)])
    if rows.features is not None and rows.features[text_column].dtype == "string_view":
        rows = rows.cast_column(text_column, Value("large_string"))  # pyarrow computes little with views
    return rows if text_column == "text" else rows.rename_column(text_column, "text")


def joined(rows: "Dataset") -> "Dataset":
    """Mark all rows as pieces of one document."""
    return rows.select_columns("text").add_column(CONTINUES, numpy.arange(len(rows)) > 0)


def _hold_out(rows, fraction) -> dict:
    """Split rows into `train` and `validation`, whole documents, both in their order."""
    import pyarrow.compute

    begins = document_begins(rows)
    if begins.sum() > 1:
        table = rows.with_format("arrow")[:]
        document = begins.cumsum() - 1  # of each row: they stay together
        filled = pyarrow.compute.greater(pyarrow.compute.binary_length(table["text"]), 0).fill_null(False).to_numpy()
        candidates = numpy.unique(document[filled])
        if len(candidates) < 2:
            raise ValueError(
                "The corpus holds fewer than two documents with text: give more documents, or name a `--validation_file`."
            )
        drawn = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0)).numpy()
        kept = numpy.isin(document, candidates[drawn[: max(1, int(len(candidates) * fraction))]])
        return {"train": rows.select(numpy.where(~kept)[0]), "validation": rows.select(numpy.where(kept)[0])}
    return _cut(rows, fraction)


def _cut(rows, fraction) -> dict:
    """Split one text into `train` and `validation` at a character."""
    import pyarrow.compute
    from datasets import Dataset, concatenate_datasets

    texts = rows.with_format("arrow")[:]["text"]
    ends = numpy.cumsum(pyarrow.compute.utf8_length(texts).fill_null(0).to_numpy())  # in characters
    cut = int(ends[-1] * (1 - fraction))
    if not 0 < cut < ends[-1]:
        raise ValueError(
            f"The text has {ends[-1]} characters: too few to split, so give more text, or name a `--validation_file`."
        )
    row = int(numpy.searchsorted(ends, cut, side="right"))  # that holds the first character after the cut
    text = rows[row]["text"]
    inside = cut - (int(ends[row]) - len(text))
    rows = rows.select_columns("text")
    head, tail = (
        Dataset.from_dict({"text": [part]}, features=rows.features) for part in (text[:inside], text[inside:])
    )
    train, validation = [rows.select(range(row)), head], [tail]
    if row + 1 < len(rows):
        validation.append(rows.select(range(row + 1, len(rows))))
    return {"train": joined(concatenate_datasets(train)), "validation": joined(concatenate_datasets(validation))}
