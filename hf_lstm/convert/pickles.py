"""Read pickles without running anything.

A pickle is a program that may call any function it names. Here each name leads to one of a few inert things: a record of a
tensor, a container, or a [`StandIn`] that keeps what it is given. No name is imported. A file that names anything else is
refused, with the names. `torch.load(weights_only=True)` does the same for fewer files: it stops at modules pickled whole
and at the frames of protocol 4.
"""

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

DEEPEST = 16  # levels of tuples in a pickle

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}

# Modules whose classes become stand-ins: torch's own, containers of other numbers, the program that was run, the files of
# word_language_model, of its forks and of awd-lstm-lm, fastai's list, flair's dictionary and Keras' Tokenizer. A stand-in runs
# nothing, whatever it is called; the list is short so that a file of another kind is noticed.
STAND_INS = (
    "torch.nn",
    "torch.optim",
    "torch.backends.cudnn",
    "torch.device",
    "torch.serialization",
    "torch.Generator",
    "numpy.core.multiarray",
    "numpy._core.multiarray",
    "numpy.core.numeric",
    "numpy._core.numeric",
    "numpy.dtype",
    "numpy.ndarray",
    "argparse.Namespace",
    "pathlib",
    "builtins.object",
    "builtins.list",
    "builtins.dict",
    "builtins.int",
    "__main__",
    "model",
    "weight_drop",
    "locked_dropout",
    "embed_regularize",
    "splitcross",
    "fastcore.foundation.L",
    "flair.data.Dictionary",
    "builtins.long",
    "keras_preprocessing.text.Tokenizer",
    *(f"{keras}.preprocessing.text.Tokenizer" for keras in ("keras", "keras.src", "keras.src.legacy")),
    *(f"{keras}.preprocessing.text.Tokenizer" for keras in ("tf_keras", "tf_keras.src", "tensorflow.python.keras")),
)
REMEDY = "save `model.state_dict()` with torch.save, and convert that with `--from torch-lstm`"
FORMER_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's, and those of protocol 2


class Damaged(ValueError):
    """A file that is incomplete, contradicts itself or is of another kind."""


class Inert:
    """An object whose attributes a pickle cannot set."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class StandIn(Inert):
    """
    An object of a class that is not loaded.

    Attributes:
        name (`str`): The class, as the file names it.
        arguments (`tuple`): The arguments with which it was made.
        fields (`dict`): Its attributes.
    """

    __slots__ = ("arguments", "fields")
    name = ""
    arguments: tuple
    fields: dict[str, Any]

    def __new__(cls, *arguments, **_):
        made = super().__new__(cls)
        made.arguments, made.fields = arguments, {}
        return made

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state):
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.fields.update(part)

    def _forget(self, *_):
        """Take an item of a list, a set or a dict whose class is not loaded."""

    append = extend = add = update = __setitem__ = _forget


class PlainDict(Inert, dict):
    """A dict, an `OrderedDict` or a `defaultdict`, of which only the items are kept."""

    __slots__ = ()

    def __init__(self, *arguments):
        super().__init__(arguments[-1] if arguments and isinstance(arguments[-1], dict | list | tuple) else ())


class Parameter(Inert):
    """A parameter, of which only the tensor is kept."""

    __slots__ = ()

    def __new__(cls, data, *_):
        return data


class Function(Inert):
    """A function of this module, in place of the one that a pickle names."""

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)


@dataclass(slots=True)
class Storage(Inert):
    """The numbers of one or more tensors: `read()` returns `count` of them."""

    dtype: torch.dtype
    count: int
    read: Callable[[], torch.Tensor]


@dataclass(slots=True)
class StoredTensor(Inert):
    """A tensor whose numbers are read when asked for."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self):
        numbers = (self.offset, *self.shape, *self.strides)
        is_plain = all(isinstance(number, int) and 0 <= number < 1 << 62 for number in numbers) and len(numbers) < 64
        if not isinstance(self.storage, Storage) or not is_plain or len(self.shape) != len(self.strides):
            raise Damaged(
                "A tensor has an offset, shape or strides that torch.save never writes: the file is damaged."
            )
        size = math.prod(self.shape)
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if size and last >= self.storage.count:
            raise Damaged(
                f"A tensor of shape {self.shape} at offset {self.offset} lies outside its storage of {self.storage.count:,} "
                "numbers: copy or download the file again."
            )
        if size > self.storage.count:
            raise Damaged(
                f"A tensor of shape {self.shape} repeats the {self.storage.count:,} numbers of its storage, as `expand` makes "
                "them: save a copy, `tensor.contiguous()`."
            )

    def read(self) -> torch.Tensor:
        return self.storage.read().as_strided(self.shape, self.strides, self.offset)


