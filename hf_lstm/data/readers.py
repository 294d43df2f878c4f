"""Readers of files: their names, their bytes, decompressed by the suffix, and their text in any encoding; errors name the file."""

import bz2
import codecs
import glob
import gzip
import io
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_lstm.tokenizers import PIECE_LENGTH, pieces_of

CONTINUES = "hf_lstm.continues"  # the column that marks rows which go on with a document; nobody uses it by chance
TEXT = ("string", "large_string", "string_view")  # pyarrow's types


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
TEXT_SUFFIXES = tuple(f".txt{suffix}" for suffix in ("", *OPENERS))
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


def check_file(path: Path, may_be_empty: bool = False) -> None:
    """Raise `ValueError` for a file that does not exist, may not be read, cannot be unpacked or is empty."""
    if not path.is_file():
        raise CorpusError(f"The file {path} does not exist: correct its name, or its folder.")
    if not os.access(path, os.R_OK):
        raise CorpusError(f"The file {path} cannot be read, since you have no permission to: `chmod u+r` gives it.")
    kind, compressed = kind_of(path), path.suffix.lower() in OPENERS
    if kind in UNREAD or (kind == ".parquet" and compressed):
        raise CorpusError(
            f"{path} is an archive, or compressed in an unsupported way: unpack it first, or compress one text, .jsonl, .json or "
            f".csv file to {', '.join(OPENERS)}."
        )
    with opened(path) as file:
        if not file.read(1) and not may_be_empty:
            raise CorpusError(f"{path} is empty: name a file with text.")


def files_of(name: str | Path) -> list[Path]:
    """
    Return the files that a name stands for, in the order of their names: the .txt files below a folder, those that match a
    pattern such as `books/*.txt`, or the one of this name. Raises `ValueError` if no file is found.
    """
    path = Path(name)
    if path.is_dir():
        found = [
            file.relative_to(path)
            for file in path.rglob("*")
            if file.name.lower().endswith(TEXT_SUFFIXES) and file.is_file()
        ]
        files = [path / file for file in sorted(found) if not any(part.startswith(".") for part in file.parts)]
        if not files:
            raise CorpusError(
                f"The folder {name} holds neither a .txt file nor a data set that `save_to_disk` made: name files of "
                f"another kind by a pattern in quotation marks, such as '{path / '*.jsonl'}'."
            )
        return files
    if path.exists() or not set("*?[") & set(str(name)):
        return [path]
    files = sorted(Path(file) for file in glob.glob(str(name), recursive=True) if os.path.isfile(file))
    if not files:
        raise CorpusError(f"No file matches {name}: correct the pattern, or its folder.")
    return files


def check_encoding(encoding: str) -> None:
    """Raise `ValueError` for an encoding that Python does not know."""
    try:
        " ".encode(encoding)
    except (LookupError, UnicodeError) as error:
        raise CorpusError(
            f"`encoding` ({encoding}) must be an encoding of text that Python knows, such as utf-8, cp1252 or utf-16."
        ) from error


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """Read a file, line ends unchanged, without a byte order mark. Raises `ValueError` for another encoding."""
    path = Path(path)
    check_encoding(encoding)
    check_file(path)
    return "".join(decoded(path, encoding))


def decoded(path: Path, encoding: str) -> Iterator[str]:
    """Yield the text of a file in small parts, never split inside a line end."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=False)
    position, data = 0, None
    has_nul = "\0".encode(encoding) != b"\0"  # in the bytes of text, as UTF-16
    with opened(path) as file:
        while data != b"":
            data = file.read(PIECE_LENGTH)
            remedy = f"`--encoding {_likely(data, encoding)}`, or `encoding=` in Python"
            if b"\0" in data and not has_nul:
                raise CorpusError(
                    f"{path} is not text, since byte {position + data.index(0)} is NUL: it is damaged, or in UTF-16, which "
                    f"{remedy} reads."
                )
            start = position - len(decoder.getstate()[0])  # of what is decoded now
            try:
                text = decoder.decode(data, final=data == b"")
            except UnicodeError as error:
                byte, reason = start + getattr(error, "start", 0), getattr(error, "reason", error)
                raise CorpusError(
                    f"{path} is not {encoding.upper()} (byte {byte}: {reason}): name its encoding, such as {remedy}."
                ) from error
            if "\0" in text:
                raise CorpusError(
                    f"{path} is not text in {encoding.upper()}, since it holds a NUL: remove it, or name another `--encoding`."
                )
            yield text.removeprefix("\ufeff") if position == 0 else text
            position += len(data)


def _likely(data, encoding):
    """Guess the encoding of a part of a file that another one does not decode."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in data:
        return f"utf-16-{'le' if data.index(0) % 2 else 'be'}"
    return "cp1252" if codecs.lookup(encoding).name == "utf-8" else "utf-8"


def text_rows(paths, encoding, key=None):
    """Yield the pieces of text files, each of which is a document: rows for `Dataset.from_generator`."""
    for path in paths:
        rest, continues = "", False
        for text in decoded(path, encoding):
            *whole, rest = list(pieces_of(rest + text)) or [""]
            for piece in whole:
                yield {"text": piece, CONTINUES: continues}
                continues = True
        yield {"text": rest, CONTINUES: continues}


def check_continues(kind: str, name: str | Path) -> None:
    """Raise `ValueError` for a column `hf_lstm.continues` that does not hold booleans."""
    if kind != "bool":
        raise CorpusError(
            f"The column `{CONTINUES}` of {name} holds {kind}: it must hold booleans, as `load_documents` makes them, or be "
            "renamed."
        )
