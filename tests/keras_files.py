"""Small files in the layouts of Keras, written without it, and its equations in numpy.

A layer is a pair of its configuration and its weights. Shapes: B rows, T steps, V tokens, D width of an embedding, H of a cell.
"""

import io
import itertools
import json
import re
import zipfile

import h5py
import numpy

GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}
V, D, H = 7, 3, 4


def layer(kind, *weights, **config):
    config = {"name": f"my {kind.lower()}"} | config
    return {"module": "keras.layers", "class_name": kind, "config": config, "registered_name": None}, list(weights)


def numbers(*shape, seed=0):
    return numpy.random.default_rng((seed, *shape)).normal(scale=0.4, size=shape).astype(numpy.float32)


def embedding(rows=V, width=D, **config):
    return layer("Embedding", numbers(rows, width), **{"input_dim": rows, "output_dim": width} | config)


def cell(kind, width=D, units=H, use_bias=True, **config):
    gates = GATES[kind]
    bias = [numbers(2, 3 * units) if kind == "GRU" else numbers(gates * units)] if use_bias else []
    settings = {"LSTM": {"recurrent_activation": "sigmoid"}, "SimpleRNN": {}}
    settings["GRU"] = settings["LSTM"] | {"reset_after": True}
    fields = {"units": units, "activation": "tanh", "return_sequences": True, "use_bias": use_bias} | settings[kind]
    weights = numbers(width, gates * units), numbers(units, gates * units, seed=1), *bias
    return layer(kind, *weights, **fields | config)


def dense(width=H, units=V, use_bias=True, **config):
    bias = [numbers(units)] if use_bias else []
    fields = {"units": units, "use_bias": use_bias, "activation": "softmax"} | config
    return layer("Dense", numbers(width, units), *bias, **fields)


def named(layers):
    """Give each layer a name of its own, as Keras asks."""
    for index, (config, _) in enumerate(layers):
        config["config"]["name"] = f"{config['config']['name']} {index}"
    return layers


def sequential(layers):
    held = [config for config, _ in named(layers)]
    return {"module": "keras", "class_name": "Sequential", "config": {"name": "sequential", "layers": held}}


def functional(layers, version=3):
    """A model of the functional interface, in the words of Keras 3 or 2, each layer reading the one before."""
    held = [config for config, _ in named([layer("InputLayer", batch_shape=[None, None]), *layers])]
    names = [config["config"]["name"] for config in held]
    for config, name, before in zip(held, names, [None, *names[:-1]], strict=True):
        tensor = {"class_name": "__keras_tensor__", "config": {"keras_history": [before, 0, 0]}}
        node = {"args": [tensor], "kwargs": {"mask": None}} if version == 3 else [[before, 0, 0, {}]]
        config |= {"name": name, "inbound_nodes": [] if before is None else [node]}
    ends = [names[0], 0, 0], [names[-1], 0, 0]
    inputs, outputs = ends if version == 3 else ([ends[0]], [ends[1]])
    kind = "Functional" if version == 3 else "Model"
    return {
        "class_name": kind,
        "config": {"name": "m", "layers": held, "input_layers": inputs, "output_layers": outputs},
    }


def write_weights(file, layers, root="layers"):
    """Write the weights under the names of the classes, numbered in order."""
    counts = {}
    for config, weights in layers:
        kind = config["class_name"]
        base = re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind)).lower()
        name = f"{base}_{counts[base]}" if base in counts else base
        counts[base] = counts.get(base, 0) + 1
        inner = {"TimeDistributed": "layer/"}.get(kind, "cell/" if kind in GATES else "")
        group = file.create_group(f"{root}/{name}/{inner}vars")
        for index, array in enumerate(weights):
            group[str(index)] = array


def write_legacy_weights(group, layers):
    """Write the weights under the users' names, with their order in attributes."""
    group.attrs["layer_names"] = [config["config"]["name"] for config, _ in layers]
    for config, weights in layers:
        name = config["config"]["name"]
        kinds = [f"{name}/{part}:0" for part in ("kernel", "recurrent_kernel", "bias")][: len(weights)]
        held = group.create_group(name)
        held.attrs["weight_names"] = kinds
        for path, array in zip(kinds, weights, strict=True):
            held[path] = array


