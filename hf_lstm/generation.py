"""What `generate()` lacks: a state that can be kept in a file and taken up again."""

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import Cache, DynamicCache

FORMAT = "hf_lstm state 1"


def save_state(model, cache: Cache, path: str | Path) -> None:
    """
    Write what a model remembers of all it has read into a safetensors file: `2 B` numbers for each cell, however many
    tokens there were. A file of that name is replaced once the new one is complete.

    Args:
        model (`LSTMForCausalLM` or `LSTMModel`): The model that read; the file is for this one alone.
        cache (`Cache`): Its `past_key_values`, a `DynamicCache` or `StaticCache`.
        path (`str` or `Path`): The file.

    Raises:
        ValueError: if the cache is not the model's, or has read nothing.
        OSError: if the file cannot be written.
    """
    states = [layer.get_state() if hasattr(layer, "get_state") else None for layer in cache.layers]
    sizes = model.config.cell_sizes
    if len(states) != len(sizes) or None in states:
        raise ValueError(
            f"`cache` holds a state in {sum(state is not None for state in states)} of {len(states)} layers, and the model "
            f"has {len(sizes)}: pass the `past_key_values` that the model has read with."
        )
    tensors = {
        f"layers.{index}.{name}": tensor.detach().cpu().contiguous()
        for index, state in enumerate(states)
        for name, tensor in zip("hc", state, strict=True)
    }
    _check_shapes(tensors, sizes, "`cache`")
    metadata = {
        "format": FORMAT,
        "model": _digest(dict(model.named_parameters())),
        "tokens": str(int(cache.get_seq_length())),
        "digest": _digest(tensors),
    }
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    save_file(tensors, unfinished, metadata=metadata)
    os.replace(unfinished, path)


def load_state(model, path: str | Path) -> DynamicCache:
    """
    The state that `save_state` wrote, to go on from: pass it as `past_key_values`. Repeated by its
    `batch_repeat_interleave`, or copied by `copy.deepcopy`, it goes on in many ways.

    Raises:
        ValueError: if there is no such file, it is no state or was cut off or changed, or it is that of a model with
            other weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"The file {path} does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no state, or was cut off ({error}): save the state again.") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds {metadata.get('format') or 'no state'}: it must be a file of `save_state`.")
    if metadata.get("model") != _digest(dict(model.named_parameters())):
        raise ValueError(f"{path} is the state of a model with other weights: load it with the model that read.")
    _check_shapes(tensors, model.config.cell_sizes, str(path))
    if metadata.get("digest") != _digest(tensors) or not metadata.get("tokens", "").isdecimal():
        raise ValueError(f"{path} was changed after it was saved: save the state again.")
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        h, c = (tensors[f"layers.{index}.{name}"].to(model.device) for name in "hc")
        layer.update(h, c, num_tokens=int(metadata["tokens"]))
    return cache


def _check_shapes(tensors: dict[str, torch.Tensor], sizes: list[int], source: str) -> None:
    rows = len(next(iter(tensors.values()), ()))
    expected = {f"layers.{index}.{name}": (rows, size) for index, size in enumerate(sizes) for name in "hc"}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected or rows == 0:
        raise ValueError(
            f"{source} holds states of the shapes {found}, and the model's are {expected}: it is another's."
        )


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """What tells these tensors from any others, to the last bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
