"""Measure the memory of training with a large vocabulary, with and without chunks, and of the state of a growing text.

python scripts/benchmarks/memory.py

Each training runs in a process of its own, because the system reports the peak memory of a process; the memory after
the imports is subtracted. The variants take turns.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

import matplotlib.pyplot as plt
import torch
from record import RESULTS, write_result
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, MambaConfig, MambaForCausalLM
from transformers.utils import logging

from hf_lstm import LSTMConfig, LSTMForCausalLM

LENGTHS = [16, 256, 1024, 4096]


@dataclass
class Arguments:
    vocab_size: int = field(default=50_000, metadata={"help": "Size of the vocabulary."})
    hidden_size: int = field(default=512, metadata={"help": "Width of the two layers."})
    rows: int = field(default=32, metadata={"help": "Rows per batch."})
    tokens: int = field(default=128, metadata={"help": "Tokens per row."})
    chunk_size: int = field(default=512, metadata={"help": "Tokens whose logits are in memory at a time."})
    rounds: int = field(default=3, metadata={"help": "Processes per variant."})
    steps: int = field(default=3, metadata={"help": "Timed steps per process, after one that is not timed."})
    way: str | None = field(default=None, metadata={"help": "Set in child processes: `plain` or `chunked`."})


def held(kind: str) -> float:
    """Return the memory of this process in megabytes: current (`VmRSS`) or peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) / 1024


def train(arguments: Arguments) -> None:
    """Train in a child process and print the memory, time and losses as JSON."""
    before = held("VmRSS")
    torch.manual_seed(0)
    config = LSTMConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        loss_chunk_size=arguments.chunk_size if arguments.way == "chunked" else None,
    )
    model = LSTMForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    times, losses = [], []
    for _ in range(arguments.steps + 1):
        ids = torch.randint(4, arguments.vocab_size, (arguments.rows, arguments.tokens + 1))
        start = perf_counter()
        loss = model(ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(perf_counter() - start)
        losses.append(loss.item())
    print(json.dumps({"mb": held("VmHWM") - before, "seconds": median(times[1:]), "losses": losses}))


def compare_losses(arguments: Arguments) -> dict:
    """Run both variants in turns."""
    runs = {"plain": [], "chunked": []}
    for _ in range(arguments.rounds):
        for way, found in runs.items():
            command = [sys.executable, __file__, "--way", way]
            for name in ("vocab_size", "hidden_size", "rows", "tokens", "chunk_size", "steps"):
                command += [f"--{name}", str(getattr(arguments, name))]
            found.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
            print(f"  {way:<8} {found[-1]['mb']:8,.0f} MB, {found[-1]['seconds']:6.2f} s a step", flush=True)
    result = {
        way: {key: median(run[key] for run in found) for key in ("mb", "seconds")} for way, found in runs.items()
    }
    plain, chunked = runs["plain"][0]["losses"], runs["chunked"][0]["losses"]
    result["largest difference of the losses"] = max(abs(a - b) for a, b in zip(plain, chunked, strict=True))
    for key in ("mb", "seconds"):
        result[f"{key}: chunked of plain"] = result["chunked"][key] / result["plain"][key]
        print(f"  {key}: {result[f'{key}: chunked of plain']:.3f} of the plain loss's")
    return result


def tensors_of(value):
    """Yield all tensors of a state."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)
    elif hasattr(value, "__dict__"):
        yield from tensors_of(vars(value))


@torch.inference_mode()
def states() -> dict[str, dict[str, int]]:
    """Return the bytes of the state of one text, by its length, for models of about 4 million parameters."""
    sizes = {"vocab_size": 69}
    models = {
        "LSTM": LSTMForCausalLM(LSTMConfig(**sizes)),
        "GPT-2": GPT2LMHeadModel(GPT2Config(**sizes, n_positions=LENGTHS[-1], n_embd=256, n_layer=5, n_head=4)),
        "Mamba": MambaForCausalLM(MambaConfig(**sizes, hidden_size=384, num_hidden_layers=4)),
    }
    result = {}
    for name, model in models.items():
        result[name] = {}
        for length in LENGTHS:
            outputs = model.eval()(torch.full((1, length), 5), use_cache=True)
            state = outputs.cache_params if name == "Mamba" else outputs.past_key_values
            kept = {tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(state)}
            result[name][str(length)] = sum(kept.values())
        print(f"  {name:<6} " + ", ".join(f"{bytes_:,} bytes after {n}" for n, bytes_ in result[name].items()))
    return result


def draw(result: dict) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    loss = result["loss"]
    left.bar(["all logits", "in chunks"], [loss[way]["mb"] for way in ("plain", "chunked")], color="tab:blue")
    left.set_title(f"MB of a training step, vocabulary of {result['vocab_size']:,}")
    for name, sizes in result["state_bytes"].items():
        right.plot([int(length) for length in sizes], list(sizes.values()), "o-", label=name)
    right.set(xscale="log", yscale="log", xlabel="tokens read", title="bytes kept of a text")
    right.legend()
    path = RESULTS / "memory_cpu.png"
    figure.savefig(path, dpi=110)
    print(f"drawn in {path}")


def main(arguments: Arguments) -> None:
    logging.set_verbosity_error()
    if arguments.way is not None:
        train(arguments)
        return
    result = {name: value for name, value in vars(arguments).items() if name not in ("way", "rounds")}
    print(f"A step of {arguments.rows} x {arguments.tokens} tokens, vocabulary of {arguments.vocab_size:,}:")
    result["loss"] = compare_losses(arguments)
    print("State of a text:")
    result["state_bytes"] = states()
    draw(result)
    write_result("memory_cpu", result)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
