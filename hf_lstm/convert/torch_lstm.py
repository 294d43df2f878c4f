"""Models of `nn.Embedding`, `nn.LSTM`, `nn.GRU` or `nn.RNN`, and `nn.Linear`: read from a file, and written to a state_dict.

A state_dict names the tensors of the recurrent modules by layer: weight_ih_l0 (W), weight_hh_l0 (U), bias_ih_l0, bias_hh_l0;
the modules of the embedding and of the output layer are found by the shapes of their weights, or named by the user.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from hf_lstm.convert.source import Layer, Source
from hf_lstm.convert.torch_files import RECURRENT, Tensors, read_tensors, read_weights
from hf_lstm.convert.vocabulary import read_vocabulary
from hf_lstm.model.modeling_lstm import LSTMForCausalLM

MODES = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}  # of an nn.RNN that was saved whole
CELLS_BY_GATES = {4: "lstm", 3: "gru", 1: "rnn"}
# Names that decide where shapes do not: of word_language_model and its forks, awd-lstm-lm, icefall and espnet, and usual ones.
EMBEDDINGS = ("encoder", "input_embedding", "embed", "embedding", "embeddings", "emb", "embed_tokens", "wte")
DECODERS = ("decoder", "output_linear", "lo", "linear", "fc", "out", "output", "lm_head")
# Why a model is refused, by the names of tensors that it has no place for.
REASONS = {
    r"peephole|w_c[ifo]": "it has peephole connections, from c to the gates",
    r"attn|attention": "it has attention on top",
    r"running_mean|running_var|norm|\bb?ln\b": "it has normalisation layers",
    r"emb": "it has several inputs",
}


@dataclass
class Options:
    """
    Facts that a checkpoint does not tell, and the names of its parts.

    Args:
        vocabulary (`str`, *optional*): The vocabulary, see [`vocabulary.read_vocabulary`].
        cell_type (`str`, *optional*): The cell, which a state_dict of `nn.RNN` does not tell.
        embedding, decoder (`str`, *optional*): Names of these modules in a state_dict.
        recurrent (`list[str]`, *optional*): Names of the recurrent modules, the first one first.
        config (`str`, *optional*): The file that describes the model, where the file of its weights does not.
    """

    vocabulary: str | None = None
    cell_type: str | None = None
    embedding: str | None = None
    recurrent: list[str] | None = None
    decoder: str | None = None
    config: str | None = None

    def refuse_names(self) -> None:
        """Raise `ValueError` if the user names a cell or parts, for a format that names them itself."""
        for name in ("cell_type", "embedding", "recurrent", "decoder"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"`--{name}` ({getattr(self, name)}) has no meaning for this format, whose file tells it: leave it out."
                )


def read(path: Path, options: Options) -> Source:
    """
    Read a file of torch.save or of safetensors that holds a state_dict, alone or under a key, or a whole module.

    Raises:
        ValueError: if the file is damaged or refused, or the model is not of the three parts named above.
    """
    return make_source("a PyTorch model", path, read_tensors(path), options)


def make_source(
    title: str,
    path: Path,
    held: Tensors,
    options: Options,
    regularization: dict[str, float] | None = None,
    unit: Literal["words", "any"] = "any",
) -> Source:
    """
    Find the parts of a model among its tensors, and read them.

    Args:
        title (`str`): The program that wrote the file, for the model card.
        path (`Path`): The file, for messages.
        held (`Tensors`): The tensors of the file.
        options (`Options`): What the file does not tell.
        regularization (`dict[str, float]`, *optional*): Fields of [`LSTMConfig`] that the file tells.
        unit (`str`, defaults to `"any"`): `"words"` where the program knows only these.

    Raises:
        ValueError: if parts are missing, ambiguous or do not fit each other, there are others, or the vocabulary does not fit.
    """
    tensors = held.tensors
    if raw := [name for name in tensors if name.endswith("_raw")]:
        raise ValueError(
            f"{path} holds {raw[0]}, a weight beside its copy with dropped entries: use `--from awd-lstm-lm` or `--from fastai`."
        )
    parts = find_parts(tensors, options, path)
    cell_type, cell_notes = find_cell(parts, held, options, path)
    notes = [*held.notes, *parts.notes, *cell_notes, *left_out_parts(tensors, parts, options, path)]
    vocabulary = read_vocabulary(options.vocabulary, tensors[parts.embedding].shape[0], unit)
    if vocabulary.unit == "characters" and not any(map(str.isspace, vocabulary.entries)):
        notes.append(
            "All tokens have one character, so text is read by characters; `--from word-language-model` reads words."
        )
    read = read_weights(tensors, parts.names(tensors), path)
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
        vocabulary=vocabulary,
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
        notes (`list[str]`): Sentences on how they were found.
    """

    embedding: str
    recurrent: dict[str, int]
    decoder: str
    decoder_bias: str | None
    notes: list[str]

    def names(self, tensors: Mapping[str, Any]) -> list[str]:
        """Return the names of all tensors that the model consists of."""
        layers = [name for prefix in self.recurrent for name in tensors if is_recurrent_weight(name, prefix)]
        return [self.embedding, *layers, self.decoder, *([self.decoder_bias] if self.decoder_bias else [])]


