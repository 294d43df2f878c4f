"""Write what the benchmarks found into README.md and scripts/recipes/README.md, so that each figure has a source.

python scripts/benchmarks/summary.py
"""

import json
import statistics
from pathlib import Path

from record import RESULTS

README = Path(__file__).parents[2] / "README.md"
RECIPES = Path(__file__).parents[1] / "recipes" / "README.md"
CELLS_BEGIN = "<!-- begin: cells, written by scripts/benchmarks/summary.py -->\n"
BEGIN, END = "<!-- begin: written by scripts/benchmarks/summary.py -->\n", "<!-- end -->\n"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def source(name: str, result: dict, command: str, folder: str = "scripts/benchmarks/results") -> str:
    return (
        f"`{command}`: {result['machine']}, commit {result['commit']} "
        f"([figures]({folder}/{name}.json), [picture]({folder}/{name}.png)).\n"
    )


def writing() -> str:
    result = load("decode_cpu")
    taken, ratios, sizes = result["ms_per_token"], result["ratios"], result["parameters"]
    tokens = f"{result['long_tokens']:,}"
    rows = [[name, f"{milliseconds:.2f}"] for name, milliseconds in sorted(taken.items(), key=lambda item: item[1])]
    grown = {name: max(0.0, *watched["grown_mb"]) for name, watched in result["long"].items()}
    long = [f"after {tokens} tokens", "time of a token, of that after 1,000", "memory grown by"]
    late = [
        [name, f"{ratios[f'{name}: time after {tokens} tokens of that after 1,000']:.3f}", f"{megabytes:.1f} MB"]
        for name, megabytes in grown.items()
    ]
    firsts, rates = result["first_token_ms"], result["tokens_per_second"]
    return (
        f"**Writing.** Ms per token of one text, greedy, {result['tokens']} tokens: two layers of 512 "
        f"({sizes['LSTM'] / 1e6:.1f} M parameters), GPT-2 and Mamba of transformers with {sizes['GPT-2'] / 1e6:.1f} and "
        f"{sizes['Mamba'] / 1e6:.1f} M, and a Llama of {sizes['llama.cpp'] / 1e6:.1f} M in llama.cpp:\n\n"
        + table(["", "ms per token"], rows)
        + f"\nA `Session` writes {ratios['GPT-2 of Session']:.1f} times as fast as GPT-2 does, `generate()` "
        f"{ratios['GPT-2 of generate()']:.1f} times, and {ratios['Mamba of generate()']:.1f} times as fast as Mamba; eight bits "
        f"take {ratios['file of ONNX int8 of float32']:.2f} of the file, and the perplexity is "
        f"{ratios['perplexity of int8 of float32']:.4f} of what it was. llama.cpp takes "
        f"{ratios['llama.cpp F32 of Session']:.2f} times as long as a `Session` and "
        f"{ratios['llama.cpp F32 of generate()']:.2f} times as long as `generate()` in float32, and in eight bits "
        f"{ratios['llama.cpp Q8_0 of ONNX int8']:.2f} times as long as ONNX.\n\n"
        + "Tokens per second by `generate()`, and where it did nothing but multiply by the LSTM's matrices:\n\n"
        + table(
            ["texts at once", *rates["LSTM"]],
            [[name, *(f"{rate:,.0f}" for rate in found.values())] for name, found in rates.items()],
        )
        + "\n"
        + table(long, late)
        + "\n`generate()` itself keeps all ids, and copies them at each token. Ms to the first token; at "
        "the least each token of the prompt has to be multiplied by U of each layer, one after the other:\n\n"
        + table(
            ["tokens of the prompt", *(f"{int(length):,}" for length in firsts["LSTM"])],
            [[name, *(f"{ms:,.0f}" for ms in taken.values())] for name, taken in firsts.items()],
        )
        + "\n"
        + source(
            "decode_cpu",
            result,
            "python scripts/benchmarks/decode.py --model MODEL --file tinyshakespeare.txt --threads 1",
        )
    )


