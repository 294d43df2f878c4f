"""Measure how well a model predicts: a corpus, each word of a sentence, one of two sentences, or while it adapts; how
far its gradients reach, how much it remembers, and how it bears noise.

python scripts/evaluate.py stream --model runs/shakespeare --file tinyshakespeare.txt --split validation
python scripts/evaluate.py surprisal --model runs/shakespeare --text "The horse raced past the barn fell." --by word
python scripts/evaluate.py pairs --model runs/shakespeare --file blimp.jsonl
python scripts/evaluate.py adapt --model runs/shakespeare --train_file tinyshakespeare.txt
python scripts/evaluate.py gradients --model runs/shakespeare runs/other --file tinyshakespeare.txt --picture flow.png
python scripts/evaluate.py privacy --model runs/shakespeare --train_file tinyshakespeare.txt --card true
python scripts/evaluate.py noise --model runs/shakespeare --train_file tinyshakespeare.txt --picture noise.png

The result goes to the standard output, as JSON or CSV, and to `--output_file`; messages go to the standard error.
`evaluate.py TASK --help` lists the flags of a task. `stream` is the task where none is named.
"""

import csv
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from command_line import Parser, flag
from evaluate_common import Arguments, as_json, corpus_of, corpus_of_run, log, resets_of, stream_of, write_result
from evaluate_noise import Noise, noise
from evaluate_pictures import PICTURES, draw_gradients, draw_positions, draw_surprisal
from evaluate_privacy import Privacy, privacy
from reading import Reading
from saved_models import load_model
from screen import prepare_screen
from standard_library import standard_library

from hf_lstm import TokenStream, evaluate_stream, load_corpus, minimal_pairs, surprisal, word_surprisal
from hf_lstm.data import joined, load_documents, read_records, read_text
from hf_lstm.data.corpora import source_of
from hf_lstm.data.lanes import check_at_least_one
from hf_lstm.data.records import find_text_column
from hf_lstm.evaluation import (
    DynamicEvaluation,
    NeuralCache,
    check_tokenizer,
    fit_temperature,
    gradient_flow,
    gradient_rms,
    losses_by_position,
)
from hf_lstm.tokenizers import direction_of


@dataclass
class Stream(Reading, Arguments):
    """The loss of a corpus, with the state carried from beginning to end."""

    file: str | None = flag(
        "Text, .jsonl, .csv or .parquet file, folder or pattern; without it the validation text of the model's own run."
    )
    split: str | None = flag(
        "`train`, `validation` or `test` as scripts/train.py splits the corpus; all of a file without."
    )
    join_records: bool = flag("Whether the records are pieces of one text, as in training.", False)
    batch_size: int = flag("Parts read side by side, each without a history: 1 is exact.", 1)
    bptt_length: int = flag("Tokens read at once: memory, not the result.", 1024)
    reset_at_documents: bool | None = flag(
        "Start every document from a zero state; without it as in the model's own run, if that is the text."
    )
    reset_every: int | None = flag("Start from a zero state after so many tokens.")
    temperature: float = flag("Divisor of the logits.", 1.0)
    picture: str | None = flag(
        "Where to draw the loss by the tokens read since a zero state: the value of the memory."
    )


@dataclass
class Surprisal(Reading, Arguments):
    """Surprisal of each token, word or region of texts."""

    text: str | None = flag("The text, instead of a file.")
    file: str | None = flag(
        "Texts: one in each line of a text file, or of each record of a .jsonl, .json, .csv or .parquet file."
    )
    whole: bool = flag("Whether a text file is one text, line ends included, instead of one text per line.", False)
    by: str = flag("`token`, `word` or `region`: a field `regions` of the records, as [[start, end], ...].", "word")
    base: str = flag("`2` for bits, `e` for nats.", "2")
    start_token: str | None = flag(
        "Token that the first one read is predicted from, such as <eos>; without it that one has no surprisal."
    )
    entropy: bool = flag("Whether to add the entropy before each row, its reduction, and a token's rank.", False)
    top_k: int = flag("The number of likeliest tokens to add, with `--by token`.", 0)
    adapt_file: str | None = flag("Text to adapt to first: adds `surprisal_adapted`, that of the adapted model.")
    adapt_learning_rate: float | None = flag("Learning rate of the adaptation; by default the papers'.")
    picture: str | None = flag("Where to draw the surprisal over the first text.")


