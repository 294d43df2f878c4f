"""Sections of the documentation on the comparisons: cells, hybrid models, regularisers, classifiers, private training.

`folder` is that of the results, as seen from the page that shows the section.
"""

import json
import math
import statistics
from collections import defaultdict

from record import RESULTS

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # quantiles of Student's t by the number of seeds


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def source(name: str, result: dict, command: str, folder: str, picture: bool = True) -> str:
    """Name the command, the machine and the files of a result; `folder` is that of the results as the page sees it."""
    drawn = f", [picture]({folder}/{name}.png)" if picture else ""
    return f"`{command}`: {result['machine']}, commit {result['commit']} ([figures]({folder}/{name}.json){drawn}).\n"


def cells(folder: str) -> str:
    """Return the comparison of cells."""
    result = load("cells")
    command = "python scripts/benchmarks/cells.py --train_file tinyshakespeare.txt"
    picture = f"![Loss, memory, gradients and copying of each cell]({folder}/cells.png)\n"
    return "\n".join([cells_tables(result), picture, source("cells", result, command, folder), cell_speed(folder)])


def cell_speed(folder: str) -> str:
    """Return the speed of a training step of each cell beside torch's."""
    result = load("cell_speed")
    rows = [
        [
            name,
            row["width"],
            f"{row['ms']:.0f}",
            row["torch"],
            f"{row['ms_of_torch']:.0f}",
            f"{row['ms'] / row['ms_of_torch']:.2f}",
        ]
        for name, row in result["cells"].items()
    ]
    head = ["cell", "width", "ms a step", "torch's, 512 wide", "ms a step", "times torch's time"]
    return (
        f"A training step of {result['rows']} x {result['tokens']} characters, in turns with torch's module and the same output "
        f"layer:\n\n{table(head, rows)}\n`python scripts/benchmarks/cell_speed.py`: {result['machine']}, commit "
        f"{result['commit']} ([figures]({folder}/cell_speed.json)).\n"
    )


def cells_tables(result: dict) -> str:
    """Return two tables of the comparison of cells: a text, and copying."""
    found: dict[tuple[str, str], list[dict]] = {}
    for run in result["runs"]:
        found.setdefault((run["task"], run["cell"]), []).append(run)
    text, copies = [], []
    for name, label in result["labels"].items():
        if runs := found.get(("tokens", name)):
            timed = found.get(("seconds", name), [])
            near, far = (statistics.mean(run["loss_by_distance"][at] for run in runs) for at in _ends_of_memory(runs))
            row = [
                label,
                runs[0]["width"],
                f"{runs[0]['parameters']:,}",
                len(runs),
                _spread(runs),
                f"{_mean(runs, 'cpu_seconds'):.0f}",
            ]
            row += [_spread(timed), f"{_mean(timed, 'tokens') / 1e6:.2f} M"] if timed else ["", ""]
            text.append([*row, f"{near - far:.3f}"])
        for run in found.get(("copy", name), []):
            shares = [f"{share:.2f}" for share in run["accuracy"].values()]
            copies.append([label, run["width"], f"{run['parameters']:,}", f"{run['tokens'] / 1e6:.1f} M", *shares])
    tables = []
    if text:
        example = next(run for run in result["runs"] if run["task"] == "tokens")
        near, far = _ends_of_memory([example])
        tokens = f"loss, {example['tokens'] / 1e6:.1f} M tokens"
        worth = f"loss at {near} minus loss at {far} characters"
        head = ["cell", "width", "parameters", "seeds", tokens, "CPU s", "loss, equal CPU s", "tokens in them", worth]
        title = (
            "Validation loss in nats per character, mean over seeds ± standard deviation. Forget bias and chrono change no "
            "step, so one LSTM stands for them where seconds are equal:\n\n"
        )
        tables.append(title + table(head, text))
    if copies:
        example = next(run for run in result["runs"] if run["task"] == "copy")
        head = ["cell", "width", "parameters", "trained on", *(f"{noise} tokens" for noise in example["accuracy"])]
        title = (
            f"Share of a key's symbols reproduced after so many tokens of noise (chance: {example['chance']:.3f}):\n\n"
        )
        tables.append(title + table(head, copies))
    return "\n".join(tables)


def _mean(runs: list[dict], name: str) -> float:
    return statistics.mean(run[name] for run in runs)


def _spread(runs: list[dict]) -> str:
    """Return the mean loss, and the standard deviation over seeds where there are several."""
    deviation = f" ± {statistics.stdev(run['loss'] for run in runs):.4f}" if len(runs) > 1 else ""
    return f"{_mean(runs, 'loss'):.4f}{deviation}"


def _ends_of_memory(runs: list[dict]) -> tuple[str, str]:
    """Return the groups of distances that are compared: up to a sixteenth of the longest, and the longest."""
    groups = list(runs[0]["loss_by_distance"])
    return groups[-5], groups[-1]


