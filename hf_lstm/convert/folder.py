"""Convert a checkpoint of another program into a model folder, with its tokenizer, its card and a check."""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedTokenizerBase

from hf_lstm.convert import awd_lstm_lm, torch_lstm, word_language_model
from hf_lstm.convert.source import Source, build_model, source_loss
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
}
TEMPLATE = Path(__file__).parent.parent / "templates" / "converted_card.md"
CHECKED_TOKENS = 200
LARGEST_DIFFERENCE = 1e-4  # between the two losses, in nats per token, or of losses above 1 nat in parts of them


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
    """
    if format not in FORMATS:
        raise ValueError(f"`format` ({format!r}) must be one of {', '.join(FORMATS)}.")
    path, output = Path(path), Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"`--output_dir` ({output}) is not empty: name a new folder.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: name the checkpoint.")
    source = FORMATS[format](path, options or Options())
    tokenizer = make_tokenizer(source.vocabulary)
    ids = ids_to_check(source, tokenizer, text)
    expected = source_loss(source, ids)
    notes, title, unit = source.notes, source.title, source.vocabulary.unit
    model = build_model(source)
    for role in ("pad", "bos", "eos"):
        for config in (model.config, model.generation_config):
            setattr(config, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        folder = Path(temporary) / output.name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del source, model  # a second model would not fit beside them on a machine that just holds them
        model = LSTMForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            batch = torch.tensor([ids])
            loss = model(input_ids=batch, labels=batch).loss.item()
        if not abs(loss - expected) <= LARGEST_DIFFERENCE * max(1, abs(expected)):
            raise ValueError(
                f"{path}: the loss of {len(ids) - 1:,} tokens is {expected:.6f} nats by its own weights and {loss:.6f} by the "
                "converted model: they must agree. This is a fault of the converter; nothing was written."
            )
        result = Conversion(model, len(ids) - 1, expected, loss, notes)
        card = render_card(result, path, title, unit, output.name, tokenizer)
        (folder / "README.md").write_text(card, encoding="utf-8")
        folder.rename(output)
    return result


def ids_to_check(source: Source, tokenizer: PreTrainedTokenizerBase, text: str | Path | None) -> list[int]:
    """Return at most `CHECKED_TOKENS` ids, of a text or the first of the vocabulary."""
    if text is None:
        return [index % len(source.embedding) for index in range(CHECKED_TOKENS)]
    ids = encode([read_text(Path(text))[: 100 * CHECKED_TOKENS]], tokenizer)[0][:CHECKED_TOKENS].tolist()
    if len(ids) < 2:
        raise ValueError(f"`--text` ({text}) makes {len(ids)} tokens: give a text of at least 2.")
    return ids


def render_card(
    result: Conversion, path: Path, title: str, unit: str, name: str, tokenizer: PreTrainedTokenizerBase
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
        "is_padded": tokenizer.pad_token is not None,
    }
    return str(ModelCard.from_template(metadata, template_path=str(TEMPLATE), **values))
