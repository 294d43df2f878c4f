"""Readers of files: text is text as it is written, whatever it looks like, and what cannot be read is refused with its place."""

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from hf_lstm.tokenizers import PIECE_LENGTH, pieces_of

CONTINUES = (
    "hf_lstm.continues"  # the column that says which rows go on with a document: of a name that nobody has by chance
)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
TEXT = ("string", "large_string", "string_view")  # pyarrow's types
PARQUET_ROWS = 100  # that are read at once
LARGEST_FIELD = 2**31 - 1  # characters of a field in a .csv file


class CorpusError(ValueError):
    """A `ValueError` whose message needs no words around it."""


def check_file(path: Path) -> None:
    """Raise `ValueError` for a file that is not there, may not be read, is compressed or is empty."""
    if not path.is_file():
        raise ValueError(f"The file {path} does not exist.")
    if not os.access(path, os.R_OK):
        raise ValueError(f"The file {path} cannot be read: you have no permission to.")
    if path.suffix.lower() in COMPRESSED:
        raise ValueError(f"{path} is compressed: unpack it first.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: there is nothing to read.")


def read_text(path: str | Path) -> str:
    """A UTF-8 file as it is, line ends included, without a byte order mark. Raises `ValueError` for anything else."""
    path = Path(path)
    check_file(path)
    return "".join(_decoded(path))


def read_records(path: str | Path) -> Iterator[tuple[int, dict]]:
    """The records of a file with a JSON object in each line, and the numbers of their lines. Raises `ValueError`."""
    path, number, found = Path(path), 0, False
    check_file(path)
    for number, line in enumerate(_lines(path, "\n"), 1):
        if not line.strip(" \t\r\n"):
            continue
        where = f"{path} cannot be read as jsonl: line {number}"
        try:
            record = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{where} is not JSON ({_fault_of(error)}): mend or remove it.") from error
        if not isinstance(record, dict):
            raise CorpusError(f"{where} is no record but {type(record).__name__}: put an object in each line.")
        found = True
        yield number, record
    if not found:
        raise CorpusError(f"{path} holds no record in its {number} lines: there is nothing to read.")


# The rows of the corpus that a file is. By the key `datasets` tells its contents, and ways of reading them, apart.


def text_rows(path, key=None):
    """The pieces of a text file."""
    rest, continues = "", False
    for text in _decoded(path):
        *whole, rest = list(pieces_of(rest + text)) or [""]
        for piece in whole:
            yield {"text": piece, CONTINUES: continues}
            continues = True
    yield {"text": rest, CONTINUES: continues}


def line_rows(path, text_column, key=None):
    """The texts of a file with a record in each line."""
    for number, record in read_records(path):
        yield {"text": _text_of(record, text_column, path, f"line {number}")}


def json_rows(path, text_column, key=None):
    """The texts of a .json file, whose records lie in an array or one behind the other; a string in an array is a text."""
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
            raise CorpusError(f"{path} cannot be read as json: {where} is not JSON ({error}): mend it.") from error
        if isinstance(record, str):
            record = {"text": record}
        yield {"text": _text_of(record, text_column, path, where)}
        behind = source.peek()
        if in_array and behind not in (",", "]"):
            found = f"there is {behind!r}" if behind else "the file ends"
            raise CorpusError(
                f"{path} cannot be read as json: {found} behind {where}, in line {source.line}: put a comma between "
                "records, and `]` behind the last."
            )
        if in_array:
            source.skip()
        if behind == ("]" if in_array else ""):
            break
    if source.peek():
        raise CorpusError(
            f"{path} cannot be read as json: there is {source.peek()!r} in line {source.line}, behind the array: keep one "
            "array in the file."
        )


def csv_rows(path, text_column, key=None):
    """The texts of a file of rows with commas between their fields, whose first row names the columns."""
    csv.field_size_limit(LARGEST_FIELD)  # of the whole process: by default it is 131,072, and a text may be a book
    end, kinds = (
        "",
        set(),
    )  # of the line that was read last, and of the rows: whether a carriage return alone ends them

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
                f"{path} cannot be read as csv: the row that begins in line {line} is not quoted as it should be ({error}): "
                "double the quotation marks within a quoted text, and end it with one."
            ) from error
        if row is None:
            break
        if end and (row or end == "\r"):  # what was written with \r\r\n has blank lines that end otherwise
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
        raise CorpusError(f"{path} holds no record in its {rows.line_num} lines: there is nothing to read.")