def _rebuild_tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
    if metadata:
        raise Damaged("A tensor is a lazy conjugate or negative: save `tensor.resolve_conj().resolve_neg()` instead.")
    return StoredTensor(storage, offset, tuple(shape), tuple(strides))


def _encode(text, *_):
    """Return bytes, which protocol 2 writes as text."""
    return text.encode("latin-1")


KNOWN = {
    "collections.OrderedDict": PlainDict,
    "collections.defaultdict": PlainDict,
    "collections.Counter": PlainDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.bytes": Function(lambda *_: b""),  # others are encoded text
    "builtins.getattr": Function(lambda *_: None),  # of a bound method: awd-lstm-lm replaces one of its LSTMs'
    "copyreg._reconstructor": Function(lambda made, *_: made()),  # an object of protocols 0 and 1
    "_codecs.encode": Function(_encode),
    "torch.Size": Function(lambda *_: None),
    "torch.nn.parameter.Parameter": Parameter,
    "torch.autograd.variable.Variable": Parameter,
    "torch._utils._rebuild_tensor": Function(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": Function(_rebuild_tensor),
    "torch._utils._rebuild_parameter": Function(lambda data, *_: data),
    "torch._utils._rebuild_parameter_with_state": Function(lambda data, *_: data),
    "torch._tensor._rebuild_from_type_v2": Function(lambda function, kind, arguments, *_: function(*arguments)),
}
KNOWN |= {f"torch.{module}{name}": dtype for name, dtype in STORAGES.items() for module in ("", "cuda.", "storage.")}
KNOWN |= {str(dtype): dtype for dtype in STORAGES.values()}


class _Reader(pickle.Unpickler):
    """An unpickler for which every name leads to something inert; names that are not on the list are kept in `refused`."""

    def __init__(self, file, find_storage: Callable[[torch.dtype, str, int], Storage]):
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self.find_storage = find_storage
        self.refused: dict[str, None] = {}

    def find_class(self, module, name):
        path = f"{FORMER_MODULES.get(module, module)}.{name}"
        if path in KNOWN:
            return KNOWN[path]
        if not any(f"{path}.".startswith(f"{known}.") for known in STAND_INS):
            self.refused[path] = None
        return type(path, (StandIn,), {"__slots__": (), "name": path})

    def persistent_load(self, reference):
        """Return the storage, or the class, which a file names outside the pickle's own language."""
        match reference:
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as count, *view):
                storage = self.find_storage(dtype, key, count)
                if not view or view[0] is None:
                    return storage
                _, offset, size = view[0]
                part = StoredTensor(storage, offset, (size,), (1,))
                return Storage(dtype, size, part.read)
            case ("module", kind, *_):
                return kind
        raise Damaged("The pickle refers to something that is neither a storage nor a module.")


def read_plain_pickle(path: Path) -> Any:
    """
    Read a pickle that is not a file of torch.save, such as a list of tokens. See [`load_pickle`].

    Raises:
        Damaged: if the file is damaged, goes on behind its pickle, or holds tensors.
    """
    file = io.BytesIO(path.read_bytes())

    def find_storage(dtype: torch.dtype, key: str, count: int) -> Storage:
        raise Damaged(f"{path} holds tensors: it is not a plain pickle.")

    loaded = load_pickle(file, path, find_storage, "save its contents as JSON")
    if file.read(1):
        raise Damaged(f"{path} goes on behind its pickle: give a file of one pickle alone.")
    return loaded