@dataclass
class Pairs(Arguments):
    """Accuracy on minimal pairs, such as BLiMP's: how often the good sentence is the more probable one."""

    file: str | None = flag("A .jsonl file whose records have `sentence_good` and `sentence_bad`.")
    encoding: str = flag("The encoding of the file, as Python names it.", "utf-8")
    start_token: str | None = flag("Token that the first one is predicted from, such as <eos>.")


@dataclass
class Adapt(Reading, Arguments):
    """The gain by a fitted temperature, a neural cache and dynamic evaluation, on test text."""

    train_file: str | None = flag(
        "The text that the model was trained on, whose gradients scale dynamic evaluation; without it that of its own run."
    )
    validation_file: str | None = flag("Text that the temperature is fitted on, split as in training.")
    test_file: str | None = flag(
        "Text that is measured; without it the temperature is fitted on the first half of the validation text, and the "
        "second half is measured."
    )
    join_records: bool = flag("Whether the records are pieces of one text, as in training.", False)
    reset_at_documents: bool | None = flag(
        "Start every document from a zero state; without it as in the model's own run, if that is the text."
    )
    cache_size: int = flag("Tokens in the cache.", NeuralCache.size)
    cache_theta: float = flag("The weight of the similarity of states in it.", NeuralCache.theta)
    cache_weight: float = flag("The share of the cache in each prediction.", NeuralCache.weight)
    rule: str = flag("`rms`: steps scaled by the gradients of the training text; `sgd`: plain ones.", "rms")
    learning_rate: float | None = flag("Learning rate of dynamic evaluation; by default the papers'.")
    decay: float | None = flag("The share of the distance to the trained weights that each step goes back.")
    segment_length: int = flag("Tokens between two steps.", DynamicEvaluation.segment_length)
    max_segments: int = flag("Segments of training text whose gradients are read.", 200)


@dataclass
class Gradients(Reading, Arguments):
    """The norm of the gradient of the loss by earlier states, by their distance: do gradients vanish or explode?"""

    model: list[str] | None = field(
        default=None, metadata={"help": "Folders of one or several models, or their names on the Hub."}
    )
    file: str | None = flag(
        "Text, .jsonl, .csv or .parquet file, folder or pattern; Python's standard library without it."
    )
    split: str | None = flag(
        "`train`, `validation` or `test` as scripts/train.py splits the corpus; all of a file without."
    )
    join_records: bool = flag("Whether the records are pieces of one text, as in training.", False)
    tokens: int = flag("Tokens to read, from the beginning.", 1600)
    positions: int = flag("Losses whose gradients are averaged, evenly spaced over these tokens.", 32)
    max_distance: int = flag("The largest distance, in tokens.", 200)
    picture: str | None = flag("Where to draw the norms by the distance, a curve for each model and layer.")


def read_split(arguments: Stream | Gradients):
    """Read the texts of `--file` and `--split`, and tell whether their run starts documents from a zero state."""
    resets = False
    if arguments.file is None and isinstance(arguments, Stream):
        (corpus, resets), split = corpus_of_run(arguments.model), arguments.split or "validation"
        log(f"The text is the {split} text of the run that {arguments.model} is of.")
    elif arguments.file is not None and arguments.split is None:
        corpus, split = load_documents(arguments.file, **arguments.reading), "train"
        corpus = {name: joined(rows) if arguments.join_records else rows for name, rows in corpus.items()}
    else:
        source = standard_library() if arguments.file is None else arguments.file
        corpus = load_corpus(source, join_records=arguments.join_records, **arguments.reading)
        split = arguments.split or "test"
    if split not in corpus:
        raise ValueError(f"`--split` {split} is not among those of the corpus: {', '.join(corpus)}.")
    return corpus[split], resets


