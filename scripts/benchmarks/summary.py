"""Write what the benchmarks found into the pages of documentation, so that each figure has a source.

python scripts/benchmarks/summary.py

A page holds each section between two markers that name it; whatever stands between them is replaced.
"""

import os
from collections.abc import Callable
from pathlib import Path

from comparisons import cells, classification, hybrid, load, noise, privacy, regularizers, source, table

ROOT = Path(__file__).parents[2]
END = "<!-- end -->\n"


def headline(folder: str) -> str:
    """Return five rows on speed and memory."""
    train, decode, memory = (load(f"{name}_cpu") for name in ("training", "decode", "memory"))
    shape, taken, states = train["shapes"]["recipe"], decode["ms_per_token"], memory["state_bytes"]
    rates, longest = shape["tokens_per_second"], list(states["LSTM"])[-1]
    late = decode["ratios"][f"Session: time after {decode['long_tokens']:,} tokens of that after 1,000"]
    rows = [
        [
            f"training, one layer of {shape['width']}, characters",
            f"{shape['bare loop of nn.LSTM']:.2f} times the speed of `nn.LSTM`, "
            + f"{rates['bare loop'] / rates['GPT-2']:.1f} times that of a GPT-2 of as many parameters",
        ],
        ["the stock Trainer", f"{shape['Trainer of the bare loop']:.2f} of the speed of a loop without it"],
        [
            "writing a token, two layers of 512",
            f"{taken['LSTM, Session']:.2f} ms; GPT-2 {taken['GPT-2, generate()']:.2f} ms, llama.cpp {taken['llama.cpp, F32']:.2f} ms",
        ],
        [f"a token after {decode['long_tokens']:,} others", f"{late:.2f} of the time of one after 1,000"],
        [
            f"bytes kept of {int(longest):,} tokens",
            f"{states['LSTM'][longest]:,}; GPT-2 {states['GPT-2'][longest]:,}",
        ],
    ]
    return (
        table(["speed and memory on two CPU cores", ""], rows)
        + f"\n[All figures]({folder.removesuffix('/results')}/README.md).\n"
    )


def writing(folder: str) -> str:
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
            folder,
        )
    )


def training(folder: str) -> str:
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
    return text + "\n" + source("training_cpu", result, "python scripts/benchmarks/training.py", folder)


def memory(folder: str) -> str:
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
    return text + "\n" + source("memory_cpu", result, "python scripts/benchmarks/memory.py", folder)


def scaling(folder: str) -> str:
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
    return text + "\n" + source("scaling_cpu", result, "python scripts/benchmarks/scaling.py", folder)


def sizes(folder: str) -> str:
    """Return how long one pass over a text takes, by the size of the text and of the model."""
    shapes, days = load("training_cpu")["shapes"], load("scaling_cpu")["days_of_a_billion_tokens"]
    rates = {
        "one layer of 384": shapes["first run"],
        "one layer of 512": shapes["recipe"],
        "two layers of 512": shapes["two layers"],
    }
    seconds = {name: 1 / shape["tokens_per_second"]["Trainer"] for name, shape in rates.items()}
    seconds["one layer of 1,024"] = days["1024"] * 86_400 / 1e9
    rows = []
    for characters, name in (
        (1e6, "1 MB, a long book"),
        (1e7, "10 MB, a shelf"),
        (1e8, "100 MB, text8"),
        (1e9, "1 GB, enwik9"),
    ):
        rows.append([name, *(_duration(characters * each) for each in seconds.values())])
    return (
        "One pass over a text by characters, on two CPU cores, computed from the speeds of short runs. A small text wants a small "
        "model and several passes, a large one the reverse; beyond the right of this table, use a GPU.\n\n"
        + table(["text", *seconds], rows)
        + f"\n[Speeds]({folder.removesuffix('/results')}/README.md).\n"
    )


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


PAGES: dict[str, list[Callable[[str], str]]] = {
    "README.md": [headline],
    "scripts/README.md": [privacy, noise, sizes],
    "scripts/benchmarks/README.md": [training, writing, memory, scaling],
    "scripts/recipes/README.md": [cells, hybrid, regularizers, classification],
}


def rendered(page: str) -> str:
    """Return a page with its sections rendered from the results."""
    folder = Path(os.path.relpath(ROOT / "scripts/benchmarks/results", (ROOT / page).parent)).as_posix()
    text = (ROOT / page).read_text(encoding="utf-8")
    for section in PAGES[page]:
        begin = f"<!-- begin: {section.__name__}, written by scripts/benchmarks/summary.py -->\n"
        before, rest = text.split(begin)
        text = before + begin + "\n" + section(folder) + "\n" + END + rest.split(END, 1)[1]
    return text


def main() -> None:
    pages = {page: rendered(page) for page in PAGES}
    for page, text in pages.items():
        (ROOT / page).write_text(text, encoding="utf-8")
        print(f"written to {page}")


if __name__ == "__main__":
    main()