def parquet_columns(path, text_column) -> dict[str, str]:
    """The types of the columns that `parquet_rows` reads. Raises `ValueError` where these are not there."""
    import pyarrow

    schema = _parquet(path).schema_arrow
    if schema.names.count(text_column) != 1:
        fault = "several columns" if text_column in schema.names else "no column"
        raise CorpusError(
            f"{path} has {fault} `{text_column}`, only {', '.join(schema.names)[:200]}: name the one that holds the text with "
            "`text_column`."
        )
    kind = schema.field(text_column).type
    kind = str(kind.value_type if pyarrow.types.is_dictionary(kind) else kind)  # texts that are named once
    if kind not in TEXT:
        raise CorpusError(f"The column `{text_column}` of {path} holds {kind}: it must hold text.")
    columns = {"text": "string" if kind == "string" else "large_string"}
    if CONTINUES in schema.names:
        check_continues(str(schema.field(CONTINUES).type), path)
        columns[CONTINUES] = "bool"
    return columns


def parquet_rows(path, text_column, key=None):
    """The texts of a .parquet file, whose other columns may hold anything."""
    import pyarrow

    file, columns, number = _parquet(path), parquet_columns(path, text_column), 0
    names = {name: text_column if name == "text" else name for name in columns}
    batches = file.iter_batches(PARQUET_ROWS, columns=list(names.values()))
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            raise CorpusError(
                f"{path} cannot be read as parquet behind row {number:,} ({error}): copy it anew."
            ) from error
        if batch is None:
            break
        for values in zip(*(batch.column(name) for name in names.values()), strict=True):
            number += 1
            try:
                yield {name: value.as_py() for name, value in zip(names, values, strict=True)}
            except UnicodeDecodeError as error:  # a file that was prepared may hold any bytes
                raise CorpusError(
                    f"The column `{text_column}` of {path} is not UTF-8 in row {number:,} ({error.reason}): write the file "
                    "anew, from text."
                ) from error
    if number == 0:
        raise CorpusError(f"{path} holds no record: there is nothing to read.")


def _parquet(path):
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{path} cannot be read as parquet ({error}): was it written to its end?") from error


def check_continues(kind: str, name: str | Path) -> None:
    """Raise `ValueError` where the column that says which rows go on with a document is of another type than bool."""
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
        kind = path.suffix.lower().removeprefix(".")
        raise CorpusError(
            f"{path} cannot be read as {kind}: {where} holds half of a character ({error.reason}): mend or remove it."
        ) from error
    return text or ""


def _members_once(pairs):
    """A JSON object; of two members of one name, one would vanish."""
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return members


def _fault_of(error):
    """Of one line, which the decoder would call line 1."""
    return f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)


_DECODER = json.JSONDecoder(object_pairs_hook=_members_once)
_WHITE_SPACE = re.compile(r"[ \t\r\n]*")


class _JSON:
    """
    The values of a JSON text, read from a file as far as they are needed: a record and what was read with it, or all
    the rest of a file with a record that has no end.
    """

    def __init__(self, path):
        self.pieces, self.text, self.start = _decoded(path), "", 0
        self.line = 1  # of `start`

    def peek(self) -> str:
        """The next character behind white space; none at the end."""
        while True:
            self._move(_WHITE_SPACE.match(self.text, self.start).end())
            if self.start < len(self.text) or not self._more():
                return self.text[self.start : self.start + 1]

    def skip(self) -> None:
        self._move(self.start + 1)

    def value(self):
        """The next value, an object or a string."""
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
        """Read as much again as there is: a long value is tried a few times only."""
        parts, read = [self.text[self.start :]], 0
        for piece in self.pieces:
            parts.append(piece)
            read += len(piece)
            if read > len(parts[0]):
                break
        self.text, self.start = "".join(parts), 0
        return read > 0


def _lines(path, newline):
    """The lines of a file with their ends, told apart as `open` tells them."""
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
    """The text of a file, a little at a time, no line end torn apart."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=False)
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
