"""Corpora: texts from files, folders, the Hub or Python itself, as `datasets` that lie on disk and are read as needed.

A corpus has a column `text`, a document in each row. A document may also lie in several rows, so that none must fit into
memory: a column `continues` is then true in each row that goes on with the document of the row before.
"""

import codecs
import errno
import glob
import hashlib
import json
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch

from hf_lstm.tokenizers import PIECE_LENGTH, pieces_of

SPLITS = ("train", "validation", "test")
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR)
# With a record in each line; read here, since `datasets` makes JSON's source of texts that stand among other values.
LINES = (".jsonl", ".ndjson")
READERS = {  # those of `datasets`; "NA" and "null" in a .csv file are texts too
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".parquet": ("parquet", {}),
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


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

    path, kind = Path(name), _kind_of(name)
    if kind in ("folder", "hub"):
        source = (
            "be read as what `save_to_disk` writes" if kind == "folder" else "be found, on this disk or on the Hub"
        )
    else:
        _check_file(path)
        source = f"be read as {kind.removeprefix('.')}"
    try:
        with writable_cache():
            corpus = _open(path, kind, str(name), config_name, text_column, streaming)
    except Exception as error:  # the readers behind `datasets` raise classes of their own
        for known in (error, error.__cause__):
            if isinstance(known, CorpusError):
                raise known from None
        raise ValueError(f"{name} cannot {source}: {error.__cause__ or error}") from error
    if not isinstance(corpus, dict):
        corpus = {"train": corpus}
    if kind != "text" and kind not in LINES:
        corpus = {split: _text_column(rows, text_column, name) for split, rows in corpus.items()}
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
    if suffix in READERS or suffix in LINES:
        return suffix
    if suffix == ".txt" or path.is_file():
        return "text"
    return "folder" if path.is_dir() else "hub"


def _open(path, kind, name, config_name, text_column, streaming):
    """What `datasets` makes of a source: one data set, or several by split."""
    from datasets import Dataset, IterableDataset, config, load_dataset, load_from_disk

    if kind == "hub":
        return load_dataset(name, config_name, streaming=streaming)
    if kind == "folder":
        corpus = load_from_disk(str(path))
        if not streaming:
            return corpus
        if not isinstance(corpus, dict):
            return corpus.to_iterable_dataset()
        return {split: rows.to_iterable_dataset() for split, rows in corpus.items()}
    if kind in READERS:
        reader, options = READERS[kind]
        if not streaming:  # a cache for these contents: `datasets` itself looks at a file's size and time alone
            options = options | {"cache_dir": str(Path(config.HF_DATASETS_CACHE) / _digest(path))}
        return load_dataset(reader, data_files=glob.escape(str(path)), streaming=streaming, **options)
    rows, arguments = _text_rows, {"path": path}
    if kind in LINES:
        rows, arguments = _line_rows, {"path": path, "text_column": text_column}
    if streaming:
        return IterableDataset.from_generator(rows, gen_kwargs=arguments)
    key = {"digest": _digest(path), "piece_length": PIECE_LENGTH}
    return Dataset.from_generator(rows, gen_kwargs=arguments | {"path": path.resolve(), "key": key})


def _digest(path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    if not os.access(path, os.R_OK):
        raise ValueError(f"The file {path} cannot be read: you have no permission to.")
    if path.suffix in COMPRESSED:
        raise ValueError(f"{path} is compressed: unpack it first.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: there is nothing to read.")


def read_records(path: str | Path) -> Iterator[tuple[int, dict]]:
    """The records of a file with a JSON object in each line, and the numbers of their lines. Raises `ValueError`."""
    path, number, found = Path(path), 0, False
    _check_file(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} cannot be read as jsonl: line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise CorpusError(f"{where} is not JSON ({error}): mend or remove it.") from error
            if not isinstance(record, dict):
                raise CorpusError(f"{where} is no record but {type(record).__name__}: put an object in each line.")
            found = True
            yield number, record
    if not found:
        raise CorpusError(f"{path} holds no record in its {number} lines: there is nothing to read.")


def _line_rows(path, text_column, key=None):
    """The texts of a file with a record in each line."""
    for number, record in read_records(path):
        if text_column not in record:
            raise CorpusError(
                f"{path} has no `{text_column}` in line {number}, only {', '.join(record) or 'nothing'}: name the one "
                "that holds the text with `text_column`, and give it to every record."
            )
        text = record[text_column]
        if text is not None and not isinstance(text, str):
            raise CorpusError(
                f"The column `{text_column}` of {path} holds {json.dumps(text)[:50]} in line {number}: it must hold text."
            )
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise CorpusError(
                f"{path} cannot be read as jsonl: line {number} holds half of a character ({error.reason}): mend or "
                "remove it."
            ) from error
        yield {"text": text or ""}


def _text_column(rows, text_column, name):
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
    rows = rows.select_columns([text_column, *(column for column in columns if column == "continues")])
    return rows if text_column == "text" else rows.rename_column(text_column, "text")


def joined(rows):
    """The same rows as pieces of one document."""
    if "continues" in rows.column_names:
        return rows
    return rows.add_column("continues", numpy.arange(len(rows)) > 0)


def _hold_out(rows, fraction) -> dict:
    """The rows for training, and those kept for validation; both in order, which may tell one story."""
    import pyarrow.compute

    if count_documents(rows) > 1:
        table = rows.with_format("arrow")[:]
        starts = numpy.ones(len(rows), dtype=bool)
        if "continues" in rows.column_names:
            starts = ~table["continues"].to_numpy()
        document = starts.cumsum() - 1  # of each row: they stay together
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