def write(path, config, layers):
    """Write a file of the layout that its name asks for: .keras, .older.keras, .h5, .weights.h5 (with .json beside it)."""
    if path.name.endswith(".keras"):
        content = io.BytesIO()
        with h5py.File(content, "w") as file:
            write_weights(file, layers, "_layer_checkpoint_dependencies" if ".older" in path.name else "layers")
        write_zip(
            path, {"metadata.json": "{}", "config.json": json.dumps(config), "model.weights.h5": content.getvalue()}
        )
        return path
    with h5py.File(path, "w") as file:
        if path.name.endswith(".weights.h5"):
            write_weights(file, layers)
            path.with_suffix(".json").write_text(json.dumps(config))
        else:
            file.attrs["model_config"] = json.dumps(config)
            write_legacy_weights(file.create_group("model_weights"), layers)
            file.create_group("optimizer_weights")
    return path


def write_zip(path, records, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def sigmoid(x):
    return 1 / (1 + numpy.exp(-x))


def step(kind, config, weights, x, h, c):
    """One step of a cell, each array `(B, width)`, by the equations of Keras."""
    kernel, recurrent, *bias = weights
    if kind == "GRU":
        input_bias, recurrent_bias = bias[0] if bias else (0, 0)
        xz, xr, xh = numpy.split(x @ kernel + input_bias, 3, axis=1)
        hz, hr, hh = numpy.split(h @ recurrent + recurrent_bias, 3, axis=1)
        z, r = sigmoid(xz + hz), sigmoid(xr + hr)
        return z * h + (1 - z) * numpy.tanh(xh + r * hh), c
    total = x @ kernel + h @ recurrent + (bias[0] if bias else 0)
    if kind == "SimpleRNN":
        return (numpy.tanh(total) if config["activation"] == "tanh" else numpy.maximum(total, 0)), c
    i, f, g, o = numpy.split(total, 4, axis=1)
    c = sigmoid(f) * c + sigmoid(i) * numpy.tanh(g)
    return sigmoid(o) * numpy.tanh(c), c


def log_probabilities(layers, ids, skip_zeros=False):
    """Return `(B, T, V)` after each step of ids `(B, T)`; with `skip_zeros`, a 0 leaves the state as it was."""
    first = layers[0][1][0] if layers[0][0]["class_name"] == "Embedding" else numpy.eye(V, dtype=numpy.float32)
    x = first[ids]
    for config, weights in layers:
        kind = config["class_name"]
        if kind in GATES:
            h = c = numpy.zeros((len(ids), len(weights[1])), dtype=numpy.float32)
            outputs = []
            for t in range(ids.shape[1]):
                new_h, new_c = step(kind, config["config"], weights, x[:, t], h, c)
                kept = (ids[:, t] == 0)[:, None] & skip_zeros
                h, c = numpy.where(kept, h, new_h), numpy.where(kept, c, new_c)
                outputs.append(h)
            x = numpy.stack(outputs, axis=1)
        elif kind in ("Dense", "TimeDistributed"):
            x = x @ weights[0] + (weights[1] if len(weights) > 1 else 0)
    return x - numpy.log(numpy.exp(x).sum(-1, keepdims=True))


def texts_to_sequences(fields, texts):
    """Return the ids that a `Tokenizer` of Keras with these settings gives, as it documents them."""
    number = fields["word_index"]
    unknown = number.get(fields["oov_token"])
    found = []
    for text in texts:
        text = text.lower() if fields["lower"] else text
        words = text
        if not fields["char_level"]:
            text = text.translate(dict.fromkeys(map(ord, fields["filters"]), fields["split"]))
            words = [word for word in text.split(fields["split"]) if word]
        ids = [number.get(word) for word in words]
        limit = fields["num_words"] or numpy.inf
        ids = [unknown if i is None or i >= limit else i for i in ids]
        found.append([i for i in ids if i is not None])
    return found


def fit(texts, **settings):
    """Return the settings of a `Tokenizer` fitted on texts."""
    fields = {
        "num_words": None,
        "filters": '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n',
        "lower": True,
        "split": " ",
        "char_level": False,
        "oov_token": None,
    } | settings
    lines = [text.lower() if fields["lower"] else text for text in texts]
    if not fields["char_level"]:
        table = dict.fromkeys(map(ord, fields["filters"]), fields["split"])
        lines = [line.translate(table).split(fields["split"]) for line in lines]
    words = [word for word in itertools.chain(*lines) if word]
    counted = sorted(dict.fromkeys(words), key=lambda word: -words.count(word))
    known = [fields["oov_token"], *counted] if fields["oov_token"] else counted
    return fields | {"word_index": {word: index for index, word in enumerate(known, 1)}}


def tokenizer_json(fields):
    """Return what `to_json()` of a `Tokenizer` returns."""
    inner = fields | {"word_index": json.dumps(fields["word_index"]), "document_count": 1}
    return json.dumps({"class_name": "Tokenizer", "config": inner})
