"""Records of .jsonl, .json and .csv files, compressed or not, and of .parquet files. Text is never converted; errors name file and line."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .readers import CONTINUES, TEXT, CorpusError, check_continues, check_encoding, check_file, decoded, kind_of

logger = logging.get_logger(__name__)

PARQUET_ROWS = 100  # read at once
LARGEST_FIELD = 2**31 - 1  # characters of a field in a .csv file
DELIMITERS = (";", "\t", "|")  # that a .csv file may have instead of commas
SEPARATED = "columns seem to be separated by {0!r}, so add `--csv_delimiter {0!r}`, or `csv_delimiter=` in Python"


def read_records(path: str | Path, encoding: str = "utf-8") -> Iterator[tuple[int, dict]]:
    """Yield line number and object of each line of a .jsonl file. Raises `ValueError` for anything else."""
    path, number, found = Path(path), 0, False
    check_encoding(encoding)
    check_file(path)
    for number, line in enumerate(_lines(path, "\n", encoding), 1):
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


def json_records(path: Path, encoding: str = "utf-8") -> Iterator[tuple[str, dict]]:
    """Yield place and object of each record of a .json file: an array of records or strings, or one after another."""
    check_encoding(encoding)
    check_file(path)
    source, number = _JSON(path, encoding), 0
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
        yield where, {"text": record} if isinstance(record, str) else record
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


def csv_records(path: str | Path, encoding: str = "utf-8", delimiter: str = ",") -> Iterator[tuple[int, dict]]:
    """
    Yield line number and fields of each row of a .csv file, whose first row names the columns; the fields of columns of
    the same name come as a list.
    """
    if delimiter == r"\t":  # typed so in a terminal
        delimiter = "\t"
    if len(delimiter) != 1 or delimiter in '"\r\n ':
        raise CorpusError(f"`csv_delimiter` ({delimiter!r}) must be one character, such as `;`, or `\\t` for a tab.")
    path = Path(path)
    check_encoding(encoding)
    check_file(path)
    csv.field_size_limit(LARGEST_FIELD)  # for the whole process; the default, 131,072, is less than a book
    end = ""  # of the line that was read last
    kinds = set()  # of the ends of rows: whether they are a carriage return alone

    def lines():
        nonlocal end
        for text in _lines(path, "", encoding):
            end = text[len(text.rstrip("\r\n")) :]
            yield text

    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    columns: list[str] = []
    found = False
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
        if not columns:
            columns = row
            repeated = {name for name in row if row.count(name) > 1}
            continue
        if len(row) != len(columns):
            remedy = f"put quotation marks around a text that holds {delimiter!r}, or make it a .txt or .jsonl file"
            if mark := _delimiter_in(path, columns):
                remedy = SEPARATED.format(mark)
            raise CorpusError(
                f"{path} cannot be read as csv: line {line} has {len(row)} fields, and the first line names {len(columns)}: "
                f"{remedy}."
            )
        found = True
        record: dict[str, Any] = dict(zip(columns, row, strict=True))
        for name in repeated:
            record[name] = [field for column, field in zip(columns, row, strict=True) if column == name]
        yield line, record
    if not found:
        raise CorpusError(f"{path} holds no record in its {rows.line_num} lines: give it at least one.")


def records_of(path: Path, encoding: str = "utf-8", csv_delimiter: str = ",") -> Iterator[tuple[str, dict]]:
    """Yield place and object of each record of a .jsonl, .json or .csv file."""
    kind = kind_of(path)
    if kind == ".json":
        yield from json_records(path, encoding)
        return
    numbered = csv_records(path, encoding, csv_delimiter) if kind == ".csv" else read_records(path, encoding)
    for number, record in numbered:
        yield f"line {number}", record


def record_rows(paths, text_column, encoding, csv_delimiter, key=None):
    """
    Yield the texts of .jsonl, .json or .csv files, for `Dataset.from_generator`, whose cache depends on `key`: the contents,
    and the version of the reader.
    """
    for path in paths:
        for where, record in records_of(path, encoding, csv_delimiter):
            yield {"text": _text_of(record, text_column, path, where)}


def find_text_column(path: Path, encoding: str = "utf-8", csv_delimiter: str = ",") -> str:
    """Return the column of a file that holds the text: `text`, or else the only one with text in its first record."""
    if kind_of(path) == ".parquet":
        columns = {field.name: _parquet_type(field) in TEXT for field in _parquet(path).schema_arrow}
    else:
        _, record = next(records_of(path, encoding, csv_delimiter))
        columns = {name: isinstance(value, str) for name, value in record.items()}
    return choose_column(columns, path)


def choose_column(columns: dict[str, bool], name: str | Path) -> str:
    """
    Return `text`, or else the only column that holds text, and say so; `columns` tells of each whether it does. Raises
    `ValueError` for several or none.
    """
    if "text" in columns:
        return "text"
    found = [column for column, is_text in columns.items() if is_text and not _delimiter_in(name, [column])]
    if len(found) != 1:
        raise missing_column(name, "column `text`", columns)
    logger.warning_once(
        f"{name} has no column `text`: `{found[0]}`, its only column of text, is read; `--text_column`, or `text_column=` in "
        "Python, names another."
    )
    return found[0]


def missing_column(name: str | Path, missing: str, columns: Iterable[str]) -> CorpusError:
    """Make the error of a missing column; those of a .csv file may be separated by another character."""
    columns = list(columns)
    remedy = "name the one that holds the text with `--text_column`, or `text_column=` in Python"
    if mark := _delimiter_in(name, columns):
        remedy = SEPARATED.format(mark)
    return CorpusError(f"{name} has no {missing}, only {', '.join(columns)[:200] or 'nothing'}: {remedy}.")


def _delimiter_in(name, columns):
    """Find the character that seems to separate the columns of a .csv file."""
    if kind_of(Path(name)) != ".csv":
        return None
    return next((mark for mark in DELIMITERS if any(mark in column for column in columns)), None)


def parquet_columns(path, text_column) -> dict[str, str]:
    """Return the types of the columns that `parquet_rows` reads. Raises `ValueError` for columns of other types, or none."""
    schema = _parquet(path).schema_arrow
    if text_column not in schema.names:
        raise missing_column(path, f"column `{text_column}`", schema.names)
    if schema.names.count(text_column) > 1:
        raise CorpusError(f"{path} has several columns `{text_column}`: give each a name of its own.")
    kind = _parquet_type(schema.field(text_column))
    if kind not in TEXT:
        raise CorpusError(f"The column `{text_column}` of {path} holds {kind}: it must hold text.")
    columns = {"text": "string" if kind == "string" else "large_string"}
    if CONTINUES in schema.names:
        check_continues(str(schema.field(CONTINUES).type), path)
        columns[CONTINUES] = "bool"
    return columns


def _parquet_type(field):
    import pyarrow

    # A dictionary stores each text once.
    return str(field.type.value_type if pyarrow.types.is_dictionary(field.type) else field.type)


def parquet_rows(paths, text_column, key=None):
    """Yield the texts of .parquet files, whose other columns may hold anything; `key` as in `record_rows`."""
    for path in paths:
        yield from _parquet_texts(path, text_column)


def _parquet_texts(path, text_column):
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


def _text_of(record, text_column, path, where):
    if text_column not in record:
        raise missing_column(path, f"`{text_column}` in {where}", record)
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

    def __init__(self, path, encoding):
        self.pieces, self.text, self.start = decoded(path, encoding), "", 0
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


def _lines(path, newline, encoding):
    """Yield the lines of a file with their ends, by the rules of `open(newline=...)`."""
    begun = []
    for text in decoded(path, encoding):
        for line in io.StringIO(text, newline=newline):
            begun.append(line)
            if line.endswith(("\n", "\r") if newline == "" else newline):
                yield "".join(begun)
                begun = []
    if begun:
        yield "".join(begun)
