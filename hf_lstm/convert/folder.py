"""Convert a checkpoint of another program into a model folder, with its tokenizer, its card and a check."""

import hashlib
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import DynamicCache, PreTrainedTokenizerBase

from hf_lstm.convert import awd_lstm_lm, char_rnn, fastai, flair, keras, torch_lstm, torch_rnn, word_language_model
from hf_lstm.convert.source import Source, build_model, source_logits
from hf_lstm.convert.torch_lstm import Options
from hf_lstm.convert.vocabulary import make_tokenizer, read_text
from hf_lstm.model.cells_lstm import CELLS
from hf_lstm.model.configuration_lstm import DROPOUTS
from hf_lstm.model.modeling_lstm import LSTMForCausalLM
from hf_lstm.tokenizers import encode

FORMATS: dict[str, Callable[[Path, Options], Source]] = {
    "torch-lstm": torch_lstm.read,
    "word-language-model": word_language_model.read,
    "awd-lstm-lm": awd_lstm_lm.read,
    "fastai": fastai.read,
    "flair": flair.read,
    "torch-rnn": torch_rnn.read,
    "char-rnn": char_rnn.read,
    "keras": keras.read,
}
TEMPLATE = Path(__file__).parent.parent / "templates" / "converted_card.md"
CHECKED_TOKENS = 200
LONGEST_TEXT = 20_000  # characters in which these tokens are looked for
LARGEST_DIFFERENCE = 1e-4  # between the two losses: nats per token, relative for losses above 1


class Conversion(NamedTuple):
    """
    The result of a conversion.

    Args:
        model (`LSTMForCausalLM`): The model, as loaded from its folder.
        tokens (`int`): Number of tokens that were predicted for the check.
        source_loss (`float`): Their loss by the source's own weights and equations, in nats per token.
        loss (`float`): Their loss by the model, in nats per token.
        notes (`list[str]`): Sentences on what was left out or taken.
    """

    model: LSTMForCausalLM
    tokens: int
    source_loss: float
    loss: float
    notes: list[str]


def convert_checkpoint(
    format: str,
    path: str | Path,
    output_dir: str | Path,
    options: Options | None = None,
    text: str | Path | None = None,
) -> Conversion:
    """
    Convert a checkpoint into a folder that `AutoModelForCausalLM` and `AutoTokenizer` load: weights, config, tokenizer and
    a model card. Nothing of the file is run. The loss of a text is computed twice, by the source's weights and equations in
    numpy and by the model loaded from the folder.

    Args:
        format (`str`): The program that wrote it, a key of `FORMATS`.
        path (`str` or `Path`): The file.
        output_dir (`str` or `Path`): The folder, new or empty. It is written whole or not at all.
        options (`Options`, *optional*): The vocabulary, and what else the file does not say.
        text (`str` or `Path`, *optional*):
            A text file, whose first tokens are predicted for the check; by default the vocabulary's own first entries.

    Raises:
        ValueError: if the file is damaged or refused, the model cannot be reproduced exactly, the vocabulary has another
            size, or the two losses differ.
        FileExistsError: if `output_dir` holds anything.
        FileNotFoundError: if `path` does not name a file.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` ({format!r}) must be one of {', '.join(FORMATS)}.")
    path, output = Path(path), Path(output_dir).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"`--output_dir` ({output}) is not empty: name a new folder.")
    keras.refuse_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: name the checkpoint.")
    if not existing_parent(output).is_dir():
        raise NotADirectoryError(
            f"`--output_dir` ({output_dir}) lies in a file, {existing_parent(output)}: name a folder."
        )
    refuse_elmo(path)
    source = FORMATS[format](path, options or Options())
    tokenizer = make_tokenizer(source.vocabulary)
    ids = ids_to_check(source, tokenizer, text)
    notes, title, preface, unit = source.notes, source.title, source.preface, source.vocabulary.unit
    model = build_model(source)
    expected, loss = both_losses(source, model, ids)
    if not abs(loss - expected) <= LARGEST_DIFFERENCE * max(1, abs(expected)):
        raise ValueError(
            f"{path}: the loss of {len(ids) - 1:,} tokens is {expected:.6f} nats by its own weights and {loss:.6f} by the "
            "converted model, and they must agree: nothing was written. If one is not a number, the states of this model grow "
            "without bound on this text; give another with `--text`."
        )
    with tempfile.TemporaryDirectory(dir=existing_parent(output), prefix=f".{output.name}.") as temporary:
        folder = Path(temporary) / output.name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        first = first_logits(model, ids[0])
        del source, model  # a second model would not fit beside them on a machine that just holds them
        model = LSTMForCausalLM.from_pretrained(folder)
        if not torch.allclose(first_logits(model, ids[0]), first, atol=1e-5):
            raise ValueError(
                f"{path}: the saved model differs from the converted one: this is a fault; nothing was written."
            )
        result = Conversion(model, len(ids) - 1, expected, loss, notes)
        card = render_card(result, path, title, preface, unit, output.name, tokenizer)
        (folder / "README.md").write_text(card, encoding="utf-8")
        output.mkdir(parents=True, exist_ok=True)
        files = sorted(
            folder.iterdir(), key=lambda file: file.name == "config.json"
        )  # last: it makes a folder a model
        for file in files:
            file.rename(output / file.name)
    return result


def both_losses(source: Source, model: LSTMForCausalLM, ids: list[int]) -> tuple[float, float]:
    """
    Return the loss of a text by the source's weights and equations, and by the model, in nats per token. Each step of both
    starts from the state that the model has reached, so that rounding does not add up.
    """
    cache = DynamicCache(config=model.config)
    losses = []
    for token, following in itertools.pairwise(ids):
        states = [state_of(layer, width) for layer, width in zip(cache.layers, model.config.cell_sizes, strict=True)]
        with torch.no_grad(), numpy.errstate(over="ignore", invalid="ignore"):  # which the loss shows
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
            both = (torch.from_numpy(source_logits(source, token, states)), logits)
        losses.append([-part.double().log_softmax(-1)[following].item() for part in both])
    expected, found = numpy.mean(losses, axis=0).tolist()
    return expected, found


def state_of(layer, width: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return h and c of a cache layer, `(H,)` each: zeros before the first token, and for a cell without c."""
    h, c = (getattr(layer, name, None) for name in ("keys", "values"))
    zeros = numpy.zeros(width, dtype=numpy.float32)
    h, c = (zeros if part is None or not part.numel() else part[0].numpy().copy() for part in (h, c))
    return h, c


