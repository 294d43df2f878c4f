"""Pictures that scripts/evaluate.py draws."""

import math
import sys

import numpy

PICTURES = (".png", ".svg", ".pdf", ".jpg")
UNSEEN = 1 / math.log(2)  # bits: the mean exposure of a secret among many
LINES = ("-", "--", "-.", ":")  # of the layers


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


def draw_confusion(confusion: list[list[int]], classes: list[str], path) -> None:
    """Draw a confusion matrix, a row for each true class, with the number of texts in each field."""
    counts = numpy.array(confusion)
    size = max(3.5, 0.6 * len(classes) + 2)
    figure, axes, pyplot = new_figure((size, size))
    axes.imshow(counts / numpy.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    names = [name.replace("$", r"\$") for name in classes]
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="class that the model says", ylabel="true class")
    for (row, column), count in numpy.ndenumerate(counts):
        dark = count > counts[row].sum() / 2
        axes.text(column, row, count, ha="center", va="center", color="white" if dark else "black")
    save(figure, path, pyplot)


def draw_gradients(norms: dict[str, list[list[float]]], path: str) -> None:
    """
    Draw the norms of gradients by the distance, on a logarithmic axis, with a colour for each model and a kind of line
    for each layer. A curve has gaps where it is 0, infinite or NaN; a cross marks from where on it is 0.
    """
    figure, axes, pyplot = new_figure((7, 4.5))
    colours = pyplot.rcParams["axes.prop_cycle"].by_key()["color"]
    names, vanished = short_names(list(norms)), False
    for number, (name, layers) in enumerate(zip(names, norms.values(), strict=True)):
        for layer, row in enumerate(layers):
            row = numpy.array(row)
            colour = colours[number % len(colours)]
            label = name if len(layers) == 1 else f"{name}, layer {layer}"
            shown = numpy.where(numpy.isfinite(row) & (row > 0), row, numpy.nan)
            axes.plot(shown, LINES[layer % len(LINES)], color=colour, label=label)
            zeros = len(row) - len(numpy.trim_zeros(row, "b"))
            if zeros:
                bottom = axes.get_xaxis_transform()  # the height as a share of the axes
                axes.plot(len(row) - zeros, 0.02, "x", color=colour, transform=bottom, clip_on=False)
                vanished = True
    if vanished:
        axes.plot([], [], "x", color="gray", label="0 from here on")
    axes.set(
        yscale="log",
        xlabel="tokens from the state to the loss, T \N{MINUS SIGN} t",
        ylabel=r"norm of the gradient, $\Vert\,\partial\,\mathrm{loss}_T\,/\,\partial\,\mathrm{state}_t\,\Vert$",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path, pyplot)


def draw_exposure(result: dict, path: str) -> None:
    """Draw the exposure of each secret by the number of its copies, and the mean of each number with its standard error."""
    figure, axes, pyplot = new_figure((7, 4))
    rows, groups = result["secrets"], result["by_count"]
    axes.plot([row["count"] for row in rows], [row["exposure"] for row in rows], ".", alpha=0.3, label="a secret")
    means, errors = ([group[name] for group in groups.values()] for name in ("mean", "standard_error"))
    axes.errorbar(list(map(int, groups)), means, errors, fmt="o-", capsize=3, label="mean ± standard error")
    axes.axhline(result["most"], color="gray", linestyle="--", label="most probable of all")
    axes.axhline(UNSEEN, color="gray", linestyle=":", label="unseen, on average")
    axes.set(xscale="symlog", xlabel="copies in the training text", ylabel="exposure, bits")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path, pyplot)


def draw_noise(result: dict, path: str) -> None:
    """Draw the loss and the share of known words by the share of wrong characters, a curve for each kind of noise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, name, label in zip(
        panels, ("loss", "known_words"), ("nats per token", "written words that training has, %"), strict=True
    ):
        for kind, found in result.items():
            scale = 100 if name == "known_words" else 1
            axes.plot(
                [100 * float(share) for share in found],
                [scale * one[name] for one in found.values()],
                "o-",
                label=kind,
            )
        axes.set(xlabel="wrong characters, %", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].legend()
    save(figure, path, pyplot)


def short_names(paths: list[str]) -> list[str]:
    """Return the last part of each path, or as many parts as tell them apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(paths):
            return names
    return paths


def new_figure(size):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return *pyplot.subplots(figsize=size, layout="constrained"), pyplot


def save(figure, path: str, pyplot) -> None:
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"The picture is in {path}", file=sys.stderr)
