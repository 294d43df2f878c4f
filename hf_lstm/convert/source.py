"""The weights of another program's language model: the model that is built of them, and their own loss in numpy.

Shapes: V vocabulary, D width of the embeddings, H width of a cell, G its gates, T tokens.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy
import torch

from hf_lstm.convert.vocabulary import Vocabulary
from hf_lstm.model.configuration_lstm import LSTMConfig
from hf_lstm.model.modeling_lstm import LSTMForCausalLM

# The gates of a cell, in the order of their rows in W and U here: input, forget, candidate, output; reset, update, candidate.
GATES = {"lstm": "ifgo", "gru": "rzn", "rnn_tanh": "h", "rnn_relu": "h"}


class Layer(NamedTuple):
    """
    The weights of a recurrent layer, the rows of its gates in the order of `Source.gates`.

    Args:
        W (`(G H, D)`), U (`(G H, H)`): Those of the input and of h.
        input_bias (`(G H,)`), hidden_bias (`(G H,)`) (*optional*): Their biases.
    """

    W: torch.Tensor
    U: torch.Tensor
    input_bias: torch.Tensor | None = None
    hidden_bias: torch.Tensor | None = None


class Projection(NamedTuple):
    """
    A linear layer between the last recurrent layer and the output layer.

    Args:
        W (`(P, H)`): Its weights.
        bias (`(P,)`): Its bias.
    """

    W: torch.Tensor
    bias: torch.Tensor


@dataclass
class Source:
    """
    The weights of another program's language model.

    Args:
        title (`str`): The program that wrote it, for the model card.
        cell_type (`str`): The cell, as in [`LSTMConfig`].
        embedding (`(V, D)`): The embeddings.
        layers (`list[Layer]`): The recurrent layers, the first one first.
        decoder (`(V, H)`, or `(V, P)` behind a projection): The output layer.
        decoder_bias (`(V,)`, *optional*): Its bias.
        vocabulary (`Vocabulary`): The tokens in the order of their ids.
        gates (`str`): The order of the gates; that of [`LSTMConfig`]'s cells by default.
        regularization (`dict[str, float]`): Fields of [`LSTMConfig`] that the file tells.
        notes (`list[str]`): Sentences for the screen and the model card: parts of the file that were left out, for example.
        projection (`Projection`, *optional*): A layer before the output layer.
        direction (`str`): `"backward"` for a model that reads each text from its end.
        preface (`str`): What to know before using the model, for the first lines of the model card.
    """

    title: str
    cell_type: str
    embedding: torch.Tensor
    layers: list[Layer]
    decoder: torch.Tensor
    decoder_bias: torch.Tensor | None
    vocabulary: Vocabulary
    gates: str = ""
    regularization: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    projection: Projection | None = None
    direction: Literal["forward", "backward"] = "forward"
    preface: str = ""

    def __post_init__(self):
        self.gates = self.gates or GATES[self.cell_type]
        self.vocabulary.check_size(len(self.embedding))

    def check_shapes(self, path: Path) -> None:
        """Raise `ValueError` if tensors of the file `path` do not fit each other."""
        size, width = self.embedding.shape
        fits = True
        for layer in self.layers:
            rows, hidden = layer.U.shape
            biases = [bias for bias in (layer.input_bias, layer.hidden_bias) if bias is not None]
            fits &= rows == len(self.gates) * hidden and layer.W.shape == (rows, width)
            fits &= all(bias.shape == (rows,) for bias in biases)
            width = hidden
        if self.projection is not None:
            rows = len(self.projection.W)
            fits &= self.projection.W.shape == (rows, width) and self.projection.bias.shape == (rows,)
            width = rows
        fits &= self.decoder.shape == (size, width)
        fits &= self.decoder_bias is None or self.decoder_bias.shape == (size,)
        if not (fits and self.layers):
            shapes = [self.embedding, *(part for layer in self.layers for part in layer[:2]), self.decoder]
            raise ValueError(
                f"{path}: the embedding, the W and U of each layer and the output layer, of shapes "
                f"{', '.join(' x '.join(map(str, part.shape)) for part in shapes)}, do not fit each other: the file is damaged or of "
                "another program."
            )


def build_model(source: Source) -> LSTMForCausalLM:
    """
    Build the model that gives the probabilities of a source. Tensors that need no change are shared with it.

    Raises:
        ValueError: if the cells have widths that no [`LSTMConfig`] describes.
    """
    *widths, last = [layer.U.shape[1] for layer in source.layers]
    if len(set(widths)) > 1:
        raise ValueError(
            f"The layers are {', '.join(map(str, [*widths, last]))} wide, and all but the last must be equally wide: such a model "
            "cannot be converted."
        )
    tied = source.embedding.shape == source.decoder.shape and torch.equal(source.embedding, source.decoder)
    hidden_size = widths[0] if widths else last
    fields: dict[str, Any] = source.regularization | {
        "vocab_size": len(source.embedding),
        "embedding_size": source.embedding.shape[1],
        "hidden_size": hidden_size,
        "num_hidden_layers": len(source.layers),
        "cell_type": source.cell_type,
        "tie_word_embeddings": tied,
        "last_cell_size": None if (tied and source.projection is None) or last == hidden_size else last,
        "output_projection_size": None if source.projection is None else len(source.projection.W),
        "output_bias": source.decoder_bias is not None,
        "direction": source.direction,
    }
    special = source.vocabulary.special_tokens()
    for role in ("pad_token", "bos_token", "eos_token"):  # never LSTMConfig's own ids
        fields[f"{role}_id"] = source.vocabulary.entries.index(special[role]) if role in special else None
    config = LSTMConfig(**fields)
    with torch.device("meta"):
        model = LSTMForCausalLM(config)
    weights = {"model.embed_tokens.weight": source.embedding}
    for index, layer in enumerate(source.layers):
        biases = [
            torch.zeros(len(layer.W), dtype=layer.W.dtype) if bias is None else ordered(bias, source)
            for bias in (layer.input_bias, layer.hidden_bias)
        ]
        if model.model.layers[index].hidden_gates.bias is None:
            biases = [biases[0] + biases[1]]
        gates = f"model.layers.{index}.input_gates", f"model.layers.{index}.hidden_gates"
        weights |= {
            f"{name}.weight": ordered(tensor, source) for name, tensor in zip(gates, (layer.W, layer.U), strict=True)
        }
        weights |= {f"{name}.bias": bias for name, bias in zip(gates, biases, strict=False)}
    weights["lm_head.weight"] = source.embedding if tied else source.decoder
    if source.decoder_bias is not None:
        weights["lm_head.bias"] = source.decoder_bias
    if source.projection is not None:
        weights |= {"model.out_proj.weight": source.projection.W, "model.out_proj.bias": source.projection.bias}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()


def ordered(tensor: torch.Tensor, source: Source) -> torch.Tensor:
    """Return a tensor `(G H, ...)` of a layer with its gates in the order of this package."""
    if source.gates == GATES[source.cell_type]:
        return tensor
    blocks = dict(zip(source.gates, tensor.chunk(len(source.gates)), strict=True))
    return torch.cat([blocks[gate] for gate in GATES[source.cell_type]])


def source_logits(source: Source, token: int, states: list[tuple[numpy.ndarray, numpy.ndarray]]) -> numpy.ndarray:
    """
    Compute the logits after a token by the source's own weights and equations, in numpy.

    Args:
        source (`Source`): The source.
        token (`int`): The token.
        states (`list[tuple]`): For each layer h and c before the token, each `(H,)`; c is not read where the cell has none.

    Returns:
        `numpy.ndarray`: `(V,)`.
    """
    x = source.embedding[token].numpy()
    for layer, (h, c) in zip(source.layers, states, strict=True):
        x = step(source, layer, x, h, c)
    if source.projection is not None:
        x = source.projection.W.numpy() @ x + source.projection.bias.numpy()
    logits = source.decoder.numpy() @ x
    return logits if source.decoder_bias is None else logits + source.decoder_bias.numpy()


def step(source: Source, layer: Layer, x, h, c):
    """Return h, `(H,)` in the weights' precision, after one input x, `(D,)`."""
    read = layer.W.numpy() @ x + (0 if layer.input_bias is None else layer.input_bias.numpy())
    kept = layer.U.numpy() @ h + (0 if layer.hidden_bias is None else layer.hidden_bias.numpy())
    X, R = (dict(zip(source.gates, numpy.split(part, len(source.gates)), strict=True)) for part in (read, kept))
    if source.cell_type == "lstm":
        i, f, o = (sigmoid(X[gate] + R[gate]) for gate in "ifo")
        c = f * c + i * numpy.tanh(X["g"] + R["g"])
        return o * numpy.tanh(c)
    if source.cell_type == "gru":
        r, z = (sigmoid(X[gate] + R[gate]) for gate in "rz")
        n = numpy.tanh(X["n"] + r * R["n"])
        return (1 - z) * n + z * h
    total = X["h"] + R["h"]
    return numpy.tanh(total) if source.cell_type == "rnn_tanh" else numpy.maximum(total, 0)


def sigmoid(x):
    return (1 + numpy.tanh(x / 2)) / 2  # which does not overflow
