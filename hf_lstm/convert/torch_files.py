"""The tensors of a file of PyTorch, by name: of a state_dict, of a module that was saved whole, or of safetensors."""

import re
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_lstm.convert.pickles import StandIn, StoredTensor
from hf_lstm.convert.torch_save import read_pickle

RECURRENT = re.compile(r"(?:(.*)\.)?(weight|bias)_(ih|hh|hr)_l(\d+)(_reverse)?")
ONE_STEP = re.compile(r"(?:.*\.)?(?:weight|bias)_(?:ih|hh)")  # nn.LSTMCell and its like: one layer, without a number
NAME = re.compile(r"[\w.-]{1,500}")
STATE_DICTS = ("state_dict", "model_state_dict", "model")  # keys under which programs save one beside other things
# The classes whose modules do no more in evaluation than `Source` says, a recurrent layer's one excepted.
KNOWN_MODULES = {
    "Embedding",
    "LSTM",
    "GRU",
    "RNN",
    "LSTMCell",
    "GRUCell",
    "RNNCell",
    "Linear",
    "Dropout",
    "ModuleList",
}
KNOWN_MODULES |= {"WeightDrop", "LockedDropout", "CrossEntropyLoss", "NLLLoss", "LogSoftmax", "Softmax"}


class Tensors(NamedTuple):
    """
    The tensors of a file.

    Args:
        tensors (`dict`): Each tensor, stored or read, by its name.
        modules (`dict[str, StandIn]`): Where a module was saved whole, its parts by name, "" for itself.
        notes (`list[str]`): Sentences on what was left out.
    """

    tensors: dict[str, Any]
    modules: dict[str, StandIn]
    notes: list[str]


def read_tensors(path: Path) -> Tensors:
    """
    Read a file of torch.save or of safetensors.

    Raises:
        ValueError: if the file is damaged or refused, or holds neither a module nor the state_dict of a recurrent one.
    """
    if path.suffix == ".safetensors":
        try:
            return Tensors(plain_names(load_file(path), path), {}, [])
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): copy or download it again.") from error
    return tensors_of(read_pickle(path), path)


def tensors_of(root: Any, path: Path) -> Tensors:
    """Return the tensors of a module that was saved whole, of a state_dict, or of one under a key beside other things."""
    if isinstance(root, StandIn):
        return tensors_of_module(root, path)
    if has_layers(root):
        return Tensors(plain_names(root, path), {}, [])
    held = root if isinstance(root, dict) else {}
    found = [key for key, value in held.items() if has_layers(value)]
    usual = [key for key in STATE_DICTS if key in found]
    if len(found) > 1 and not usual:
        raise ValueError(f"{path} holds several models, {', '.join(map(repr, found))}: save the one you want alone.")
    if not found:
        content = ", ".join(map(str, list(held)[:8])) or ("nothing" if root == {} else type(root).__name__)
        raise ValueError(
            f"{path} holds {content}, and no weights of an nn.LSTM, nn.GRU or nn.RNN such as rnn.weight_ih_l0: give a state_dict "
            "with an embedding, a recurrent module and an output layer."
        )
    key = (usual or found)[0]
    rest = [other if is_name(other) else "something without a name" for other in held if other != key]
    notes = [f"Beside the weights the file held {', '.join(rest)}, which was left out."] if rest else []
    return Tensors(plain_names(held[key], path), {}, notes)


def has_layers(value: Any) -> bool:
    """Return whether an object is a state_dict with recurrent weights."""
    return isinstance(value, dict) and any(
        isinstance(name, str) and (RECURRENT.fullmatch(name) or ONE_STEP.fullmatch(name) or name.endswith("_raw"))
        for name in value
    )


def plain_names(tensors: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    """Return the tensors of a state_dict without the prefix of `DataParallel`, those of an nn.LSTMCell as its layer 0."""
    other = [name for name, tensor in tensors.items() if not (is_name(name) and is_tensor(tensor))]
    if other:
        shown = ", ".join(name if is_name(name) else type(name).__name__ for name in other[:5])
        raise ValueError(
            f"{path} holds {shown} among its tensors: give a state_dict alone, of tensors by their names."
        )
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    names = ((name.removeprefix(prefix), tensor) for name, tensor in tensors.items())
    return {f"{name}_l0" if ONE_STEP.fullmatch(name) else name: tensor for name, tensor in names}


def is_name(value: Any) -> bool:
    """Return whether a key can be the name of a tensor."""
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def is_tensor(value: Any) -> bool:
    return isinstance(value, StoredTensor | torch.Tensor)


def tensors_of_module(root: StandIn, path: Path) -> Tensors:
    """
    Return the parameters and buffers of a module by name, without those of `DataParallel` around it, and its parts.

    Raises:
        ValueError: if a part is of a class that may change the result, since its code is not read.
    """
    if root.name.endswith("DataParallel"):
        root = next(iter(children_of(root, "_modules").values()), root)
    tensors: dict[str, Any] = {}
    modules: dict[str, StandIn] = {}
    waiting, seen = deque([("", root)]), set()
    while waiting:
        name, module = waiting.popleft()
        if not isinstance(module, StandIn) or not (name == "" or is_name(name)):
            shown = name[:100] if name else "its object"
            raise ValueError(f"{path}: {shown!r} is not a PyTorch module: it is refused.")
        if name and module.name.rpartition(".")[2] not in KNOWN_MODULES:
            raise ValueError(
                f"{path} is refused: its {name} is a {module.name}, which an embedding, recurrent layers and an output layer do "
                "not have between them."
            )
        if module.fields.get("max_norm") is not None:
            raise ValueError(f"{path} is refused: its {name} rescales embeddings as they are read (`max_norm`).")
        if id(module) in seen:
            continue
        seen.add(id(module))
        modules[name] = module
        prefix = f"{name}." if name else ""
        for group in ("_parameters", "_buffers"):
            tensors |= {f"{prefix}{own}": tensor for own, tensor in children_of(module, group).items()}
        waiting.extend((f"{prefix}{own}", child) for own, child in children_of(module, "_modules").items())
    return Tensors(plain_names(tensors, path), modules, [])


def children_of(module: StandIn, group: str) -> dict[str, Any]:
    held = module.fields.get(group)
    return {name: child for name, child in held.items() if child is not None} if isinstance(held, dict) else {}


def read_weights(tensors: Mapping[str, Any], names: Iterable[str], path: Path) -> dict[str, torch.Tensor]:
    """
    Read tensors of finite numbers, all in float64 if one of them is, else in float32, each with memory of its own.

    Raises:
        ValueError: if one holds other numbers, NaNs or infinities.
    """
    read = {}
    for name in names:
        tensor = tensors[name].read() if isinstance(tensors[name], StoredTensor) else tensors[name]
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{path}: {name} holds {tensor.dtype} numbers: quantised weights cannot be converted.")
        wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
        if wrong:
            raise ValueError(f"{path}: {name} holds {wrong:,} numbers that are NaN or infinite: its training failed.")
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        read[name] = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()
    if any(tensor.dtype == torch.float64 for tensor in read.values()):
        read = {name: tensor.double() for name, tensor in read.items()}
    return read
