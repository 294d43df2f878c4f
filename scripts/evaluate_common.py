"""Arguments, token streams and results that the tasks of scripts/evaluate.py share."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hf_lstm import TokenStream
from hf_lstm.tokenizers import direction_of
from hf_lstm.unknown import drops_text, unknown_id


def flag(help, default=None, **options):
    return field(default=default, metadata={"help": help}, **options)


@dataclass
class Arguments:
    """Arguments of every task."""

    model: str | None = flag("A model's folder, an adapter's (LoRA), or its name on the Hub.")
    trust_remote_code: bool = flag("Whether to run code that comes with the model.", False)
    output_file: str | None = flag("Where to write the result too.")


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
