"""Reference implementation of the language models, of every cell: scalar float64 arithmetic in plain Python, without tensors. The
outputs, states and gradients of the package must agree with it.
"""

import math


class Scalar:
    """A number with the numbers it was computed from, for reverse-mode differentiation."""

    def __init__(self, value, sources=()):
        self.value = float(value)
        self.sources = sources  # pairs (Scalar, derivative of self with respect to it)

    def __add__(self, other):
        return Scalar(self.value + other.value, ((self, 1.0), (other, 1.0)))

    def __sub__(self, other):
        return Scalar(self.value - other.value, ((self, 1.0), (other, -1.0)))

    def __mul__(self, other):
        return Scalar(self.value * other.value, ((self, other.value), (other, self.value)))

    def sigmoid(self):
        value = 1.0 / (1.0 + math.exp(-self.value))
        return Scalar(value, ((self, value * (1.0 - value)),))

    def tanh(self):
        value = math.tanh(self.value)
        return Scalar(value, ((self, 1.0 - value * value),))

    def relu(self):
        return Scalar(max(0.0, self.value), ((self, 1.0 if self.value > 0 else 0.0),))

    def exp(self):
        value = math.exp(self.value)
        return Scalar(value, ((self, value),))

    def power(self, exponent):
        return Scalar(self.value**exponent, ((self, exponent * self.value ** (exponent - 1)),))

    def log(self):
        return Scalar(math.log(self.value), ((self, 1.0 / self.value),))

    def derivatives(self):
        """Return the derivative of this number with respect to each that it was computed from, by these."""
        order, seen, stack = [], set(), [(self, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif id(node) not in seen:
                seen.add(id(node))
                stack.append((node, True))
                stack.extend((source, False) for source, _ in node.sources)
        found = {self: 1.0}
        for node in reversed(order):
            for source, derivative in node.sources:
                found[source] = found.get(source, 0.0) + derivative * found[node]
        return found


def scalars(numbers):
    """Convert nested lists of numbers to nested lists of `Scalar`."""
    return [scalars(number) for number in numbers] if isinstance(numbers, list) else Scalar(numbers)


def values(nested, number=lambda scalar: scalar.value):
    """Convert nested lists of `Scalar` to numbers, by default their values."""
    return [values(item, number) for item in nested] if isinstance(nested, list) else number(nested)


def gradients(result, weights):
    """Return the derivatives of `result` with respect to `weights`, as numbers, by the names of the weights."""
    found = result.derivatives()
    return {name: values(weight, lambda scalar: found.get(scalar, 0.0)) for name, weight in weights.items()}


def dot(a, b):
    total = Scalar(0.0)
    for x, y in zip(a, b, strict=True):
        total = total + x * y
    return total


def linear(x, matrix, bias=None):
    products = [dot(row, x) for row in matrix]
    return products if bias is None else [a + b for a, b in zip(products, bias, strict=True)]


def lstm_step(x, state, w):
    """One step; x has D numbers, h and c have H. The gates have the order i, f, g, o."""
    (h, c), size = state, len(state[0])
    W, U, b = w["input_gates.weight"], w["hidden_gates.weight"], w["input_gates.bias"]
    gates = [dot(W[row], x) + dot(U[row], h) + b[row] for row in range(4 * size)]
    new_h, new_c = [], []
    for unit in range(size):
        i = gates[unit].sigmoid()
        f = gates[size + unit].sigmoid()
        g = gates[2 * size + unit].tanh()
        o = gates[3 * size + unit].sigmoid()
        cell = f * c[unit] + i * g
        new_c.append(cell)
        new_h.append(o * cell.tanh())
    return [new_h, new_c]


def gru_step(x, state, w):
    """One step in torch's form: r gates the product and its bias. The gates have the order r, z, n."""
    (h,), size, new_h = state, len(state[0]), []
    read = linear(x, w["input_gates.weight"], w["input_gates.bias"])
    carried = linear(h, w["hidden_gates.weight"], w["hidden_gates.bias"])
    for unit in range(size):
        r = (read[unit] + carried[unit]).sigmoid()
        z = (read[size + unit] + carried[size + unit]).sigmoid()
        n = (read[2 * size + unit] + r * carried[2 * size + unit]).tanh()
        new_h.append((Scalar(1.0) - z) * n + z * h[unit])
    return [new_h]


def rnn_sums(x, state, w):
    W, U, b = w["input_gates.weight"], w["hidden_gates.weight"], w["input_gates.bias"]
    return [dot(W[unit], x) + dot(U[unit], state[0]) + b[unit] for unit in range(len(b))]


def rnn_tanh_step(x, state, w):
    return [[number.tanh() for number in rnn_sums(x, state, w)]]


def rnn_relu_step(x, state, w):
    return [[number.relu() for number in rnn_sums(x, state, w)]]


def mogrifier_step(x, state, w):
    """One step of an LSTM whose x and h gate each other first, x in the first round."""
    h, c = state
    rounds = sorted({int(name.split(".")[1]) for name in w if name.startswith("mogrifier.")})
    for index in rounds:
        gate = h if index % 2 == 0 else x
        for matrix in range(sum(name.startswith(f"mogrifier.{index}.") for name in w)):
            gate = linear(gate, w[f"mogrifier.{index}.{matrix}.weight"])
        gated = [Scalar(2.0) * a.sigmoid() * b for a, b in zip(gate, x if index % 2 == 0 else h, strict=True)]
        x, h = (gated, h) if index % 2 == 0 else (x, gated)
    return lstm_step(x, [h, c], w)


STEPS = {
    "lstm": lstm_step,
    "gru": gru_step,
    "rnn_tanh": rnn_tanh_step,
    "rnn_relu": rnn_relu_step,
    "mogrifier": mogrifier_step,
}


def cell_step(x, state, w, cell_type):
    """
    Return the state after one more input. `w` holds the weights of the cell by their names in its layer, and a state the
    lists h and, of an LSTM or a Mogrifier, c.
    """
    return STEPS[cell_type](x, state, w)


def rms_norm(x, weight, eps=1e-6):
    scale = (dot(x, x) * Scalar(1.0 / len(x)) + Scalar(eps)).power(-0.5)
    return [number * scale * w for number, w in zip(x, weight, strict=True)]


def swiglu(x, gate, up, down):
    inner = [g * g.sigmoid() * u for g, u in zip(linear(x, gate), linear(x, up), strict=True)]
    return linear(inner, down)


def window_attention(x, window, w, size, heads):
    """
    Attend from one token to itself and the `size` - 1 before it: x has H numbers, and so have each key and value of `window`, a
    list of keys and one of values. Returns the output, before its projection, and the window with this token.
    """
    query = linear(x, w["self_attn.q_proj.weight"])
    keys, values = (
        [*old[max(0, len(old) - size + 1) :], linear(x, w[f"self_attn.{name}_proj.weight"])]
        for name, old in zip("kv", window, strict=True)
    )
    width, output = len(query) // heads, []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        shares = [(dot(query[part], key[part]) * Scalar(width**-0.5)).exp() for key in keys]
        total = dot(shares, [Scalar(1.0)] * len(shares)).power(-1)
        output += [dot(shares, [value[unit] for value in values]) * total for unit in range(part.start, part.stop)]
    return output, [keys, values]


def filled_window(window, size, heads):
    """Return keys and values by heads, after zeros where there are fewer than `size`, and which of them are there."""
    zeros, missing = [Scalar(0.0)] * len(window[0][0]), size - len(window[0])
    width = len(zeros) // heads
    parts = [
        [[entry[head * width : (head + 1) * width] for entry in [zeros] * missing + entries] for head in range(heads)]
        for entries in window
    ]
    return [*parts, [Scalar(float(place >= missing)) for place in range(size)]]


def language_model(ids, weights, cell_type="lstm", window=None, heads=1):
    """
    Return the logits after each token of one row, and the state after the last: for each layer a list of h and, where the
    cell has it, c; for one of attention, over `window` tokens by so many `heads`, keys, values and which of them are there.
    `weights` come from `weights_of`.
    """
    w = {name.removeprefix("model."): weight for name, weight in weights.items()}
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("layers."))
    residual = "norm.weight" in w
    of_layer = [
        {name.removeprefix(f"layers.{index}."): weight for name, weight in w.items() if f"layers.{index}." in name}
        for index in range(layers)
    ]
    parts = 2 if cell_type in ("lstm", "mogrifier") else 1
    states = [
        [[Scalar(0.0)] * len(layer["hidden_gates.weight"][0]) for _ in range(parts)]
        if "hidden_gates.weight" in layer
        else [[], []]
        for layer in of_layer
    ]
    logits = []
    for token in ids:
        x = w["embed_tokens.weight"][token]
        if "in_proj.weight" in w:
            x = linear(x, w["in_proj.weight"])
        for index, layer in enumerate(of_layer):
            read = rms_norm(x, layer["norm.weight"]) if residual else x
            if "hidden_gates.weight" in layer:
                states[index] = cell_step(read, states[index], layer, cell_type)
                output, projection = states[index][0], layer.get("o_proj.weight")
            else:
                output, states[index] = window_attention(read, states[index], layer, window, heads)
                projection = layer["self_attn.o_proj.weight"]
            if not residual:
                x = output
                continue
            x = [a + b for a, b in zip(x, linear(output, projection), strict=True)]
            if "mlp.norm.weight" in layer:
                projections = (layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
                branch = swiglu(rms_norm(x, layer["mlp.norm.weight"]), *projections)
                x = [a + b for a, b in zip(x, branch, strict=True)]
        if residual:
            x = rms_norm(x, w["norm.weight"])
        if "out_proj.weight" in w:
            x = linear(x, w["out_proj.weight"], w.get("out_proj.bias"))
        logits.append(linear(x, w.get("lm_head.weight", w["embed_tokens.weight"]), w.get("lm_head.bias")))
    for index, layer in enumerate(of_layer):
        if "hidden_gates.weight" not in layer:
            states[index] = filled_window(states[index], window, heads)
    return logits, states


def mean_cross_entropy(logits, targets):
    """Return the mean cross-entropy in nats per target."""
    total = Scalar(0.0)
    for row, target in zip(logits, targets, strict=True):
        normaliser = Scalar(0.0)
        for logit in row:
            normaliser = normaliser + logit.exp()
        total = total + normaliser.log() - row[target]
    return total * Scalar(1.0 / len(targets))


def weights_of(model):
    """Return the weights of an `LSTMForCausalLM` by name, as nested lists of `Scalar`; tied weights occur once."""
    return {name: scalars(parameter.tolist()) for name, parameter in model.named_parameters()}


def fields_of(model):
    """Return the arguments of `language_model` after the weights."""
    config = model.config
    return config.cell_type, config.attention_window, config.num_attention_heads or 1
