"""Models of `nn.Embedding`, `nn.LSTM`, `nn.GRU` or `nn.RNN`, and `nn.Linear`: read from a state_dict, and written to one.

A state_dict names the tensors of the recurrent modules by layer: weight_ih_l0 (W), weight_hh_l0 (U), bias_ih_l0, bias_hh_l0;
the modules of the embedding and of the output layer are found by the shapes of their weights, or named by the user.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_lstm.convert.pickles import StandIn, StoredTensor, read_pickle
from hf_lstm.convert.source import Layer, Source
from hf_lstm.convert.vocabulary import read_vocabulary
from hf_lstm.model.modeling_lstm import LSTMForCausalLM

RECURRENT = re.compile(r"(?:(.*)\.)?(weight|bias)_(ih|hh|hr)_l(\d+)(_reverse)?")
CELLS_BY_GATES = {4: "lstm", 3: "gru", 1: "rnn"}
# Names that decide where shapes do not: of word_language_model and its forks, awd-lstm-lm, icefall and espnet, and usual ones.
EMBEDDINGS = ("encoder", "input_embedding", "embed", "embedding", "embeddings", "emb", "embed_tokens", "wte")
DECODERS = ("decoder", "output_linear", "lo", "linear", "fc", "out", "output", "lm_head")
STATE_DICTS = ("state_dict", "model_state_dict", "model")  # keys under which programs save one beside other things


@dataclass
class Options:
    """
    Facts that a checkpoint does not tell, and the names of its parts.

    Args:
        vocabulary (`str`, *optional*): The vocabulary, see [`vocabulary.read_vocabulary`].
        cell_type (`str`, *optional*): The cell, which a state_dict of `nn.RNN` does not tell.
        embedding, decoder (`str`, *optional*): Names of these modules in a state_dict.
        recurrent (`list[str]`, *optional*): Names of the recurrent modules, the first one first.
    """

    vocabulary: str | None = None
    cell_type: str | None = None
    embedding: str | None = None
    recurrent: list[str] | None = None
    decoder: str | None = None


def read(path: Path, options: Options) -> Source:
    """
    Read a file of torch.save or of safetensors that holds a state_dict, alone or under a key, or a whole module.

    Raises:
        ValueError: if the file is damaged or refused, or the model is not of the three parts named above.
    """
    tensors, modules = read_tensors(path)
    if raw := [name for name in tensors if str(name).endswith("_raw")]:
        raise ValueError(
            f"{path} holds {raw[0]}, a weight of awd-lstm-lm beside its copy with dropped entries: use `--from awd-lstm-lm`."
        )
    return make_source("a PyTorch model", path, tensors, modules, options)


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, StandIn]]:
    """Return the tensors of a file by name and, if it holds a whole module, its parts by name, "" for itself."""
    if path.suffix == ".safetensors":
        try:
            return without_prefix(load_file(path)), {}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): copy or download it again.") from error
    root = read_pickle(path)
    if isinstance(root, StandIn):
        return tensors_of_module(root, path)
    return without_prefix(find_state_dict(root, path)), {}


def find_state_dict(root: Any, path: Path) -> Mapping[str, Any]:
    """Return the dictionary of tensors: the object itself, or what it holds under a key."""

    def has_layers(value):
        return isinstance(value, dict) and any(isinstance(k, str) and RECURRENT.fullmatch(k) for k in value)

    if has_layers(root):
        return root
    found = {key: value for key, value in root.items() if has_layers(value)} if isinstance(root, dict) else {}
    known = [key for key in STATE_DICTS if key in found] or list(found)
    if len(known) == 1 or (known and known[0] in STATE_DICTS):
        return found[known[0]]
    if known:
        raise ValueError(f"{path} holds several models, {', '.join(map(repr, known))}: save the one you want alone.")
    held = ", ".join(map(str, list(root)[:8])) if isinstance(root, dict) else type(root).__name__
    raise ValueError(
        f"{path} holds no weights of an nn.LSTM, nn.GRU or nn.RNN (such as rnn.weight_ih_l0), but {held or 'nothing'}: give "
        "a state_dict with an embedding, a recurrent module and an output layer."
    )


def tensors_of_module(root: Any, path: Path) -> tuple[dict[str, Any], dict[str, StandIn]]:
    """Return the parameters and buffers of a module by name, without those of `DataParallel` around it, and its parts."""
    if root.name.endswith("DataParallel") and isinstance(root.fields.get("_modules"), dict):
        root = root.fields["_modules"].get("module")
    tensors: dict[str, Any] = {}
    modules: dict[str, StandIn] = {}
    waiting, seen = [("", root)], set()
    while waiting:
        prefix, module = waiting.pop()
        if not isinstance(module, StandIn):
            raise ValueError(
                f"{path}: {prefix.removesuffix('.') or 'its object'} is not a PyTorch module: it is refused."
            )
        if id(module) in seen:
            continue
        seen.add(id(module))
        modules[prefix.removesuffix(".")] = module
        parameters, buffers, children = (
            held if isinstance(held := module.fields.get(group), dict) else {}
            for group in ("_parameters", "_buffers", "_modules")
        )
        tensors |= {f"{prefix}{name}": tensor for name, tensor in (parameters | buffers).items() if tensor is not None}
        waiting += [(f"{prefix}{name}.", child) for name, child in children.items() if child is not None]
    return tensors, modules


def without_prefix(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state_dict without the prefix of `DataParallel`."""
    if all(isinstance(name, str) and name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def make_source(
    title: str,
    path: Path,
    tensors: dict[str, Any],
    modules: dict[str, StandIn],
    options: Options,
    regularization: dict[str, float] | None = None,
    unit="any",
) -> Source:
    """
    Find the parts of a model among its tensors, and read them.

    Args:
        title (`str`): The program that wrote the file.
        path (`Path`): The file, for messages.
        tensors (`dict`): Tensors, stored or read, by name.
        modules (`dict[str, StandIn]`): The modules by name, where they were saved whole.
        options (`Options`): What the user says.
        regularization (`dict[str, float]`, *optional*): Fields of [`LSTMConfig`] that the file tells.
        unit (`str`, defaults to `"any"`): `"words"` where the program knows only these.
    """
    other = [name for name, tensor in tensors.items() if not isinstance(tensor, StoredTensor | torch.Tensor)]
    if other:
        raise ValueError(f"{path} holds {', '.join(map(repr, other[:5]))} among its tensors: give a state_dict alone.")
    parts = find_parts(tensors, options, path)
    cell_type, notes = find_cell(parts, tensors, modules, options, path)
    notes += left_out_parts(tensors, parts, options, path)
    read = {name: read_tensor(tensors[name], name, path) for name in parts.names(tensors)}
    widest = torch.float64 if any(tensor.dtype == torch.float64 for tensor in read.values()) else torch.float32
    read = {name: tensor.to(widest) for name, tensor in read.items()}
    layers = [
        Layer(
            read[f"{prefix}weight_ih_l{layer}"],
            read[f"{prefix}weight_hh_l{layer}"],
            read.get(f"{prefix}bias_ih_l{layer}"),
            read.get(f"{prefix}bias_hh_l{layer}"),
        )
        for prefix, count in parts.recurrent.items()
        for layer in range(count)
    ]
    return Source(
        title=title,
        cell_type=cell_type,
        embedding=read[parts.embedding],
        layers=layers,
        decoder=read[parts.decoder],
        decoder_bias=None if parts.decoder_bias is None else read[parts.decoder_bias],
        vocabulary=read_vocabulary(options.vocabulary, len(read[parts.embedding]), unit),
        regularization=regularization or {},
        notes=notes,
    )


@dataclass
class Parts:
    """
    The names of a model's tensors.

    Args:
        embedding (`str`): The embeddings `(V, D)`.
        recurrent (`dict[str, int]`): The number of layers of each recurrent module by its prefix, "rnn." for example.
        decoder (`str`): The output layer `(V, H)`; the embeddings' own name where they are stored once for both.
        decoder_bias (`str`, *optional*): Its bias `(V,)`.
    """

    embedding: str
    recurrent: dict[str, int]
    decoder: str
    decoder_bias: str | None

    def names(self, tensors: Mapping[str, Any]) -> list[str]:
        """Return the names of all tensors that the model consists of."""
        layers = [name for prefix in self.recurrent for name in tensors if is_of(name, prefix)]
        return [self.embedding, *layers, self.decoder, *([self.decoder_bias] if self.decoder_bias else [])]


def is_of(name: str, prefix: str) -> bool:
    """Whether a tensor is a weight of the recurrent module with this prefix."""
    rest = name.removeprefix(prefix)
    return name.startswith(prefix) and "." not in rest and RECURRENT.fullmatch(rest) is not None


def find_parts(tensors: dict[str, Any], options: Options, path: Path) -> Parts:
    prefixes = list(dict.fromkeys((f"{m[1]}." if m[1] else "") for m in map(RECURRENT.fullmatch, tensors) if m))
    chosen = prefixes if options.recurrent is None else [f"{name.removesuffix('.')}." for name in options.recurrent]
    shown = ", ".join(prefix.removesuffix(".") or "(without a name)" for prefix in prefixes)
    if not prefixes:
        raise ValueError(f"{path} holds no weights of an nn.LSTM, nn.GRU or nn.RNN, such as rnn.weight_ih_l0.")
    if missing := [prefix.removesuffix(".") for prefix in chosen if prefix not in prefixes]:
        raise ValueError(
            f"`--recurrent` ({', '.join(missing)}) is not a recurrent module of {path}, which has {shown}."
        )
    if options.recurrent is None and len(prefixes) > 1:
        raise ValueError(
            f"{path} holds several recurrent modules, {shown}: name the one to convert, or several that read each other's "
            "outputs in this order, with `--recurrent`."
        )
    recurrent = {prefix: check_layers(prefix, tensors, path) for prefix in chosen}
    widths = [
        size
        for prefix, count in recurrent.items()
        for layer in range(count)
        for size in (tensors[f"{prefix}weight_ih_l{layer}"].shape[1], tensors[f"{prefix}weight_hh_l{layer}"].shape[1])
    ]
    for output, following in zip(widths[1:-1:2], widths[2::2], strict=True):
        if output != following:
            raise ValueError(
                f"{path}: a layer that reads {following} numbers cannot follow one that writes {output}: these recurrent modules "
                "do not read each other's outputs in this order."
            )
    matrices = [
        name for name, tensor in tensors.items() if len(tensor.shape) == 2 and name.rpartition(".")[2] == "weight"
    ]
    embedding = choose(
        "embedding",
        options.embedding,
        [n for n in matrices if tensors[n].shape[1] == widths[0] and f"{n.removesuffix('weight')}bias" not in tensors],
        EMBEDDINGS,
        f"(V, {widths[0]}) without a bias",
        path,
    )
    size = tensors[embedding].shape[0]
    outputs = [name for name in matrices if tensors[name].shape == (size, widths[-1]) and name != embedding]
    biases = [name for name in tensors if tensors[name].shape == (size,) and name.rpartition(".")[2] == "bias"]
    alone = [name for name in biases if f"{name.removesuffix('bias')}weight" not in tensors]
    if not outputs and len(alone) == 1 and widths[0] == widths[-1]:  # stored once for both, as safetensors does
        return Parts(embedding, recurrent, embedding, alone[0])
    if options.decoder is not None and f"{options.decoder}.weight" == embedding:
        outputs = [embedding]
    decoder = choose("decoder", options.decoder, outputs, DECODERS, f"({size}, {widths[-1]})", path)
    bias = f"{decoder.removesuffix('weight')}bias"
    return Parts(embedding, recurrent, decoder, bias if bias in tensors and decoder != embedding else None)


def check_layers(prefix: str, tensors: dict[str, Any], path: Path) -> int:
    """Return the number of layers of a recurrent module whose weights fit each other."""
    name = prefix.removesuffix(".") or "the recurrent module"
    found = [RECURRENT.fullmatch(key.removeprefix(prefix)) for key in tensors if is_of(key, prefix)]
    matches = [match for match in found if match is not None]
    if any(match[5] for match in matches):
        raise ValueError(
            f"{path}: {name} reads in both directions, so it is not a language model that writes: it is refused."
        )
    if any(match[3] == "hr" for match in matches):
        raise ValueError(
            f"{path}: {name} projects its output (`proj_size`), which no cell of this package does: it is refused."
        )
    count = 1 + max(int(match[4]) for match in matches)
    for layer in range(count):
        W, U = (tensors.get(f"{prefix}weight_{kind}_l{layer}") for kind in ("ih", "hh"))
        if W is None or U is None or len(W.shape) != 2 or len(U.shape) != 2 or 0 in (*W.shape, *U.shape):
            raise ValueError(
                f"{path}: {name} lacks W or U of layer {layer}: the file is incomplete or of another program."
            )
        biases = [tensors.get(f"{prefix}bias_{kind}_l{layer}") for kind in ("ih", "hh")]
        rows, hidden = U.shape
        if W.shape[0] != rows or any(bias is not None and tuple(bias.shape) != (rows,) for bias in biases):
            raise ValueError(
                f"{path}: the tensors of layer {layer} of {name} do not fit each other: the file is damaged."
            )
        if rows % hidden or rows // hidden not in CELLS_BY_GATES:
            raise ValueError(
                f"{path}: U of layer {layer} of {name} is {rows} x {hidden}, and an nn.LSTM, nn.GRU or nn.RNN has 4, 3 or 1 times "
                "as many rows as columns."
            )
    return count


def choose(part: str, asked: str | None, candidates: list[str], usual: tuple[str, ...], shape: str, path: Path) -> str:
    """Return the one tensor that can be the embedding or the decoder, the asked for or else that with a usual name."""
    shown = ", ".join(name.removesuffix(".weight") for name in candidates) or "none"
    if asked is not None:
        named = [name for name in candidates if name in (asked, f"{asked}.weight")]
    else:
        named = (
            [name for name in candidates if name.split(".")[-2:][0] in usual] if len(candidates) > 1 else candidates
        )
    if len(named) != 1:
        given = f" is {asked}, and" if asked is not None else ":"
        raise ValueError(
            f"{path}: `--{part}`{given} the modules with a weight of shape {shape} are: {shown}. Name the {part} with `--{part}`."
        )
    return named[0]


def find_cell(
    parts: Parts, tensors: dict[str, Any], modules: dict[str, StandIn], options: Options, path: Path
) -> tuple[str, list[str]]:
    """
    Return the cell by the shape of U, for an `nn.RNN` by what its module or the user says; and a note where neither says it.
    """
    kinds = set()
    for prefix, count in parts.recurrent.items():
        for layer in range(count):
            rows, hidden = tensors[f"{prefix}weight_hh_l{layer}"].shape
            kind = CELLS_BY_GATES[rows // hidden]
            if kind == "rnn" and prefix.removesuffix(".") in modules:
                kind = str(modules[prefix.removesuffix(".")].fields.get("mode", kind)).lower()
            kinds.add(kind)
    found = kinds.pop()
    if kinds:
        raise ValueError(
            f"{path} mixes the cells {found} and {kinds.pop()}: all layers of a model have the same cell here."
        )
    notes = []
    if found == "rnn":
        found = options.cell_type if options.cell_type in ("rnn_tanh", "rnn_relu") else "rnn_tanh"
        if options.cell_type is None:
            notes = ["The file does not say whether its nn.RNN uses tanh or relu: tanh was taken."]
    if options.cell_type not in (None, found):
        raise ValueError(
            f"`--cell_type` ({options.cell_type}) contradicts {path}, whose cell is {found}: leave it out."
        )
    return found, notes


def left_out_parts(tensors: dict[str, Any], parts: Parts, options: Options, path: Path) -> list[str]:
    """Return a note of the tensors that the user did not choose, and refuse others that the model lacks a place for."""
    used = set(parts.names(tensors))
    rest = [name for name in tensors if name not in used]
    is_chosen = options.embedding is not None and options.recurrent is not None and options.decoder is not None
    unknown = [
        name for name in rest if not (is_chosen or (options.recurrent is not None and RECURRENT.fullmatch(name)))
    ]
    if unknown:
        raise ValueError(
            f"{path} holds {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}, which neither the embedding, the "
            f"recurrent module nor the output layer has: the model is of another kind. To leave them out, name all three parts "
            "with `--embedding`, `--recurrent` and `--decoder`."
        )
    return [f"Left out, since other parts were chosen: {', '.join(rest)}."] if rest else []


def read_tensor(tensor: Any, name: str, path: Path) -> torch.Tensor:
    """Read a tensor of finite numbers, in float32 at least, with memory of its own."""
    read = tensor.read() if isinstance(tensor, StoredTensor) else tensor
    if not read.dtype.is_floating_point:
        raise ValueError(f"{path}: {name} holds {read.dtype} numbers: quantised weights cannot be converted.")
    if not torch.isfinite(read).all():
        count = int((~torch.isfinite(read)).sum())
        raise ValueError(
            f"{path}: {name} holds {count:,} numbers that are NaN or infinite: the training of this model failed."
        )
    if read.untyped_storage().nbytes() > read.nbytes:
        read = read.clone(memory_format=torch.contiguous_format)
    return read.to(torch.promote_types(read.dtype, torch.float32)).contiguous()


def to_torch_lstm(model: LSTMForCausalLM) -> dict[str, torch.Tensor]:
    """
    Return the weights as `nn.Embedding`, `nn.LSTM` (or `nn.GRU` or `nn.RNN`) and `nn.Linear` load them.

    Args:
        model (`LSTMForCausalLM`): A stacked model whose cells are equally wide.

    Returns:
        `dict[str, torch.Tensor]`: the state_dict of a module with these three as `encoder`, `rnn` and `decoder`, the names of
        word_language_model: encoder.weight `(V, D)`; rnn.weight_ih_l0 `(G H, D)`, rnn.weight_hh_l0 `(G H, H)`,
        rnn.bias_ih_l0 and rnn.bias_hh_l0 `(G H,)`, and so on for each layer; decoder.weight `(V, H)`, and decoder.bias `(V,)`
        if the model has one. Tensors are shared with the model, but for the biases that it lacks, which are zeros.

    Raises:
        ValueError: for a model that these three cannot hold: residual, a Mogrifier, with cells of several widths or with a
            projection before the output layer.
    """
    config = model.config
    reason = None
    if config.block_type != "stacked":
        reason = f"its blocks are {config.block_type} (`block_type`)"
    elif config.cell_type not in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        reason = f"its cell is a {config.cell_type} (`cell_type`)"
    elif len(set(config.cell_sizes)) > 1:
        reason = f"its cells have the widths {', '.join(map(str, config.cell_sizes))}"
    elif config.output_projection_size is not None:
        reason = (
            f"it has a projection before its output layer (`output_projection_size` {config.output_projection_size})"
        )
    if reason:
        raise ValueError(
            f"The model cannot be held by nn.Embedding, one recurrent module of torch and nn.Linear: {reason}."
        )
    tensors = {"encoder.weight": model.model.embed_tokens.weight}
    for index, layer in enumerate(model.model.layers):
        weights = layer.gates().weights()
        hidden_bias = torch.zeros_like(weights.b) if weights.hidden_bias is None else weights.hidden_bias
        tensors |= {f"rnn.weight_ih_l{index}": weights.W, f"rnn.weight_hh_l{index}": weights.U}
        tensors |= {f"rnn.bias_ih_l{index}": weights.b, f"rnn.bias_hh_l{index}": hidden_bias}
    tensors["decoder.weight"] = model.lm_head.weight
    if model.lm_head.bias is not None:
        tensors["decoder.bias"] = model.lm_head.bias
    return {name: tensor.detach() for name, tensor in tensors.items()}
