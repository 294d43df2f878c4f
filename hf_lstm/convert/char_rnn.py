"""char-rnn (Karpathy 2015): a step of the model as a graph of modules, in a .t7 file.

A character is one-hot, so the columns of the first matrix are its embeddings: here the embedding is the identity and that matrix
W. Each layer adds the `nn.Linear` of its input and that of h, each with a bias in most versions; an LSTM cuts the sum into i, f,
o, g. Which `nn.Linear` is which is read off the graph: that of h reads an input of the step itself.
"""

from pathlib import Path
from typing import Any

import torch

from hf_lstm.convert.source import Layer, Source
from hf_lstm.convert.torch7 import Item, check_dropout, listed, read_t7, tensors_of, vocabulary_of_characters
from hf_lstm.convert.torch_files import read_weights
from hf_lstm.convert.torch_lstm import Options

COMMON = {"nn.Identity", "OneHot", "nn.Linear", "nn.CAddTable", "nn.Tanh", "nn.Dropout", "nn.LogSoftMax"}
OF_LSTM = {"nn.Reshape", "nn.SplitTable", "nn.Narrow", "nn.Sigmoid", "nn.CMulTable"}


def read(path: Path, options: Options) -> Source:
    """
    Read a checkpoint with an LSTM or a tanh layer (`-model lstm` or `rnn`).

    Raises:
        ValueError: if the file is damaged, or holds another model: a GRU, whose reset gate acts before the product with U,
            one with batch normalisation, or one that lacks its own list of characters.
    """
    options.refuse_names()
    root = read_t7(path)
    fields = root.fields if isinstance(root, Item) else {}
    protos, settings = (
        value.fields if isinstance(value, Item) else {} for value in map(fields.get, ("protos", "opt"))
    )
    graph = protos.get("rnn")
    if not isinstance(graph, Item) or graph.name != "nn.gModule":
        raise ValueError(
            f"{path} holds {', '.join(map(str, fields)) or 'no table'}, and char-rnn saves `protos` with an nn.gModule as `rnn`: "
            "try `--from torch-rnn`."
        )
    if settings.get("model") == "gru":
        raise ValueError(
            f"{path} is a GRU of char-rnn (`-model gru`), whose reset gate acts on h before the product with U and not after it: "
            "no cell of this package does that."
        )
    if options.vocabulary is not None:
        raise ValueError(
            f"`--vocabulary` ({options.vocabulary}) has no meaning here, since {path} holds its own: leave it out."
        )
    linears, pairs, decoder = find_linears(graph, path)
    if len(linears) != 2 * len(pairs) + 1 or not pairs:
        raise ValueError(
            f"{path} has {len(linears)} nn.Linear, of which {2 * len(pairs)} are pairs that a layer adds: it is of another kind."
        )
    tensors: dict[str, Any] = {}
    for index, module in enumerate([*(module for pair in pairs for module in pair), decoder]):
        tensors |= {f"{index}.{name}": tensor for name, tensor in tensors_of(module, ("weight", "bias"), path).items()}
        if len(tensors[f"{index}.weight"].shape if f"{index}.weight" in tensors else ()) != 2:
            raise ValueError(f"{path}: an nn.Linear lacks its matrix: the file is damaged.")
    read = read_weights(tensors, tensors, path)
    layers = [
        Layer(
            read[f"{2 * k}.weight"],
            read[f"{2 * k + 1}.weight"],
            read.get(f"{2 * k}.bias"),
            read.get(f"{2 * k + 1}.bias"),
        )
        for k in range(len(pairs))
    ]
    last = f"{2 * len(pairs)}"
    cell_type = cell_of(layers, graph, path)
    source = Source(
        title="char-rnn",
        cell_type=cell_type,
        embedding=torch.eye(layers[0].W.shape[1], dtype=layers[0].W.dtype),
        layers=layers,
        decoder=read[f"{last}.weight"],
        decoder_bias=read.get(f"{last}.bias"),
        vocabulary=vocabulary_of_characters(entries_of(fields.get("vocab"), path), str(path)),
        gates="ifog" if cell_type == "lstm" else "h",
        notes=["The optimizer's state and the history of its losses were left out, where the file holds them."],
    )
    source.check_shapes(path)
    return source


