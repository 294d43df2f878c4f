"""Read the files of torch.save without running anything.

Two layouts are known: zip files, and those before torch 1.6: five pickles (a magic number, a version, the system, the object,
the keys of the storages), then the storages in the order of the keys, each a count and its numbers.
"""

import io
import mmap
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from hf_lstm.convert.pickles import Damaged, Storage, load_pickle

PIECE = 1 << 24  # bytes
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_pickle(path: str | Path) -> Any:
    """
    Read a file of torch.save, of either layout and of protocols 2 to 5.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        Numbers, strings, lists, tuples, sets and dicts as they are; a [`StoredTensor`] for each tensor and parameter, whose
        numbers are read when asked for; a [`StandIn`] for any other object (pickles.py).

    Raises:
        Damaged: (a `ValueError`) if the file is incomplete, contradicts itself or is of another kind.
        ValueError: if the pickle names functions or classes that are not on the list; all of them are in the message.
    """
    path = Path(path)
    with path.open("rb"), _damage(path):  # a file that cannot be opened is not a damaged one
        return _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """
    Raise [`Damaged`] for the errors of zipfile (`NotImplementedError` for a compression that it lacks, `RuntimeError` for an
    encrypted entry), of struct, and of a place outside the file, at once or when a tensor is read.
    """
    try:
        yield
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, struct.error, EOFError) as error:
        raise Damaged(f"{path} is incomplete or damaged ({error}): copy or download it again.") from error


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record for record in archive.infolist()}
    sizes = sum(record.file_size for record in records.values())
    packed = [name for name, record in records.items() if record.compress_type != zipfile.ZIP_STORED]
    if packed or sizes > path.stat().st_size:
        raise Damaged(
            f"{path} would unpack to {sizes:,} bytes from {path.stat().st_size:,}, and torch.save compresses nothing: it is "
            "not a file of torch.save, or was packed again. Unpack it first."
        )
    found = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
        raise Damaged(
            f"{path} is a zip file without the one data.pkl that torch.save writes: give a file of torch.save."
        )
    folder = found[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in records:
        raise ValueError(
            f"{path} is a TorchScript program: load it with torch.jit.load, and save its `state_dict()` with torch.save."
        )

    def read(name: str) -> bytearray:
        data = bytearray(records[name].file_size)
        rest = memoryview(data)
        with _damage(path), zipfile.ZipFile(path) as archive, cast(zipfile.ZipExtFile, archive.open(name)) as record:
            while rest:  # in pieces, each of which is copied once more on its way
                count = record.readinto(rest[:PIECE])
                if not count:
                    raise Damaged(f"{path} is incomplete: {name} ends early. Copy or download it again.")
                rest = rest[count:]
        return data

    if f"{folder}byteorder" in records and read(f"{folder}byteorder") != b"little":
        raise ValueError(f"{path} was saved on a big-endian machine: save it again on another.")

    storages: dict[str, Storage] = {}

    def find_storage(dtype: torch.dtype, key: str, count: int) -> Storage:
        name = f"{folder}data/{key}"
        if name not in records or count * dtype.itemsize > records[name].file_size:
            raise Damaged(f"{path} lacks the {count:,} numbers of {name}: copy or download it again.")
        return _known_storage(storages, key, dtype, count, lambda: read(name), path)

    return load_pickle(io.BytesIO(read(found[0])), path, find_storage)


def _read_legacy(path: Path) -> Any:
    if tarfile.is_tarfile(path):
        raise ValueError(
            f"{path} is a tar file of torch 0.1, which is not read: load it with a torch before 1.6, and save it again."
        )
    if path.stat().st_size == 0:
        raise Damaged(f"{path} is empty: copy or download it again.")
    with path.open("rb") as opened:
        file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    places: dict[str, int] = {}
    storages: dict[str, Storage] = {}

    def find_storage(dtype: torch.dtype, key: str, count: int) -> Storage:
        def read() -> bytearray:
            data = bytearray(count * dtype.itemsize)
            with path.open("rb") as opened:
                opened.seek(places[key])
                opened.readinto(data)
            return data

        return _known_storage(storages, key, dtype, count, read, path)

    if load_pickle(file, path, find_storage) != LEGACY_MAGIC:
        raise Damaged(f"{path} is a pickle, but not one of torch.save: give a file of torch.save.")
    load_pickle(file, path, find_storage)  # the version of the layout
    system = load_pickle(file, path, find_storage)
    if not (isinstance(system, dict) and system.get("little_endian", True)):
        raise ValueError(f"{path} was saved on a big-endian machine: save it again on another.")
    root = load_pickle(file, path, find_storage)
    keys = load_pickle(file, path, find_storage)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Damaged(f"{path} has no list of its storages: copy or download it again.")
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        storage = storages.get(key)
        places[key] = file.tell()
        if storage is None or storage.count != count or len(file) - file.tell() < count * storage.dtype.itemsize:
            raise Damaged(f"{path} lacks the {count:,} numbers of storage {key}: copy or download it again.")
        file.seek(count * storage.dtype.itemsize, io.SEEK_CUR)
    if missing := storages.keys() - places.keys():
        raise Damaged(f"{path} lacks the storages {', '.join(sorted(missing))}: copy or download it again.")
    return root


def _known_storage(
    storages: dict[str, Storage], key: str, dtype: torch.dtype, count: int, read: Callable[[], bytearray], path: Path
) -> Storage:
    """Return the storage of a key, which reads its numbers at its first use."""
    kept: list[torch.Tensor] = []

    def read_once() -> torch.Tensor:
        if not kept:
            kept.append(torch.frombuffer(read(), dtype=dtype)[:count] if count else torch.empty(0, dtype=dtype))
        return kept[0]

    known = storages.setdefault(key, Storage(dtype, count, read_once))
    if (known.dtype, known.count) != (dtype, count):
        raise Damaged(f"{path} contradicts itself about storage {key}: copy or download it again.")
    return known
