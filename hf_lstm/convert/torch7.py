"""Read Torch7's files (.t7) without Torch, and without running anything.

A file is one object, written from left to right in little-endian binary: a number for its kind, then a number (8 bytes), a
string, a boolean, a table (its keys and values), an object of a class (a table of its fields; a tensor or a storage has a
layout of its own), or a Lua function. Tables, objects and functions are numbered, and come again by their number, so that
tensors may share a storage and a graph may hold circles. Functions are passed over.

The package torchfile reads the same layout. It is not used: it lays a tensor over memory by the strides and offset that the
file gives, without a look at the size of the storage, and takes as much memory as the file asks for.
"""

import functools
import mmap
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_lstm.convert.pickles import Damaged, Storage, StoredTensor
from hf_lstm.convert.vocabulary import Vocabulary
from hf_lstm.tokenizers import LETTER_BYTES

NIL, NUMBER, STRING, TABLE, OBJECT, BOOLEAN, FUNCTION, OLD_CLOSURE, CLOSURE = range(9)
DTYPES = {
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Half": torch.float16,
    "Float": torch.float32,
    "Double": torch.float64,
}
# Those of a GPU are written like the others; torch.CudaTensor holds floats.
NUMBERS = re.compile(rf"torch\.(?:(?:Cuda)?({'|'.join(DTYPES)})|Cuda)(Tensor|Storage)")
LARGEST_DIMENSIONS = 8
LETTERS = {byte: letter for letter, byte in LETTER_BYTES.items()}
ESCAPED_BYTE = re.compile(r"\[(\d{3})\]")  # how torch-rnn names a byte above 127 of a text that it reads as bytes


@dataclass(slots=True, eq=False)
class Item:
    """
    A table, an object or a function.

    Args:
        name (`str`): The class of an object; `"table"` and `"function"` for these.
        wanted (`int`): The number of objects that it consists of.
        parts (`list`): These: keys and values in turn, an object's table, a tensor's storage.
    """

    name: str
    wanted: int
    parts: list[Any] = field(default_factory=list)

    @property
    def fields(self) -> dict[str | int, Any]:
        """The values by the keys that are strings or whole numbers; of an object, those of its table."""
        if self.name != "table":
            table = self.parts[0] if self.parts else None
            return table.fields if isinstance(table, Item) and table.name == "table" else {}
        pairs = zip(self.parts[::2], self.parts[1::2], strict=False)
        return {key: value for key, value in pairs if isinstance(key, str | int) and not isinstance(key, bool)}


@dataclass(slots=True, eq=False)
class TensorItem(Item):
    """
    A tensor of a file, whose place in its storage is checked when it is read.

    Args:
        shape, strides (`tuple[int, ...]`): As in torch.
        offset (`int`): The place of its first number in the storage, from 0.
    """

    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    offset: int = 0


def read_t7(path: Path) -> Any:
    """
    Read a file of Torch7.

    Args:
        path (`Path`): The file.

    Returns:
        Numbers, strings (bytes that are not UTF-8 as surrogates), booleans, `None`, and an [`Item`] for anything else.

    Raises:
        Damaged: (a `ValueError`) if the file is incomplete, contradicts itself or is of another kind.
    """
    if path.stat().st_size == 0:
        raise Damaged(f"{path} is empty: copy or download it again.")
    with path.open("rb") as opened:
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    if re.match(rb"[0-8]\r?\n\d", data[:4]):
        raise ValueError(
            f'{path} is a .t7 file in letters (`"ascii"`): load it in Torch7 and save it in its binary form, the default.'
        )
    return _Reader(data, path).read()


