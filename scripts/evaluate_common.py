"""Arguments, token streams and results that the tasks of scripts/evaluate.py share."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from command_line import flag
from standard_library import DESCRIPTION, standard_library

from hf_lstm import TokenStream, load_corpus
from hf_lstm.hub import read_json
from hf_lstm.tokenizers import direction_of
from hf_lstm.unknown import drops_text, unknown_id


@dataclass
class Arguments:
    """Arguments of every task."""

    model: str | None = flag("A model's folder, an adapter's (LoRA), or its name on the Hub.")
    trust_remote_code: bool = flag("Whether to run code that comes with the model.", False)
    output_file: str | None = flag("Where to write the result too.")


def corpus_of(arguments, **files: str | None):
    """
    Load the corpus of `--train_file`, split as in training, or without it that of the model's own run, and tell whether
    documents start from a zero state there. `files` are others that take the place of splits, by their flags.
    """
    files["validation_file"] = arguments.validation_file
    if arguments.train_file is not None:
        read = arguments.reading | files
        return load_corpus(arguments.train_file, join_records=arguments.join_records, **read), False
    for name, file in files.items():
        if file is not None:
            raise ValueError(
                f"`--{name}` {file} needs `--train_file`: name the text that the model was trained on too, or leave both out."
            )
    return corpus_of_run(arguments.model, "train_file")


def corpus_of_run(model: str, flag: str = "file"):
    """
    Load the corpus that a model was trained on, as its run.json tells, and tell whether documents start from a zero state
    there. Raises `ValueError` for a corpus that is not known or not here, which `flag` would name.
    """
    from train_arguments import data_of_command

    remedy = f"name a text to measure, such as `--{flag} mytext.txt`"
    folder = Path(model).parent if Path(model).name.startswith("checkpoint-") else Path(model)
    if not (folder / "run.json").is_file():
        raise ValueError(
            f"`--{flag}` is missing, and {model} holds no run.json that tells what it was trained on: {remedy}."
        )
    run = read_json(folder / "run.json")
    try:
        data, card = data_of_command(run["command"])
        name = data.train_file or data.dataset_name
        if name is None and card.data_description is None and run["data"] != DESCRIPTION:
            raise ValueError(f"it was trained on {run['data']}")
        corpus = load_corpus(
            standard_library() if name is None else name,
            data.dataset_config_name,
            data.validation_file,
            data.test_file,
            join_records=data.join_records,
            **data.reading,
        )
        return corpus, data.starts_documents_at_zero
    except (ValueError, OSError) as error:
        raise ValueError(
            f"`--{flag}` is missing, and the text that {model} was trained on is not here ({error}): {remedy}."
        ) from error


def resets_of(arguments, of_run: bool) -> bool:
    """Return `--reset_at_documents`, or else whether the run starts documents from a zero state, and log that it does."""
    if arguments.reset_at_documents is not None:
        return arguments.reset_at_documents
    if of_run:
        log("Documents start from a zero state, as in the run: `--reset_at_documents false` carries it on.")
    return of_run


def stream_of(texts, model, tokenizer) -> TokenStream:
    """Tokenize texts, and log the number of unknown tokens."""
    tokens = TokenStream.from_documents(texts, tokenizer, direction_of(model))
    counts = tokens.counts(model.config.vocab_size)
    index = unknown_id(tokenizer)
    unknown = counts[index] if index not in (None, tokenizer.eos_token_id) else 0
    if unknown:
        log(f"{unknown:,} of {len(tokens):,} tokens are unknown to the tokenizer: bits per byte mean little")
    if drops_text(tokenizer):
        log("The tokenizer drops text that it lacks in silence: bits per byte mean little where it lacks something")
    return tokens


def as_json(result: dict) -> str:
    """Format a result as JSON, with null for infinity and NaN, which JSON lacks."""
    return json.dumps(json.loads(json.dumps(result), parse_constant=lambda name: None), indent=2)


def write_result(text: str, arguments: Arguments) -> None:
    """Print the result, and write it to `--output_file`."""
    print(text)
    if arguments.output_file is not None:
        Path(arguments.output_file).write_text(text + "\n", encoding="utf-8", newline="\n")
        log(f"The result is in {arguments.output_file}")


def log(text: str) -> None:
    print(text, file=sys.stderr)