def load_pickle(
    file, path: Path, find_storage: Callable[[torch.dtype, str, int], Storage], remedy: str = REMEDY
) -> Any:
    """
    Load one pickle of a file, which is left behind its end.

    Args:
        file: A binary file at the pickle's first byte.
        path (`Path`): Its path, for messages.
        find_storage (`Callable`): Returns the storage for the type of its numbers, its key and their count.
        remedy (`str`, *optional*): The end of a refusal: what to do with the file elsewhere.

    Returns:
        Numbers, strings, lists, tuples, sets and dicts as they are; a [`StoredTensor`] for each tensor and parameter; a
        [`StandIn`] for any other object.

    Raises:
        Damaged: (a `ValueError`) if the pickle is incomplete or contradicts itself.
        ValueError: if it names functions or classes that are not on the list; all of them are in the message.
    """
    _check_program(file, path)
    reader = _Reader(file, find_storage)
    try:
        loaded = reader.load()
    except Exception as error:  # a pickle that contradicts itself raises an error of any kind
        if reader.refused:
            raise _refusal(path, reader.refused, remedy) from error
        if isinstance(error, Damaged):
            raise
        raise Damaged(
            f"{path} holds a damaged pickle ({type(error).__name__}: {error}): copy or download it again."
        ) from error
    if reader.refused:
        raise _refusal(path, reader.refused, remedy)
    return loaded


def _check_program(file, path: Path) -> None:
    """
    Refuse a pickle that would take any amount of memory or time, before it is loaded: one that numbers its objects beyond
    their count, or nests tuples, whose hash takes twice as long with each level that holds the one below twice.
    """
    begin = file.tell()
    stack: list[int | None] = []  # how deeply tuples are nested in each object; `None` for a mark
    numbered: dict[int, int] = {}
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                number = len(numbered) if argument is None else cast(int, argument)
                if number > count:
                    raise Damaged(
                        f"{path} numbers an object {number:,} after {count:,} steps, and a pickle numbers them one by one: it is "
                        "damaged. Copy or download it again."
                    )
                numbered[number] = stack[-1] or 0
                continue
            taken = _take(stack, opcode)
            depth = 0
            if opcode.name.startswith("TUPLE"):
                depth = 1 + max(taken, default=0)
            elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                depth = numbered[cast(int, argument)]
            elif opcode.name == "DUP":
                depth = taken[0]
            if depth > DEEPEST:
                raise Damaged(f"{path} nests tuples more than {DEEPEST} deep, which no model does: it is refused.")
            stack += [None if kind is pickletools.markobject else depth for kind in opcode.stack_after]
    except (ValueError, LookupError, OverflowError, MemoryError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{path} is neither a file of torch.save nor another pickle ({error}).") from error
    file.seek(begin)


def _take(stack: list[int | None], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Take from the stack what an operation takes, down to the last mark if it takes that."""
    needed = len(opcode.stack_before)
    if pickletools.markobject in opcode.stack_before:
        mark = len(stack) - 1 - stack[::-1].index(None)
        needed = len(stack) - mark + opcode.stack_before.index(pickletools.markobject)
    if needed > len(stack):
        raise LookupError("an operation takes more than there is")
    taken = stack[len(stack) - needed :]
    del stack[len(stack) - needed :]
    return [depth or 0 for depth in taken]


def _refusal(path: Path, names: dict[str, None], remedy: str) -> ValueError:
    if all(re.fullmatch(r"torch\.(\w+\.)?(\w+Storage|[a-z]+\d\w*)", name) for name in names):
        reason = "a type of numbers that is not read: save float32 instead"
    elif any(name.startswith("torchqrnn.") for name in names):
        reason = "and a QRNN is a convolution over time, which this package lacks"
    else:
        reason = (
            "which could run any program; none of it was run. If you trust the file, load it with the program that wrote "
            f"it, {remedy}"
        )
    shown = (f"`{name}`" if name.isprintable() else repr(name) for name in names)
    return ValueError(f"{path} is refused: its pickle names {', '.join(shown)}, {reason}.")
