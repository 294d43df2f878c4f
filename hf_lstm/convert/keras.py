"""Keras: an embedding or one-hot input, LSTM, GRU or SimpleRNN layers, and a Dense layer, sequential or functional.

Three kinds of files: `.keras`, a zip of config.json and model.weights.h5; `.weights.h5`, which does not say which layers it
is of; and the older `.h5`, with the layers in an attribute. Keras is not needed to read them. A kernel is `(D, G H)`, a
recurrent kernel `(H, G H)`, the gates i f c o (LSTM) or z r h (GRU); an LSTM has one bias `(4 H,)`, a GRU two, `(2, 3 H)`.
"""

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from hf_lstm.convert.hdf5 import find, open_hdf5, read_array, read_string, read_strings
from hf_lstm.convert.keras_layers import GATES, Model, Part, describe
from hf_lstm.convert.keras_tokenizer import read_keras_vocabulary
from hf_lstm.convert.source import Layer, Source
from hf_lstm.convert.torch_files import read_weights as read_numbers
from hf_lstm.convert.torch_lstm import Options
from hf_lstm.convert.vocabulary import read_text

CONFIG, WEIGHTS = "config.json", "model.weights.h5"  # in a .keras file
NOT_ASKED = ("cell_type", "embedding", "recurrent", "decoder")


def read(path: Path, options: Options) -> Source:
    """
    Read a .keras, .weights.h5 or .h5 file.

    Raises:
        ValueError: if the file is damaged or refused, h5py is not installed, the configuration is missing or of another model,
            or a layer computes what no layer of this package does.
    """
    if given := [f"--{name}" for name in NOT_ASKED if getattr(options, name) is not None]:
        raise ValueError(
            f"`{' '.join(given)}` has no meaning for {path}, since files of Keras name their layers: leave it out."
        )
    origin = path if options.config is None else Path(options.config)
    asked = None if options.config is None else load_json(read_text(origin), origin)
    with open_file(path) as (file, own):
        if own is not None and options.config is not None:
            raise ValueError(f"`--config` ({options.config}) contradicts {path}, which has its own: leave it out.")
        if own is None and options.config is None:
            if not is_of_layers(file):
                raise ValueError(
                    f"{path} holds no weights of layers but {', '.join(list(file)[:5]) or 'nothing'}: give the file that "
                    "`model.save` wrote."
                )
            raise ValueError(
                f"{path} holds weights without the model: give `--config`, a file with what `model.to_json()` returns, or the "
                "config.json of its .keras file."
            )
        model = describe(own if asked is None else asked, origin)
        arrays = read_weights(file, model, path)
        has_optimizer = "optimizer_weights" in file or "optimizer" in file
    return make_source(model, arrays, has_optimizer, path, options)


