"""Readers of text, .jsonl, .json and .csv files, compressed or not, and of .parquet files. Text is never converted; errors name file and line."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_lstm.tokenizers import PIECE_LENGTH, pieces_of

CONTINUES = "hf_lstm.continues"  # the column that marks rows which go on with a document; nobody uses it by chance
TEXT = ("string", "large_string", "string_view")  # pyarrow's types
PARQUET_ROWS = 100  # read at once
LARGEST_FIELD = 2**31 - 1  # characters of a field in a .csv file


class CorpusError(ValueError):
    """A complete error message about a corpus; callers raise it again unchanged."""


def _open_zst(path: Path):
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


def _open_zip(path: Path):
    with zipfile.ZipFile(path) as archive:
        return archive.open(_only_member(archive, path))


def _only_member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    files = [member for member in archive.infolist() if not member.is_dir()]
    if len(files) != 1:
        raise CorpusError(
            f"{path} holds {len(files)} files: unpack it and name one, since a .zip file must hold exactly one."
        )
    return files[0]


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
    ".zip": _open_zip,
}
UNREAD = {".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".lz4", ".br", *OPENERS}  # also compressed twice


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file for reading bytes, decompressed by its suffix. Raises `ValueError` if that fails."""
    with unpacking(path), OPENERS.get(path.suffix.lower(), lambda path: path.open("rb"))(path) as file:
        yield file


