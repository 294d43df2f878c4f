"""Time a training step of every cell beside torch's own LSTM, GRU or RNN with the same embedding and output layer.

python scripts/benchmarks/cell_speed.py

A cell that torch has meets torch's; a Mogrifier, which torch lacks, meets `nn.LSTM` at equal width and, narrower, at equal
parameters. All take their steps in turns in one process, with AdamW and the norm of the gradient clipped to 1, and carry
their state from step to step. Medians of the steps are reported, and the median of torch's second copy beside the first
says what chance alone makes of them.
"""

from dataclasses import dataclass, field
from statistics import median

import torch
from record import write_result
from torch import nn
from torch.nn import functional as F
from training import Loop, OurLSTM
from transformers import HfArgumentParser

from hf_lstm import LSTMConfig, LSTMForCausalLM

ROWS, TOKENS, WIDTH, VOCABULARY = 16, 64, 512, 69
TORCH = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="tanh", **options),
    "rnn_relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}


@dataclass
class Arguments:
    steps: int = field(default=100, metadata={"help": "Timed steps of each, after five that are not timed."})
    threads: int = field(default=2, metadata={"help": "Threads of torch."})


class TorchModel(nn.Module):
    """The same model written with a recurrent module of torch and tied embeddings."""

    def __init__(self, kind, width: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.recurrent = kind(width, width, batch_first=True)
        self.state = None

    def loss(self, ids, targets):
        state = self.state
        if state is not None:
            state = tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()
        hidden, self.state = self.recurrent(self.embedding(ids), state)
        logits = F.linear(hidden, self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def ours(**fields) -> Loop:
    return Loop(OurLSTM(LSTMConfig(vocab_size=VOCABULARY, num_hidden_layers=1, **{"hidden_size": WIDTH} | fields)))


def equal_width(**fields) -> int:
    """Return the width at which such a model has about as many parameters as an LSTM of `WIDTH`."""

    def parameters(**fields) -> int:
        with torch.device("meta"):
            config = LSTMConfig(vocab_size=VOCABULARY, num_hidden_layers=1, **fields)
            return LSTMForCausalLM(config).num_parameters()

    goal = parameters(hidden_size=WIDTH)
    return min(range(8, WIDTH + 1, 8), key=lambda width: abs(parameters(hidden_size=width, **fields) - goal))


def contestants() -> list[tuple[str, Loop, str]]:
    """Return a name, the loop, and the cell of torch that it meets."""
    mogrifier = {"cell_type": "mogrifier"}
    low_rank = mogrifier | {"mogrifier_rank": 64}
    rows = [(cell, ours(cell_type=cell), cell) for cell in TORCH]
    rows.append(("mogrifier", ours(**mogrifier), "lstm"))
    rows.append(("mogrifier, rank 64", ours(**low_rank), "lstm"))
    for name, fields in (
        ("mogrifier, equal parameters", mogrifier),
        ("mogrifier, rank 64, equal parameters", low_rank),
    ):
        rows.append((name, ours(hidden_size=equal_width(**fields), **fields), "lstm"))
    return rows


def main(arguments: Arguments) -> None:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    text = torch.randint(4, VOCABULARY, (arguments.steps + 5, ROWS, TOKENS + 1))
    rows = contestants()
    torchs = {cell: [Loop(TorchModel(kind, WIDTH)) for _ in range(2)] for cell, kind in TORCH.items()}
    for number, batch in enumerate(text):
        ids, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        loops = [loop for _, loop, _ in rows] + [loop for pair in torchs.values() for loop in pair]
        for loop in loops[:: 1 if number % 2 else -1]:
            loop.step(ids, targets)
    results = {}
    for name, loop, cell in rows:
        first, second = (median(other.times[5:]) for other in torchs[cell])
        own = median(loop.times[5:])
        results[name] = {
            "width": loop.model.model.config.hidden_size,
            "parameters": loop.model.model.num_parameters(),
            "ms": own * 1e3,
            "torch": cell,
            "ms_of_torch": first * 1e3,
            "speed_of_torch": first / own,
            "torch_of_itself": first / second,
        }
        print(
            f"{name:>38} {results[name]['width']:>4} {own * 1e3:8.1f} ms, torch's {cell} {first * 1e3:6.1f} ms: "
            f"{first / own:.3f} of its speed, {own / first:.2f} times its time (torch of itself: {first / second:.3f})"
        )
    write_result("cell_speed", vars(arguments) | {"rows": ROWS, "tokens": TOKENS, "cells": results})


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
