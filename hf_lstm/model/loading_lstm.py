"""What a checkpoint must be before a model is made of it: complete, of the model's shapes, of numbers, and no pickle."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel


class StrictLoading:
    """What every model of hf_lstm is loaded by."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        As every model's, and stricter: nothing is initialised at random in silence.

        Raises:
            ValueError: if the weights are no whole safetensors file, or there are too few, too many, ones of other
                shapes or numbers that are none. `output_loading_info=True` and `ignore_mismatched_sizes=True` leave
                it to whoever asks for them what to do about weights that are too few, too many or of other shapes.
        """
        informed = kwargs.pop("output_loading_info", False)
        name = pretrained_model_name_or_path
        try:
            model, report = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        except (SafetensorError, RuntimeError) as error:
            if (explained := explain(error, name)) is None:
                raise
            raise explained from error
        lenient = informed or name is None or kwargs.get("ignore_mismatched_sizes", False)
        check_loaded(model, report, name, lenient)
        return (model, report) if informed else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs):
        """
        No pickle is read. A private name of transformers (modeling_utils.py), since every file of weights passes here, whatever
        has named it, and no public hook sees them; tests/test_damaged_checkpoints.py fails when it changes.
        """
        check_files(checkpoint_files)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)


ORDINARY = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_files(paths: list[str | Path] | None) -> None:
    """Raises `ValueError` where weights lie in a pickle, which can run any code when it is read."""
    for path in paths or ():
        if Path(path).suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"):
            raise ValueError(
                f"{path} is a pickle, and models of hf_lstm are read from safetensors files only: save it as one with "
                "`save_pretrained`, where you trust who made it."
            )


def explain(error: Exception, name: str | Path) -> ValueError | None:
    """The error that says which checkpoint could not be read, and why, where that is known."""
    if isinstance(error, SafetensorError):
        return ValueError(
            f"The weights of {name} are no safetensors file, or were cut off ({error}): fetch or save them again."
        )
    if "ignore_mismatched_sizes" in str(error):
        return ValueError(
            f"The weights of {name} have other shapes than its config.json says (the table above lists them): put back "
            "the config.json that was saved with them, or take new weights for these by `ignore_mismatched_sizes=True`."
        )
    return None


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
                f"The weights of {name} {what} {named}: they were saved by another model or changed. Save it anew, or load "
                "what there is by `output_loading_info=True`, which says what was new."
            )
    for key, weight in model.named_parameters():
        is_ordinary = type(weight) is torch.nn.Parameter and weight.dtype in ORDINARY and not weight.is_meta
        if is_ordinary and not weight.isfinite().all():
            raise ValueError(
                f"The weights of {name} hold numbers in `{key}` that are none (NaN or infinity) as {weight.dtype}: the "
                "training that made them failed, so take an earlier checkpoint, or the type is too small for them."
            )
