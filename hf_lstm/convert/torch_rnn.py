"""torch-rnn (Johnson 2016): `nn.LanguageModel` in a .t7 file.

Its `net` is an `nn.LookupTable`, layers and an `nn.Linear`. A layer has one matrix `(D + H, G H)`, that of the input above that
of h, and one bias. An `nn.LSTM` has its gates in the order i, f, o, g; an `nn.VanillaRNN` has one row of tanh.
"""

import json
from pathlib import Path
from typing import Any

from hf_lstm.convert.source import Layer, Source
from hf_lstm.convert.torch7 import (
    Item,
    check_dropout,
    listed,
    read_t7,
    tensors_of,
    vocabulary_of_characters,
)
from hf_lstm.convert.torch_files import read_weights
from hf_lstm.convert.torch_lstm import Options
from hf_lstm.convert.vocabulary import Vocabulary, read_text

CELLS = {"nn.LSTM": ("lstm", "ifog"), "nn.VanillaRNN": ("rnn_tanh", "h")}
WITHOUT_EFFECT = ("nn.Dropout", "nn.View")  # after training


def read(path: Path, options: Options) -> Source:
    """
    Read a checkpoint, or an `nn.LanguageModel` alone. `options.vocabulary` is torch-rnn's own JSON file, for a model that does
    not hold its `idx_to_token`.

    Raises:
        ValueError: if the file is damaged, or holds another model or one with batch normalisation.
    """
    options.refuse_names()
    root = read_t7(path)
    model = root.fields.get("model", root) if isinstance(root, Item) else root
    if not isinstance(model, Item) or model.name != "nn.LanguageModel":
        kind = model.name if isinstance(model, Item) else type(model).__name__
        raise ValueError(f"{path} holds a {kind}, and torch-rnn saves an nn.LanguageModel: try `--from char-rnn`.")
    net = model.fields.get("net")
    modules = listed(net.fields.get("modules") if isinstance(net, Item) else None, "net.modules", path)
    for module in modules:
        check_module(module, path)
    first, *layers, last = [module for module in modules if module.name not in WITHOUT_EFFECT] or [None, None]
    kinds = {layer.name for layer in layers}
    if (first and first.name, last and last.name) != ("nn.LookupTable", "nn.Linear") or len(kinds & CELLS.keys()) != 1:
        found = ", ".join(module.name for module in modules)
        raise ValueError(
            f"{path} is a row of {found}, and a model of torch-rnn is an nn.LookupTable, layers of one cell and an nn.Linear: it "
            "is of another kind."
        )
    tensors: dict[str, Any] = {f"embedding.{n}": t for n, t in tensors_of(first, ("weight",), path).items()}
    for index, layer in enumerate(layers):
        tensors |= {f"{index}.{name}": tensor for name, tensor in tensors_of(layer, ("weight", "bias"), path).items()}
    tensors |= {f"decoder.{name}": tensor for name, tensor in tensors_of(last, ("weight", "bias"), path).items()}
    weights = ["embedding.weight", "decoder.weight", *(f"{index}.weight" for index in range(len(layers)))]
    if missing := [name for name in weights if name not in tensors or len(tensors[name].shape) != 2]:
        raise ValueError(f"{path} lacks the matrix {missing[0]}: the file is damaged or of another program.")
    read = read_weights(tensors, tensors, path)
    cell_type, gates = CELLS[kinds.pop()]
    parts = []
    for index in range(len(layers)):
        weight = read[f"{index}.weight"].T
        hidden = len(weight) // len(gates)
        W, U = weight[:, : weight.shape[1] - hidden], weight[:, weight.shape[1] - hidden :]
        parts.append(Layer(W.contiguous(), U.contiguous(), read.get(f"{index}.bias")))
    entries = model.fields.get("idx_to_token")
    own = None if entries is None else listed(entries, "idx_to_token", path)
    source = Source(
        title="torch-rnn",
        cell_type=cell_type,
        embedding=read["embedding.weight"],
        layers=parts,
        decoder=read["decoder.weight"],
        decoder_bias=read.get("decoder.bias"),
        vocabulary=find_vocabulary(own, options.vocabulary, len(read["embedding.weight"]), path),
        gates=gates,
    )
    source.check_shapes(path)
    return source


def check_module(module: Any, path: Path) -> None:
    """Raise `ValueError` for a module that the conversion would leave out or get wrong."""
    name = module.name if isinstance(module, Item) else type(module).__name__
    if name not in ("nn.LookupTable", "nn.Linear", *WITHOUT_EFFECT, *CELLS):
        raise ValueError(f"{path} has the module {name}, which this package lacks: it is not converted.")
    if module.fields.get("maxNorm"):
        raise ValueError(
            f"{path} shortens long embeddings while it reads (`maxNorm`), which this package does not do."
        )
    check_dropout(module, path)


def find_vocabulary(own: list[Any] | None, file: str | None, size: int, path: Path) -> Vocabulary:
    """Return the vocabulary of the model's own list, or of torch-rnn's JSON file."""
    if own is None and file is None:
        raise ValueError(
            f"{path} has {size:,} tokens and does not say which (`idx_to_token`): give torch-rnn's JSON file with `--vocabulary`."
        )
    given = None if file is None else entries_of_json(Path(file))
    if own is not None and given is not None and own != given:
        raise ValueError(
            f"`--vocabulary` ({file}) is another list of tokens than the one in {path} ({len(given):,} and {len(own):,} tokens): "
            "leave it out."
        )
    return vocabulary_of_characters(own or given or [], str(path) if own else str(file))


def entries_of_json(file: Path) -> list[str]:
    """Return the tokens of torch-rnn's JSON file: `idx_to_token` gives them by their numbers from 1, as strings."""
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): save it again.") from error
    tokens = content.get("idx_to_token", content) if isinstance(content, dict) else None
    if not isinstance(tokens, dict) or tokens.keys() != {str(index + 1) for index in range(len(tokens))}:
        raise ValueError(
            f"{file} must hold `idx_to_token`, a dictionary with the keys 1 to n: give torch-rnn's JSON file."
        )
    return [tokens[str(index + 1)] for index in range(len(tokens))]
