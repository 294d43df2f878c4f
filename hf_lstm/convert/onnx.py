"""Export to ONNX graphs, which run without Python, torch and this package.

Both graphs map `input_ids (B, T)` and the state to `logits (B, T, V)` and the next state, `next_h_0, next_c_0, ...`. The
state is `h_0, c_0, h_1, ...` of shape `(B, H)`, without c for cells that lack it; of a layer of attention, `keys_1, values_1`
`(B, A, W, D)` and `real_1` `(B, W)`, 1 for entries that are there. step.onnx reads one token per row with matrix products;
chunk.onnx reads any number with ONNX's operator for the cell, or with a loop, and holds a map `(T, W + T)` for each head of
attention: give it at most W tokens at once. The graphs are built node by node, because the exporters of torch fix the length.

The metadata of a graph contains `tokens`, the bytes that each id adds to a text (a JSON list of Latin-1 strings),
`ends`, the ids that end a document, and `direction`, that of the config.
"""

import json
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import numpy
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from transformers import PreTrainedTokenizerFast

from hf_lstm.decoding import bytes_of_tokens
from hf_lstm.model.attention_lstm import WindowAttention, WindowAttentionLayer
from hf_lstm.model.cells_lstm import Gates
from hf_lstm.model.layers_lstm import GatedMLP, LSTMLayer
from hf_lstm.model.modeling_lstm import LSTMForCausalLM

from .checking import largest_difference

OPSET, IR_VERSION = 17, 8  # of 2022, supported by every current runtime
# By `cell_type`: ONNX's operator, its order of the gates, its attributes. Other cells run in a `Scan`.
OPERATORS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "lstm": ("LSTM", (0, 3, 1, 2), {}),
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "rnn_tanh": ("RNN", (0,), {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", (0,), {"activations": ["Relu"]}),
}
ACTIVATIONS = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}  # silu is composed of Sigmoid and Mul


