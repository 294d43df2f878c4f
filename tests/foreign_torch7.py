"""Files of torch-rnn and char-rnn, written without Torch, and the equations of their models."""

import struct

import torch

from hf_lstm.convert.torch_lstm import Options

CHARACTERS = list("\n abcdefghijklmnopqrstuvwxyzA.山")
V = len(CHARACTERS)


# A writer of the layout that torch7's File.lua and Tensor.c write.


class Table(dict):
    """A table, which may be the key of another."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Object:
    def __init__(self, name, **fields):
        self.name, self.fields = name, Table(fields)


class Function:
    pass


class Writer:
    def __init__(self, prefix="torch."):
        self.written, self.known, self.prefix = bytearray(), {}, prefix

    def integers(self, *numbers):
        self.written += struct.pack(f"<{len(numbers)}i", *numbers)

    def longs(self, *numbers):
        self.written += struct.pack(f"<{len(numbers)}q", *numbers)

    def string(self, text):
        data = text if isinstance(text, bytes) else text.encode()
        self.integers(len(data))
        self.written += data

    def is_known(self, kind, thing, key):
        """Write the kind and number of a thing that may come again; it is kept, so that its address stays its own."""
        known = key in self.known
        number, _ = self.known.setdefault(key, (len(self.known) + 1, thing))
        self.integers(kind, number)
        return known

    def put(self, thing):
        match thing:
            case None:
                self.integers(0)
            case bool():
                self.integers(5, int(thing))
            case int() | float():
                self.integers(1)
                self.written += struct.pack("<d", thing)
            case str() | bytes():
                self.integers(2)
                self.string(thing)
            case list():
                self.put(Table(enumerate(thing, 1)))
            case Table():
                if not self.is_known(3, thing, id(thing)):
                    self.integers(len(thing))
                    for pair in thing.items():
                        for part in pair:
                            self.put(part)
            case Function():
                if not self.is_known(8, thing, id(thing)):
                    self.string(b"\x1bLua bytecode")
                    self.put(Table())
            case Object():
                if not self.is_known(4, thing, id(thing)):
                    self.string("V 1")
                    self.string(thing.name)
                    self.put(thing.fields)
            case torch.Tensor():
                self.tensor(thing)

    def tensor(self, tensor):
        kind = {torch.float32: "Float", torch.float64: "Double", torch.int64: "Long"}[tensor.dtype]
        name = f"{self.prefix}{kind}".replace("CudaFloat", "Cuda")
        if self.is_known(4, tensor, id(tensor)):
            return
        self.string("V 1")
        self.string(f"{name}Tensor")
        self.integers(tensor.dim())
        self.longs(*tensor.shape, *tensor.stride(), tensor.storage_offset() + 1)
        storage = tensor.untyped_storage()
        if self.is_known(4, storage, ("storage", storage.data_ptr())):
            return
        self.string("V 1")
        self.string(f"{name}Storage")
        whole = torch.tensor([], dtype=tensor.dtype).set_(storage)
        self.longs(len(whole))
        self.written += whole.numpy().tobytes()


def save(thing, path, prefix="torch."):
    writer = Writer(prefix)
    writer.put(thing)
    path.write_bytes(writer.written)
    return path


# torch-rnn.


def random_weights(*shape, seed=[0]):  # noqa: B006 (a counter)
    seed[0] += 1
    return torch.empty(shape).uniform_(-0.6, 0.6, generator=torch.Generator().manual_seed(seed[0]))


def torch_rnn_model(model_type="lstm", layers=2, D=8, H=12, dropout=0.0, **fields):
    gates, name = (4, "nn.LSTM") if model_type == "lstm" else (1, "nn.VanillaRNN")
    modules = [Object("nn.LookupTable", weight=random_weights(V, D), gradWeight=random_weights(V, D))]
    for layer in range(layers):
        width = D if layer == 0 else H
        weights = {"weight": random_weights(width + H, gates * H), "bias": random_weights(gates * H)}
        modules.append(Object(name, input_dim=width, hidden_dim=H, remember_states=True, **weights))
        if dropout:
            modules.append(Object("nn.Dropout", p=dropout, v2=True, train=False))
    modules.append(Object("nn.View", numElements=1))
    modules.append(Object("nn.Linear", weight=random_weights(V, H), bias=random_weights(V)))
    modules.append(Object("nn.View", numElements=1))
    net = Object("nn.Sequential", modules=modules, train=False)
    own = {"idx_to_token": list(CHARACTERS), "model_type": model_type, "rnn_size": H, "net": net}
    return Object("nn.LanguageModel", **own | fields)


def torch_rnn_logits(model, ids):
    """The equations of LSTM.lua and VanillaRNN.lua, in float64."""
    modules = model.fields["net"].fields["modules"]
    table, *layers, linear = (m.fields for m in modules if m.name not in ("nn.Dropout", "nn.View"))
    x = table["weight"].double()[ids]
    for layer in layers:
        weight, bias = layer["weight"].double(), layer["bias"].double()
        H = layer["hidden_dim"]
        h = c = torch.zeros(H, dtype=torch.float64)
        outputs = []
        for step in x:
            a = torch.cat([step, h]) @ weight + bias
            if len(bias) == H:
                h = a.tanh()
            else:
                i, f, o = a[: 3 * H].sigmoid().split(H)
                c = f * c + i * a[3 * H :].tanh()
                h = o * c.tanh()
            outputs.append(h)
        x = torch.stack(outputs)
    return x @ linear["weight"].double().T + linear["bias"].double()


def torch_rnn_checkpoint(folder):
    model = torch_rnn_model()
    return save(Table(model=model, i=1000, opt=Table(gpu=-1)), folder / "checkpoint.t7"), Options()


# char-rnn.


class Graph:
    """The nodes of an nngraph.gModule: each data names the data that it reads in `mapindex`, by place and the other way round."""

    def __init__(self):
        self.nodes = []

    def add(self, module, *read):
        mapindex = Table()
        for place, data in enumerate(read, 1):
            mapindex |= {place: data, data: place}
        data = Table(annotations=Table(), mapindex=mapindex)
        if module is not None:
            data["module"] = Object(module) if isinstance(module, str) else module
        node = Object("nngraph.Node", data=data, children=Table(), id=len(self.nodes))
        for other in self.nodes:
            if other.fields["data"] in read:
                other.fields["children"][len(other.fields["children"]) + 1] = node
                node.fields["children"][other] = 1  # a circle, as between the two graphs of a gModule
        self.nodes.append(node)
        return data


def linear(inputs, outputs, bias=True):
    fields = {"weight": random_weights(outputs, inputs)} | ({"bias": random_weights(outputs)} if bias else {})
    return Object("nn.Linear", **fields)


def char_rnn(model="lstm", layers=2, H=12, hidden_bias=True, old=False, dropout=0.0, size=V):
    """The graph of model/LSTM.lua (`old`: before it used SplitTable, and named its parts) or model/RNN.lua; and its layers."""
    graph, weights = Graph(), []
    start = graph.add(None)
    x = graph.add("nn.Identity", start)
    states = [graph.add("nn.Identity", start) for _ in range(2 * layers if model == "lstm" else layers)]
    G = 4 if model == "lstm" else 1
    for layer in range(layers):
        if layer == 0:
            x = graph.add("OneHot", x)
        elif dropout:
            x = graph.add(Object("nn.Dropout", p=dropout, v2=True), x)
        i2h, h2h = linear(size if layer == 0 else H, G * H), linear(H, G * H, hidden_bias)
        weights.append((i2h, h2h))
        prev_h = states[2 * layer + 1] if model == "lstm" else states[layer]
        first, second = graph.add(h2h, prev_h), graph.add(i2h, x)  # any order
        if not old:
            first, second = graph.add("nn.Identity", first), graph.add("nn.Identity", second)
        total = graph.add("nn.CAddTable", second, first)
        if model != "lstm":
            x = graph.add("nn.Tanh", total)
            continue
        if old:
            gates = [graph.add("nn.Narrow", graph.add("nn.Sigmoid", total)) for _ in range(3)]
            g = graph.add("nn.Tanh", graph.add("nn.Narrow", total))
        else:
            split = graph.add("nn.SplitTable", graph.add("nn.Reshape", total))
            parts = [graph.add(None, split) for _ in range(4)]
            gates, g = [graph.add("nn.Sigmoid", part) for part in parts[:3]], graph.add("nn.Tanh", parts[3])
        kept = [graph.add("nn.CMulTable", *pair) for pair in ((gates[1], states[2 * layer]), (gates[0], g))]
        x = graph.add("nn.CMulTable", gates[2], graph.add("nn.Tanh", graph.add("nn.CAddTable", *kept)))
    decoder = linear(H, size)
    graph.add(None, graph.add("nn.LogSoftMax", graph.add(decoder, x)))
    module = Object("nn.gModule", forwardnodes=[*graph.nodes], innode=graph.nodes[0], verbose=False)
    return module, weights, decoder


def char_rnn_logits(weights, decoder, ids):
    """The equations of LSTM.lua and RNN.lua, in float64."""

    def apply(module, x):
        bias = module.fields.get("bias")
        return module.fields["weight"].double() @ x + (0 if bias is None else bias.double())

    size = weights[0][0].fields["weight"].shape[1]
    x = torch.eye(size, dtype=torch.float64)[ids]
    for i2h, h2h in weights:
        H = h2h.fields["weight"].shape[1]
        h = c = torch.zeros(H, dtype=torch.float64)
        outputs = []
        for step in x:
            a = apply(i2h, step) + apply(h2h, h)
            if len(a) == H:
                h = a.tanh()
            else:
                i, f, o, g = a.split(H)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            outputs.append(h)
        x = torch.stack(outputs)
    return torch.stack([apply(decoder, step) for step in x])


def char_rnn_content(module, characters=CHARACTERS, model="lstm", **fields):
    """A checkpoint as train.lua saves it; the numbers of all modules lie in one storage, as it flattens them."""
    vocab = Table((character, index) for index, character in enumerate(characters, 1))
    protos = Table(rnn=module, criterion=Object("nn.ClassNLLCriterion", sizeAverage=True))
    losses = Table({1: 4.1, 3: 3.5})
    return Table(
        {"protos": protos, "opt": Table(model=model, seed=123), "vocab": vocab, "val_losses": losses, "i": 3} | fields
    )


def flatten(modules):
    """Move the tensors of modules into one storage, as `combine_all_parameters` does."""
    tensors = [(module, name) for module in modules for name in ("weight", "bias") if name in module.fields]
    whole = torch.cat([module.fields[name].flatten() for module, name in tensors])
    begin = 0
    for module, name in tensors:
        shape = module.fields[name].shape
        module.fields[name] = whole[begin : begin + shape.numel()].view(shape)
        begin += shape.numel()


def char_rnn_checkpoint(folder):
    module, weights, decoder = char_rnn()
    flatten([*(part for pair in weights for part in pair), decoder])
    return save(char_rnn_content(module), folder / "lm.t7"), Options()