def hybrid(folder: str) -> str:
    """Return the comparison of LSTMs, hybrid models and GPT-2."""
    result = load("hybrid")
    command = (
        "python scripts/benchmarks/hybrid.py --train_file tinyshakespeare.txt --words wikitext-2/valid.txt "
        "--words_validation wikitext-2/test.txt"
    )
    picture = f"![Loss by model, recall by pairs and distance, bytes kept]({folder}/hybrid.png)\n"
    return "\n".join([hybrid_tables(result), picture, source("hybrid", result, command, folder)])


def hybrid_tables(result: dict) -> str:
    """Return three tables: losses on texts, recall, and the time and memory of a token."""
    found = defaultdict(list)
    for run in result["runs"]:
        found[run["task"], run["on"], run["model"]].append(run)
    columns = [
        ("tokens", "characters", "Shakespeare, {tokens:.1f} M tokens"),
        ("seconds", "characters", "Shakespeare, {seconds:.0f} CPU s"),
        ("seconds", "words", "WT2-small, {seconds:.0f} CPU s"),
    ]
    columns = [column for column in columns if any(found[(*column[:2], name)] for name in result["labels"])]
    text, recalled, decoded = [], [], []
    tasks = list(dict.fromkeys(run["on"] for run in result["runs"] if run["task"] == "recall"))
    lengths = list(next((run["decode"] for run in result["runs"] if run["task"] == "decode"), ()))
    for name, label in result["labels"].items():
        if any(found[(*column[:2], name)] for column in columns):
            cells = [label]
            for task, on, _ in columns:
                runs = found[task, on, name]
                cells += [f"{runs[0]['parameters'] / 1e6:.2f} M", _spread(runs)] if runs else ["", ""]
            text.append(cells)
        if recalls := [found["recall", task, name] for task in tasks if found["recall", task, name]]:
            accuracies = [f"{_mean(runs, 'accuracy'):.3f} in {_mean(runs, 'cpu_seconds'):.0f} s" for runs in recalls]
            recalled.append([label, f"{recalls[0][0]['parameters']:,}", *accuracies])
        for run in found["decode", "random weights", name]:
            decoded.append(
                [label, *(f"{run['decode'][at]['ms']:.2f} ms, {run['decode'][at]['bytes']:,} bytes" for at in lengths)]
            )
    tables = []
    if text:
        settings = result["runs"][0]["settings"]
        sizes = {"tokens": settings["tokens"] / 1e6, "seconds": settings["seconds"]}
        heads = [title for *_, column in columns for title in ("parameters", column.format(**sizes))]
        tables.append(
            "Validation loss in nats per token, mean over seeds ± standard deviation:\n\n"
            + table(["model", *heads], text)
        )
    if recalled:
        tables.append(
            "Share of values recalled for so many pairs of keys and values, with so many tokens between them and the "
            "questions, after so many CPU seconds of training (it ends at 0.999):\n\n"
            + table(["model", "parameters", *tasks], recalled)
        )
    if decoded:
        head = ["model", *(f"after {int(length):,} tokens" for length in lengths)]
        tables.append("CPU time of a token, and the memory that is kept of the text:\n\n" + table(head, decoded))
    return "\n".join(tables)


def regularizers(folder: str) -> str:
    """Return the ablation of regularisers."""
    result = load("regularizers")
    command = (
        "python scripts/benchmarks/regularizers.py --train_file wikitext-2/valid.txt --test_file wikitext-2/test.txt"
    )
    return (
        f'On "WT2-small", the validation file of WikiText-2 for training and its test file for testing: {result["train_words"]:,} '
        f"words to train on, a vocabulary of {result['vocabulary']:,} ({result['unknown_in_test']:.1%} of the test words are unknown), "
        f"two layers of {result['model']['hidden_size']}, {result['model']['parameters']:,} parameters, {result['epochs']} epochs:\n\n"
        + regularizers_table(result["rows"])
        + "\n"
        + source("regularizers", result, command, folder, picture=False)
        + '\nRows with several seeds come from `--seeds 3 --only "all of them" "with adversarial softmax" "with partial shuffle"`.\n'
    )


def regularizers_table(rows: list[dict]) -> str:
    """Return the mean over seeds of each row, with the standard deviation where there are several."""
    cells = []
    for name in dict.fromkeys(row["regularizers"] for row in rows):
        own = [row for row in rows if row["regularizers"] == name]
        cells.append([name, len(own)])
        for figure in ("validation_perplexity", "test_perplexity", "best_epoch", "cpu_seconds"):
            values = [row[figure] for row in own if figure in row]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells[-1].append(f"{statistics.mean(values):.1f}{spread}" if values else "")
    return table(["regularisers", "seeds", "validation perplexity", "test perplexity", "best epoch", "CPU s"], cells)


