"""Pictures that scripts/evaluate.py draws."""

import math
import sys

import numpy

PICTURES = (".png", ".svg", ".pdf", ".jpg")


def draw_positions(nats: numpy.ndarray, counts: numpy.ndarray, path: str) -> None:
    """Draw the loss by the number of tokens read since a zero state, in groups that double in width."""
    edges = numpy.unique(numpy.geomspace(1, len(nats) + 1, 2 * int(math.log2(len(nats) + 1)) + 1).astype(int))
    sums, numbers = (numpy.add.reduceat(values, edges[:-1] - 1) for values in (nats, counts))
    figure, axes, pyplot = new_figure((7, 4))
    middles = numpy.sqrt(edges[:-1] * (edges[1:] - 1))
    axes.plot(middles, sums / numbers, "o-")
    axes.set(xscale="log", xlabel="tokens read since a zero state", ylabel="nats per token")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    save(figure, path, pyplot)


def draw_surprisal(rows, by: str, unit: str, path: str) -> None:
    """Draw a bar for each token or word of a text, in its order."""
    rows, labels = rows.iloc[:80], rows["token" if by == "token" else "word"].iloc[:80]
    figure, axes, pyplot = new_figure((max(4, 0.35 * len(rows) + 1), 4))
    axes.bar(range(len(rows)), rows["surprisal"])
    axes.set_xticks(range(len(rows)), [label.replace("$", r"\$") for label in labels], rotation=60, ha="right")
    axes.set(ylabel=f"surprisal, {unit}", xlim=(-0.6, len(rows) - 0.4))
    axes.grid(axis="y", alpha=0.3)
    save(figure, path, pyplot)


def new_figure(size):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return *pyplot.subplots(figsize=size, layout="constrained"), pyplot


def save(figure, path: str, pyplot) -> None:
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"The picture is in {path}", file=sys.stderr)
