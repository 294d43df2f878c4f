"""The layers of a Keras model, by its configuration: which ones are read, in which order, and the shapes of their weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GATES = {"LSTM": "ifgo", "GRU": "zrn", "SimpleRNN": "h"}
# The settings for which the cells of this package compute the same.
COMMON = {"go_backwards": (False,), "time_major": (False,), "zero_output_for_mask": (False,)}
GATED = {"activation": ("tanh",), "recurrent_activation": ("sigmoid",)}
SETTINGS: dict[str, dict[str, tuple[Any, ...]]] = {
    "LSTM": COMMON | GATED,
    "GRU": COMMON | GATED | {"reset_after": (True,)},
    "SimpleRNN": COMMON | {"activation": ("tanh", "relu")},
}
# Every layer that is read, and the name under which Keras files the first one's weights, whatever the user calls it.
FILED_AS = {
    "InputLayer": "input_layer",
    "Embedding": "embedding",
    "LSTM": "lstm",
    "GRU": "gru",
    "SimpleRNN": "simple_rnn",
    "Dense": "dense",
    "TimeDistributed": "time_distributed",
    "Activation": "activation",
    "Softmax": "softmax",
    "Dropout": "dropout",
    "SpatialDropout1D": "spatial_dropout1d",
    "GaussianDropout": "gaussian_dropout",
    "GaussianNoise": "gaussian_noise",
    "NotEqual": "not_equal",  # the mask of a functional model
}
WITHOUT_EFFECT = ("InputLayer", "Dropout", "SpatialDropout1D", "GaussianDropout", "GaussianNoise")
REASONS = {
    "Bidirectional": "reads in both directions, so the model cannot write",
    "BatchNormalization": "scales by statistics of its training, which no layer of this package does",
    "Lambda": "runs Python code",
    "AttentionWeightedAverage": "averages over all steps (textgenrnn), and a memory that never grows cannot",
    "Attention": "reads all steps, and a memory that never grows cannot",
    "MultiHeadAttention": "reads all steps, and a memory that never grows cannot",
    "Functional": "is a model within the model",
    "Sequential": "is a model within the model",
}


@dataclass
class Part:
    """
    A layer that has weights.

    Args:
        kind (`str`): Its class.
        config (`dict`): Its settings.
        filed (`str`): The group of its weights in a file of today's layout.
        shapes (`list[tuple]`): The shapes of its weights, in order.
    """

    kind: str
    config: dict[str, Any]
    filed: str
    shapes: list[tuple[int, ...]]


@dataclass
class Model:
    """
    A model as its configuration describes it.

    Args:
        parts (`list[Part]`): The layers that have weights, from the input to the output.
        groups (`set[str]`): The groups of all layers in a file of today's layout.
        notes (`list[str]`): Sentences for the model card.
    """

    parts: list[Part]
    groups: set[str]
    notes: list[str]

    @property
    def mask_zero(self) -> bool:
        return bool(self.parts[0].config.get("mask_zero"))


def describe(config: Any, path: Path) -> Model:
    """Return the layers of a model, checked."""
    try:
        layers = list_layers(config, path)
        check_classes(layers, path)
        chain = follow(config, layers, path)
        return describe_chain(layers, chain, path)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path}: the configuration is not that of a Keras model, or of a version that is not known ({error!r}): load it with "
            "Keras and save it again."
        ) from error


def list_layers(config: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    kind = config["class_name"]
    if kind not in ("Sequential", "Functional", "Model"):
        raise ValueError(
            f"{path} is a {kind}, whose layers are called by its own program: only sequential and functional models say how."
        )
    held = config["config"]
    layers = held if isinstance(held, list) else held["layers"]  # a list in old sequential models
    if not layers:
        raise ValueError(
            f"{path} is a model without layers: give one with an embedding, a recurrent and a Dense layer."
        )
    return layers


def check_classes(layers: list[dict[str, Any]], path: Path) -> None:
    """Refuse layers that are not known, before the way through them is looked for."""
    for layer in layers:
        kind, name = layer["class_name"], name_of(layer)
        inner = layer["config"]["layer"]["class_name"] if kind == "TimeDistributed" else "Dense"
        registered = layer.get("registered_name")
        package = str(layer.get("module") or "keras").split(".")[0]
        is_own = registered not in (None, kind) or package not in ("keras", "tf_keras")
        if kind not in FILED_AS or inner != "Dense" or is_own:
            shown = kind if inner == "Dense" else f"{kind}({inner})"
            reason = REASONS.get(kind, "computes what no layer of this package does")
            if is_own and kind in FILED_AS:
                reason = f"is a class of its own ({layer.get('module')}, {registered})"
            raise ValueError(f"{path}: the layer {name} ({shown}) {reason}: the model is refused.")
    if (inputs := sum(layer["class_name"] == "InputLayer" for layer in layers)) > 1:
        raise ValueError(f"{path}: the model has {inputs} inputs, and a language model reads one: it is refused.")


def name_of(layer: dict[str, Any]) -> str:
    return str(layer["config"].get("name") or layer.get("name") or layer["class_name"])


def follow(config: dict[str, Any], layers: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Return the layers from the input to the output, each of which reads the one before it and nothing else."""
    if config["class_name"] == "Sequential":
        return layers
    by_name = {name_of(layer): layer for layer in layers}
    masks = {name for name, layer in by_name.items() if layer["class_name"] == "NotEqual"}
    ends = config["config"]["output_layers"]
    ends = [ends] if isinstance(ends[0], str) else ends
    if len(ends) != 1:
        raise ValueError(f"{path}: the model has {len(ends)} outputs, and a language model has one: it is refused.")
    name, output = ends[0][0], ends[0][2]
    chain: list[dict[str, Any]] = []
    while True:
        layer = by_name[name]
        nodes = layer["inbound_nodes"]
        if output != 0 or len(nodes) > 1 or layer in chain:
            raise ValueError(
                f"{path}: the layer {name} is used more than once, or its state is: only a chain of layers is read."
            )
        chain.insert(0, layer)
        if not nodes:
            break
        tensors, mask = inputs_of(nodes[0])
        if len(tensors) != 1 or not set(mask) <= masks:
            shown = ", ".join(other for other, _ in tensors) or "nothing"
            raise ValueError(
                f"{path}: the layer {name} reads {shown}, and only a chain of layers, one input each, is read."
            )
        name, output = tensors[0]
    for name in masks:
        (node,) = by_name[name]["inbound_nodes"]
        is_masked = any(layer["config"].get("mask_zero") for layer in chain)
        if not is_masked or inputs_of(node)[0] != [(name_of(chain[0]), 0)] or node["args"][1:] != [0]:
            raise ValueError(f"{path}: the layer {name} is not the mask of the input: the model is refused.")
    if unused := [name for name in by_name if name not in masks and by_name[name] not in chain]:
        raise ValueError(f"{path}: the layers {', '.join(unused)} are not on the way from the input to the output.")
    return chain