def classification(folder: str) -> str:
    """Return the comparison of classifiers with and without a language model."""
    result = load("classification")
    command = (
        "python scripts/benchmarks/classification.py --train_file tinyshakespeare.txt --folder runs/speakers_benchmark"
    )
    return (
        "Share of right answers on the test part, five seeds of passages and weights, both ways tuned over the same three "
        f"learning rates:\n\n{classification_table(result['runs'])}\n"
        + source("classification", result, command, folder, picture=False)
    )


def classification_table(runs: list[dict]) -> str:
    """Return accuracies on the test part, at the learning rate with the best mean on the validation part."""
    rows = []
    for labels in sorted({run["labels"] for run in runs}):
        means, chosen = [], []
        for way in ("language model", "scratch"):
            rates = defaultdict(list)
            for run in sorted(runs, key=lambda run: run["seed"]):
                if (run["labels"], run["way"]) == (labels, way):
                    rates[run["learning_rate"]].append(run)
            best = max(rates.values(), key=lambda own: _mean(own, "validation_accuracy"))
            means.append(f"{_mean(best, 'accuracy'):.1%}")
            chosen.append([run["accuracy"] for run in best])
        gains = [a - b for a, b in zip(*chosen, strict=True)]
        mean, half = statistics.mean(gains), T_95[len(gains)] * statistics.stdev(gains) / math.sqrt(len(gains))
        rows.append([f"{labels:,}", *means, f"{mean:+.1%}, {mean - half:+.1%} to {mean + half:+.1%}"])
    return table(["labels", "from the language model", "from scratch", "difference, 95 % interval"], rows)


def privacy(folder: str) -> str:
    """Return exposure and loss by epsilon."""
    result = load("privacy")
    command = (
        "python scripts/benchmarks/privacy.py --train_file tang/train.jsonl --validation_file tang/validation.jsonl"
    )
    speed = next(run for run in result["runs"] if run["task"] == "speed")
    settings = next(run["settings"] for run in result["runs"] if run.get("budget") == "plain")
    return (
        f"Exposure in bits (mean ± standard error) of secrets of {settings['length']} digits among {settings['documents']:,} "
        f"poems, {settings['secrets']} secrets for each number of copies, and the loss on unseen poems. All models have one layer "
        f'of {settings["hidden_size"]} and take {settings["steps"]:,} steps unless a row says otherwise; "plain" is the stock Trainer, "inf" clips and adds no noise:\n\n'
        + privacy_table(result)
        + f"\n![Exposure by the number of copies, a curve for each epsilon]({folder}/privacy.png)\n\n"
        "The guarantee is for one document: k copies of it weaken epsilon to k times epsilon. Secrets that are all remembered "
        "outrank each other, so that their exposure is bounded. "
        f"10,000 candidates are scored {speed['ratio']:.0f} times as fast as the same texts one by one.\n\n"
        + source("privacy", result, command, folder)
    )


def privacy_table(result: dict) -> str:
    """Return the mean exposure by the number of copies, and the loss, of each budget."""
    runs = [run for run in result["runs"] if run["task"] == "train"]
    counts, rows = list(runs[0]["exposures"]), []
    for budget in sorted({run["budget"] for run in runs}, key=_kind_of_training):
        own = [run for run in runs if run["budget"] == budget]
        cells = [budget, len(own), f"{_mean(own, 'loss'):.4f}"]
        for count in counts:
            bits = [value for run in own for value in run["exposures"][count]]
            cells.append(f"{statistics.mean(bits):.2f} ± {statistics.stdev(bits) / math.sqrt(len(bits)):.2f}")
        rows.append(cells)
    return table(
        [
            "training, epsilon",
            "seeds",
            "nats per byte",
            *(f"{count} {'copy' if count == '1' else 'copies'}" for count in counts),
        ],
        rows,
    )


def _kind_of_training(budget: str) -> tuple[bool, float, str]:
    """Order plain runs before private ones, and those by falling epsilon."""
    plain = budget.startswith("plain")
    return not plain, 0.0 if plain else -float(budget), budget


def noise(folder: str) -> str:
    """Return what noise in characters costs, with and without noise in training."""
    result = load("noise")
    command = "python scripts/benchmarks/noise.py --train_file tinyshakespeare.txt"
    return (
        "Loss in nats per character of Shakespeare after so many wrong characters, and the share of written words that occur in "
        f"the training text:\n\n{noise_table(result['runs'])}\n" + source("noise", result, command, folder)
    )


def noise_table(runs: list[dict]) -> str:
    """Return loss and share of known words by the kind and share of noise."""
    rows = [
        [
            kind,
            f"{run['training_noise']:.0%}",
            *(f"{cell['loss']:.3f}, {cell['known_words']:.0%}" for cell in found.values()),
        ]
        for kind in runs[0]["kinds"]
        for run in runs
        for found in [run["kinds"][kind]]
    ]
    shares = [f"{float(share):.0%}" for share in next(iter(runs[0]["kinds"].values()))]
    return table(["noise", "in training", *shares], rows)