class _Reader:
    """The objects of a file from left to right, without recursion: a graph may be as deep as it likes."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.place = data, path, 0
        self.known: dict[int, Any] = {}

    def read(self) -> Any:
        root = Item("root", 1)
        open_items = [root]
        while open_items:
            item = open_items[-1]
            if len(item.parts) == item.wanted:
                open_items.pop()
                continue
            part, is_new = self.part()
            item.parts.append(part)
            if is_new:
                open_items.append(part)
        return root.parts[0]

    def part(self) -> tuple[Any, bool]:
        """Return the next object, and whether its parts follow."""
        begin, kind = self.place, self.integer()
        if kind == NIL:
            return None, False
        if kind == NUMBER:
            (number,) = self.unpack("<d")
            return (int(number) if number.is_integer() else number), False
        if kind == STRING:
            return self.string(), False
        if kind == BOOLEAN:
            return self.integer() == 1, False
        if kind == FUNCTION:
            return self.function(), True
        if kind not in (TABLE, OBJECT, CLOSURE, OLD_CLOSURE):
            raise Damaged(
                f"{self.path} is damaged at byte {begin:,}, or not a file of Torch7 in its binary form: copy or download it again."
            )
        index = self.integer()
        if index in self.known:
            return self.known[index], False
        if kind == TABLE:
            made: Any = Item("table", 2 * self.count(self.integer(), 8))
        elif kind == OBJECT:
            made = self.object()
        else:
            made = self.function()
        self.known[index] = made
        return made, isinstance(made, Item)

    def object(self) -> Item | Storage:
        name = self.string()
        if re.fullmatch(r"V -?\d+(\.\d+)?", name):  # a version comes before the name in files since 2012
            name = self.string()
        match = NUMBERS.fullmatch(name)
        if match is None:
            if name.startswith(("torch.", "tds.")):
                raise ValueError(
                    f"{self.path} holds a {name}, whose layout is its own and not known here: load it in Torch7, turn the model into "
                    "floats (`model:float()`) and save it again."
                )
            return Item(name, 1)
        dtype = DTYPES[match[1] or "Float"]
        if match[2] == "Storage":
            (count,) = self.unpack("<q")
            begin, size = self.place, self.count(count, dtype.itemsize) * dtype.itemsize
            self.place += size
            return Storage(dtype, count, functools.cache(lambda: self.numbers(begin, size, dtype)))
        dimensions = self.integer()
        if not 0 <= dimensions <= LARGEST_DIMENSIONS:
            raise Damaged(f"{self.path} holds a tensor of {dimensions} dimensions: copy or download it again.")
        *numbers, offset = self.unpack(f"<{2 * dimensions + 1}q")
        return TensorItem(
            name, 1, shape=tuple(numbers[:dimensions]), strides=tuple(numbers[dimensions:]), offset=offset - 1
        )

    def numbers(self, begin: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        if size == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(bytearray(memoryview(self.data)[begin : begin + size]), dtype=dtype)

    def function(self) -> Item:
        size = self.count(self.integer(), 1)
        self.place += size  # over its bytecode
        return Item("function", 1)

    def string(self) -> str:
        size = self.count(self.integer(), 1)
        self.place += size
        return self.data[self.place - size : self.place].decode(errors="surrogateescape")

    def integer(self) -> int:
        return self.unpack("<i")[0]

    def unpack(self, layout: str) -> tuple:
        size = self.count(struct.calcsize(layout), 1)
        self.place += size
        return struct.unpack_from(layout, self.data, self.place - size)

    def count(self, count: int, size: int) -> int:
        """Return a number of things of at least `size` bytes each, all of which must be in the rest of the file."""
        if not 0 <= count * size <= len(self.data) - self.place:
            raise Damaged(
                f"{self.path} ends before the {count:,} times {size} bytes that byte {self.place:,} announces: copy or download it "
                "again."
            )
        return count


def listed(table: Any, name: str, path: Path) -> list[Any]:
    """Return the values of a table with the keys 1 to n; raise `ValueError`, which calls it `name`, for another one."""
    fields = table.fields if isinstance(table, Item) else None
    if fields is None or fields.keys() != set(range(1, len(fields) + 1)):
        raise ValueError(f"{path}: `{name}` must be a table with the keys 1 to n: the file is of another program.")
    return [fields[index] for index in range(1, len(fields) + 1)]


def tensors_of(module: Item, names: tuple[str, ...], path: Path) -> dict[str, StoredTensor]:
    """
    Return those tensors of a module that it has, by name.

    Raises:
        ValueError: if a field of that name is not a tensor, or lies outside its storage.
    """
    found = {}
    for name in names:
        item = module.fields.get(name)
        if item is None:
            continue
        storage = item.parts[0] if isinstance(item, TensorItem) else None
        if not isinstance(storage, Storage):
            raise ValueError(f"{path}: `{name}` of a {module.name} is not a tensor of numbers: the file is damaged.")
        try:
            found[name] = StoredTensor(storage, item.offset, item.shape, item.strides)
        except Damaged as error:
            raise Damaged(f"{path}: `{name}` of a {module.name}: {error}") from error
    return found


def check_dropout(module: Item, path: Path) -> None:
    """Raise `ValueError` for a dropout that changes what the model says after training, as the first of Torch's did."""
    if module.name == "nn.Dropout" and module.fields.get("p") and module.fields.get("v2") is not True:
        raise ValueError(
            f"{path} has a dropout of the kind that scales its output after training (`v2` is not true): it is not converted."
        )


def vocabulary_of_characters(entries: list[Any], origin: str) -> Vocabulary:
    """
    Return the vocabulary of a list of characters, or of bytes, in the order of their ids. Text that it lacks is refused, as by
    the programs that wrote it.

    Raises:
        ValueError: if it holds anything else, or anything twice.
    """
    if not all(isinstance(entry, str) and entry for entry in entries):
        raise ValueError(f"{origin} holds tokens that are not text: the file is of another program.")
    if all(len(entry) == 1 and not "\ud800" <= entry <= "\udfff" for entry in entries):
        return Vocabulary(entries, "characters", origin, roles={})
    escaped = (ESCAPED_BYTE.fullmatch(entry) for entry in entries)
    raw = [
        bytes([int(match[1])]) if match and 127 < int(match[1]) < 256 else entry.encode(errors="surrogateescape")
        for match, entry in zip(escaped, entries, strict=True)
    ]
    if other := [entry for entry, name in zip(entries, raw, strict=True) if len(name) != 1]:
        raise ValueError(
            f"{origin} holds {other[0]!r}, and the tokens of this program are single characters, or single bytes: how another one "
            "cut its text is not known, so that it is not converted."
        )
    return Vocabulary([LETTERS[name[0]] for name in raw], "bytes", origin, roles={})
