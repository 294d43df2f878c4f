"""Picture of the comparison of hybrid models: loss on texts, recall, and bytes kept of a text, from the stored runs."""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"lstm": "tab:blue", "residual": "tab:green", "hybrid": "tab:orange", "gpt2": "tab:gray"}


def runs_of(result: dict, task: str, on: str, model: str) -> list[dict]:
    return [run for run in result["runs"] if (run["task"], run["on"], run["model"]) == (task, on, model)]


def draw(result: dict, path: Path) -> None:
    figure, (losses, recall, memory) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    _draw_losses(losses, result)
    _draw_recall(recall, result)
    _draw_memory(memory, result)
    lines = [
        plt.Line2D([], [], color=COLORS[name], label=label, linewidth=3) for name, label in result["labels"].items()
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"drawn in {path.name}")


def _draw_losses(axes, result):
    """A mark for each run, beside the best mean on the same text in the same task."""
    columns = list(dict.fromkeys((run["task"], run["on"]) for run in result["runs"] if "loss" in run))
    for place, column in enumerate(columns):
        found = {name: [run["loss"] for run in runs_of(result, *column, name)] for name in result["labels"]}
        best = min(statistics.mean(values) for values in found.values() if values)
        for shift, (name, values) in enumerate(found.items()):
            at = place + 0.12 * (shift - (len(found) - 1) / 2)
            axes.plot([at] * len(values), [value - best for value in values], "o", color=COLORS[name])
    names = {"tokens": "equal tokens", "seconds": "equal CPU time"}
    axes.set_xticks(range(len(columns)), [f"{on},\n{names[task]}" for task, on in columns])
    axes.set(title="Validation loss", ylabel="nats per token above the best mean")
    axes.grid(axis="y", alpha=0.3)


def _draw_recall(axes, result):
    tasks = list(dict.fromkeys(run["on"] for run in result["runs"] if run["task"] == "recall"))
    width = 0.8 / len(result["labels"])
    for shift, name in enumerate(result["labels"]):
        for place, task in enumerate(tasks):
            if own := [run["accuracy"] for run in runs_of(result, "recall", task, name)]:
                axes.bar(place + shift * width, statistics.mean(own), width, color=COLORS[name])
    axes.set_xticks(
        [place + 1.5 * width for place in range(len(tasks))], [task.replace(", ", ",\n") for task in tasks], fontsize=8
    )
    axes.set(title="Values recalled", ylabel="share", ylim=(0, 1.02))
    axes.grid(axis="y", alpha=0.3)


def _draw_memory(axes, result):
    for run in result["runs"]:
        if run["task"] == "decode":
            lengths = [int(length) for length in run["decode"]]
            sizes = [found["bytes"] for found in run["decode"].values()]
            axes.plot(lengths, sizes, "o-", color=COLORS[run["model"]])
    axes.set(title="Memory of a text", xlabel="tokens read", ylabel="bytes", xscale="log", yscale="log")
    axes.grid(alpha=0.3)
