"""HDF5 files, of which only the plain parts are read.

Those are groups and datasets that lie in the file itself and are not larger than what it stores. Links that lead elsewhere,
datasets whose numbers lie in other files, and datasets that would unpack to more than the file are refused.
"""

import io
import math
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import numpy
import torch

HEAP = b"GCOL\x01\0\0\0"


@contextmanager
def open_hdf5(path: Path, content: IO[bytes] | None = None) -> Iterator[Any]:
    """
    Open an HDF5 file; errors of h5py within the `with` block become `ValueError`s that name the file.

    Args:
        path (`Path`): The file, for messages too.
        content (file, *optional*): Where its bytes are, if the file is part of another.

    Raises:
        ValueError: if h5py is not installed, or the file is damaged or of another kind.
    """
    try:
        import h5py
    except ImportError as error:
        raise ValueError(
            f'{path} needs h5py, which is not installed: run `pip install "hf-lstm[convert]"`.'
        ) from error
    try:
        with path.open("rb") if content is None else nullcontext(content) as opened:
            check_heaps(opened)
        with h5py.File(path if content is None else content, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError, TypeError, UnicodeError) as error:  # of h5py, for damaged files
        raise ValueError(f"{path} is damaged, or not an HDF5 file ({error}): copy or download it again.") from error


def check_heaps(file: IO[bytes]) -> None:
    """
    Raise `OSError` for a heap of strings whose objects are larger than it, or of no size: HDF5's own library reads one forever.

    A heap is `GCOL`, a version, its size, and its objects: an index, 0 for free space, two unused fields, and a size.
    """
    if file.seek(0, io.SEEK_END) == 0:
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begin = data.find(HEAP)
        while begin >= 0:
            (size,) = struct.unpack_from("<Q", data, begin + 8) if begin + 16 <= len(data) else (0,)
            place, end = begin + 16, min(begin + size, len(data))
            while place + 16 <= end:
                index, _, _, length = struct.unpack_from("<HHIQ", data, place)
                taken = 16 + (length + 7) // 8 * 8 if index else length
                if taken < 16 or place + taken > end:
                    raise OSError("a heap contradicts itself")
                place += taken
            begin = data.find(HEAP, begin + 1)


def find(group: Any, name: str, path: Path) -> Any:
    """
    Return a group or dataset within a group, by its name with slashes, or None where it has none.

    Raises:
        ValueError: if a link on the way leads elsewhere.
    """
    import h5py

    for part in name.split("/"):
        link = group.get(part, getlink=True) if part and isinstance(group, h5py.Group) else None
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise ValueError(
                f"{path} is refused: {group.name.rstrip('/')}/{part} is an HDF5 {type(link).__name__}, which may lead to another "
                "file. Write the weights themselves into the file."
            )
        group = group[part]
    return group


def read_array(dataset: Any, path: Path) -> torch.Tensor:
    """
    Read a dataset, bfloat16 included, which HDF5 knows as two bytes.

    Raises:
        ValueError: if its numbers lie in another file or dataset, are fewer than its shape, or are not numbers.
    """
    name = f"{path}: {dataset.name}"
    if dataset.is_virtual or dataset.external:
        kind = "a virtual dataset" if dataset.is_virtual else "a dataset with external storage"
        raise ValueError(
            f"{name} is {kind}, whose numbers lie in other files: it is refused. Write them into the file itself."
        )
    try:
        dtype = dataset.dtype
    except ValueError as error:
        raise ValueError(f"{name} holds values of an unknown type ({error}): weights are numbers.") from error
    stored = dataset.id.get_storage_size()
    if dataset.nbytes > stored:
        raise ValueError(
            f"{name} would unpack to {dataset.nbytes:,} bytes from {stored:,}: it is damaged or packed. Unpack a file that you "
            "trust with `h5repack -f NONE`."
        )
    is_bfloat16 = dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None
    if not is_bfloat16 and (dtype.kind not in "fiub" or dtype.itemsize > 8):
        raise ValueError(f"{name} holds values of the type {dtype}: weights are numbers of at most 64 bits.")
    values = numpy.asarray(dataset[()])
    if is_bfloat16:
        return torch.from_numpy(values.view(numpy.int16)).view(torch.bfloat16)
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))


def read_strings(group: Any, name: str, path: Path) -> list[str] | None:
    """Return an attribute that is a list of strings, also one that Keras has cut into parts named 0, 1, ..., or None."""
    if name in group.attrs:
        return _strings(group, name, path)
    parts: list[str] = []
    index = 0
    while f"{name}{index}" in group.attrs:
        parts += _strings(group, f"{name}{index}", path)
        index += 1
    return parts if index else None


def read_string(group: Any, name: str, path: Path) -> str | None:
    """Return an attribute that is one string, or None."""
    if name not in group.attrs:
        return None
    values = _strings(group, name, path)
    if len(values) != 1:
        raise ValueError(f"{path}: the attribute {name} holds {len(values):,} values instead of one: it is damaged.")
    return values[0]


def _strings(group: Any, name: str, path: Path) -> list[str]:
    import h5py

    attribute = group.attrs.get_id(name)
    count = math.prod(attribute.shape)
    if count == 0:
        return []
    kind = attribute.get_type()
    if kind.get_class() != h5py.h5t.STRING or count * kind.get_size() > path.stat().st_size:
        raise ValueError(f"{path}: the attribute {name} must hold strings, and no more than its file: it is damaged.")
    values = numpy.atleast_1d(group.attrs[name]).tolist()
    try:
        return [value.decode() if isinstance(value, bytes) else str(value) for value in values]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the attribute {name} is not UTF-8: the file is damaged.") from error
