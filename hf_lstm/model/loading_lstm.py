"""Checkpoint validation: safetensors only, all keys present, shapes that match, finite values."""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

if TYPE_CHECKING:  # by this line each save copies the file, which every `auto_map` names
    from .heads_lstm import ClassificationHead  # noqa: F401


class ShapeError(ValueError, RuntimeError):
    """Weights of other shapes than the model's; `PreTrainedModel.from_pretrained` raises a `RuntimeError`."""


class StrictLoading:
    """Strict loading of checkpoints, for every model of hf_lstm."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        Load a model. Stricter than `PreTrainedModel.from_pretrained`: a weight is never silently initialised at
        random. The head of a classifier, where the checkpoint holds none of it, starts anew with a warning.

        Raises:
            ValueError: if the weights are not a complete safetensors file inside the model's folder, or if weights are
                missing, unexpected, of other shapes, or contain NaN or infinite values. With
                `output_loading_info=True` or `ignore_mismatched_sizes=True` the caller decides about weights that are
                missing, unexpected or of other shapes.
        """
        informed = kwargs.pop("output_loading_info", False)
        name = pretrained_model_name_or_path
        if name is not None:
            check_sources(cls.config_class, name, kwargs)
            kwargs |= {"use_safetensors": True, "weights_only": True}
        try:
            model, report = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"The weights of {name} are not a valid safetensors file, or truncated ({error}): fetch or save them "
                "again."
            ) from error
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ShapeError(
                f"The weights of {name} have other shapes than its config.json says (the table above lists them): restore "
                "the config.json that was saved with them, leave `num_labels` out if you gave it, or initialise new ones "
                "with `ignore_mismatched_sizes=True`."
            ) from error
        lenient = informed or name is None or kwargs.get("ignore_mismatched_sizes", False)
        check_loaded(model, report, name, lenient)
        return (model, report) if informed else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """
        Check the names of the files of weights, since adapters and the models that they name are loaded without
        `check_sources`. A private name of transformers (modeling_utils.py): every file of weights is read here,
        whichever file names it, and no public hook sees them; tests/test_damaged_checkpoints.py fails when it changes.
        """
        for path in checkpoint_files or ():
            check_name(os.path.basename(path), os.path.dirname(path))
        for written in ((load_config.sharded_metadata or {}).get("weight_map") or {}).values():
            check_name(written, "the index of the weights")
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )


ORDINARY = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# A file inside the model's folder: parts of its name may not be empty, `.`, `..`, a drive or hidden.
SAFETENSORS = re.compile(r"(?:[\w -][\w. -]*/)*[\w -][\w. -]*\.safetensors")
OR_INDEX = re.compile(SAFETENSORS.pattern + r"(?:\.index\.json)?")
HEADS = ("lm_head.", "score.")  # output layers
WHERE = ("cache_dir", "proxies", "local_files_only", "token", "revision", "subfolder")


def check_name(written: str, place: str | Path, allowed: re.Pattern = SAFETENSORS) -> None:
    """
    Raise `ValueError` unless a name is that of a safetensors file inside the folder: any other kind of file may be a
    pickle, which can run any code when it is read. The name is checked as it is written, without following links
    (files from the Hub are links).
    """
    if not isinstance(written, str) or not allowed.fullmatch(written):
        raise ValueError(
            f"{place} names the weights {written!r}, and models of hf_lstm are read only from `*.safetensors` files inside "
            "their folder: if you trust the source, load the weights elsewhere and save them with `save_pretrained`."
        )


def check_sources(config_class: type[PreTrainedConfig], name: str | Path, asked: dict) -> None:
    """
    Check the names of all files that weights would be read from, before any is read.

    Args:
        config_class (`type`): The class of the model's config.
        name (`str` or `Path`): The model's folder, or its name on the Hub.
        asked (`dict`): The arguments of `from_pretrained`.

    Raises:
        ValueError: if one is not a safetensors file inside the model's folder.
    """
    for argument in ("gguf_file", "use_safetensors"):
        if asked.get(argument) not in (None, True):
            raise ValueError(
                f"`{argument}` ({asked[argument]!r}) asks for weights of another format, and models of hf_lstm are "
                "read only from safetensors files: leave it out."
            )
    if os.path.isfile(name):
        check_name(os.path.basename(name), os.path.dirname(name))
        return

    where = {argument: asked[argument] for argument in WHERE if asked.get(argument) is not None}
    config = asked.get("config")
    if config is None or isinstance(config, (str, os.PathLike)):
        try:
            config = config_class.get_config_dict(config or name, **where)[0]
        except OSError:  # an adapter's folder, or a missing model, which transformers reports
            config = {}
    config = config if isinstance(config, dict) else vars(config)
    named = asked.get("transformers_weights") or config.get("transformers_weights")
    if named is not None:
        check_name(named, f"`transformers_weights` in the config of {name}", OR_INDEX)
        if named.endswith(".safetensors"):
            return
    variant = f".{asked['variant']}" if asked.get("variant") else ""
    try:
        index = cached_file(name, named or f"model.safetensors.index{variant}.json", **where)
    except OSError:
        index = None
    if index is None:  # a single file holds all weights
        return
    try:
        files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} does not say in which file each weight lies: save the model again.") from error
    for written in files:
        check_name(written, index)


def check_loaded(model: PreTrainedModel, report: dict, name: str | Path | None, lenient: bool = False) -> None:
    """
    Check that all weights were loaded, that there were no others, and that their values are finite.

    Args:
        model (`PreTrainedModel`): The loaded model.
        report (`dict`): The loading info of `from_pretrained(..., output_loading_info=True)`.
        name (`str` or `Path`): The checkpoint, for the message.
        lenient (`bool`, defaults to `False`): Whether weights may be missing or unexpected.

    Raises:
        ValueError: if weights are missing, unexpected, or contain NaN or infinite values.
    """
    is_language_model = hasattr(model, "lm_head")  # others leave the output layers out that they lack
    left_out = () if is_language_model else tuple(head for head in HEADS if not hasattr(model, head.removesuffix(".")))
    surplus = [key for key in report["unexpected_keys"] if not key.startswith(left_out)]
    head = {key for key in model.state_dict() if key.startswith("score.")}
    lacking = report["missing_keys"] if report["missing_keys"] != head else ()
    for keys, verb in ((lacking, "lack"), (surplus, "contain, beside those of the model,")):
        if keys and not lenient:
            keys = sorted(keys)
            named = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
            raise ValueError(
                f"The weights of {name} {verb} {named}, since they belong to another model or were changed: save the model "
                "again, or load it with `output_loading_info=True`, which reports missing and unexpected weights."
            )
    for key, weight in model.named_parameters():
        is_ordinary = type(weight) is torch.nn.Parameter and weight.dtype in ORDINARY and not weight.is_meta
        if is_ordinary and not weight.isfinite().all():
            raise ValueError(
                f"The weights of {name} contain NaN or infinite values in `{key}` as {weight.dtype}: use an earlier "
                "checkpoint if training diverged, or a type of wider range if this one overflows."
            )
