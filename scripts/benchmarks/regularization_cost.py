"""Measure what weight-drop, locked dropout and activation penalties together cost in a training step.

python scripts/benchmarks/regularization_cost.py
"""

import statistics
import time

import torch
from record import write_result

from hf_lstm import LSTMConfig, LSTMForCausalLM

ROUNDS = 25
SHAPES = {  # model, rows, tokens: the recipes shakespeare_cpu and, for a GPU, awd_wikitext2
    "cpu": ({"vocab_size": 69, "hidden_size": 512, "num_hidden_layers": 1}, 16, 64),
    "cuda": ({"vocab_size": 33_278, "hidden_size": 1150, "embedding_size": 400, "num_hidden_layers": 3}, 80, 70),
}
REGULARIZATION = {
    "weight_dropout": 0.5,
    "input_dropout": 0.4,
    "hidden_dropout": 0.2,
    "output_dropout": 0.4,
    "activation_regularization": 2.0,
    "temporal_activation_regularization": 1.0,
}


def seconds(model, optimizer, ids) -> float:
    """Time one training step, with that of the optimizer."""
    start = time.perf_counter()
    model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, rows, tokens = SHAPES[device]
    torch.manual_seed(0)
    runs, times = {}, {"plain": [], "regularized": []}
    for name, settings in (("plain", {}), ("regularized", REGULARIZATION)):
        model = LSTMForCausalLM(LSTMConfig(**config, **settings)).to(device).train()
        runs[name] = (model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    for _ in range(ROUNDS + 3):
        ids = torch.randint(4, config["vocab_size"], (rows, tokens + 1), device=device)
        for name, run in runs.items():
            times[name].append(seconds(*run, ids))
    medians = {name: statistics.median(values[3:]) for name, values in times.items()}
    ratio = medians["regularized"] / medians["plain"]
    print(f"{ratio:.3f} of the plain step's {medians['plain'] * 1000:.1f} ms")
    write_result(
        f"regularization_cost_{device}",
        {
            "model": config,
            "batch": [rows, tokens],
            "regularization": REGULARIZATION,
            "seconds": medians,
            "regularized_over_plain": ratio,
        },
    )


if __name__ == "__main__":
    main()
