"""Python's standard library as a corpus, which every machine has: the default of the scripts."""

import hashlib
import platform
import sysconfig
import tokenize
from pathlib import Path

from datasets import Dataset, DatasetDict

DESCRIPTION = f"small modules of Python {platform.python_version()}'s standard library"
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_LARGEST = 20_000  # bytes of a module for training: many small modules teach more than few large ones
_EVALUATED = {"validation": 140_000, "test": 210_000}  # bytes


def standard_library(max_bytes: int = 1_900_000) -> DatasetDict:
    """
    Load modules of the running interpreter's standard library, a document each, without tests. Training gets up to
    `max_bytes` of modules of at most 20,000 bytes, validation 140,000 and testing 210,000 bytes of modules of any size. A
    hash of the path decides the order and the split.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in root.rglob("*.py") if not _LEFT_OUT.intersection(path.relative_to(root).parts)]
    digests = {path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest() for path in paths}
    limits = {"train": max_bytes} | _EVALUATED
    corpus: dict[str, list[str]] = {split: [] for split in limits}
    sizes = dict.fromkeys(limits, 0)
    for path in sorted(paths, key=lambda path: digests[path]):
        split = {0: "validation", 1: "test"}.get(digests[path][-1] % 20, "train")
        if sizes[split] > limits[split] or (split == "train" and path.stat().st_size > _LARGEST):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # a few modules are written in other encodings on purpose
            continue
        sizes[split] += len(text.encode())
        if text and sizes[split] <= limits[split]:  # the first text beyond the limit ends its split
            corpus[split].append(text)
    return DatasetDict({split: Dataset.from_dict({"text": texts}) for split, texts in corpus.items()})