def is_recurrent_weight(name: str, prefix: str) -> bool:
    """Return whether a tensor is a weight of the recurrent module with this prefix."""
    rest = name.removeprefix(prefix)
    return name.startswith(prefix) and "." not in rest and RECURRENT.fullmatch(rest) is not None


def find_parts(tensors: Mapping[str, Any], options: Options, path: Path) -> Parts:
    """Find the embedding, the recurrent modules and the output layer among the tensors."""
    chosen, notes = find_recurrent(tensors, options, path)
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
        name
        for name, tensor in tensors.items()
        if name.endswith("weight") and len(tensor.shape) == 2 and 0 not in tensor.shape
    ]
    embeddings = [name for name in matrices if tensors[name].shape[1] == widths[0] and bias_of(name) not in tensors]
    embedding = choose("embedding", options.embedding, embeddings, EMBEDDINGS, f"(V, {widths[0]})", path)
    size = tensors[embedding].shape[0]
    outputs = [name for name in matrices if name != embedding and tuple(tensors[name].shape) == (size, widths[-1])]
    is_stored_once = path.suffix == ".safetensors" and not outputs and widths[0] == widths[-1]
    if is_stored_once or (options.decoder is not None and embedding in (options.decoder, f"{options.decoder}.weight")):
        notes.append("The output layer is the embedding, stored once for both.")
        alone = [name for name in tensors if tuple(tensors[name].shape) == (size,) and weight_of(name) not in tensors]
        return Parts(embedding, recurrent, embedding, alone[0] if len(alone) == 1 else None, notes)
    decoder = choose("decoder", options.decoder, outputs, DECODERS, f"({size}, {widths[-1]})", path)
    return Parts(embedding, recurrent, decoder, bias_of(decoder) if bias_of(decoder) in tensors else None, notes)


def bias_of(name: str) -> str:
    return f"{name.removesuffix('weight')}bias"


def weight_of(name: str) -> str:
    return f"{name.removesuffix('bias')}weight"


def find_recurrent(tensors: Mapping[str, Any], options: Options, path: Path) -> tuple[list[str], list[str]]:
    """Return the prefixes of the recurrent modules in the order in which they read, and a note where they are several."""
    prefixes = list(dict.fromkeys((f"{m[1]}." if m[1] else "") for m in map(RECURRENT.fullmatch, tensors) if m))
    shown = ", ".join(prefix.removesuffix(".") or "(without a name)" for prefix in prefixes)
    if not prefixes:
        raise ValueError(f"{path} holds no weights of an nn.LSTM, nn.GRU or nn.RNN, such as rnn.weight_ih_l0.")
    if options.recurrent is not None:
        chosen = [f"{name}." if name else "" for name in options.recurrent]
        if missing := [prefix.removesuffix(".") for prefix in chosen if prefix not in prefixes]:
            raise ValueError(
                f"`--recurrent` ({', '.join(missing)}) is not a recurrent module of {path}, which has {shown}: name these."
            )
        return chosen, []
    numbered = [re.fullmatch(r"(.*\.)(\d+)\.", prefix) for prefix in prefixes]
    places = {int(match[2]): prefix for match, prefix in zip(numbered, prefixes, strict=True) if match}
    is_list = len({match[1] if match else None for match in numbered}) == 1 and sorted(places) == [
        *range(len(prefixes))
    ]
    if len(prefixes) > 1 and not is_list:
        raise ValueError(
            f"{path} holds several recurrent modules, {shown}: name the one to convert, or several that read each other's "
            "outputs in this order, with `--recurrent`."
        )
    if len(prefixes) == 1:
        return prefixes, []
    chosen = [places[number] for number in sorted(places)]
    shown = ", ".join(prefix.removesuffix(".") for prefix in chosen)
    return chosen, [f"The list of modules {shown} was read as layers, each reading the output of the one before it."]