def export_onnx(model: LSTMForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> list[Path]:
    """
    Write step.onnx and chunk.onnx in float32, and return their paths.

    Args:
        model (`LSTMForCausalLM`): The model.
        tokenizer (`PreTrainedTokenizerFast`): Its tokenizer.
        folder (`str` or `Path`): The output folder, created if it does not exist.

    Raises:
        ValueError: if the activation of the model's MLP has no ONNX operator here, or the model has an adaptive
            softmax.
    """
    if model.config.adaptive_softmax_cutoffs is not None:
        raise ValueError(
            f"`adaptive_softmax_cutoffs` ({model.config.adaptive_softmax_cutoffs}) has no ONNX graph: train a model "
            "without it, or export with torch (`--to torch`)."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [token.decode("latin-1") for token in bytes_of_tokens(tokenizer, model.config.vocab_size)]
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    metadata = {"tokens": json.dumps(tokens), "ends": json.dumps(ends), "direction": model.config.direction}
    paths = []
    for name, one_token in (("step", True), ("chunk", False)):
        graph = onnx_graph(model, one_token)
        helper.set_model_props(graph, metadata)
        onnx.checker.check_model(graph)
        paths.append(folder / f"{name}.onnx")
        onnx.save(graph, paths[-1])
    return paths


def quantize_onnx(path: str | Path) -> Path:
    """
    Quantize the matrices of a graph to 8 bits, write the result beside it as NAME_int8.onnx, and return its path. The
    other factor of each product is quantized at run time; sums, gates and the state stay float32, as do the matrices of
    ONNX's GRU and RNN in chunk.onnx, for which onnxruntime has no operator in 8 bits.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # writes to the log when it is imported

    path = Path(path)
    quantized = path.with_name(f"{path.stem}_int8.onnx")
    options: dict[str, Any] = {"weight_type": QuantType.QInt8, "extra_options": {"EnableSubgraph": True}}
    quantize_dynamic(path, quantized, op_types_to_quantize=["MatMul", "LSTM", "Gather"], **options)
    return quantized


def difference(model: LSTMForCausalLM, path: str | Path, rows: int = 3, length: int = 9) -> float:
    """
    Return the largest difference, in nats, between the log-probabilities of a graph and of the model, over random
    tokens with carried state. A model in half precision differs more, because its graph computes in float32.
    """
    from onnxruntime import InferenceSession

    session = InferenceSession(path)
    state = {part.name: numpy.zeros((rows, *part.shape[1:]), numpy.float32) for part in session.get_inputs()[1:]}

    def read(ids: torch.Tensor) -> torch.Tensor:
        logits, *following = session.run(None, {"input_ids": ids.numpy(), **state})
        state.update(zip(state, following, strict=True))
        return torch.from_numpy(logits)

    one_token = session.get_inputs()[0].shape[1] == 1
    return largest_difference(model, read, 1 if one_token else length // 2, rows, length)


def onnx_graph(model: LSTMForCausalLM, one_token: bool) -> onnx.ModelProto:
    """Build the graph that reads one token per row, or any number of tokens."""
    config, layers = model.config, list(model.model.layers)
    graph = _Graph()
    length = 1 if one_token else "tokens"
    x = graph("Transpose", graph.embedding(model, "input_ids"), perm=[2, 1, 0])  # (T, B, D), the layout of ONNX's LSTM
    x = graph.linear(x, model.model.in_proj, "in_proj")
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["rows", length])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", length, config.vocab_size])]
    recurrence = graph.step if one_token else graph.chunk
    for index, layer in enumerate(layers):
        name = f"layers.{index}"
        state = [f"{part}_{index}" for part in layer.state_names]
        following = [f"next_{part}" for part in state]
        for values, parts in ((inputs, state), (outputs, following)):
            for part, shape in zip(parts, layer.cache_layer.shapes_of(config, index).values(), strict=True):
                values.append(helper.make_tensor_value_info(part, TensorProto.FLOAT, ["rows", *shape]))
        if config.block_type == "stacked":
            x = recurrence(x, state, following, layer, name)
            continue
        y = graph.rms_norm(x, layer.norm, f"{name}.norm")
        if isinstance(layer, WindowAttentionLayer):
            y = graph.attention(y, state, following, layer.self_attn, f"{name}.self_attn")
        else:
            y = graph.linear(recurrence(y, state, following, layer, name), layer.o_proj, f"{name}.o_proj")
        x = graph("Add", x, y)
        if layer.mlp is not None:
            x = graph("Add", x, graph.gated_mlp(x, layer.mlp, config.hidden_act, f"{name}.mlp"))
    if config.block_type == "residual":
        x = graph.rms_norm(x, model.model.norm, "norm")
    x = graph("Transpose", graph.linear(x, model.model.out_proj, "out_proj"), perm=[1, 0, 2])
    graph.linear(x, model.lm_head, "lm_head", ["logits"])
    built = helper.make_graph(graph.nodes, "hf_lstm", inputs, outputs, list(graph.weights.values()))
    return helper.make_model(built, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


class _Graph:
    """Nodes and weights of a graph. A call adds a node and returns the name of its first output."""

    def __init__(self, weights: dict[str, onnx.TensorProto] | None = None, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {} if weights is None else weights
        self.prefix = prefix  # of the names in a loop, which sees those outside

    def __call__(self, operator: str, *inputs: str, outputs: list[str] | None = None, **attributes: Any) -> str:
        outputs = outputs or [f"{self.prefix}{operator}_{len(self.nodes)}"]
        self.nodes.append(helper.make_node(operator, inputs, outputs, outputs[0], **attributes))
        return outputs[0]

    def weight(self, name: str, tensor: torch.Tensor) -> str:
        array = numpy.ascontiguousarray(tensor.detach().float().cpu().numpy())
        self.weights[name] = numpy_helper.from_array(array, name)
        return name

    def integers(self, *numbers: int) -> str:
        name = "integers_" + "_".join(map(str, numbers))
        self.weights[name] = numpy_helper.from_array(numpy.array(numbers, dtype=numpy.int64), name)
        return name

    def scalar(self, number: int) -> str:
        name = f"scalar_{number}"
        self.weights[name] = numpy_helper.from_array(numpy.array(number, dtype=numpy.int64), name)
        return name

    def embedding(self, model: LSTMForCausalLM, ids: str) -> str:
        """Add the embedding, `(D, B, T)`. Tied weights are columns of the output layer's matrix, stored once."""
        weight = model.model.embed_tokens.weight
        name = "lm_head" if weight is model.lm_head.weight else "embed_tokens"
        return self("Gather", self.weight(name, weight.T), ids, axis=1)

    def linear(self, x: str, module: nn.Linear | nn.Identity, name: str, outputs: list[str] | None = None) -> str:
        if isinstance(module, nn.Identity):
            return x
        if module.bias is None:
            return self("MatMul", x, self.weight(name, module.weight.T), outputs=outputs)
        product = self("MatMul", x, self.weight(name, module.weight.T))
        return self("Add", product, self.weight(f"{name}.bias", module.bias), outputs=outputs)

    def rms_norm(self, x: str, module: nn.RMSNorm, name: str) -> str:
        mean = self("ReduceMean", self("Mul", x, x), axes=[-1])
        root = self("Sqrt", self("Add", mean, self.weight(f"{name}.eps", torch.tensor(module.eps))))
        return self("Mul", self("Div", x, root), self.weight(name, module.weight))

    def gated_mlp(self, x: str, mlp: GatedMLP, act: str, name: str) -> str:
        if act not in ("silu", "swish", *ACTIVATIONS):
            raise ValueError(
                f"`hidden_act` ({act!r}) cannot be exported: it must be one of silu, {', '.join(ACTIVATIONS)}."
            )
        x = self.rms_norm(x, mlp.norm, f"{name}.norm")
        gate = self.linear(x, mlp.gate_proj, f"{name}.gate_proj")
        gate = self(ACTIVATIONS[act], gate) if act in ACTIVATIONS else self("Mul", gate, self("Sigmoid", gate))
        x = self("Mul", gate, self.linear(x, mlp.up_proj, f"{name}.up_proj"))
        return self.linear(x, mlp.down_proj, f"{name}.down_proj")

    def attention(self, x: str, state: list[str], following: list[str], module: WindowAttention, name: str) -> str:
        """Add the attention of a layer to its window and to the tokens of the call; x is `(T, B, H)`."""
        config = module.config
        size, heads = config.attention_window or 1, config.num_attention_heads or 1
        axis, last = self.integers(2), (self.integers(-size), self.integers(2**62))

        def split(part: str) -> str:  # (T, B, H) -> (B, A, T, D)
            y = self.linear(x, getattr(module, part), f"{name}.{part}")
            y = self("Reshape", y, self.integers(0, 0, heads, module.head_dim))
            return self("Transpose", y, perm=[1, 2, 0, 3])

        query = split("q_proj")
        keys, values = (
            self("Concat", old, split(part), axis=2) for old, part in zip(state, ("k_proj", "v_proj"), strict=False)
        )
        ones = self(
            "ConstantOfShape", self("Shape", "input_ids"), value=helper.make_tensor("", TensorProto.FLOAT, [1], [1])
        )
        real = self("Concat", state[2], ones, axis=1)  # (B, W + T)
        for part, new, place in zip((keys, values, real), following, (axis, axis, self.integers(1)), strict=True):
            self("Slice", part, *last, place, outputs=[new])
        end = self("Squeeze", self("Gather", self("Shape", keys), axis))
        entries = self("Range", self.scalar(0), end, self.scalar(1))
        tokens = self("Range", self.scalar(size), end, self.scalar(1))
        distance = self("Sub", self("Unsqueeze", tokens, self.integers(1)), entries)  # (T, W + T)
        near = self("And", self("Less", distance, self.scalar(size)), self("GreaterOrEqual", distance, self.scalar(0)))
        there = self("Unsqueeze", self("Cast", real, to=TensorProto.BOOL), self.integers(1, 2))  # (B, 1, 1, W + T)
        scores = self("MatMul", query, self("Transpose", keys, perm=[0, 1, 3, 2]))
        scores = self("Mul", scores, self.weight(f"{name}.scaling", torch.tensor(module.scaling)))
        nothing = self.weight("nothing", torch.tensor(-torch.inf))
        shares = self("Softmax", self("Where", self("And", near, there), scores, nothing), axis=-1)
        y = self("Transpose", self("MatMul", shares, values), perm=[2, 0, 1, 3])
        return self.linear(
            self("Reshape", y, self.integers(0, 0, config.hidden_size)), module.o_proj, f"{name}.o_proj"
        )

    def gates(self, layer: LSTMLayer, name: str) -> Gates:
        """Return the modules of a layer's cell as functions that map a [`_Value`] to their product with it."""

        def product(module: Any, place: str) -> Callable[["_Value"], "_Product"]:
            return lambda x: _Product(self, f"{name}.{place}", [(x, module.weight)], module.bias)

        def chained(part: Any, place: str) -> Callable[["_Value"], "_Value"]:
            products = [product(module, f"{place}.{index}") for index, module in enumerate(part)]
            return lambda x: reduce(lambda value, multiply: multiply(value), products, x)

        rounds = [chained(part, f"mogrifier.{index}") for index, part in enumerate(layer.mogrifier or ())]
        input_gates, hidden_gates = (
            product(getattr(layer, place), place) for place in ("input_gates", "hidden_gates")
        )
        return Gates(input_gates, hidden_gates, rounds=rounds)

    def step(self, x: str, state: list[str], following: list[str], layer: LSTMLayer, name: str) -> str:
        """Add one step of a layer's cell; x is `(1, B, D)`."""
        gates, x = self.gates(layer, name), self("Squeeze", x, self.integers(0))
        read = layer.cell.read(_Value(self, x), gates)
        for value, part in zip(
            layer.cell.step(read, [_Value(self, part) for part in state], gates), following, strict=True
        ):
            self("Identity", value.name, outputs=[part])
        return self("Unsqueeze", following[0], self.integers(0))

    def chunk(self, x: str, state: list[str], following: list[str], layer: LSTMLayer, name: str) -> str:
        """Add all steps of a layer's cell, by the operator that ONNX has for it or by a loop; x is `(T, B, D)`."""
        if layer.config.cell_type not in OPERATORS:
            return self.loop(x, state, following, layer, name)
        operator, order, attributes = OPERATORS[layer.config.cell_type]
        first = self.integers(0)
        start = [self("Unsqueeze", part, first) for part in state]

        def reordered(gates: torch.Tensor) -> torch.Tensor:
            return torch.cat([gates.detach().chunk(len(order))[index] for index in order])

        W, U, b, hidden_bias, _ = Gates(layer.input_gates, layer.hidden_gates).weights()  # without weight dropout
        bias = torch.cat([reordered(b), reordered(torch.zeros_like(b) if hidden_bias is None else hidden_bias)])
        weights = [
            self.weight(f"{name}.input_gates", reordered(W)[None]),
            self.weight(f"{name}.hidden_gates", reordered(U)[None]),
            self.weight(f"{name}.bias", bias[None]),
        ]
        outputs = [f"{name}.{part}" for part in ("outputs", *layer.cell.states)]
        y = self(operator, x, *weights, "", *start, outputs=outputs, hidden_size=U.shape[1], **attributes)
        for end, part in zip(outputs[1:], following, strict=True):
            self("Squeeze", end, first, outputs=[part])
        return self("Squeeze", y, self.integers(1))  # (T, 1, B, H) -> (T, B, H)

    def loop(self, x: str, state: list[str], following: list[str], layer: LSTMLayer, name: str) -> str:
        """Add a loop over the steps of a layer's cell; x is `(T, B, D)`."""
        gates, size = self.gates(layer, name), layer.hidden_gates.in_features
        read = layer.cell.read(_Value(self, x), gates)
        body = _Graph(self.weights, f"{name}.")
        before = [f"{name}.before_{index}" for index in range(len(state))]
        step = layer.cell.step(
            _Value(body, f"{name}.read"), [_Value(body, part) for part in before], body.gates(layer, name)
        )
        after = [body("Identity", value.name, outputs=[f"{name}.after_{part}"]) for part, value in enumerate(step)]
        after.append(body("Identity", after[0], outputs=[f"{name}.output"]))
        given = [helper.make_tensor_value_info(part, TensorProto.FLOAT, ["rows", size]) for part in before]
        given.append(helper.make_tensor_value_info(f"{name}.read", TensorProto.FLOAT, ["rows", None]))
        made = [helper.make_tensor_value_info(part, TensorProto.FLOAT, ["rows", size]) for part in after]
        steps = helper.make_graph(body.nodes, f"{name}.step", given, made)
        outputs = [*following, f"{name}.outputs"]
        self("Scan", *state, read.name, outputs=outputs, body=steps, num_scan_inputs=1)
        return outputs[-1]


class _Value:
    """
    Symbolic float32 tensor. Its operations add nodes to the graph, so that `Cell.step` writes the graph from its own
    equations.
    """

    dtype = None

    def __init__(self, graph: _Graph, name: str):
        self.graph, self.name = graph, name

    def to(self, dtype) -> "_Value":
        return self

    def __add__(self, other: "_Value") -> "_Value":
        return self._apply("Add", other)

    def __mul__(self, other: "_Value") -> "_Value":
        return self._apply("Mul", other)

    def __rmul__(self, number: float) -> "_Value":
        return self._apply("Mul", self._constant(number))

    def __rsub__(self, number: float) -> "_Value":
        return self._constant(number)._apply("Sub", self)

    def sigmoid(self) -> "_Value":
        return self._apply("Sigmoid")

    def tanh(self) -> "_Value":
        return self._apply("Tanh")

    def relu(self) -> "_Value":
        return self._apply("Relu")

    def chunk(self, chunks: int, dim: int) -> list["_Value"]:
        parts = [f"{self.name}.{index}" for index in range(chunks)]
        self.graph("Split", self.name, outputs=parts, axis=dim)
        return [_Value(self.graph, part) for part in parts]

    def _apply(self, operator: str, *others: "_Value") -> "_Value":
        return _Value(self.graph, self.graph(operator, self.name, *(other.name for other in others)))

    def _constant(self, number: float) -> "_Value":
        return _Value(self.graph, self.graph.weight(f"number_{number}", torch.tensor(float(number))))


class _Product(_Value):
    """
    Linear map W x + b, computed when it is first used. Adding one without a bias joins both into one product:
    W x + b + U h = [W U] [x; h] + b.
    """

    def __init__(
        self, graph: _Graph, name: str, factors: list[tuple[_Value, torch.Tensor]], bias: torch.Tensor | None
    ):
        self.graph, self.place, self.factors, self.bias = graph, name, factors, bias
        self.known: str | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        if self.known is None:
            values, matrices = zip(*self.factors, strict=True)
            x = (
                values[0].name
                if len(values) == 1
                else self.graph("Concat", *(value.name for value in values), axis=-1)
            )
            weight = self.graph.weight(self.place, torch.cat(matrices, dim=1).T)
            self.known = self.graph("MatMul", x, weight)
            if self.bias is not None:
                self.known = self.graph("Add", self.known, self.graph.weight(f"{self.place}.bias", self.bias))
        return self.known

    def __add__(self, other: _Value) -> _Value:
        if isinstance(other, _Product) and other.bias is None:
            return _Product(self.graph, f"{self.place}.{other.place}", [*self.factors, *other.factors], self.bias)
        return super().__add__(other)
