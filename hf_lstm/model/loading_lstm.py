"""What a checkpoint must be before a model is made of it: complete, of the model's shapes, of numbers, and no pickle."""

from pathlib import Path

import torch
from safetensors import SafetensorError


def check_format(use_safetensors: bool | None) -> None:
    """Raises `ValueError` where weights are asked for in another format than safetensors."""
    if use_safetensors is False:
        raise ValueError(
            "`use_safetensors` (False) asks for a pickle, which can run any code when it is read: models of hf_lstm are "
            "safetensors files only."
        )


def explain(error: Exception, name: str | Path) -> Exception:
    """The error that says which checkpoint could not be read, and why, where that is known."""
    if isinstance(error, SafetensorError):
        return ValueError(
            f"The weights of {name} are no safetensors file, or were cut off ({error}): fetch or save them again."
        )
    if "ignore_mismatched_sizes" in str(error):
        return ValueError(
            f"The weights of {name} have other shapes than its config.json says (the table above lists them): put back "
            "the config.json that was saved with them."
        )
    return error


def check_loaded(model, report: dict, name: str | Path, lenient: bool = False) -> None:
    """
    Args:
        model (`PreTrainedModel`): What was loaded.
        report (`dict`): What `from_pretrained(..., output_loading_info=True)` says of it.
        name (`str` or `Path`): The checkpoint, for the message.
        lenient (`bool`, defaults to `False`): Whether weights may be too few or too many.

    Raises:
        ValueError: if the checkpoint lacks a weight, has one that the model does not, or holds a number that is none.
    """
    surplus = [key for key in report["unexpected_keys"] if hasattr(model, "lm_head") or not key.startswith("lm_head.")]
    for keys, what in ((report["missing_keys"], "lack"), (surplus, "hold, beside those of the model,")):
        if keys and not lenient:
            keys = sorted(keys)
            named = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
            raise ValueError(
                f"The weights of {name} {what} {named}: they were saved by another model or changed; save it anew, or "
                "read another folder."
            )
    for key, weight in model.named_parameters():
        is_ordinary = type(weight) is torch.nn.Parameter and weight.is_floating_point() and not weight.is_meta
        if is_ordinary and not weight.isfinite().all():
            raise ValueError(
                f"The weights of {name} hold numbers in `{key}` that are none (NaN or infinity): the training that "
                "made them failed; take an earlier checkpoint."
            )
