"""Train a classifier of texts on top of a language model, as ULMFiT does, and measure it.

python scripts/train.py --train_file passages.txt --output_dir runs/language
python scripts/classify.py --model runs/language --train_file train.csv --test_file test.csv --output_dir runs/classifier

The files are .csv or .jsonl, with a column for the text and one for its label. `--output_dir` receives the classifier (the
best by the accuracy on `--validation_file`, if there is one), its tokenizer, metrics.json and confusion.png: of the test
file, or else of the validation file, or, without both, of the training texts themselves. Layers learn at rates that fall
by `--layer_divisor` from the head down and are freed one an epoch, and all rates follow a slanted triangle (Howard & Ruder
2018). `--from_scratch true` begins with random weights of the same config instead, and trains all at once and alike.
"""

import json
import math
import sys
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from command_line import Parser, check_trainer_flags, flag
from evaluate_pictures import draw_confusion
from huggingface_hub.errors import StrictDataclassError
from reading import Reading
from saved_models import check_source
from screen import prepare_screen
from train_progress import ProgressLines, show_progress
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_lstm import LSTMConfig, LSTMForSequenceClassification
from hf_lstm.data.readers import kind_of
from hf_lstm.data.records import choose_column, records_of
from hf_lstm.tokenizers import direction_of, encode, in_direction
from hf_lstm.training import DivergenceCallback, GradualUnfreezingCallback, parameter_groups, slanted_triangular


@dataclass
class Arguments(Reading):
    """The texts, and the classifier."""

    model: str | None = flag("A language model's or a classifier's folder, or its name on the Hub.")
    train_file: str | None = flag(".csv or .jsonl file of labelled texts.")
    validation_file: str | None = flag("File that chooses the best epoch; without it the last one is kept.")
    test_file: str | None = flag("File that is measured at the end.")
    dataset_name: str | None = flag("A data set with `train`, `validation` and `test`, on the Hub or in a folder.")
    label_column: str = flag("The column that holds its label.", "label")
    classifier_pooling: str = flag("Outputs that a new head reads: `last`, `max`, `mean` or `concat`.", "concat")
    classifier_hidden_size: int | None = flag("Width of the block of a new head; 0 for none.", 50)
    layer_divisor: float = flag("Divisor of the learning rate from each layer to the one below.", 2.6)
    unfreeze: bool = flag("Whether the first epoch trains the head alone, the next one a layer more, and so on.", True)
    from_scratch: bool = flag("Whether to begin with random weights, all trained at once and alike.", False)


@dataclass
class Training(TrainingArguments):
    """Trainer's own arguments, with ULMFiT's Adam."""

    output_dir: str | None = flag("Folder that the run writes to; it must be empty.")
    num_train_epochs: float = flag("Passes over the training texts.", 10.0)
    learning_rate: float = flag("Highest learning rate of the head.", 1e-2)
    adam_beta1: float = flag("Decay of Adam's first moment.", 0.7)
    adam_beta2: float = flag("Decay of Adam's second moment.", 0.99)
    per_device_train_batch_size: int = flag("Texts of a batch.", 32)
    per_device_eval_batch_size: int = flag("Texts of a batch in evaluation.", 64)
    logging_steps: float = flag("Steps between two logs of the training loss.", 50)
    report_to: str = flag("`tensorboard`, `wandb`, ... to watch the run there.", "none")
    dataloader_pin_memory: bool = flag("Whether batches are copied to a GPU from pinned memory.", False)
    max_steps: int = flag("Steps to train, instead of `--num_train_epochs`.", -1)
    weight_decay: float = flag("Weight decay of Adam.", 0.0)
    bf16: bool = flag("Compute in bfloat16.", False)
    use_cpu: bool = flag("Train on the CPU although there is a GPU.", False)
    seed: int = flag("Seed of weights and order.", 42)

    def __post_init__(self):
        check_trainer_flags(self)
        super().__post_init__()


Rows = tuple[list[str], list[str]]  # texts and their labels