def modules_of(graph: Item, path: Path) -> list[Item]:
    """Return the data of the nodes of a graph, in the order in which they are computed."""
    nodes = listed(graph.fields.get("forwardnodes"), "protos.rnn.forwardnodes", path)
    found = [node.fields.get("data") if isinstance(node, Item) else None for node in nodes]
    return [data for data in found if isinstance(data, Item) and isinstance(data.fields.get("module"), Item)]


def find_linears(graph: Item, path: Path) -> tuple[list[Item], list[tuple[Item, Item]], Item]:
    """
    Return the `nn.Linear` of a graph: all, those of the input and of h by layer, the first layer first, and the output layer.
    A node's `mapindex` holds the data of the nodes that it reads.
    """
    datas = modules_of(graph, path)
    for data in datas:
        module = data.fields["module"]
        if module.name not in COMMON | OF_LSTM:
            reason = "batch normalisation" if "BatchNorm" in module.name else "a module that this package lacks"
            raise ValueError(f"{path} has the module {module.name}, {reason}: it is not converted.")
        check_dropout(module, path)

    def read_by(data: Item) -> list[Item]:
        index = data.fields.get("mapindex")
        return [d for d in index.fields.values() if isinstance(d, Item)] if isinstance(index, Item) else []

    def kind(data: Item) -> str:
        module = data.fields.get("module")
        return module.name if isinstance(module, Item) else ""

    def behind_identities(data: Item) -> Item:
        """Step over the identities that stand for batch normalisation."""
        seen = []
        while kind(data) == "nn.Identity" and data not in seen and len(read_by(data)) == 1:
            seen.append(data)
            data = read_by(data)[0]
        return data

    pairs = []
    decoders = []
    for data in datas:
        sources = [behind_identities(other) for other in read_by(data)]
        if kind(data) == "nn.LogSoftMax":
            decoders += sources
        if kind(data) == "nn.CAddTable" and [kind(source) for source in sources] == ["nn.Linear"] * 2:
            of_hidden = [source for source in sources if {kind(d) for d in read_by(source)} == {"nn.Identity"}]
            of_input = [source for source in sources if source not in of_hidden]
            if len(of_hidden) != 1:
                raise ValueError(
                    f"{path}: it cannot be told which nn.Linear of a layer reads h, since both or neither read an input of the graph: "
                    "it is of another version of char-rnn."
                )
            pairs.append((of_input[0].fields["module"], of_hidden[0].fields["module"]))
    if [kind(data) for data in decoders] != ["nn.Linear"]:
        raise ValueError(f"{path} has no nn.Linear before an nn.LogSoftMax: it is of another version of char-rnn.")
    linears = [data.fields["module"] for data in datas if kind(data) == "nn.Linear"]
    return linears, pairs, decoders[0].fields["module"]


def cell_of(layers: list[Layer], graph: Item, path: Path) -> str:
    """Return the cell by the shape of U and the modules of the graph."""
    kinds = {data.fields["module"].name for data in modules_of(graph, path)}
    gates = {len(layer.U) / layer.U.shape[1] for layer in layers if layer.U.shape[1]}
    if gates == {4} and "nn.Sigmoid" in kinds:
        return "lstm"
    if gates == {1} and "nn.Sigmoid" not in kinds:
        return "rnn_tanh"
    raise ValueError(f"{path} is neither an LSTM nor a layer of tanh, but a graph of {', '.join(sorted(kinds))}.")


def entries_of(table: Any, path: Path) -> list[Any]:
    """Return the characters of `vocab`, which gives their ids from 1 by character."""
    ids = table.fields if isinstance(table, Item) else {}
    if not ids:
        raise ValueError(
            f"{path} lacks `vocab`, the ids of its characters: it is not a checkpoint of char-rnn's train.lua."
        )
    if sorted(ids.values(), key=repr) != sorted(range(1, len(ids) + 1), key=repr):
        raise ValueError(f"{path}: `vocab` must give {len(ids):,} characters the ids 1 to {len(ids):,}, each once.")
    return sorted(ids, key=ids.__getitem__)
