"""Export to ONNX graphs, which run without Python, torch and this package.

Both graphs map `input_ids (B, T)` and the state, `h_0, c_0, h_1, ...` of shape `(B, H)`, to `logits (B, T, V)` and the
next state, `next_h_0, next_c_0, ...`. step.onnx reads one token per row with matrix products; chunk.onnx reads any
number with the LSTM operator of ONNX. The graphs are built node by node, because the exporters of torch fix the
length.

The metadata of a graph contains `tokens`, the bytes that each id adds to a text (a JSON list of Latin-1 strings), and
`ends`, the ids that end a document.
"""

import json
from pathlib import Path
from typing import Any

import numpy
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from transformers import PreTrainedTokenizerFast

from hf_lstm.decoding import bytes_of_tokens
from hf_lstm.model.modeling_lstm import GatedMLP, LSTMForCausalLM, LSTMLayer

from .checking import largest_difference

OPSET, IR_VERSION = 17, 8  # of 2022, supported by every current runtime
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
    metadata = {"tokens": json.dumps(tokens), "ends": json.dumps(ends)}
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
    other factor of each product is quantized at run time; sums, gates and the state stay float32.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # writes to the log when it is imported

    path = Path(path)
    quantized = path.with_name(f"{path.stem}_int8.onnx")
    quantize_dynamic(path, quantized, op_types_to_quantize=["MatMul", "LSTM", "Gather"], weight_type=QuantType.QInt8)
    return quantized


def difference(model: LSTMForCausalLM, path: str | Path, rows: int = 3, length: int = 9) -> float:
    """
    Return the largest difference, in nats, between the log-probabilities of a graph and of the model, over random
    tokens with carried state. A model in half precision differs more, because its graph computes in float32.
    """
    from onnxruntime import InferenceSession

    session = InferenceSession(path)
    state = {part.name: numpy.zeros((rows, part.shape[1]), numpy.float32) for part in session.get_inputs()[1:]}

    def read(ids: torch.Tensor) -> torch.Tensor:
        logits, *following = session.run(None, {"input_ids": ids.numpy(), **state})
        state.update(zip(state, following, strict=True))
        return torch.from_numpy(logits)

    one_token = session.get_inputs()[0].shape[1] == 1
    return largest_difference(model, read, 1 if one_token else length // 2, rows, length)


def onnx_graph(model: LSTMForCausalLM, one_token: bool) -> onnx.ModelProto:
    """Build the graph that reads one token per row, or any number of tokens."""
    config, layers = model.config, model.model.layers
    graph = _Graph()
    length = 1 if one_token else "tokens"
    x = graph("Transpose", graph.embedding(model, "input_ids"), perm=[2, 1, 0])  # (T, B, D), the layout of ONNX's LSTM
    x = graph.linear(x, model.model.in_proj, "in_proj")
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["rows", length])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", length, config.vocab_size])]
    recurrence = graph.cell if one_token else graph.lstm
    for index, (layer, size) in enumerate(zip(layers, config.cell_sizes, strict=True)):
        name = f"layers.{index}"
        state = [f"h_{index}", f"c_{index}"]
        inputs += [helper.make_tensor_value_info(part, TensorProto.FLOAT, ["rows", size]) for part in state]
        following = [f"next_{part}" for part in state]
        outputs += [helper.make_tensor_value_info(part, TensorProto.FLOAT, ["rows", size]) for part in following]
        if config.block_type == "stacked":
            x = recurrence(x, state, following, layer, name)
            continue
        y = recurrence(graph.rms_norm(x, layer.norm, f"{name}.norm"), state, following, layer, name)
        x = graph("Add", x, graph.linear(y, layer.o_proj, f"{name}.o_proj"))
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

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}

    def __call__(self, operator: str, *inputs: str, outputs: list[str] | None = None, **attributes: Any) -> str:
        outputs = outputs or [f"{operator}_{len(self.nodes)}"]
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

    def cell(self, x: str, state: list[str], following: list[str], layer: LSTMLayer, name: str) -> str:
        """Add one step: the equations of modeling_lstm.py with W and U joined in one product; x is `(1, B, D)`."""
        h, c = state
        weights = torch.cat([layer.input_gates.weight, layer.hidden_gates.weight], dim=1).T  # (D + H, 4 H)
        read = self("Concat", self("Squeeze", x, self.integers(0)), h, axis=-1)
        gates = self("MatMul", read, self.weight(f"{name}.gates", weights))
        gates = self("Add", gates, self.weight(f"{name}.bias", layer.input_gates.bias))
        i, f, g, o = (f"{name}.{gate}" for gate in "ifgo")
        self("Split", gates, outputs=[i, f, g, o], axis=-1)
        kept = self("Mul", self("Sigmoid", f), c)
        new = self("Mul", self("Sigmoid", i), self("Tanh", g))
        self("Add", kept, new, outputs=[following[1]])
        self("Mul", self("Sigmoid", o), self("Tanh", following[1]), outputs=[following[0]])
        return self("Unsqueeze", following[0], self.integers(0))

    def lstm(self, x: str, state: list[str], following: list[str], layer: LSTMLayer, name: str) -> str:
        """Add ONNX's LSTM, whose gates have the order i, o, f, g; x is `(T, B, D)`."""
        first = self.integers(0)
        start = [self("Unsqueeze", part, first) for part in state]
        bias = torch.cat([_iofg(layer.input_gates.bias), torch.zeros_like(layer.input_gates.bias)])
        weights = [
            self.weight(f"{name}.input_gates", _iofg(layer.input_gates.weight)[None]),
            self.weight(f"{name}.hidden_gates", _iofg(layer.hidden_gates.weight)[None]),
            self.weight(f"{name}.bias", bias[None]),
        ]
        outputs = [f"{name}.{part}" for part in ("outputs", "h", "c")]
        y = self("LSTM", x, *weights, "", *start, outputs=outputs, hidden_size=layer.hidden_gates.in_features)
        for end, part in zip(outputs[1:], following, strict=True):
            self("Squeeze", end, first, outputs=[part])
        return self("Squeeze", y, self.integers(1))  # (T, 1, B, H) -> (T, B, H)


def _iofg(gates: torch.Tensor) -> torch.Tensor:
    """Reorder the rows of the gates from i, f, g, o."""
    i, f, g, o = gates.detach().chunk(4)
    return torch.cat([i, o, f, g])