def read_rows(path: str, arguments: Arguments) -> Rows:
    """Read the texts and labels of a file."""
    if kind_of(Path(path)) not in (".jsonl", ".ndjson", ".json", ".csv"):
        raise ValueError(f"{path} must be a .csv or .jsonl file of labelled texts, with a column for each: write one.")
    records = list(records_of(Path(path), arguments.encoding, arguments.csv_delimiter))
    return checked_rows(records, arguments, path)


def checked_rows(records: list[tuple[str, dict]], arguments: Arguments, name: str) -> Rows:
    """Return the texts and labels of records, each with its place. Raises `ValueError` for one that lacks either."""
    if not records:
        raise ValueError(f"{name} holds no row: give labelled texts.")
    label_column, first = arguments.label_column, records[0][1]
    text_column = arguments.text_column or choose_column(
        {column: isinstance(value, str) for column, value in first.items() if column != label_column}, name
    )
    texts, labels = [], []
    for place, record in records:
        for flag_of, column, kinds in (("text_column", text_column, str), ("label_column", label_column, str | int)):
            if column not in record:
                columns = ", ".join(f"`{other}`" for other in record)
                raise ValueError(
                    f"{name} has no column `{column}` in {place}, only {columns}: name another by `--{flag_of}`."
                )
            if not isinstance(record[column], kinds) or record[column] == "":
                raise ValueError(
                    f"{name} has nothing in `{column}` in {place} ({record[column]!r}): write it, or leave the row out."
                )
        texts.append(record[text_column])
        labels.append(str(record[label_column]))
    return texts, labels


def read_parts(arguments: Arguments) -> dict[str, Rows]:
    """Read the parts, and check that their labels can be learnt from the first."""
    if (arguments.train_file is None) == (arguments.dataset_name is None):
        raise ValueError("Give either a `--train_file` or a `--dataset_name`.")
    if arguments.dataset_name is None:
        files = {name: getattr(arguments, f"{name}_file") for name in ("train", "validation", "test")}
        parts = {name: read_rows(path, arguments) for name, path in files.items() if path is not None}
    else:
        parts = load_parts(arguments)
    known = set(parts["train"][1])
    if len(known) < 2:
        raise ValueError(f"All texts of the training part have the label {known.pop()!r}: give at least two classes.")
    for name, (_, labels) in parts.items():
        if lacking := sorted(set(labels) - known):
            raise ValueError(
                f"The {name} part has the label {lacking[0]!r}, which no training text has: add some, or leave its texts out."
            )
    return parts


def load_parts(arguments: Arguments) -> dict[str, Rows]:
    """Load the parts of `--dataset_name`, with the names of classes that it numbers."""
    from datasets import load_dataset

    loaded, parts = load_dataset(arguments.dataset_name), {}
    for name in ("train", "validation", "test"):
        if name in loaded:
            names = getattr(loaded[name].features.get(arguments.label_column), "names", None)  # of numbered classes
            rows = [dict(row) for row in loaded[name]]
            if names:
                name_classes(rows, names, arguments, name)
            parts[name] = checked_rows(
                [(f"row {number}", row) for number, row in enumerate(rows, 1)],
                arguments,
                f"{name} of {arguments.dataset_name}",
            )
    if "train" not in parts:
        raise ValueError(f"`--dataset_name` {arguments.dataset_name} has no `train` split, only {', '.join(loaded)}.")
    return parts


def name_classes(rows: list[dict], names: list[str], arguments: Arguments, part: str) -> None:
    """Put the names of classes in the place of their numbers. Raises `ValueError` for a number of none."""
    for number, row in enumerate(rows, 1):
        label = row[arguments.label_column]
        if not isinstance(label, int) or not 0 <= label < len(names):
            raise ValueError(
                f"Row {number} of the {part} part of {arguments.dataset_name} has the label {label}, and the classes are "
                f"numbered 0 to {len(names) - 1}: it is not labelled, so save the data set without this part."
            )
        row[arguments.label_column] = names[label]


