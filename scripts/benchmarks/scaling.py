"""Measure how training and generation scale with tokens, width, depth, vocabulary, length of the text and processes.

python scripts/benchmarks/scaling.py

On each axis the sizes take turns, and an exponent is fitted to the medians: time ~ size ^ exponent. The times by width
give an estimate of the time for a billion tokens on this machine.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import matplotlib.pyplot as plt
import numpy
import torch
from lengths import states_after, ways_to_write
from record import RESULTS, write_result
from transformers import HfArgumentParser
from transformers.utils import logging

from hf_lstm import LSTMConfig, LSTMForCausalLM, char_tokenizer

ROWS, TOKENS = 16, 64
BASE = {"vocab_size": 69, "hidden_size": 512, "num_hidden_layers": 1}
AXES = {
    "tokens": [8, 16, 32, 64],  # steps of 1,024 tokens
    "hidden_size": [256, 512, 1024, 2048],
    "num_hidden_layers": [1, 2, 4, 8],
    "vocab_size": [1000, 4000, 16_000, 64_000],
}
STEPS = 60  # for each number of processes
LENGTHS = [1000, 10_000, 100_000]
TOKENIZER = char_tokenizer([bytes(range(33, 98)).decode()])


@dataclass
class Arguments:
    rounds: int = field(default=5, metadata={"help": "Number of timings of each size."})
    processes: bool = field(default=True, metadata={"help": "Whether to compare two processes with one."})


class Training:
    """A model and its optimizer; a call trains for some steps."""

    def __init__(self, **changes):
        torch.manual_seed(0)
        self.model = LSTMForCausalLM(LSTMConfig(**BASE | changes)).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.ids = torch.randint(4, self.model.config.vocab_size, (ROWS, TOKENS + 1))

    def __call__(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.model(self.ids[:, :-1], shift_labels=self.ids[:, 1:].contiguous()).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def medians(calls: dict, rounds: int) -> dict[int, float]:
    """Time the calls in turns and return the median of each in seconds, without the first round."""
    times = {size: [] for size in calls}
    for _ in range(rounds + 1):
        for size, call in calls.items():
            start = perf_counter()
            call()
            times[size].append(perf_counter() - start)
    return {size: median(taken[1:]) for size, taken in times.items()}


def exponent(times: dict[int, float]) -> float:
    sizes = numpy.log([float(size) for size in times])
    return float(numpy.polyfit(sizes, numpy.log(list(times.values())), 1)[0])


def report(axis: str, times: dict[int, float], unit: str) -> dict:
    fitted = exponent(times)
    shown = ", ".join(f"{size:,}: {seconds * 1000:,.3g} ms" for size, seconds in times.items())
    print(f"  {axis}: time ~ size ^ {fitted:.3f} ({shown} {unit})", flush=True)
    return {"seconds": {str(size): seconds for size, seconds in times.items()}, "exponent": fitted}


def training_axis(axis: str, rounds: int) -> dict:
    if axis == "tokens":
        training = Training()
        calls = {steps * ROWS * TOKENS: partial(training, steps) for steps in AXES[axis]}
        return report("tokens trained on", medians(calls, rounds), "in all")
    return report(axis, medians({size: Training(**{axis: size}) for size in AXES[axis]}, rounds), "a step")


def writing_axes(rounds: int) -> dict:
    """Time the generation of 300 tokens after texts of different lengths."""
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMConfig(**BASE | {"num_hidden_layers": 2})).eval()
    model.generation_config.eos_token_id = None
    axes = {}
    for way, write in ways_to_write(model, TOKENIZER, states_after(model, LENGTHS), 300).items():
        times = medians({length: partial(write, length) for length in LENGTHS}, 2 * rounds)
        axes[f"length of the text, {way}"] = report(f"length of the text, {way}", times, "for 300 tokens")
    return axes


def processes() -> dict[str, float]:
    """Measure tokens per second of scripts/train.py with one and with two processes of one thread."""
    train, rates = Path(__file__).parent.parent / "train.py", {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("".join(chr(33 + value % 64) for value in torch.randint(0, 64, (200_000,)).tolist()))
        for count in (1, 2):
            command = [sys.executable]
            if count > 1:  # `--multi_gpu` starts several processes with torchrun; the script itself uses no GPU
                command += ["-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={count}"]
                command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
            flags = f"--train_file {text} --output_dir {folder}/{count} --hidden_size 512 --max_steps {STEPS} --use_cpu true"
            flags += f" --per_device_train_batch_size {ROWS // count} --per_device_eval_batch_size {ROWS // count}"
            flags += f" --bptt_length {TOKENS}"
            flags += " --eval_strategy no --save_strategy no --load_best_model_at_end false"
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([*command, str(train), *flags.split()], capture_output=True, env=environment, check=True)
            taken = json.loads((Path(folder) / str(count) / "metrics.json").read_text())["train_runtime"]
            rates[str(count)] = STEPS * ROWS * TOKENS / taken
            print(f"  {count} processes of one thread: {rates[str(count)]:,.0f} tokens per second", flush=True)
    return rates


def draw(axes: dict) -> None:
    figure, panels = plt.subplots(2, 4, figsize=(14, 6), layout="constrained")
    for panel, (axis, result) in zip(panels.flat, axes.items(), strict=False):
        sizes = [int(size) for size in result["seconds"]]
        panel.plot(sizes, [seconds * 1000 for seconds in result["seconds"].values()], "o-")
        panel.set(xscale="log", yscale="log", title=f"{axis}\ntime ~ size^{result['exponent']:.2f}", ylabel="ms")
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.set_xticks([], minor=True)
        panel.set_ylim(min(result["seconds"].values()) * 300, max(result["seconds"].values()) * 3000)
    for panel in panels.flat[len(axes) :]:
        panel.axis("off")
    path = RESULTS / "scaling_cpu.png"
    figure.savefig(path, dpi=110)
    print(f"drawn in {path}")


def main(arguments: Arguments) -> None:
    logging.set_verbosity_error()
    print(f"Training, {ROWS} x {TOKENS} tokens a step:")
    axes = {axis: training_axis(axis, arguments.rounds) for axis in AXES}
    print("Writing, two layers of 512:")
    axes |= writing_axes(arguments.rounds)
    result = {"rows": ROWS, "tokens": TOKENS, "base": BASE, "axes": axes}
    per_token = {size: seconds / ROWS / TOKENS for size, seconds in axes["hidden_size"]["seconds"].items()}
    result["days_of_a_billion_tokens"] = {size: seconds * 1e9 / 86_400 for size, seconds in per_token.items()}
    for size, days in result["days_of_a_billion_tokens"].items():
        parameters = Training(hidden_size=int(size)).model.num_parameters()
        print(f"  a billion tokens, one layer of {size} ({parameters:,} parameters): {days:,.1f} days")
    if arguments.processes:
        result["tokens_per_second_of_processes"] = processes()
    draw(axes)
    write_result("scaling_cpu", result)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
