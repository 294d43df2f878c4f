"""Picture of the comparison of cells: loss, memory, gradients and copying, from the stored runs."""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {
    "rnn_tanh": "tab:red",
    "gru": "tab:orange",
    "lstm_0": "lightskyblue",
    "lstm": "tab:blue",
    "lstm_2": "navy",
    "chrono": "tab:cyan",
    "residual": "tab:green",
    "zoneout": "tab:purple",
    "mogrifier": "black",
}


def runs_of(result: dict, task: str, cell: str) -> list[dict]:
    return [run for run in result["runs"] if (run["task"], run["cell"]) == (task, cell)]


def mean_by(runs: list[dict], name: str) -> dict[int, float]:
    """Average a field of numbers by distance over the runs."""
    return {int(distance): statistics.mean(run[name][distance] for run in runs) for distance in runs[0][name]}


def draw(result: dict, path: Path) -> None:
    plt.rcParams.update({"font.size": 14, "axes.titlesize": 16, "lines.linewidth": 2.2})
    figure, ((losses, memory), (gradients, copying)) = plt.subplots(2, 2, figsize=(16, 10), layout="constrained")
    _draw_losses(losses, result)
    _draw_memory(memory, result)
    _draw_gradients(gradients, result)
    _draw_copying(copying, result)
    lines = [
        plt.Line2D([], [], color=COLORS[name], label=label, linewidth=3) for name, label in result["labels"].items()
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"drawn in {path.name}")


def _draw_losses(axes, result):
    """One line for each cell, a mark for each seed."""
    means = {name: [run["loss"] for run in runs_of(result, "tokens", name)] for name in result["labels"]}
    order = sorted((name for name in means if means[name]), key=lambda name: -statistics.mean(means[name]))
    for place, name in enumerate(order):
        for task, shift, marker, face in (("tokens", 0.14, "o", COLORS[name]), ("seconds", -0.14, "D", "white")):
            found = [run["loss"] for run in runs_of(result, task, name)]
            if found:
                height = [place + shift] * len(found)
                axes.hlines(place + shift, min(found), max(found), color=COLORS[name])
                axes.plot(found, height, marker, color=COLORS[name], markerfacecolor=face, markersize=9)
    axes.plot([], [], "o", color="gray", label="equal tokens")
    axes.plot([], [], "D", color="gray", markerfacecolor="white", label="equal seconds")
    axes.set_yticks(range(len(order)), [result["labels"][name] for name in order])
    axes.set(title="Shakespeare: loss after training, a mark for each seed", xlabel="nats per character")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False)


def _draw_memory(axes, result):
    late = []  # where all lines are near their ends
    for name in result["labels"]:
        if runs := runs_of(result, "tokens", name):
            found = mean_by(runs, "loss_by_distance")
            axes.plot(found.keys(), found.values(), "o-", color=COLORS[name], markersize=5)
            late += [value for distance, value in found.items() if distance >= 4]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    if late:
        margin = 0.05 * (max(late) - min(late))
        axes.set(xlim=(3.5, None), ylim=(min(late) - margin, max(late) + margin))
    axes.set(
        title="What memory is worth: loss by what was read",
        xlabel="characters read since the reset",
        ylabel="nats per character",
    )
    axes.grid(alpha=0.3)


def _draw_gradients(axes, result):
    distances = result["flow_distances"]
    for name in result["labels"]:
        for run in runs_of(result, "tokens", name):
            if "gradient_at_end" in run:
                axes.plot(distances, run["gradient_at_start"], "--", color=COLORS[name], linewidth=1.2)
                axes.plot(distances, run["gradient_at_end"], color=COLORS[name])
    axes.plot([], [], "--", color="gray", label="before training", linewidth=1.2)
    axes.plot([], [], color="gray", label="after training")
    axes.set(yscale="log", title="How far gradients flow back", xlabel="characters between loss and state")
    axes.set_ylabel("gradient, of that at distance 0")
    axes.set_ylim(max(1e-12, axes.get_ylim()[0]), min(1e3, axes.get_ylim()[1]))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _draw_copying(axes, result):
    chance = None
    for place, name in enumerate(result["labels"]):
        if runs := runs_of(result, "copy", name):
            found, chance = mean_by(runs, "accuracy"), runs[0]["chance"]
            distances = list(found)
            beside = [
                distance * 1.02 ** (place - len(COLORS) / 2) for distance in distances
            ]  # equal lines stay visible
            axes.plot(beside, found.values(), "o-", color=COLORS[name])
    if chance is not None:
        axes.axhline(chance, color="gray", linestyle=":")
        axes.annotate("chance", (distances[0], chance), xytext=(0, 4), textcoords="offset points", color="gray")
        axes.set(xscale="log", ylim=(0, 1.03))
        axes.set_xticks(distances, distances)
        axes.set_xticks([], minor=True)
    axes.set(title="Copying: symbols of a key reproduced", xlabel="tokens of noise in between", ylabel="share")
    axes.grid(alpha=0.3)