def stream(arguments: Stream, model, tokenizer) -> None:
    texts, of_run = read_split(arguments)
    resets = {"reset_at_documents": resets_of(arguments, of_run), "reset_every": arguments.reset_every}
    if arguments.picture is not None and not any(resets.values()):
        raise ValueError("`--picture` shows what follows a zero state: add `--reset_at_documents` or `--reset_every`.")
    tokens = stream_of(texts, model, tokenizer)
    result = evaluate_stream(
        model,
        tokens,
        batch_size=arguments.batch_size,
        bptt_length=arguments.bptt_length,
        temperature=arguments.temperature,
        **resets,
    )
    for name, value in result.items():
        numbers = value if isinstance(value, list) else [value]
        log(f"{name:>24}  " + " to ".join(f"{n:.4f}" if isinstance(n, float) else f"{n:,}" for n in numbers))
    if result["loss"] > math.log(model.config.vocab_size):
        log("The model does worse than one that finds all tokens equally likely: are text and tokenizer its own?")
    write_result(as_json(result), arguments)
    if arguments.picture is not None:
        nats, counts = losses_by_position(model, tokens, bptt_length=arguments.bptt_length, **resets)
        draw_positions(nats, counts, arguments.picture)


def surprisals(arguments: Surprisal, model, tokenizer) -> None:
    if arguments.base not in ("2", "e"):
        raise ValueError(f"`--base` {arguments.base} must be `2` or `e`.")
    if arguments.by not in ("token", "word", "region"):
        raise ValueError(f"`--by` {arguments.by} must be `token`, `word` or `region`.")
    if arguments.top_k and arguments.by != "token":
        raise ValueError(f"`--top_k` {arguments.top_k} belongs to `--by` token: leave it out, or add that.")
    texts, regions = read_texts(arguments)
    base = 2 if arguments.base == "2" else math.e
    added = {"entropy": arguments.entropy, "top_k": arguments.top_k}
    options = (tokenizer, texts, base, arguments.start_token)
    tables = [surprisal(model, *options, **added)]
    if arguments.adapt_file is not None:
        read = load_documents(arguments.adapt_file, **arguments.reading)["train"]
        dynamic = DynamicEvaluation(learning_rate=arguments.adapt_learning_rate)
        tables.append(surprisal(dynamic.adapt(model, stream_of(read, model, tokenizer)), *options))
    if arguments.by != "token":
        tables = [word_surprisal(table, texts, regions, direction_of(model)) for table in tables]
    rows = tables[0] if len(tables) == 1 else tables[0].assign(surprisal_adapted=tables[1]["surprisal"])
    unit = "bits" if base == 2 else "nats"
    log(f"{len(texts):,} texts, {len(rows):,} {arguments.by}s, {rows['surprisal'].mean():.3f} {unit} on average")
    # In quotes a line end inside a token ends no row, for whatever reads it.
    write_result(
        rows.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").removesuffix("\n"), arguments
    )
    if arguments.picture is not None:
        draw_surprisal(rows[rows["text"] == 0], arguments.by, unit, arguments.picture)


def read_texts(arguments: Surprisal) -> tuple[list[str], list | None]:
    """Read the texts, and the regions of each if `--by` is `region`."""
    if (arguments.text is None) == (arguments.file is None):
        raise ValueError("Give either a `--text` or a `--file`.")
    kind, files = ("text", []) if arguments.file is None else source_of(arguments.file)
    if arguments.by == "region" and kind not in (".jsonl", ".ndjson"):
        raise ValueError("`--by` region needs a .jsonl `--file` whose records have `regions`, as [[start, end], ...].")
    if arguments.text is not None:
        return [arguments.text], None
    if kind in (".json", ".csv", ".parquet", "folder"):
        rows = load_documents(arguments.file, streaming=True, **arguments.reading)["train"]
        return [row["text"] for row in rows], None
    if kind in ("text", "hub"):
        return [text for file in files or [Path(arguments.file)] for text in lines_of(file, arguments)], None
    column = arguments.text_column or find_text_column(files[0], arguments.encoding)
    texts, regions = [], []
    rows = ((file, *row) for file in files for row in read_records(file, arguments.encoding))
    for file, number, record in rows:
        if not isinstance(record.get(column), str):
            raise ValueError(f"Line {number} of {file} has no text in `{column}`: name another `--text_column`.")
        texts.append(record[column])
        regions.append(record.get("regions"))
        if arguments.by == "region" and not is_regions(regions[-1]):
            raise ValueError(
                f"`regions` in line {number} of {file} is {json.dumps(regions[-1])[:50]}: it must be "
                "[[start, end], ...], in characters."
            )
    return texts, regions if arguments.by == "region" else None