@contextmanager
def unpacking(path: Path) -> Iterator[None]:
    """Raise `ValueError` where a compressed file is damaged."""
    try:
        yield
    except (OSError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        if path.suffix.lower() not in OPENERS:
            raise
        raise CorpusError(
            f"{path} cannot be unpacked ({error}): it is damaged, or not a {path.suffix} file, so make it again."
        ) from error


def kind_of(path: Path) -> str:
    """Return the suffix of the contents: `.jsonl` for a.jsonl, a.jsonl.gz, and a .zip file that holds a.jsonl."""
    suffix = path.suffix.lower()
    if suffix == ".zip" and path.is_file():
        with unpacking(path), zipfile.ZipFile(path) as archive:
            return Path(_only_member(archive, path).filename).suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in OPENERS else suffix


def check_file(path: Path) -> None:
    """Raise `ValueError` for a file that does not exist, may not be read, cannot be unpacked or is empty."""
    if not path.is_file():
        raise ValueError(f"The file {path} does not exist.")
    if not os.access(path, os.R_OK):
        raise ValueError(f"The file {path} cannot be read: you have no permission to.")
    kind, compressed = kind_of(path), path.suffix.lower() in OPENERS
    if kind in UNREAD or (kind == ".parquet" and compressed):
        raise CorpusError(
            f"{path} is an archive, or compressed in an unsupported way: unpack it first, or compress one text, .jsonl, .json or "
            f".csv file to {', '.join(OPENERS)}."
        )
    with opened(path) as file:
        if not file.read(1):
            raise ValueError(f"{path} is empty: name a file with text.")


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file, line ends unchanged, without a byte order mark. Raises `ValueError` for anything else."""
    path = Path(path)
    check_file(path)
    return "".join(_decoded(path))


def read_records(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield line number and object of each line of a .jsonl file. Raises `ValueError` for anything else."""
    path, number, found = Path(path), 0, False
    check_file(path)
    for number, line in enumerate(_lines(path, "\n"), 1):
        if not line.strip(" \t\r\n"):
            continue
        where = f"{path} cannot be read as jsonl: line {number}"
        try:
            record = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            fault = str(error)
            if isinstance(error, json.JSONDecodeError):  # the decoder would call every line the first
                fault = f"{error.msg} at character {error.pos + 1}"
            raise CorpusError(f"{where} is not JSON ({fault}): correct or remove it.") from error
        if not isinstance(record, dict):
            raise CorpusError(f"{where} is {type(record).__name__}, not an object: put an object in each line.")
        found = True
        yield number, record
    if not found:
        raise CorpusError(f"{path} holds no record in its {number} lines: give it at least one.")


# Generators of rows for `Dataset.from_generator`, whose cache depends on `key`: the contents, and the version of the reader.


def text_rows(path, key=None):
    """Yield the pieces of a text file."""
    rest, continues = "", False
    for text in _decoded(path):
        *whole, rest = list(pieces_of(rest + text)) or [""]
        for piece in whole:
            yield {"text": piece, CONTINUES: continues}
            continues = True
    yield {"text": rest, CONTINUES: continues}


def line_rows(path, text_column, key=None):
    """Yield the texts of a .jsonl file."""
    for number, record in read_records(path):
        yield {"text": _text_of(record, text_column, path, f"line {number}")}


def json_rows(path, text_column, key=None):
    """Yield the texts of a .json file: an array of records or strings, or one record after another."""
    source, number = _JSON(path), 0
    in_array = source.peek() == "["
    if in_array:
        source.skip()
    while True:
        begin, number, line = source.peek(), number + 1, source.line
        where = f"record {number} (line {line})"
        if begin == "" or begin not in ('{"' if in_array else "{"):
            found = f"there is {begin!r}" if begin else "the file ends"
            raise CorpusError(
                f"{path} cannot be read as json: {found} where {where} should begin: make it an array of objects, or an "
                "object in each line."
            )
        try:
            record = source.value()
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{path} cannot be read as json: {where} is not JSON ({error}): correct it.") from error
        if isinstance(record, str):
            record = {"text": record}
        yield {"text": _text_of(record, text_column, path, where)}
        behind = source.peek()
        if in_array and behind not in (",", "]"):
            found = f"there is {behind!r}" if behind else "the file ends"
            raise CorpusError(
                f"{path} cannot be read as json: {found} after {where}, in line {source.line}: put a comma between "
                "records, and `]` after the last."
            )
        if in_array:
            source.skip()
        if behind == ("]" if in_array else ""):
            break
    if source.peek():
        raise CorpusError(
            f"{path} cannot be read as json: there is {source.peek()!r} in line {source.line}, after the array: keep one "
            "array in the file."
        )


def csv_rows(path, text_column, key=None):
    """Yield the texts of a .csv file, whose first row names the columns."""
    csv.field_size_limit(LARGEST_FIELD)  # for the whole process; the default, 131,072, is less than a book
    end = ""  # of the line that was read last
    kinds = set()  # of the ends of rows: whether they are a carriage return alone

    def lines():
        nonlocal end
        for text in _lines(path, ""):
            end = text[len(text.rstrip("\r\n")) :]
            yield text

    rows = csv.reader(lines(), strict=True)
    column, width, found = None, 0, False
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise CorpusError(
                f"{path} cannot be read as csv: the row that begins in line {line} is not quoted correctly ({error}): "
                "double the quotation marks within a quoted text, and close it."
            ) from error
        if row is None:
            break
        if end and (row or end == "\r"):  # a file written with \r\r\n has blank lines of another end
            kinds.add(end == "\r")
        if len(kinds) > 1:
            raise CorpusError(
                f"{path} cannot be read as csv: some rows end in a carriage return alone, and others do not, first in line "
                f"{line}: put quotation marks around a text that holds one, or give all rows the same end."
            )
        if not row:  # a blank line
            continue
        if column is None:
            if row.count(text_column) != 1:
                fault = "several columns" if text_column in row else "no column"
                raise CorpusError(
                    f"{path} has {fault} `{text_column}` in line {line}, only {', '.join(row)[:200]}: name the one that "
                    "holds the text with `text_column`."
                )
            column, width = row.index(text_column), len(row)
            continue
        if len(row) != width:
            raise CorpusError(
                f"{path} cannot be read as csv: line {line} has {len(row)} fields, and the first line names {width}: put "
                "quotation marks around a text that holds a comma, or make it a .txt or .jsonl file."
            )
        found = True
        yield {"text": row[column]}
    if not found:
        raise CorpusError(f"{path} holds no record in its {rows.line_num} lines: give it at least one.")


def parquet_columns(path, text_column) -> dict[str, str]:
    """Return the types of the columns that `parquet_rows` reads. Raises `ValueError` for columns of other types, or none."""
    import pyarrow

    schema = _parquet(path).schema_arrow
    if schema.names.count(text_column) != 1:
        fault = "several columns" if text_column in schema.names else "no column"
        raise CorpusError(
            f"{path} has {fault} `{text_column}`, only {', '.join(schema.names)[:200]}: name the one that holds the text with "
            "`text_column`."
        )
    kind = schema.field(text_column).type
    kind = str(kind.value_type if pyarrow.types.is_dictionary(kind) else kind)  # each text is stored once
    if kind not in TEXT:
        raise CorpusError(f"The column `{text_column}` of {path} holds {kind}: it must hold text.")
    columns = {"text": "string" if kind == "string" else "large_string"}
    if CONTINUES in schema.names:
        check_continues(str(schema.field(CONTINUES).type), path)
        columns[CONTINUES] = "bool"
    return columns


def parquet_rows(path, text_column, key=None):
    """Yield the texts of a .parquet file, whose other columns may hold anything."""
    import pyarrow

    file, columns, number = _parquet(path), parquet_columns(path, text_column), 0
    names = {name: text_column if name == "text" else name for name in columns}
    batches = file.iter_batches(PARQUET_ROWS, columns=list(names.values()))
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            raise CorpusError(
                f"{path} cannot be read as parquet after row {number:,} ({error}): it is damaged, so make it again."
            ) from error
        if batch is None:
            break
        for values in zip(*(batch.column(name) for name in names.values()), strict=True):
            number += 1
            try:
                yield {name: value.as_py() for name, value in zip(names, values, strict=True)}
            except UnicodeDecodeError as error:  # which pyarrow does not check
                raise CorpusError(
                    f"The column `{text_column}` of {path} is not UTF-8 in row {number:,} ({error.reason}): write the file "
                    "anew, from text."
                ) from error
    if number == 0:
        raise CorpusError(f"{path} holds no record: give it at least one.")


def _parquet(path):
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(
            f"{path} cannot be read as parquet ({error}): it is damaged, or not a .parquet file, so make it again."
        ) from error


def check_continues(kind: str, name: str | Path) -> None:
    """Raise `ValueError` for a column `hf_lstm.continues` that does not hold booleans."""
    if kind != "bool":
        raise CorpusError(
            f"The column `{CONTINUES}` of {name} holds {kind}: it must hold booleans, as `load_documents` makes them, or be "
            "renamed."
        )


def _text_of(record, text_column, path, where):
    if text_column not in record:
        raise CorpusError(
            f"{path} has no `{text_column}` in {where}, only {', '.join(record)[:200] or 'nothing'}: name the one that "
            "holds the text with `text_column`, and give it to every record."
        )
    text = record[text_column]
    if text is not None and not isinstance(text, str):
        raise CorpusError(
            f"The column `{text_column}` of {path} holds {json.dumps(text)[:50]} in {where}: it must hold text, in "
            "quotation marks."
        )
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{path} cannot be read as {kind_of(path)[1:]}: {where} holds half of a character ({error.reason}): mend or "
            "remove it."
        ) from error
    return text or ""