def check_layers(prefix: str, tensors: Mapping[str, Any], path: Path) -> int:
    """Return the number of layers of a recurrent module whose weights fit each other."""
    name = prefix.removesuffix(".") or "the recurrent module"
    found = [RECURRENT.fullmatch(key.removeprefix(prefix)) for key in tensors if is_recurrent_weight(key, prefix)]
    matches = [match for match in found if match is not None]
    if any(match[5] for match in matches):
        raise ValueError(f"{path}: {name} is bidirectional, and reads what it would predict: it is refused.")
    if any(match[3] == "hr" for match in matches):
        raise ValueError(
            f"{path}: {name} projects its output (`proj_size`), which no cell of this package does: it is refused."
        )
    count = 1 + max(int(match[4]) for match in matches)
    for layer in range(count):
        W, U = (tensors.get(f"{prefix}weight_{kind}_l{layer}") for kind in ("ih", "hh"))
        if W is None or U is None or len(W.shape) != 2 or len(U.shape) != 2 or 0 in (*W.shape, *U.shape):
            raise ValueError(
                f"{path}: {name} lacks weight_ih_l{layer} or weight_hh_l{layer}: the file is incomplete or of another program."
            )
        biases = [tensors.get(f"{prefix}bias_{kind}_l{layer}") for kind in ("ih", "hh")]
        rows, hidden = U.shape
        if W.shape[0] != rows or any(bias is not None and tuple(bias.shape) != (rows,) for bias in biases):
            raise ValueError(
                f"{path}: the tensors of layer {layer} of {name} do not fit each other: the file is damaged."
            )
        if rows % hidden or rows // hidden not in CELLS_BY_GATES:
            raise ValueError(
                f"{path}: weight_hh_l{layer} of {name} is {rows} x {hidden}, and an nn.LSTM, nn.GRU or nn.RNN has 4, 3 or 1 times "
                "as many rows as columns: it is another cell, or one with `proj_size`."
            )
    return count


def choose(part: str, asked: str | None, candidates: list[str], usual: tuple[str, ...], shape: str, path: Path) -> str:
    """Return the tensor that is the embedding or the decoder: the one asked for, else the only one or that with a usual name."""
    shown = ", ".join(name.removesuffix(".weight") for name in candidates)
    if asked is not None:
        named = [name for name in candidates if name in (asked, f"{asked}.weight")]
    elif len(candidates) > 1:
        named = [name for name in candidates if name.split(".")[-2:][0] in usual]
    else:
        named = candidates
    if len(named) == 1:
        return named[0]
    if not candidates:
        raise ValueError(
            f"{path} holds no {part}, a weight of shape {shape}: it is incomplete, or another kind of model."
        )
    if asked is not None:
        raise ValueError(
            f"`--{part}` ({asked}) must be one of the modules of {path} with a weight of shape {shape}: {shown}."
        )
    raise ValueError(
        f"{path} holds {len(candidates)} modules with a weight of shape {shape}, {shown}: name one with `--{part}`."
    )


def find_cell(parts: Parts, held: Tensors, options: Options, path: Path) -> tuple[str, list[str]]:
    """
    Return the cell by the shape of U, for an `nn.RNN` by what its module or the user says; and a note where neither says it.
    """
    kinds = set()
    for prefix, count in parts.recurrent.items():
        for layer in range(count):
            rows, hidden = held.tensors[f"{prefix}weight_hh_l{layer}"].shape
            kind = CELLS_BY_GATES[rows // hidden]
            if kind == "rnn" and prefix.removesuffix(".") in held.modules:
                kind = MODES.get(held.modules[prefix.removesuffix(".")].fields.get("mode", ""), kind)
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


def left_out_parts(tensors: Mapping[str, Any], parts: Parts, options: Options, path: Path) -> list[str]:
    """Return a note of the tensors that the user did not choose, and refuse others, which the model has no place for."""
    used = set(parts.names(tensors))
    rest = [name for name in tensors if name not in used]
    modules = (parts.embedding, parts.decoder, *parts.recurrent)
    places = tuple(name.removesuffix("weight") for name in modules if name)
    is_chosen = options.embedding is not None and options.recurrent is not None and options.decoder is not None
    unknown = [
        name
        for name in rest
        if name.startswith(places) or not (is_chosen or (options.recurrent is not None and RECURRENT.fullmatch(name)))
    ]
    if unknown:
        shown = f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}"
        reasons = (reason for pattern, reason in REASONS.items() if any(re.search(pattern, name) for name in unknown))
        raise ValueError(
            f"{path} holds {shown}, which no embedding, recurrent module or output layer has: "
            f"{next(reasons, 'it is another kind of model')}. If these are parts of another model, name the three parts of the one "
            "to convert with `--embedding`, `--recurrent` and `--decoder`."
        )
    return [f"Left out, since other parts were chosen: {', '.join(rest)}."] if rest else []


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
        ValueError: for a model that these three cannot hold: residual, a Mogrifier, with cells of several widths, a
            projection before the output layer or an adaptive softmax.
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
    elif config.adaptive_softmax_cutoffs is not None:
        reason = (
            f"its output layer is an adaptive softmax (`adaptive_softmax_cutoffs` {config.adaptive_softmax_cutoffs})"
        )
    if reason:
        raise ValueError(f"nn.Embedding, one recurrent module of torch and nn.Linear cannot hold the model: {reason}.")
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
