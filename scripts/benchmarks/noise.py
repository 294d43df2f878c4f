"""Compare a model trained on clean text to one trained on text with wrong characters, by the noise in the text they read.

python scripts/benchmarks/noise.py --train_file tinyshakespeare.txt

`scripts/train.py` trains both, of one layer and as many steps; `--character_noise` corrupts the text of the second anew in
each epoch. `scripts/evaluate.py noise` measures the loss after noise of three kinds, and the share of the words they write
that occur in the training text.

Each finished run is stored at once in noise.json; a run that is stored with the same settings is not repeated. `--quick`
does the same in seconds, and its figures mean nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from comparisons import noise_table
from record import RESULTS, StoredRuns, digest

NAME = "noise"
SCRIPTS = Path(__file__).parents[1]
SHARES = [0.0, 0.05]  # of the characters of the training text
TRAINING = "--max_steps 2000 --bptt_length 64 --per_device_train_batch_size 16 --learning_rate 4e-3 --seed 0"
EVALUATION = "--seed 0"
QUICK = "--max_steps 2 --logging_steps 2 --eval_steps 2 --save_steps 2 --hidden_size 8 --per_device_eval_batch_size 2"
QUICK_EVALUATION = "--characters 200 --prompts 1 --prompt_length 20 --seed 0"


def measure(text: Path, share: float, training: str, evaluation: str) -> dict:
    """Train a model on a text with noise, and return its losses and shares of known words by the noise that it reads."""
    with tempfile.TemporaryDirectory() as folder:
        model, written = Path(folder) / "model", Path(folder) / "noise.json"
        flags = ["--train_file", text, "--character_noise", str(share), "--output_dir", model, "--use_cpu", "true"]
        subprocess.run(
            [sys.executable, SCRIPTS / "train.py", *flags, *training.split()], check=True, stdout=subprocess.DEVNULL
        )
        flags = ["--model", model, "--train_file", text, "--output_file", written]
        subprocess.run([sys.executable, SCRIPTS / "evaluate.py", "noise", *flags, *evaluation.split()], check=True)
        return {"kinds": json.loads(written.read_text(encoding="utf-8"))}


def draw(runs: list[dict], path: Path) -> None:
    """Draw both figures by the noise in the text that is read: a line for each model and kind of noise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, figure_of, label in zip(
        panels, ("loss", "known_words"), ("nats per character", "share of written words that are known"), strict=True
    ):
        for run, style in zip(runs, ("-", "--"), strict=False):
            for number, (kind, found) in enumerate(run["kinds"].items()):
                values = [of_share[figure_of] for of_share in found.values()]
                name = f"{kind}, trained with {run['training_noise']:.0%} noise"
                axes.plot([100 * float(share) for share in found], values, style, color=f"C{number}", label=name)
        axes.set(xlabel="% of characters that are wrong", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a tiny model: a test of this script")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of noise.json and noise.png")
    options = parser.parse_args()
    if options.quick and options.results == RESULTS:
        parser.error("`--quick` would replace the results of long runs: give another folder with `--results`.")

    training, evaluation = (QUICK, QUICK_EVALUATION) if options.quick else (TRAINING, EVALUATION)
    stored = StoredRuns(NAME, options.results)
    settings = {"training": training, "evaluation": evaluation, "text": digest(options.train_file)}
    for share in SHARES:
        compute = partial(measure, options.train_file, share, training, evaluation)
        stored.add({"training_noise": share}, settings, compute)
    draw(stored.runs, options.results / f"{NAME}.png")
    print("\n" + noise_table(stored.runs))


if __name__ == "__main__":
    main()