def inputs_of(node: Any) -> tuple[list[tuple[str, int]], list[str]]:
    """Return the layers that a layer reads, with the place among their outputs, and those that it reads as its mask."""
    if isinstance(node, dict):
        keywords = dict(node.get("kwargs") or {})
        mask = [name for name, _ in tensors_in(keywords.pop("mask", None))]
        return [*tensors_in(node["args"]), *others_in(keywords)], mask
    node = [node] if isinstance(node[0], str) else node
    arguments = [value for entry in node for value in (entry[3] if len(entry) > 3 and entry[3] else {}).values()]
    return [(entry[0], entry[2]) for entry in node] + others_in(dict(enumerate(arguments))), []


def others_in(keywords: dict[Any, Any]) -> list[tuple[str, int]]:
    """Return the arguments of a call that say anything, `training=True` for example, which draws dropout at each call."""
    return [(f"an argument ({name})", 0) for name, value in keywords.items() if value not in (None, False)]


def tensors_in(value: Any) -> Iterator[tuple[str, int]]:
    if isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":
        name, _, output = value["config"]["keras_history"]
        yield name, output
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def describe_chain(layers: list[dict[str, Any]], chain: list[dict[str, Any]], path: Path) -> Model:
    """Return the parts of a chain: embedding or one-hot input, recurrent layers, Dense."""
    counts: dict[str, int] = {}
    filed: dict[str, str] = {}
    for layer in layers:
        base = FILED_AS[layer["class_name"]]
        filed[name_of(layer)] = base if base not in counts else f"{base}_{counts[base]}"
        counts[base] = counts.get(base, 0) + 1
    kinds = [layer["class_name"] for layer in chain if layer["class_name"] not in WITHOUT_EFFECT]
    recurrent = [kind for kind in kinds if kind in GATES]
    body = kinds[1:] if kinds[:1] == ["Embedding"] else kinds
    outputs = body[len(recurrent) :]
    if (
        not recurrent
        or body[: len(recurrent)] != recurrent
        or outputs[:1] not in (["Dense"], ["TimeDistributed"])
        or not set(outputs[1:]) <= {"Activation", "Softmax"}
    ):
        raise ValueError(
            f"{path} has the layers {', '.join(kinds)}, and a model that is read has an Embedding or one-hot input, LSTM, GRU or "
            "SimpleRNN layers, and one Dense layer, in this order."
        )
    if len(set(recurrent)) > 1:
        raise ValueError(f"{path} mixes {' and '.join(sorted(set(recurrent)))}: all layers have the same cell here.")
    parts: list[Part] = []
    notes: list[str] = []
    width = 0
    softmaxes: list[str] = []
    last_step = False
    for layer in chain:
        kind, config, name = layer["class_name"], layer["config"], name_of(layer)
        where = f"{path}: the layer {name} ({kind})"
        if kind == "InputLayer":
            continue
        if kind == "Embedding":
            shape = (number(config, "input_dim", where), number(config, "output_dim", where))
            width = shape[1]
            parts.append(Part(kind, config, f"{filed[name]}/vars", [shape]))
        elif kind in GATES:
            if not width:
                width = one_hot_width(chain, path)
                parts.append(Part("one-hot", {}, "", [(width, width)]))
            check_settings(kind, config, where)
            if last_step:
                raise ValueError(f"{path}: a layer before {name} returns the last step only (`return_sequences`).")
            last_step = config.get("return_sequences") is not True
            units, gates = number(config, "units", where), len(GATES[kind])
            bias = [(2, 3 * units) if kind == "GRU" else (gates * units,)] if config.get("use_bias", True) else []
            shapes: list[tuple[int, ...]] = [(width, gates * units), (units, gates * units), *bias]
            parts.append(Part(kind, config, f"{filed[name]}/cell/vars", shapes))
            width = units
        elif kind in ("Dense", "TimeDistributed"):
            inner = "vars" if kind == "Dense" else "layer/vars"
            config = config if kind == "Dense" else config["layer"]["config"]
            units = number(config, "units", where)
            bias = [(units,)] if config.get("use_bias", True) else []
            parts.append(Part("Dense", config, f"{filed[name]}/{inner}", [(width, units), *bias]))
            softmaxes.append(config.get("activation", "linear"))
        elif kind in ("Activation", "Softmax"):
            softmaxes.append(
                config.get("activation", "softmax") if config.get("axis", -1) == -1 else "softmax over time"
            )
    tokens, written = parts[0].shapes[0][0], parts[-1].shapes[0][1]
    if tokens != written:
        raise ValueError(
            f"{path} reads {tokens:,} tokens and writes {written:,} numbers: a language model writes one for each token."
        )
    if sorted(name for name in softmaxes if name != "linear") not in ([], ["softmax"]):
        raise ValueError(
            f"{path}: the activation of the output is {' and '.join(map(str, softmaxes))}, and it must be linear or one softmax."
        )
    if len({str(part.config.get("activation")) for part in parts if part.kind == "SimpleRNN"}) > 1:
        raise ValueError(f"{path} has SimpleRNN layers of tanh and of relu: all layers have the same cell here.")
    if last_step:
        notes.append(
            "It returned the probabilities after the last token only; here each position has those that it returned for the text "
            "up to there."
        )
    return Model(parts, set(filed.values()) | {"input_layer"}, notes + notes_of(chain, parts[0]))


