"""Corpora: texts from files, folders, the Hub or Python itself, as `datasets` that lie on disk and are read as needed.

A corpus has a column `text`, a document in each row. A document may also lie in several rows, so that none must fit into
memory: a column `hf_lstm.continues` is then true in each row that goes on with the document of the row before. It is made
here alone, of text files and by `join_records`, saved and loaded with the corpus, and left out of no selection of rows; the
first row that is selected begins a document. A column of any other name says nothing of documents, `continues` too.
"""

import errno
import hashlib
import sysconfig
import tokenize
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch
from transformers.utils import logging

from hf_lstm.tokenizers import PIECE_LENGTH

from .readers import (
    CONTINUES,
    TEXT,
    CorpusError,
    check_continues,
    check_file,
    csv_rows,
    json_rows,
    line_rows,
    parquet_columns,
    parquet_rows,
    text_rows,
)

logger = logging.get_logger(__name__)

SPLITS = ("train", "validation", "test")
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR)
RECORDS = {".jsonl": line_rows, ".ndjson": line_rows, ".json": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}
FORMAT = 1  # of the rows in the cache: another number, and those of earlier versions are forgotten


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
            corpus[split] = one_split(load_documents(file, text_column=text_column), split, file)
    if "train" not in corpus:
        raise ValueError(f"{name} has the splits {', '.join(sorted(corpus))}: there must be one called `train`.")
    if join_records:
        corpus = {split: joined(documents) for split, documents in corpus.items()}
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
            folder that `save_to_disk` made; or a data set on the Hub. A text is read as it is written, and never as a
            number or a date. A .json file holds an array of records, or one record behind the other; the first row of a
            .csv file names its columns.
        config_name (`str`, *optional*): Which configuration of a data set on the Hub.
        text_column (`str`, defaults to `"text"`): Where records hold their text.
        streaming (`bool`, defaults to `False`):
            Whether to read records when they are needed, as a `datasets.IterableDatasetDict`, instead of preparing all
            of them in the cache folder of `datasets`.

    Raises:
        ValueError: for what cannot be found or read, with the file, its line or byte, and the remedy.
    """
    from datasets import DatasetDict, IterableDatasetDict

    path, kind = Path(name), _kind_of(name)
    if kind in ("folder", "hub"):
        source = (
            "be read as what `save_to_disk` writes" if kind == "folder" else "be found, on this disk or on the Hub"
        )
    else:
        check_file(path)
        source = f"be read as {kind.removeprefix('.')}"
    try:
        with writable_cache():
            corpus = _open(path, kind, str(name), config_name, text_column, streaming)
            if not isinstance(corpus, dict):
                corpus = {"train": corpus}
            if kind in ("folder", "hub"):
                corpus = {split: _text_column(rows, text_column, name, kind) for split, rows in corpus.items()}
    except Exception as error:  # the readers behind `datasets` raise classes of their own
        for known in (error, error.__cause__):
            if isinstance(known, CorpusError):
                raise known from None
        raise ValueError(f"{name} cannot {source}: {error.__cause__ or error}") from error
    return (IterableDatasetDict if streaming else DatasetDict)(corpus)


def one_split(corpus: dict, split: str, name: str | Path):
    """The split of a source that is to serve as `split`: the one of that name, or its only one."""
    if split in corpus:
        return corpus[split]
    if len(corpus) > 1:
        raise ValueError(
            f"{name} has the splits {', '.join(corpus)}, and none called `{split}`: name a file with one."
        )
    return next(iter(corpus.values()))


def _kind_of(name):
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix in RECORDS:
        return suffix
    if suffix == ".txt" or path.is_file():
        return "text"
    return "folder" if path.is_dir() else "hub"


def _open(path, kind, name, config_name, text_column, streaming):
    """What `datasets` makes of a source: one data set, or several by split."""
    from datasets import Dataset, Features, IterableDataset, Value, load_dataset, load_from_disk

    if kind == "hub":
        return load_dataset(name, config_name, streaming=streaming)
    if kind == "folder":
        corpus = load_from_disk(str(path)).with_format(None)  # as Python's own str, whatever it was saved with
        if not streaming:
            return corpus
        if not isinstance(corpus, dict):
            return corpus.to_iterable_dataset()
        return {split: rows.to_iterable_dataset() for split, rows in corpus.items()}
    if kind == "text":
        rows, arguments, columns = text_rows, {}, {"text": Value("string"), CONTINUES: Value("bool")}
    else:
        rows, arguments, columns = RECORDS[kind], {"text_column": text_column}, {"text": Value("string")}
    if kind == ".parquet":
        columns = {name: Value(type) for name, type in parquet_columns(path, text_column).items()}
    if streaming:
        return IterableDataset.from_generator(rows, gen_kwargs={"path": path} | arguments, features=Features(columns))
    key = {"digest": _digest(path), "piece_length": PIECE_LENGTH, "format": FORMAT}
    arguments |= {"path": path.resolve(), "key": key}
    return Dataset.from_generator(rows, gen_kwargs=arguments, features=Features(columns))


def _digest(path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def document_begins(rows) -> numpy.ndarray:
    """Which rows of a data set begin a document, `(rows,)`: the first does, also where its own beginning was cut off."""
    if CONTINUES not in rows.column_names:
        return numpy.ones(len(rows), dtype=bool)
    continues = rows.select_columns(CONTINUES).with_format("arrow")[:][CONTINUES]
    begins = ~continues.fill_null(False).to_numpy()  # null where `datasets` put rows without the column beside others
    begins[:1] = True
    return begins


def check_text(rows, column: str, name: str | Path) -> None:
    """Raise `ValueError` where a column of a data set is known to hold anything but text."""
    if rows.features is None:
        return
    feature = rows.features[column]
    kind = getattr(feature, "dtype", type(feature).__name__)  # lists and mixtures are features without one
    if kind not in TEXT:
        raise CorpusError(f"The column `{column}` of {name} holds {kind}: it must hold text.")
    if CONTINUES in rows.features:
        feature = rows.features[CONTINUES]
        check_continues(getattr(feature, "dtype", type(feature).__name__), name)


def _text_column(rows, text_column, name, kind):
    from datasets import Value

    columns = rows.column_names or list(next(iter(rows), {}))  # a stream may know them only when it is read
    if text_column not in columns:
        raise CorpusError(
            f"{name} has no column `{text_column}`, only {', '.join(columns) or 'empty records'}: name the one that holds "
            "the text with `text_column`."
        )
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


def joined(rows):
    """The same rows as pieces of one document."""
    return rows.select_columns("text").add_column(CONTINUES, numpy.arange(len(rows)) > 0)


def _hold_out(rows, fraction) -> dict:
    """The rows for training, and those kept for validation; both in order, which may tell one story."""
    import pyarrow.compute

    begins = document_begins(rows)
    if begins.sum() > 1:
        table = rows.with_format("arrow")[:]
        document = begins.cumsum() - 1  # of each row: they stay together
        filled = pyarrow.compute.greater(pyarrow.compute.binary_length(table["text"]), 0).fill_null(False).to_numpy()
        candidates = numpy.unique(document[filled])
        if len(candidates) < 2:
            raise ValueError(
                "The corpus holds fewer than two documents with text: there is none to keep for validation."
            )
        drawn = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0)).numpy()
        kept = numpy.isin(document, candidates[drawn[: max(1, int(len(candidates) * fraction))]])
        return {"train": rows.select(numpy.where(~kept)[0]), "validation": rows.select(numpy.where(kept)[0])}
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
    return {"train": joined(concatenate_datasets(train)), "validation": joined(concatenate_datasets(validation))}


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