@contextmanager
def open_file(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open the HDF5 file of the weights, and return it with the model's configuration, or None where there is none."""
    if not zipfile.is_zipfile(path):
        with open_hdf5(path) as file:
            text = read_string(file, "model_config", path)
            yield file, None if text is None else load_json(text, path)
        return
    with tempfile.TemporaryFile() as copy:
        try:
            with zipfile.ZipFile(path) as archive:
                check_records(archive, path)
                config = load_json(archive.read(CONFIG).decode("utf-8", "replace"), path)
                with archive.open(WEIGHTS) as record:
                    shutil.copyfileobj(record, copy)
        except (zipfile.BadZipFile, RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"{path} is incomplete or damaged ({error}): copy or download it again.") from error
        with open_hdf5(path, cast(Any, copy)) as file:
            yield file, config


def check_records(archive: zipfile.ZipFile, path: Path) -> None:
    """Check the names and sizes of a .keras file before anything of it is read."""
    records = {record.filename: record for record in archive.infolist()}
    if WEIGHTS not in records and "model.weights.npz" in records:
        raise ValueError(
            f"{path} holds its weights as model.weights.npz, which may hold pickled objects: it is refused. Load it with Keras and "
            "h5py installed, and save it again."
        )
    if missing := [name for name in (CONFIG, WEIGHTS) if name not in records]:
        raise ValueError(f"{path} is a zip file without {' and '.join(missing)}: give a file that `model.save` wrote.")
    needed = [records[name] for name in (CONFIG, WEIGHTS)]
    size = sum(record.file_size for record in needed)
    if size > path.stat().st_size or any(record.compress_type != zipfile.ZIP_STORED for record in needed):
        raise ValueError(
            f"{path} would unpack to {size:,} bytes from {path.stat().st_size:,}, and Keras compresses nothing: it was packed again. "
            f"Unpack one that you trust, and give its {WEIGHTS} with `--config {CONFIG}`."
        )


def refuse_folder(path: Path) -> None:
    """Raise `ValueError` for a folder of TensorFlow or Keras, with the lines that make a file of it."""
    if (path / "saved_model.pb").exists() or (path / "keras_metadata.pb").exists() or (path / "variables").is_dir():
        raise ValueError(
            f"{path} is a TensorFlow SavedModel, which only TensorFlow reads. These two lines, run where it is installed, save the "
            "model as a file to convert (from TensorFlow 2.16 on with `import tf_keras` instead of tf.keras):\n"
            f"    model = tf.keras.models.load_model({str(path)!r})\n"
            '    model.save("model.keras")'
        )
    if (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
        raise ValueError(f"{path} is an unpacked .keras file: give {path / WEIGHTS} with `--config {path / CONFIG}`.")


def load_json(text: str, path: Path) -> Any:
    try:
        content = json.loads(text)
        return json.loads(content) if isinstance(content, str) else content  # json.dump(model.to_json(), file)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: the configuration of the model is not valid JSON ({error}).") from error


def is_of_layers(file: Any) -> bool:
    return any(name in file for name in ("layers", "_layer_checkpoint_dependencies", "model_weights")) or any(
        name.startswith("layer_names") for name in file.attrs
    )


def read_weights(file: Any, model: Model, path: Path) -> list[list[torch.Tensor]]:
    """Return the weights of each part in the order of `model.parts`, kernels with the rows that the file has as columns."""
    stored = [part for part in model.parts if part.filed]
    root = next((name for name in ("layers", "_layer_checkpoint_dependencies") if name in file), None)
    if root is not None:
        group = find(file, root, path)
        datasets = [datasets_of(find(group, part.filed, path), path) for part in stored]
        foreign = [name for name in group if name not in model.groups]
    elif is_of_layers(file):
        group = file if "model_weights" not in file else find(file, "model_weights", path)
        datasets = []
        for layer in read_strings(group, "layer_names", path) or []:
            held = find(group, layer, path)
            names = None if held is None else read_strings(held, "weight_names", path)
            datasets += [[find(held, name, path) for name in names]] if names else []
        foreign = [f"{len(datasets)} layers with weights"] if len(datasets) != len(stored) else []
    else:
        raise ValueError(
            f"{path} holds no weights of layers but {', '.join(list(file)[:5]) or 'nothing'}: give the file that `model.save` wrote."
        )
    if foreign:
        raise ValueError(
            f"{path} holds {', '.join(foreign[:5])}, and the configuration has {', '.join(part.kind for part in stored)} with "
            "weights: it is that of another model."
        )
    for part, found in zip(stored, datasets, strict=True):
        shapes = [getattr(dataset, "shape", None) for dataset in found]
        if shapes != part.shapes:
            raise ValueError(
                f"{path}: the weights of {part.kind} have the shapes {shapes}, and {part.shapes} by the configuration: it is that of "
                "another model, or the file is damaged."
            )
    return [read_part(part, found, path) for part, found in zip(stored, datasets, strict=True)]


def read_part(part: Part, datasets: list[Any], path: Path) -> list[torch.Tensor]:
    kernels = {"Embedding": 0, "Dense": 1}.get(part.kind, 2)
    arrays = []
    for index, dataset in enumerate(datasets):
        (array,) = read_numbers({dataset.name: read_array(dataset, path)}, [dataset.name], path).values()
        arrays.append(array.t().contiguous() if index < kernels else array)
    return arrays


def datasets_of(group: Any, path: Path) -> list[Any]:
    """Return the datasets 0, 1, ... of a group."""
    return [] if group is None else [find(group, str(index), path) for index in range(len(group))]


def make_source(
    model: Model, arrays: list[list[torch.Tensor]], has_optimizer: bool, path: Path, options: Options
) -> Source:
    """Return the source: embedding, recurrent layers and decoder, of the wider of their types."""
    widest = torch.float64 if any(a.dtype == torch.float64 for part in arrays for a in part) else torch.float32
    arrays = [[array.to(widest) for array in part] for part in arrays]
    if model.parts[0].kind == "one-hot":
        kernel = arrays[0][0]
        smaller = torch.eye(min(kernel.shape), dtype=widest)
        if kernel.shape[1] <= kernel.shape[0]:
            arrays.insert(0, [smaller])
        else:  # each token's column of the kernel is its embedding
            arrays[0][0] = smaller
            arrays.insert(0, [kernel.t().contiguous()])
    (embedding,), *recurrent, decoder = arrays
    first = model.parts[1]
    layers = []
    for W, U, *bias in recurrent:
        both = list(bias[0]) if bias and first.kind == "GRU" else bias
        layers.append(Layer(W, U, *both))
    cell_type = f"rnn_{first.config['activation']}" if first.kind == "SimpleRNN" else first.kind.lower()
    vocabulary, notes = read_keras_vocabulary(options.vocabulary, len(embedding), model.mask_zero)
    return Source(
        title="Keras",
        cell_type=cell_type,
        embedding=embedding,
        layers=layers,
        decoder=decoder[0],
        decoder_bias=decoder[1] if len(decoder) > 1 else None,
        vocabulary=vocabulary,
        gates=GATES[first.kind],
        notes=[*(["The state of the optimizer was left out."] if has_optimizer else []), *model.notes, *notes],
    )
