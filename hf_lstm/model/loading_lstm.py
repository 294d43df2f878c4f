"""What a checkpoint must be before a model is made of it: complete, of the model's shapes, of numbers, and no pickle."""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import cached_file


class StrictLoading:
    """What every model of hf_lstm is loaded by."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        As every model's, and stricter: nothing is initialised at random in silence.

        Raises:
            ValueError: if the weights are no whole safetensors file inside the model's folder, or there are too few, too
                many, ones of other shapes or numbers that are none. `output_loading_info=True` and
                `ignore_mismatched_sizes=True` leave it to whoever asks for them what to do about weights that are too
                few, too many or of other shapes.
        """
        informed = kwargs.pop("output_loading_info", False)
        name = pretrained_model_name_or_path
        if name is not None:
            check_sources(cls.config_class, name, kwargs)
            kwargs |= {"use_safetensors": True, "weights_only": True}
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
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """
        Adapters, and models that they name, come without `check_sources`. A private name of transformers
        (modeling_utils.py), since every file of weights passes here, whatever has named it, and no public hook sees them;
        tests/test_damaged_checkpoints.py fails when it changes.
        """
        for path in checkpoint_files or ():
            check_name(os.path.basename(path), os.path.dirname(path))
        for written in ((load_config.sharded_metadata or {}).get("weight_map") or {}).values():
            check_name(written, "the index of the weights")
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )


ORDINARY = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# A file below the model's folder: no part of its name is empty, `.`, `..`, a drive or hidden.
SAFETENSORS = re.compile(r"(?:[\w -][\w. -]*/)*[\w -][\w. -]*\.safetensors")
OR_INDEX = re.compile(SAFETENSORS.pattern + r"(?:\.index\.json)?")
WHERE = ("cache_dir", "proxies", "local_files_only", "token", "revision", "subfolder")


def check_name(written: str, place: str | Path, allowed: re.Pattern = SAFETENSORS) -> None:
    """
    Raises `ValueError` unless the name, as it is written and whatever it may link to (files from the Hub are links), is one
    of a safetensors file inside the folder: any other kind of file may be a pickle, which can run any code when it is read.
    """
    if not isinstance(written, str) or not allowed.fullmatch(written):
        raise ValueError(
            f"{place} names the weights {written!r}, and models of hf_lstm are read from files `*.safetensors` inside their "
            "folder only: save them as one with `save_pretrained`, where you trust who made them."
        )


def check_sources(config_class, name: str | Path, asked: dict) -> None:
    """
    Checks the name of each file that weights would be read from, before any is.

    Args:
        config_class (`type`): The class of the model's config.
        name (`str` or `Path`): The model's folder, or its name on the Hub.
        asked (`dict`): The arguments of `from_pretrained`.

    Raises:
        ValueError: if one is no safetensors file inside the model's folder.
    """
    for argument, refused in (
        ("gguf_file", asked.get("gguf_file")),
        ("use_safetensors", asked.get("use_safetensors")),
    ):
        if refused not in (None, True):
            raise ValueError(
                f"`{argument}` ({refused!r}) asks for weights of another format, and models of hf_lstm are read from "
                "safetensors files only: leave it out."
            )
    if os.path.isfile(name):
        check_name(os.path.basename(name), os.path.dirname(name))
        return

    where = {argument: asked[argument] for argument in WHERE if asked.get(argument) is not None}
    config = asked.get("config")
    if config is None or isinstance(config, (str, os.PathLike)):
        try:
            config = config_class.get_config_dict(config or name, **where)[0]
        except OSError:  # an adapter's folder, or nothing at all: transformers says so
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
    except OSError:  # one file holds them all
        return
    try:
        files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} does not say in which file each weight lies: save the model anew.") from error
    for written in files:
        check_name(written, index)


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