def _members_once(pairs):
    """Make a JSON object; raise `ValueError` for a repeated name, which `dict` would drop."""
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} occurs twice")
    return members


_DECODER = json.JSONDecoder(object_pairs_hook=_members_once)
_NO_WHITE_SPACE = re.compile(r"[^ \t\r\n]")


class _JSON:
    """
    Incremental reader of JSON values. It holds one value and the rest of the last read, or, for a value without an end,
    the rest of the file.
    """

    def __init__(self, path):
        self.pieces, self.text, self.start = _decoded(path), "", 0
        self.line = 1  # of `start`

    def peek(self) -> str:
        """Return the next character that is not white space; empty at the end."""
        while True:
            found = _NO_WHITE_SPACE.search(self.text, self.start)
            self._move(found.start() if found else len(self.text))
            if self.start < len(self.text) or not self._more():
                return self.text[self.start : self.start + 1]

    def skip(self) -> None:
        self._move(self.start + 1)

    def value(self):
        """Read the next value, an object or a string."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.start)
            except json.JSONDecodeError as error:  # perhaps its end is still to be read
                if self._more():
                    continue
                line = self.line + self.text.count("\n", self.start, error.pos)
                raise ValueError(f"{error.msg} in line {line}") from error
            self._move(end)
            return value

    def _move(self, start):
        self.line += self.text.count("\n", self.start, start)
        self.start = start

    def _more(self) -> bool:
        """Double the text held, so that a long value is parsed a few times only."""
        parts, read = [self.text[self.start :]], 0
        for piece in self.pieces:
            parts.append(piece)
            read += len(piece)
            if read > len(parts[0]):
                break
        self.text, self.start = "".join(parts), 0
        return read > 0


def _lines(path, newline):
    """Yield the lines of a file with their ends, by the rules of `open(newline=...)`."""
    begun = []
    for text in _decoded(path):
        for line in io.StringIO(text, newline=newline):
            begun.append(line)
            if line.endswith(("\n", "\r") if newline == "" else newline):
                yield "".join(begun)
                begun = []
    if begun:
        yield "".join(begun)


def _decoded(path):
    """Yield the text of a file in small parts, never split inside a line end."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=False)
    position, data = 0, None
    with opened(path) as file:
        while data != b"":
            data = file.read(PIECE_LENGTH)
            if b"\0" in data:
                raise CorpusError(
                    f"{path} is not text, since byte {position + data.index(0)} is NUL: it is damaged, or in UTF-16, which "
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