def items_of(rows: Rows, tokenizer, direction: str, classes: list[str], part: str) -> list[dict[str, Any]]:
    """Tokenize the texts of a part, in the order in which the model reads."""
    texts, labels = rows
    found = encode([in_direction(text, direction) for text in texts], tokenizer)
    for number, ids in enumerate(found, 1):
        if not len(ids):
            raise ValueError(f"Text {number} of the {part} part becomes no token: leave it out.")
    return [
        {"input_ids": ids.tolist(), "labels": classes.index(label)} for ids, label in zip(found, labels, strict=True)
    ]


def make_classifier(arguments: Arguments, classes: list[str]) -> LSTMForSequenceClassification:
    """Load a classifier, or put a new head on a language model."""
    config = AutoConfig.from_pretrained(arguments.model)
    if not isinstance(config, LSTMConfig):
        raise ValueError(f"`--model` {arguments.model} is a {config.model_type!r}: name an {LSTMConfig.model_type!r}.")
    names: dict[str, Any] = {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
    }
    has_head = config.architectures == [LSTMForSequenceClassification.__name__]
    if has_head:
        saved = [config.id2label[number] for number in range(config.num_labels)]
        if not arguments.from_scratch and sorted(saved) != classes:
            raise ValueError(
                f"`--model` {arguments.model} tells {listed(saved)} apart, and the training part has {listed(classes)}: name "
                "the language model that it was made from."
            )
        if not arguments.from_scratch:
            names = {}  # the head keeps the order of its classes
    else:
        names |= {
            "classifier_pooling": arguments.classifier_pooling,
            "classifier_hidden_size": arguments.classifier_hidden_size or None,
        }
    if arguments.from_scratch:
        return LSTMForSequenceClassification(AutoConfig.from_pretrained(arguments.model, **names))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # instead of a table of the weights of a new head
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            arguments.model, dtype=torch.float32, output_loading_info=True, **names
        )
    finally:
        logging.set_verbosity(verbosity)
    if lacking := sorted(key for key in found["missing_keys"] if has_head or not key.startswith("score.")):
        raise ValueError(f"`--model` {arguments.model} lacks the weights {lacking[0]}: name a whole model.")
    return model


def listed(classes: list[str]) -> str:
    """Return the number of classes and the names of the first ones."""
    shown = ", ".join(map(repr, classes[:5])) + (", ..." if len(classes) > 5 else "")
    return f"{len(classes)} classes ({shown})"


def figures(truth: numpy.ndarray, guesses: numpy.ndarray, classes: int) -> dict[str, Any]:
    """Compute accuracy, F1 of each class and their mean, and the confusion matrix: a row for each true class."""
    confusion = numpy.zeros((classes, classes), dtype=int)
    numpy.add.at(confusion, (truth, guesses), 1)
    right, both = confusion.diagonal(), confusion.sum(axis=0) + confusion.sum(axis=1)
    f1 = 2 * right / numpy.maximum(both, 1)
    return {
        "accuracy": float(right.sum() / len(truth)),
        "f1": float(f1.mean()),
        "f1_of_classes": f1.tolist(),
        "confusion": confusion.tolist(),
    }


class ProgressWithAccuracy(ProgressLines):
    """Prints the figures of each evaluation."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.is_world_process_zero:
            self.say(
                f"epoch {state.epoch:.0f}: validation, loss {metrics['eval_loss']:.4f}, accuracy "
                f"{metrics['eval_accuracy']:.2%}, F1 {metrics['eval_f1']:.4f}"
            )


def make_trainer(
    model, parts: dict[str, list], tokenizer, arguments: Arguments, args: Training, progress: ProgressLines
) -> Trainer:
    """Make the stock Trainer with ULMFiT's optimizer, schedule and unfreezing."""
    batch, rows = args.train_batch_size * args.world_size, len(parts["train"])
    batches = rows // batch if args.dataloader_drop_last else math.ceil(rows / batch)
    steps = math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)
    if args.max_steps > 0:
        steps = args.max_steps
    divisor = 1.0 if arguments.from_scratch else arguments.layer_divisor
    groups = parameter_groups(model, args.weight_decay, learning_rate=args.learning_rate, layer_divisor=divisor)
    optimizer = torch.optim.AdamW(groups, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
    callbacks = [DivergenceCallback()]
    if arguments.unfreeze and not arguments.from_scratch:
        callbacks.append(GradualUnfreezingCallback())

    def compute_metrics(predictions):
        found = figures(predictions.label_ids, predictions.predictions.argmax(axis=-1), model.config.num_labels)
        return {name: found[name] for name in ("accuracy", "f1")}

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=parts["train"],
        eval_dataset=parts.get("validation"),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        optimizers=(optimizer, slanted_triangular(optimizer, max(1, steps))),
        callbacks=callbacks,
    )
    show_progress(trainer, progress)
    return trainer