def lines_of(file: Path, arguments: Surprisal) -> list[str]:
    """Read the lines of a text file, or with `--whole` all of it as one text."""
    text = read_text(file, arguments.encoding)
    lines = [text] if arguments.whole else text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if "" in lines:
        raise ValueError(f"Line {lines.index('') + 1} of {file} is empty: remove it, or read it `--whole`.")
    return lines


def is_regions(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(region, list) and len(region) == 2 and all(type(number) is int for number in region)
        for region in value
    )


def pairs(arguments: Pairs, model, tokenizer) -> None:
    if arguments.file is None:
        raise ValueError("`--file` is missing: name a .jsonl file of pairs.")
    records = [record for _, record in read_records(arguments.file, arguments.encoding)]
    rows = minimal_pairs(model, tokenizer, records, arguments.start_token)
    result = figures(rows)
    for name in ("field", "linguistics_term", "UID"):
        if name in rows:
            result[name] = {
                key: figures(group) for key, group in rows.groupby([label(each, name) for each in records])
            }
            for key, group in result[name].items():
                log(f"{key:>60}  {group['accuracy']:7.2%} of {group['pairs']:,}")
    log(f"{'all':>60}  {result['accuracy']:7.2%} of {len(rows):,}")
    if result["ties"]:
        theirs = result["accuracy"] + result["ties"] / 2 / len(rows)
        log(f"ties: {result['ties']:,}, half right; BabyLM's own script counts them as right: {theirs:.2%}")
    write_result(as_json(result), arguments)


def label(record: dict, name: str) -> str:
    """Return the text of a field; another value as JSON, and a missing one as null."""
    value = record.get(name)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def figures(rows) -> dict:
    """Summarise pairs: the accuracy, and the numbers of pairs, ties and pairs with unknown words."""
    unknown = (rows["unknown_good"] + rows["unknown_bad"]) > 0
    return {
        "accuracy": float(rows["correct"].mean()),
        "pairs": len(rows),
        "ties": int(rows["tie"].sum()),
        "pairs_with_unknown_words": int(unknown.sum()),
    }


