"""Measure how well a model predicts a text, with its state carried from beginning to end.

python scripts/evaluate.py --model runs/first
python scripts/evaluate.py --model runs/shakespeare --file tinyshakespeare.txt --split validation --reset_every 256
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_lstm import TokenStream, evaluate_stream, load_corpus
from hf_lstm.data import joined, load_documents


@dataclass
class Arguments:
    """What to measure."""

    model: str = field(metadata={"help": "A model's folder, or its name on the Hub."})
    file: str | None = field(
        default=None, metadata={"help": "Text, .jsonl, .csv or .parquet file; Python's standard library without it."}
    )
    split: str | None = field(
        default=None,
        metadata={
            "help": "`train`, `validation` or `test` as scripts/train.py splits the corpus; all of a file without."
        },
    )
    text_column: str = field(default="text", metadata={"help": "The column of the records that holds the text."})
    join_records: bool = field(
        default=False, metadata={"help": "Whether the records are pieces of one text, as in training."}
    )
    batch_size: int = field(
        default=1, metadata={"help": "Parts read side by side, each without a history: 1 is exact."}
    )
    bptt_length: int = field(default=1024, metadata={"help": "Tokens read at once: memory, not the result."})
    reset_at_documents: bool = field(default=False, metadata={"help": "Start every document from a zero state."})
    reset_every: int | None = field(default=None, metadata={"help": "Start from a zero state after so many tokens."})
    output_file: str | None = field(default=None, metadata={"help": "Where to write the result as JSON too."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code that comes with the model."})


def main(arguments: Arguments) -> None:
    if arguments.output_file is not None and not Path(arguments.output_file).parent.is_dir():
        raise ValueError(f"`--output_file` {arguments.output_file} lies in no folder: make the folder first.")
    folder = Path(arguments.model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: name the folder of a saved model.")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=arguments.trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, trust_remote_code=arguments.trust_remote_code, device_map="auto"
    )
    if arguments.file is not None and arguments.split is None:
        corpus, split = load_documents(arguments.file, text_column=arguments.text_column), "train"
        corpus = {name: joined(rows) if arguments.join_records else rows for name, rows in corpus.items()}
    else:
        corpus = load_corpus(arguments.file, text_column=arguments.text_column, join_records=arguments.join_records)
        split = arguments.split or "test"
    if split not in corpus:
        raise ValueError(f"`--split` {split} is not among those of the corpus: {', '.join(corpus)}.")
    stream = TokenStream.from_documents(corpus[split], tokenizer)
    counts = stream.counts(model.config.vocab_size)
    unknown = counts[tokenizer.unk_token_id] if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id) else 0
    if unknown:
        print(
            f"{unknown:,} of {len(stream):,} tokens are unknown to the tokenizer: bits per byte mean little",
            file=sys.stderr,
        )
    result = evaluate_stream(
        model,
        stream,
        batch_size=arguments.batch_size,
        bptt_length=arguments.bptt_length,
        reset_at_documents=arguments.reset_at_documents,
        reset_every=arguments.reset_every,
    )
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output_file is not None:
        Path(arguments.output_file).write_text(text + "\n")


if __name__ == "__main__":
    try:
        main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