def run(arguments: Arguments, args: Training) -> dict[str, Any]:
    """Train, measure and save a classifier; returns what metrics.json holds."""
    folder = Path(args.output_dir)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"`--output_dir` {folder} already holds something: name another folder.")
    check_source(arguments.model)
    rows = read_parts(arguments)
    if "validation" in rows:
        args.eval_strategy = args.save_strategy = "epoch"
        args.load_best_model_at_end, args.metric_for_best_model, args.save_total_limit = True, "accuracy", 1
        args.greater_is_better = True
    else:
        args.save_strategy = "no"
    set_seed(args.seed)
    classes = sorted(set(rows["train"][1]))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = make_classifier(arguments, classes)
    classes = [model.config.id2label[number] for number in range(len(classes))]
    parts = {name: items_of(part, tokenizer, direction_of(model), classes, name) for name, part in rows.items()}
    batch = args.train_batch_size * args.world_size
    if model.config.classifier_hidden_size is not None and len(parts["train"]) % batch == 1:
        print("The last training text is left out, since batch norm learns nothing from a batch of one text.")
        parts["train"] = parts["train"][:-1]
    with closing(ProgressWithAccuracy()) as progress:  # also before the sentence with which a run may end
        trainer = make_trainer(model, parts, tokenizer, arguments, args, progress)
        trainer.train()
    trainer.save_model()
    measured = next(name for name in ("test", "validation", "train") if name in parts)
    outcome = trainer.predict(parts[measured])
    truth, guesses = outcome.label_ids, outcome.predictions.argmax(axis=-1)
    metrics = {
        "part": measured,
        "texts": len(truth),
        "majority": max(Counter(truth.tolist()).values()) / len(truth),
        "classes": classes,
        **figures(truth, guesses, len(classes)),
        "validation_accuracy": trainer.state.best_metric,  # of the epoch that was kept
        "training_texts": len(parts["train"]),
        "steps": trainer.state.global_step,
    }
    written = json.dumps(metrics, indent=2, ensure_ascii=False) + "\n"
    (folder / "metrics.json").write_text(written, encoding="utf-8", newline="\n")
    draw_confusion(metrics["confusion"], classes, folder / "confusion.png")
    print(
        f"{measured}: {metrics['accuracy']:.2%} of {len(truth):,} texts right, F1 {metrics['f1']:.4f}; the commonest class "
        f"alone would give {metrics['majority']:.2%}"
    )
    return metrics


def main() -> None:
    try:
        arguments, args = Parser((Arguments, Training), __doc__).parse_args_into_dataclasses()
        if args.output_dir is None:
            raise ValueError(
                "`--output_dir` is missing: name a folder for the classifier, such as `--output_dir runs/classifier`."
            )
        try:
            run(arguments, args)
        except KeyboardInterrupt:
            remedy = f"delete {args.output_dir}, and begin anew" if Path(args.output_dir).exists() else "begin anew"
            print(f"classify.py: stopped before the classifier was finished: {remedy}.", file=sys.stderr)
            sys.exit(130)  # as a shell says that Ctrl-C ended a program
    except StrictDataclassError as error:  # a config wraps the ValueErrors of its checks
        sys.exit(f"classify.py: {error.__cause__}")
    except (ValueError, OSError) as error:
        sys.exit(f"classify.py: {error}")


if __name__ == "__main__":
    prepare_screen()
    main()