def adapt(arguments: Adapt, model, tokenizer) -> None:
    if arguments.rule not in ("rms", "sgd"):
        raise ValueError(f"`--rule` {arguments.rule} must be `rms` or `sgd`.")
    options = {"learning_rate": arguments.learning_rate, "decay": arguments.decay}
    options["segment_length"] = arguments.segment_length
    check_at_least_one(max_segments=arguments.max_segments)
    DynamicEvaluation(**options)  # refuses what cannot be before any work
    cache = NeuralCache(arguments.cache_size, arguments.cache_theta, arguments.cache_weight)
    corpus, of_run = corpus_of(arguments, test_file=arguments.test_file)
    validation = stream_of(corpus["validation"], model, tokenizer)
    if "test" in corpus:
        test = stream_of(corpus["test"], model, tokenizer)
    else:
        validation, test = halves(validation)
    resets = {"reset_at_documents": resets_of(arguments, of_run)}
    temperature = 1.0
    try:
        temperature = fit_temperature(model, validation, **resets)
    except ValueError as error:
        log(f"The temperature stays 1. {error}")
    if arguments.rule == "rms":
        training = stream_of(corpus["train"], model, tokenizer)
        lanes = min(100, max(1, (len(training) - 1) // arguments.segment_length))
        options["gradient_rms"] = gradient_rms(
            model, training, lanes, arguments.segment_length, arguments.max_segments
        )
    dynamic = DynamicEvaluation(**options)
    ways = {
        "plain": {},
        "temperature": {"temperature": temperature},
        "neural cache": {"neural_cache": cache},
        "dynamic evaluation": {"dynamic_evaluation": dynamic},
        "all": {"temperature": temperature, "neural_cache": cache, "dynamic_evaluation": dynamic},
    }
    log(f"The best temperature for the validation text is {temperature:.4f}")
    log(f"{'':>24}  nats per token  perplexity  95 % interval of the loss")
    results = {}
    for name, way in ways.items():
        result = evaluate_stream(model, test, **resets, **way)
        results[name] = {"fitted_temperature": way["temperature"]} | result if "temperature" in way else result
        low, high = result["loss_interval"]
        log(f"{name:>24}  {result['loss']:14.4f}  {result['perplexity']:10.3f}  {low:.4f} to {high:.4f}")
    write_result(as_json(results), arguments)


def gradients(arguments: Gradients, *loaded) -> None:
    """Unlike the other tasks, it takes a pair of model and tokenizer for each `--model`."""
    if arguments.tokens < (least := arguments.max_distance + arguments.positions + 1):
        raise ValueError(
            f"`--tokens` ({arguments.tokens}) must be at least {least}, `--max_distance` + `--positions` + 1."
        )
    (texts, _), results = read_split(arguments), {}
    distances = [distance for distance in TABLE if distance <= arguments.max_distance]
    log(f"{'distance in tokens':>40}" + "".join(f"{distance:>10}" for distance in distances))
    for name, (model, tokenizer) in zip(arguments.model, loaded, strict=True):
        ids = stream_of(texts, model, tokenizer)[: arguments.tokens]
        norms = gradient_flow(model, ids[None], arguments.positions, arguments.max_distance)
        results[name] = {"tokens": len(ids), "norms": norms.tolist()}
        for layer, row in enumerate(norms[:, distances]):
            log(f"{name[-30:]:>30}, layer {layer}" + "".join(f"{norm:>10.2g}" for norm in row))
    write_result(as_json(results), arguments)
    if arguments.picture is not None:
        draw_gradients({name: result["norms"] for name, result in results.items()}, arguments.picture)


def halves(tokens: TokenStream) -> tuple[TokenStream, TokenStream]:
    """Cut a stream in two, between documents if there are several."""
    starts = tokens.document_starts
    if len(starts) == 1:
        middle = len(tokens) // 2
        return TokenStream(tokens[:middle]), TokenStream(tokens[middle:])
    middle = int(starts[len(starts) // 2])
    first, second = starts[starts < middle], starts[starts >= middle] - middle
    return TokenStream(tokens[: middle + 1], first), TokenStream(tokens[middle:], second)


TABLE = (0, 1, 2, 5, 10, 20, 50, 100, 200)  # distances that `gradients` logs
TASKS = {
    "stream": (Stream, stream),
    "surprisal": (Surprisal, surprisals),
    "pairs": (Pairs, pairs),
    "adapt": (Adapt, adapt),
    "gradients": (Gradients, gradients),
    "privacy": (Privacy, privacy),
    "noise": (Noise, noise),
}


def main(task: str, arguments: Arguments) -> None:
    for name in ("output_file", "picture"):
        path = getattr(arguments, name, None)
        if path is not None and not Path(path).parent.is_dir():
            raise ValueError(f"`--{name}` {path} lies in a folder that does not exist: make the folder first.")
    if (picture := getattr(arguments, "picture", None)) is not None and Path(picture).suffix not in PICTURES:
        raise ValueError(f"`--picture` {picture} must end in one of {', '.join(PICTURES)}.")
    names = arguments.model if isinstance(arguments.model, list) else [arguments.model]
    loaded = [load(name, arguments.trust_remote_code) for name in names]
    TASKS[task][1](arguments, *(loaded if isinstance(arguments.model, list) else loaded[0]))


def load(name: str, trust_remote_code: bool):
    """Load a model and its tokenizer, after checking that they belong together."""
    model, tokenizer = load_model(name, trust_remote_code)
    check_tokenizer(model, tokenizer)
    known = max(tokenizer.get_vocab().values()) + 1
    if known < model.config.vocab_size:
        log(f"The tokenizer has {known:,} tokens and the model {model.config.vocab_size:,}: is it the model's own?")
    return model, tokenizer


if __name__ == "__main__":
    prepare_screen()
    task, *flags = sys.argv[1:] or ["stream"]
    if task in ("--help", "-h"):
        sys.exit(print(__doc__))
    if task.startswith("--"):
        task, flags = "stream", [task, *flags]
    if task not in TASKS:
        sys.exit(
            f"evaluate.py: the first argument ({task}) must be one of {', '.join(TASKS)}, or be left out for stream."
        )
    try:
        kind = TASKS[task][0]
        main(task, *Parser(kind, kind.__doc__, task).parse_args_into_dataclasses(flags))
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