def first_logits(model: LSTMForCausalLM, token: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[token]])).logits


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above a path that exists, on whose file system it will lie."""
    return next(parent for parent in path.parents if parent.exists())


def refuse_elmo(path: Path) -> None:
    """Raise `ValueError` for the weights (HDF5) or the options (JSON) of an ELMo."""
    with path.open("rb") as file:
        begin = file.read(1000)
        is_weights = begin.startswith(b"\x89HDF") and any(
            b"MultiRNNCell" in piece for piece in iter(lambda: file.read(1 << 24), b"")
        )
    if is_weights or (begin.lstrip().startswith(b"{") and b'"char_cnn"' in begin):
        raise ValueError(
            f"{path} is an ELMo, which reads in both directions and embeds words by a network of their characters: it is not a "
            "language model that writes, and is refused."
        )


def ids_to_check(source: Source, tokenizer: PreTrainedTokenizerBase, text: str | Path | None) -> list[int]:
    """Return at most `CHECKED_TOKENS` ids, of a text or the first of the vocabulary."""
    if text is None:
        return [index % len(source.embedding) for index in range(CHECKED_TOKENS)]
    content = read_text(Path(text))
    if len(content) > LONGEST_TEXT:
        content = content[:LONGEST_TEXT].rsplit(maxsplit=1)[0]
    ids = encode([content], tokenizer, direction=source.direction)[0][:CHECKED_TOKENS].tolist()
    if len(ids) < 2:
        raise ValueError(f"`--text` ({text}) makes {len(ids)} tokens: give a text of at least 2.")
    return ids


def render_card(
    result: Conversion, path: Path, title: str, preface: str, unit: str, name: str, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Render the model card: where the weights came from, what was left out, and the two losses."""
    config = result.model.config
    cell = CELLS[config.cell_type]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["hf-lstm", "lstm"], model_name=name
    )
    values = {
        "name": name,
        "title": title,
        "preface": preface,
        "unit": unit,
        "cell": cell.title[0].upper() + cell.title[1:],
        "parameters": result.model.num_parameters(),
        "layers": " + ".join(map(str, config.cell_sizes)),
        "vocab_size": config.vocab_size,
        "state_size": config.state_size,
        "file": path.name,
        "digest": digest,
        "result": result,
        "dropouts": {name: getattr(config, name) for name in DROPOUTS if getattr(config, name)},
        "unknown": tokenizer.unk_token,
        "line_end": tokenizer.eos_token if unit == "words" else None,
        "backward": config.direction == "backward",
        "is_padded": tokenizer.pad_token is not None,
    }
    return str(ModelCard.from_template(metadata, template_path=str(TEMPLATE), **values))
