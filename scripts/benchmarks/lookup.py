"""Time the first layer where each distinct token is multiplied once, and where every position is.

python scripts/benchmarks/lookup.py

Over vocabularies, widths and batches, W is multiplied by the V distinct embeddings and read by one-hot vectors, or by all
N embeddings of the call. The share is that of the products, (N V + V D) / N D; `FEW_PRODUCTS` of
hf_lstm/model/cells_lstm.py is the share up to which the first is taken. Both take turns in one process, in a model
without its output layer; medians of the ratios are reported.
"""

import math
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import matplotlib.pyplot as plt
import torch
from record import RESULTS, write_result
from transformers import HfArgumentParser

from hf_lstm import LSTMConfig
from hf_lstm.model import cells_lstm
from hf_lstm.model.modeling_lstm import LSTMModel

VOCABULARIES = (30, 69, 112, 200, 260, 400, 700, 1000, 2000)
WIDTHS = (128, 256, 512, 1024)
BATCHES = ((16, 64), (64, 64), (64, 256))


@dataclass
class Arguments:
    rounds: int = field(default=7, metadata={"help": "Rounds of each of the two ways."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})


def forward(model: LSTMModel, ids: torch.Tensor) -> None:
    with torch.no_grad():
        model(ids)


def step(model: LSTMModel, ids: torch.Tensor) -> None:
    model.zero_grad()
    model(ids).last_hidden_state.sum().backward()


def compare(run, model: LSTMModel, ids: torch.Tensor, rounds: int) -> float:
    """Return the median of the time by position divided by the time by token."""
    ratios = []
    for turn in range(rounds + 1):
        seconds = {}
        for share in (0, math.inf) if turn % 2 else (math.inf, 0):
            cells_lstm.FEW_PRODUCTS = share
            start = perf_counter()
            run(model, ids)
            seconds[share] = perf_counter() - start
        ratios.append(seconds[0] / seconds[math.inf])
    return median(ratios[1:])


def measure(vocab_size: int, width: int, rows: int, tokens: int, rounds: int) -> dict:
    torch.manual_seed(0)
    model = LSTMModel(LSTMConfig(vocab_size=vocab_size, hidden_size=width, num_hidden_layers=1)).train()
    ids = torch.randint(vocab_size, (rows, tokens))
    number = rows * tokens
    result = {"vocabulary": vocab_size, "width": width, "rows": rows, "tokens": tokens}
    result["share"] = vocab_size * (number + width) / (number * width)
    result["step"] = compare(step, model, ids, rounds)
    result["forward"] = compare(forward, model, ids, rounds)
    print("V {vocabulary:5} {width:5} wide {rows:3} x {tokens:3}   share {share:.2f}   ".format(**result), end="")
    print("step {step:.2f} x   forward {forward:.2f} x".format(**result), flush=True)
    return result


def draw(results: list[dict], chosen: float, threads: int) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for panel, what in zip(panels, ("step", "forward"), strict=True):
        for width in WIDTHS:
            points = [(result["share"], result[what]) for result in results if result["width"] == width]
            panel.scatter(*zip(*points, strict=True), label=f"{width} wide", s=18)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.axvline(chosen, color="gray", linestyle="--", label="chosen")
        panel.set(title=what, xlabel="share of the products", xscale="log")
    panels[0].set_ylabel("times as fast as by position")
    panels[0].legend()
    path = RESULTS / f"lookup_{threads}.png"
    figure.savefig(path, dpi=110)
    print(f"drawn in {path}")


def main(arguments: Arguments) -> None:
    torch.set_num_threads(arguments.threads)
    chosen = cells_lstm.FEW_PRODUCTS
    results = [
        measure(
            vocab_size, width, rows, tokens, max(3, arguments.rounds * 4096 // (rows * tokens * width // 256 + 4096))
        )
        for width in WIDTHS
        for rows, tokens in BATCHES
        for vocab_size in VOCABULARIES
        if rows * tokens * width <= 2**22 and vocab_size * (rows * tokens + width) <= 1.5 * rows * tokens * width
    ]
    draw(results, chosen, arguments.threads)
    write_result(f"lookup_{arguments.threads}", vars(arguments) | {"chosen": chosen, "results": results})


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
