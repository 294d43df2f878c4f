"""A model as ONNX graphs, which run without Python, torch and this package.

Both graphs take `input_ids (B, T)` and the state, `h_0, c_0, h_1, ...` of shape `(B, H)`, and give `logits (B, T, V)` and
the state after them, `next_h_0, next_c_0, ...`. step.onnx reads one token of each row, by matrix products; chunk.onnx reads
any number, by ONNX's own LSTM. They are built here node by node, since torch's exporters fix the length.

A graph's metadata holds `tokens`, what each id adds to a text, in bytes (a JSON list of Latin-1 strings), and `ends`, the
ids that end a document.
"""

import json
from pathlib import Path

import numpy
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from hf_lstm.tokenizers import bytes_of_tokens

from .checking import largest_difference

OPSET, IR_VERSION = 17, 8  # from 2022: whoever runs ONNX runs these
ACTIVATIONS = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}  # silu is made of one


def export_onnx(model, tokenizer, folder: str | Path) -> list[Path]:
    """
    Write step.onnx and chunk.onnx, in float32.

    Args:
        model (`LSTMForCausalLM`): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, a fast one.
        folder (`str` or `Path`): Where to; it is made if need be.

    Raises:
        ValueError: if ONNX has no operator for the activation of the model's MLP, or its softmax is adaptive.
    """
    if model.config.adaptive_softmax_cutoffs is not None:
        raise ValueError(
            f"`adaptive_softmax_cutoffs` ({model.config.adaptive_softmax_cutoffs}) makes an output layer that has no graph "
            "here: train a model without it, or export it by torch (`--to torch`)."
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
    Write the graph with its matrices in 8 bits beside it, NAME_int8.onnx, and return where that is. What is multiplied
    with them is brought to 8 bits on the way; what adds up, the state and the gates, stays float32.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # it writes to the log when it is imported

    path = Path(path)
    quantized = path.with_name(f"{path.stem}_int8.onnx")
    quantize_dynamic(path, quantized, op_types_to_quantize=["MatMul", "LSTM", "Gather"], weight_type=QuantType.QInt8)
    return quantized


def difference(model, path: str | Path, rows: int = 3, length: int = 9) -> float:
    """
    The largest difference, in nats, of the log-probabilities of a graph's file and of the model, over random tokens and
    the state that follows them. A model in half precision rounds, and its graph in float32 does not.
    """
    from onnxruntime import InferenceSession

    session = InferenceSession(path)
    state = {part.name: numpy.zeros((rows, part.shape[1]), numpy.float32) for part in session.get_inputs()[1:]}

    def read(ids):
        logits, *following = session.run(None, {"input_ids": ids.numpy(), **state})
        state.update(zip(state, following, strict=True))
        return torch.from_numpy(logits)

    one_token = session.get_inputs()[0].shape[1] == 1
    return largest_difference(model, read, 1 if one_token else length // 2, rows, length)


def onnx_graph(model, one_token: bool) -> onnx.ModelProto:
    """The graph that reads one token of each row, or any number."""
    config, layers = model.config, model.model.layers
    graph = _Graph()
    length = 1 if one_token else "tokens"
    x = graph.transpose(graph.embedding(model, "input_ids"), [2, 1, 0])  # (T, B, D), as ONNX's LSTM reads
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
    x = graph.transpose(graph.linear(x, model.model.out_proj, "out_proj"), [1, 0, 2])
    graph.linear(x, model.lm_head, "lm_head", ["logits"])
    built = helper.make_graph(graph.nodes, "hf_lstm", inputs, outputs, list(graph.weights.values()))
    return helper.make_model(built, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


class _Graph:
    """Nodes and weights; a call adds a node and gives the name of what comes out of it."""

    def __init__(self):
        self.nodes, self.weights = [], {}

    def __call__(self, operator: str, *inputs: str, outputs: list[str] | None = None, **attributes) -> str:
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

    def transpose(self, x: str, order: list[int]) -> str:
        return self("Transpose", x, perm=order)

    def embedding(self, model, ids: str) -> str:
        """(D, B, T): columns of the output layer's matrix where that is the same, so that the file holds it once."""
        weight = model.model.embed_tokens.weight
        name = "lm_head" if weight is model.lm_head.weight else "embed_tokens"
        return self("Gather", self.weight(name, weight.T), ids, axis=1)

    def linear(self, x: str, module: torch.nn.Module, name: str, outputs: list[str] | None = None) -> str:
        if isinstance(module, torch.nn.Identity):
            return x
        if module.bias is None:
            return self("MatMul", x, self.weight(name, module.weight.T), outputs=outputs)
        product = self("MatMul", x, self.weight(name, module.weight.T))
        return self("Add", product, self.weight(f"{name}.bias", module.bias), outputs=outputs)

    def rms_norm(self, x: str, module: torch.nn.Module, name: str) -> str:
        mean = self("ReduceMean", self("Mul", x, x), axes=[-1])
        root = self("Sqrt", self("Add", mean, self.weight(f"{name}.eps", torch.tensor(module.eps))))
        return self("Mul", self("Div", x, root), self.weight(name, module.weight))

    def gated_mlp(self, x: str, mlp: torch.nn.Module, act: str, name: str) -> str:
        if act not in ("silu", "swish", *ACTIVATIONS):
            raise ValueError(
                f"`hidden_act` ({act!r}) has no operator in ONNX here: silu, {', '.join(ACTIVATIONS)} have one."
            )
        x = self.rms_norm(x, mlp.norm, f"{name}.norm")
        gate = self.linear(x, mlp.gate_proj, f"{name}.gate_proj")
        gate = self(ACTIVATIONS[act], gate) if act in ACTIVATIONS else self("Mul", gate, self("Sigmoid", gate))
        x = self("Mul", gate, self.linear(x, mlp.up_proj, f"{name}.up_proj"))
        return self.linear(x, mlp.down_proj, f"{name}.down_proj")

    def cell(self, x: str, state: list[str], following: list[str], layer, name: str) -> str:
        """The equations of modeling_lstm.py for one token, W and U side by side in one product; x is (1, B, D)."""
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

    def lstm(self, x: str, state: list[str], following: list[str], layer, name: str) -> str:
        """x of shape (T, B, D) by one operator, which has its gates in the order i, o, f, g."""
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
    i, f, g, o = gates.detach().chunk(4)
    return torch.cat([i, o, f, g])
