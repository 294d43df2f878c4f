"""awd-lstm-lm (Merity et al. 2018), which saves `[model, criterion, optimizer]`.

Its LSTMs, one module a layer, lie in wrappers that drop recurrent weights: `weight_hh_l0_raw` is U, and `module.weight_hh_l0`
the copy with dropped entries of the last step.
"""

import re
from pathlib import Path
from typing import Any

from hf_lstm.convert.pickles import StandIn
from hf_lstm.convert.source import Source
from hf_lstm.convert.torch_files import children_of, tensors_of
from hf_lstm.convert.torch_lstm import Options, make_source
from hf_lstm.convert.torch_save import read_pickle

QRNN = re.compile(r"(module\.)?rnns\.\d+\..*\blinear\.weight(_raw)?")
RAW = re.compile(r"(rnns\.\d+\.)weight_hh_l0_raw")
# The fields of the model for the arguments of its training.
RATES = {
    "dropoute": "embedding_dropout",
    "dropouti": "input_dropout",
    "dropouth": "hidden_dropout",
    "dropout": "output_dropout",
}


def read(path: Path, options: Options) -> Source:
    """
    Read `[model, criterion, optimizer]`, the model alone, or its state_dict.

    Raises:
        ValueError: if the file is damaged or refused, or holds another model, a QRNN or a softmax in several parts.
    """
    root = read_pickle(path)
    notes = []
    if isinstance(root, list | tuple) and root:
        if len(root) > 1 and isinstance(root[1], StandIn):
            check_criterion(root[1], path)
        notes = ["The criterion and the state of the optimizer were left out."]
        root = root[0]
    if isinstance(root, dict) and any(isinstance(name, str) and QRNN.fullmatch(name) for name in root):
        raise ValueError(f"{path} is refused: its layers are QRNNs, convolutions over time, which this package lacks.")
    held = tensors_of(root, path)
    tensors = without_wrappers(held.tensors)
    if not any(name.startswith("rnns.") for name in tensors):
        raise ValueError(f"{path} holds no layers named rnns.0, rnns.1, ... of awd-lstm-lm: try `--from torch-lstm`.")
    source = make_source("awd-lstm-lm", path, held._replace(tensors=tensors), options, dropouts(held.modules), "words")
    source.notes = notes + source.notes
    return source


def without_wrappers(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors under the names of plain LSTMs, with the whole U instead of the dropped one."""
    raw = {match[1] for match in map(RAW.fullmatch, tensors) if match}
    stale = {f"{prefix}module.weight_hh_l0" for prefix in raw}
    return {
        re.sub(r"^(rnns\.\d+\.)module\.", r"\1", name).removesuffix("_raw"): tensor
        for name, tensor in tensors.items()
        if name not in stale
    }


def dropouts(modules: dict[str, StandIn]) -> dict[str, float]:
    """Return the dropouts of the training, which are those of this package."""
    given = {name: modules[""].fields.get(theirs) for theirs, name in RATES.items()} if modules else {}
    wrappers = [module for module in modules.values() if module.name.endswith(".WeightDrop")]
    given["weight_dropout"] = wrappers[0].fields.get("dropout") if wrappers else None
    return {name: rate for name, rate in given.items() if isinstance(rate, float | int) and 0 < rate < 1}


def check_criterion(criterion: StandIn, path: Path) -> None:
    """Refuse a softmax whose weights are not the output layer's alone."""
    if tensors := children_of(criterion, "_parameters"):
        raise ValueError(
            f"{path}: the criterion {criterion.name} has weights of its own ({', '.join(tensors)}), so the output layer alone does "
            "not give the probabilities: a softmax in several parts cannot be converted."
        )
