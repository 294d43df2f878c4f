"""Compare classifiers that begin with a language model to the same from scratch, with few labels.

python scripts/benchmarks/classification.py --train_file tinyshakespeare.txt --folder runs/speakers

The task is that of speakers.py. The language model is trained once, for at most 15 minutes on two CPU cores, on text that
holds no passage of the validation and test parts. Each way is tuned with the same effort: the learning rates of the same
grid, chosen for each number of labels by the mean accuracy on the validation part over the seeds. A seed draws the labelled
passages, equally many of each speaker where there are enough, and the new weights; both ways get the same passages.

Each finished run is stored at once in classification.json; a run that is stored with the same settings is not repeated.
`--quick` does the same with a tiny model in seconds, and its figures mean nothing.
"""

import argparse
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path

SCRIPTS = Path(__file__).parents[1]
sys.path.insert(0, str(SCRIPTS))  # for classify.py

import classify
from comparisons import classification_table
from record import RESULTS, StoredRuns, digest
from speakers import make_task, write_rows, write_task

NAME = "classification"
WAYS = ("language model", "scratch")
WHOLE = {
    "seeds": 5,
    "epochs": {50: 25, 200: 12, 1000: 6},  # by the number of labels
    "learning_rates": [3e-3, 1e-2, 3e-2],
    "language": "--hidden_size 384 --hidden_dropout 0.2 --output_dropout 0.2 --max_steps 3000 --bptt_length 64",
}
QUICK = {
    "seeds": 2,
    "epochs": {16: 1},
    "learning_rates": [1e-2],
    "language": "--hidden_size 16 --max_steps 4 --eval_steps 4 --save_steps 4 --logging_steps 4 --use_cpu true",
}


def train_language_model(folder: Path, flags: str) -> Path:
    """Train the language model, if it is not there yet."""
    model = folder / "language"
    if not (model / "config.json").is_file():
        command = [sys.executable, SCRIPTS / "train.py", "--train_file", folder / "language.txt", *flags.split()]
        subprocess.run([*command, "--output_dir", model], check=True, stdout=subprocess.DEVNULL)
    return model


def draw(rows: list[tuple[str, str]], number: int, seed: int) -> list[tuple[str, str]]:
    """Draw labelled passages, in turn of each speaker."""
    by_speaker = defaultdict(list)
    for row in random.Random(seed).sample(rows, len(rows)):
        by_speaker[row[1]].append(row)
    drawn = []
    while len(drawn) < number and any(by_speaker.values()):
        drawn += [own.pop() for own in by_speaker.values() if own]
    return drawn[:number]


def run_one(model: Path, folder: Path, rows: list[tuple[str, str]], settings: dict) -> dict:
    """Train one classifier, and return its accuracies."""
    with tempfile.TemporaryDirectory() as temporary:
        write_rows(draw(rows, settings["labels"], settings["seed"]), Path(temporary, "train.csv"))
        arguments = classify.Arguments(
            model=str(model),
            train_file=str(Path(temporary, "train.csv")),
            validation_file=str(folder / "validation.csv"),
            test_file=str(folder / "test.csv"),
            from_scratch=settings["way"] == "scratch",
        )
        args = classify.Training(
            str(Path(temporary, "out")),
            num_train_epochs=settings["epochs"],
            learning_rate=settings["learning_rate"],
            per_device_train_batch_size=16,
            seed=settings["seed"],
            disable_tqdm=True,
        )
        metrics = classify.run(arguments, args)
    return {name: metrics[name] for name in ("validation_accuracy", "accuracy", "f1", "steps")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--folder", type=Path, required=True, help="Folder for the task and the language model.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else WHOLE
    passages = {"test": 2, "validation": 2} if arguments.quick else None
    text = arguments.train_file.read_text(encoding="utf-8")
    parts, language = make_task(text) if passages is None else make_task(text, passages)
    write_task(parts, language, arguments.folder)
    model = train_language_model(arguments.folder, plan["language"])

    stored = StoredRuns(NAME, arguments.results, language=plan["language"])
    for labels, epochs in plan["epochs"].items():
        for seed in range(plan["seeds"]):
            for rate in plan["learning_rates"]:
                for way in WAYS:
                    run = {"labels": labels, "epochs": epochs, "seed": seed, "learning_rate": rate, "way": way}
                    compute = partial(run_one, model, arguments.folder, parts["train"], run)
                    stored.add(run, {"language": plan["language"], "text": digest(arguments.train_file)}, compute)
    print(classification_table(stored.runs))


if __name__ == "__main__":
    main()
