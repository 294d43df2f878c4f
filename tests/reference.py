"""The equations of the LSTM language model, number by number, in Python's own float64. No tensor, no matrix product:
whatever the package computes must agree with this, outputs, states and gradients.
"""

import math


class Scalar:
    """A number that remembers what it was made of, so that the chain rule can be applied backwards."""

    def __init__(self, value, sources=()):
        self.value = float(value)
        self.sources = sources  # pairs (Scalar, derivative of self by it)
        self.gradient = 0.0

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

    def exp(self):
        value = math.exp(self.value)
        return Scalar(value, ((self, value),))

    def log(self):
        return Scalar(math.log(self.value), ((self, 1.0 / self.value),))

    def backward(self):
        order, seen, stack = [], set(), [(self, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif id(node) not in seen:
                seen.add(id(node))
                stack.append((node, True))
                stack.extend((source, False) for source, _ in node.sources)
        self.gradient = 1.0
        for node in reversed(order):
            for source, derivative in node.sources:
                source.gradient += derivative * node.gradient


def scalars(numbers):
    """Nested lists of numbers as nested lists of `Scalar`."""
    return [scalars(number) for number in numbers] if isinstance(numbers, list) else Scalar(numbers)


def values(nested, what="value"):
    """The reverse; `what="gradient"` gives the derivatives."""
    return [values(item, what) for item in nested] if isinstance(nested, list) else getattr(nested, what)


def dot(a, b):
    total = Scalar(0.0)
    for x, y in zip(a, b, strict=True):
        total = total + x * y
    return total


def lstm_step(x, h, c, layer):
    """One token through one layer: x of D numbers, h and c of H. Gates in the order i, f, g, o."""
    size = len(h)
    gates = []
    for row in range(4 * size):
        gates.append(dot(layer["W"][row], x) + dot(layer["U"][row], h) + layer["b"][row])
    new_h, new_c = [], []
    for unit in range(size):
        i = gates[unit].sigmoid()
        f = gates[size + unit].sigmoid()
        g = gates[2 * size + unit].tanh()
        o = gates[3 * size + unit].sigmoid()
        cell = f * c[unit] + i * g
        new_c.append(cell)
        new_h.append(o * cell.tanh())
    return new_h, new_c


def zero_states(weights):
    return [([Scalar(0.0)] * len(layer["U"][0]),) * 2 for layer in weights["layers"]]


def language_model(ids, weights, states=None):
    """
    The logits after each token of one row, and the states after the last.

    weights: {"E": V x D, "layers": [{"W": 4H x D, "U": 4H x H, "b": 4H}, ...], "output": V x H}
    """
    states = list(zero_states(weights) if states is None else states)
    logits = []
    for token in ids:
        x = weights["E"][token]
        for index, layer in enumerate(weights["layers"]):
            states[index] = lstm_step(x, *states[index], layer)
            x = states[index][0]
        logits.append([dot(row, x) for row in weights["output"]])
    return logits, states


def mean_cross_entropy(logits, targets):
    """Nats per target."""
    total = Scalar(0.0)
    for row, target in zip(logits, targets, strict=True):
        normaliser = Scalar(0.0)
        for logit in row:
            normaliser = normaliser + logit.exp()
        total = total + normaliser.log() - row[target]
    return total * Scalar(1.0 / len(targets))


def weights_of(model):
    """The weights of an `LSTMForCausalLM` as nested lists of `Scalar`; tied matrices are the same objects."""
    embedding = scalars(model.model.embed_tokens.weight.tolist())
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    return {
        "E": embedding,
        "layers": [
            {
                "W": scalars(layer.input_gates.weight.tolist()),
                "U": scalars(layer.hidden_gates.weight.tolist()),
                "b": scalars(layer.input_gates.bias.tolist()),
            }
            for layer in model.model.layers
        ],
        "output": embedding if tied else scalars(model.lm_head.weight.tolist()),
    }