def notes_of(chain: list[dict[str, Any]], first: Part) -> list[str]:
    """Return sentences about zeros and about what acts only while a model is trained."""
    notes = []
    if first.kind == "Embedding" and first.config.get("mask_zero"):
        notes.append("It skips id 0 (`mask_zero`), which is its padding.")
    elif first.kind == "Embedding":
        notes.append(
            "It reads id 0 like any token, since it was built without `mask_zero`: zeros that its training put before a text moved "
            "its state. To have the same probabilities, put them there as ids, with ones in the attention mask."
        )
    rates = {layer["config"].get(name) for layer in chain for name in ("rate", "dropout", "recurrent_dropout")} - {
        None,
        0,
    }
    if any("mixed" in str(layer["config"].get("dtype")) for layer in chain):
        notes.append(
            "Keras computes it in mixed precision, and this model in float32, so that they differ by Keras' rounding."
        )
    if rates:
        notes.append(f"The dropout of its training ({', '.join(map(str, sorted(rates)))}) was not taken over.")
    return notes


def number(config: dict[str, Any], name: str, where: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"{where}: `{name}` ({value!r}) must be a number of 1 or more.")
    return value


def one_hot_width(chain: list[dict[str, Any]], path: Path) -> int:
    """Return the number of tokens of a model without an embedding, by the shape of its input."""
    config = chain[0]["config"]
    shape = config.get("batch_shape") or config.get("batch_input_shape") or []
    width = shape[-1] if len(shape) == 3 else None
    if type(width) is not int or width < 2:
        raise ValueError(
            f"{path} has no Embedding, and its input is of shape {shape}, which is not one-hot: only (batch, steps, tokens) is. Ids "
            "that are read as numbers cannot be converted."
        )
    return width


def check_settings(kind: str, config: dict[str, Any], where: str) -> None:
    """Refuse settings for which no cell of this package computes the same."""
    for name, allowed in SETTINGS[kind].items():
        value = config.get(name, False)  # the default of an older Keras, or not known to it
        if value not in allowed:
            shown = " or ".join(map(repr, allowed))
            raise ValueError(
                f"{where} has `{name}` {value!r}, and the cells of this package have {shown}: it is refused."
            )