def training() -> str:
    result = load("training_cpu")
    rows = []
    for shape in result["shapes"].values():
        rates = shape["tokens_per_second"]
        rows.append(
            [
                f"{shape['rows']} x {shape['tokens']}",
                f"{shape['layers']} x {shape['width']}",
                f"{shape['vocabulary']:,}",
                *(f"{rates[name]:,.0f}" if name in rates else "" for name in ("Trainer", "bare loop", "nn.LSTM")),
                f"{shape['Trainer of the bare loop']:.3f}",
                f"{shape['bare loop of nn.LSTM']:.2f}",
                f"{shape['loss and gradients of nn.LSTM']:.2f}",
                *(f"{rates[name]:,.0f}" if name in rates else "" for name in ("GPT-2", "Mamba")),
            ]
        )
    head = [
        "tokens of a step",
        "layers",
        "vocabulary",
        "Trainer",
        "bare loop",
        "`nn.LSTM`",
        "Trainer of bare loop",
        "bare loop of `nn.LSTM`",
        "without clipping and optimizer",
    ]
    text = (
        "**Training.** Tokens per second, no dropout, the steps of all contestants in turns. GPT-2 and Mamba "
        f"of transformers have as many parameters and took {result['slow_steps']} steps each; Mamba runs step by step where its "
        "kernels are not, as on a CPU:\n\n"
    )
    text += table([*head, "GPT-2", "Mamba"], rows)
    return text + "\n" + source("training_cpu", result, "python scripts/benchmarks/training.py")


def memory() -> str:
    result = load("memory_cpu")
    loss, states = result["loss"], result["state_bytes"]
    lengths = list(states["LSTM"])
    text = (
        f"**Memory.** With a vocabulary of {result['vocab_size']:,} and {result['rows']} x {result['tokens']} tokens a step, two layers "
        f"of {result['hidden_size']}, `loss_chunk_size={result['chunk_size']}` brings a training step, AdamW included, from "
        f"{loss['plain']['mb']:,.0f} to {loss['chunked']['mb']:,.0f} MB ({loss['mb: chunked of plain']:.2f}), and from "
        f"{loss['plain']['seconds']:.2f} to {loss['chunked']['seconds']:.2f} s. Bytes kept of one text:\n\n"
    )
    rows = [[name, *(f"{size:,}" for size in sizes.values())] for name, sizes in states.items()]
    text += table(["tokens read", *(f"{int(length):,}" for length in lengths)], rows)
    return text + "\n" + source("memory_cpu", result, "python scripts/benchmarks/memory.py")


def scaling() -> str:
    result = load("scaling_cpu")
    names = {"tokens": "training, tokens", "hidden_size": "a training step, width of the layer"}
    names |= {"num_hidden_layers": "a training step, layers", "vocab_size": "a training step, vocabulary"}
    rows = []
    for axis, found in result["axes"].items():
        sizes = list(found["seconds"])
        rows.append(
            [
                names.get(axis, f"300 tokens, {axis}"),
                f"{int(sizes[0]):,} to {int(sizes[-1]):,}",
                f"{found['exponent']:.3f}",
            ]
        )
    days = ", ".join(f"{value:,.1f} with {size}" for size, value in result["days_of_a_billion_tokens"].items())
    text = "**Scaling.** Time grows with a size to the power of:\n\n" + table(
        ["time of", "from, to", "exponent"], rows
    )
    text += f"\nA billion tokens of a vocabulary of 69 through one layer would take so many days here, by its width: {days}.\n"
    if "tokens_per_second_of_processes" in result:
        one, two = result["tokens_per_second_of_processes"].values()
        text += f"`scripts/train.py` in one process of one thread: {one:,.0f} tokens per second; in two: {two:,.0f} (one run each).\n"
    return text + "\n" + source("scaling_cpu", result, "python scripts/benchmarks/scaling.py")


def cells() -> str:
    """Return the comparison of cells between its two markers, with links from scripts/recipes/."""
    result, folder = load("cells"), "../benchmarks/results"
    command = "python scripts/benchmarks/cells.py --train_file tinyshakespeare.txt"
    picture = f"![Loss, memory, gradients and copying of each cell]({folder}/cells.png)\n"
    parts = [cells_tables(result), picture, source("cells", result, command, folder), cell_speed(folder)]
    return CELLS_BEGIN + "\n" + "\n".join(parts) + "\n" + END


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


def render() -> str:
    """Return the section between its two markers."""
    return f"{BEGIN}\n{training()}\n{writing()}\n{memory()}\n{scaling()}\n{END}"


def main() -> None:
    readme = README.read_text(encoding="utf-8")
    before, rest = readme.split(BEGIN)
    README.write_text(before + render() + rest.split(END, 1)[1], encoding="utf-8")
    print(f"written to {README.name}")
    if not (RESULTS / "cells.json").exists():
        return
    if not RECIPES.exists():
        print(cells())
        return
    before, rest = RECIPES.read_text(encoding="utf-8").split(CELLS_BEGIN)
    RECIPES.write_text(before + cells() + rest.split(END, 1)[1], encoding="utf-8")
    print(f"written to {RECIPES.relative_to(README.parent)}")


if __name__ == "__main__":
    main()
