"""Compare cells at equal parameters, tokens and CPU time on a text, and on a copying task.

python scripts/benchmarks/cells.py --train_file tinyshakespeare.txt

Shakespeare: every model has as nearly 1.25 M parameters as its width allows, and is trained by the stock Trainer on
lanes, once on 1.5 M characters and once for 60 seconds. All have a cosine schedule, no dropout and a learning rate of
4e-3, plain RNNs 1e-3. Seconds are CPU time of this process in one thread, since wall time says little on a shared
machine. The schedule has to know the number of steps beforehand: a few steps of the same model are timed first, and a
callback stops at the budget in any case. The bias of the forget gate and chrono initialisation change the first weights
and not the time of a step, so of those LSTMs only one is trained for equal seconds.

Copying (copying.py): reproduce a key after 10 to 500 tokens of noise. One model of each cell, of equal parameters, is
trained for 90 seconds of CPU time on mixed distances from 1 token on, since long ones are learnt after short ones.

Each finished run is stored at once in cells.json; a run that is stored with the same settings is not repeated.
`--quick` does the same with tiny models in seconds, and its figures mean nothing.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import copying
import numpy
import torch
from cells_picture import draw
from comparisons import cells_tables
from record import RESULTS, StoredRuns
from transformers import PrinterCallback, Trainer, TrainerCallback, default_data_collator, set_seed
from transformers.utils import logging
from zoneout import add_zoneout

from hf_lstm import (
    LaneDataset,
    LSTMConfig,
    LSTMForCausalLM,
    TokenStream,
    char_tokenizer,
    evaluate_stream,
    load_corpus,
)
from hf_lstm.evaluation import gradient_flow, losses_by_position
from hf_lstm.training import LSTMTrainingArguments, TruncatedBPTTCallback

NAME = "cells"


@dataclass(frozen=True)
class Contestant:
    """A row of the tables: its config, its learning rates, and the number of its seeds."""

    label: str
    config: dict[str, Any]
    copy_config: dict[str, Any] = field(default_factory=dict)  # what differs when copying
    learning_rate: float = 4e-3  # on the text
    copy_learning_rate: float = 4e-3
    seeds: int = 3
    prepare: Callable[[LSTMForCausalLM], LSTMForCausalLM] = lambda model: model
    steps_like: str | None = None  # a cell whose steps take the same time: no run for equal seconds
    copies: bool = True
    layers: int = 1


CONTESTANTS = {
    "rnn_tanh": Contestant("RNN, tanh", {"cell_type": "rnn_tanh"}, learning_rate=1e-3, copy_learning_rate=1e-3),
    "gru": Contestant("GRU", {"cell_type": "gru"}),
    "lstm_0": Contestant("LSTM, forget bias 0", {"forget_gate_bias": 0.0}, steps_like="lstm", copies=False),
    "lstm": Contestant("LSTM, forget bias 1", {"forget_gate_bias": 1.0}),
    "lstm_2": Contestant("LSTM, forget bias 2", {"forget_gate_bias": 2.0}, steps_like="lstm", copies=False),
    "chrono": Contestant(
        "LSTM, chrono", {"chrono_max_distance": 64}, {"chrono_max_distance": 500}, steps_like="lstm"
    ),  # what gradients run back through in one task, the longest distance in the other
    "residual": Contestant("residual LSTM", {"block_type": "residual"}, layers=2),
    "zoneout": Contestant("LSTM, zoneout", {"forget_gate_bias": 1.0}, seeds=2, prepare=add_zoneout),
    "mogrifier": Contestant("Mogrifier LSTM", {"cell_type": "mogrifier", "mogrifier_rounds": 5}, seeds=1),
}


@dataclass(frozen=True)
class Scale:
    """The size of the comparison."""

    parameters: int = 1_250_000
    lanes: int = 16
    bptt_length: int = 64
    tokens: int = 1_500_000
    seconds: float = 60.0
    warmup: int = 50  # steps
    calibration: int = 30  # steps
    parts: int = 32  # of the validation text, read side by side
    reset_every: int = 512
    flow_positions: int = 32
    flow_distances: tuple[int, ...] = tuple(range(0, 201, 4))
    copy_parameters: int = 135_000
    copy_rows: int = 16
    copy_range: tuple[int, int] = (1, 500)  # short distances are learnt first
    copy_seconds: float = 90.0
    copy_distances: tuple[int, ...] = (10, 20, 50, 100, 200, 500)
    copy_keys: int = 512


QUICK = Scale(
    parameters=4000,
    lanes=2,
    bptt_length=16,
    tokens=256,
    seconds=0.05,
    warmup=2,
    calibration=6,
    parts=4,
    reset_every=16,
    flow_positions=2,
    flow_distances=(0, 4, 8),
    copy_parameters=3000,
    copy_rows=2,
    copy_range=(2, 5),
    copy_seconds=0.05,
    copy_distances=(2, 5),
    copy_keys=4,
)


def find_config(cell: Contestant, vocab_size: int, parameters: int) -> LSTMConfig:
    """Return the config whose width brings the number of parameters nearest to `parameters`."""

    def config(width):
        settings = cell.config | {"vocab_size": vocab_size, "hidden_size": width, "num_hidden_layers": cell.layers}
        if cell.config.get("block_type") == "residual":
            settings["intermediate_size"] = round(8 * width / 3)  # with three matrices, as many as one with 4
        return LSTMConfig(**settings)

    def size(width):
        with torch.device("meta"):
            return LSTMForCausalLM(config(width)).num_parameters()

    low, high = 1, 2
    while size(high) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < parameters else (low, middle)
    return config(min((low, high), key=lambda width: abs(size(width) - parameters)))


def make_model(cell: Contestant, config: LSTMConfig, seed: int) -> LSTMForCausalLM:
    set_seed(seed)
    return cell.prepare(LSTMForCausalLM(config))


class CPUTime(TrainerCallback):
    """Notes the CPU time (seconds) at the end of each step, and stops where it exceeds a budget."""

    def __init__(self, budget: float = math.inf):
        self.budget, self.times = budget, [time.process_time()]

    def on_train_begin(self, args, state, control, **kwargs):
        self.times = [time.process_time()]

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.process_time())
        if self.used >= self.budget:
            control.should_training_stop = True

    @property
    def used(self) -> float:
        return self.times[-1] - self.times[0]


def train(
    model, stream, scale: Scale, steps: int, learning_rate: float, seed: int, budget: float = math.inf
) -> CPUTime:
    """Train with the state carried on, for a number of steps and at most `budget` seconds."""
    watch = CPUTime(budget)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=LSTMTrainingArguments(
                folder,
                max_steps=steps,
                seed=seed,
                per_device_train_batch_size=scale.lanes,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=min(scale.warmup, steps // 10),
                adam_beta2=0.99,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=LaneDataset(stream, scale.lanes, scale.bptt_length),
            data_collator=default_data_collator,
            callbacks=[TruncatedBPTTCallback(), watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return watch


def flow(model, stream, scale: Scale) -> list[float]:
    """Return the gradient of a loss by the states of all layers, at each of the distances, over that at distance 0."""
    longest = scale.flow_distances[-1]
    ids = stream[: 8 * (longest + 1)]
    norms = gradient_flow(model, ids[None], positions=scale.flow_positions, max_distance=longest)
    whole = numpy.sqrt(numpy.square(norms).sum(axis=0))  # of the states of all layers together
    return [float(f"{whole[distance] / whole[0]:.4g}") for distance in scale.flow_distances]


def by_distance(model, stream, scale: Scale) -> dict[str, float]:
    """Return the loss by the number of characters read since the state was zero, in groups that double."""
    chunk = scale.parts * scale.reset_every
    nats, counts = losses_by_position(model, stream, bptt_length=chunk, reset_every=scale.reset_every)
    losses, first = {}, 1
    while first <= len(nats):  # 1, 2, 3-4, 5-8, ...
        last = 2 ** math.ceil(math.log2(first))
        losses[str(last)] = float(nats[first - 1 : last].sum() / counts[first - 1 : last].sum())
        first = last + 1
    return losses


@dataclass(frozen=True)
class Run:
    """One run: its task (`tokens`, `seconds` or `copy`), cell and seed."""

    task: str
    cell: str
    seed: int


class Comparison:
    """The runs of a comparison on a text, and what each needs."""

    def __init__(self, train_file: str, scale: Scale):
        corpus = load_corpus(train_file)
        self.scale, self.tokenizer = scale, char_tokenizer(corpus["train"]["text"])
        self.streams = {split: TokenStream.from_documents(rows, self.tokenizer) for split, rows in corpus.items()}

    def config(self, run: Run) -> LSTMConfig:
        if run.task == "copy":
            cell = CONTESTANTS[run.cell]
            cell = replace(cell, config=cell.config | cell.copy_config)
            return find_config(cell, copying.VOCABULARY, self.scale.copy_parameters)
        return find_config(CONTESTANTS[run.cell], len(self.tokenizer), self.scale.parameters)

    def settings(self, run: Run) -> dict:
        """Return whatever decides the result of a run."""
        cell, config, scale = CONTESTANTS[run.cell], self.config(run), asdict(self.scale)
        settings = cell.config | {"layers": cell.layers, "width": config.hidden_size}
        if run.task == "copy":
            chosen = {name: value for name, value in scale.items() if name.startswith("copy_")}
            chosen |= {"symbols": copying.SYMBOLS, "key": copying.KEY, "noise": copying.NOISE}
            return settings | cell.copy_config | {"learning_rate": cell.copy_learning_rate} | chosen
        left_out = {"tokens": "seconds", "seconds": "tokens"}[run.task]
        chosen = {name: value for name, value in scale.items() if not name.startswith("copy_") and name != left_out}
        text = {"text": self.streams["train"].digest(), "vocabulary": len(self.tokenizer)}
        return settings | {"learning_rate": cell.learning_rate} | text | chosen

    def __call__(self, run: Run) -> dict:
        """Train and measure."""
        cell, config = CONTESTANTS[run.cell], self.config(run)
        model = make_model(cell, config, run.seed)
        sizes = {"width": config.hidden_size, "parameters": model.num_parameters()}
        return sizes | (self.copy(run, cell, model) if run.task == "copy" else self.read(run, cell, config, model))

    def copy(self, run: Run, cell: Contestant, model) -> dict:
        scale = self.scale
        budget = (scale.copy_range, scale.copy_rows, scale.copy_seconds)
        trained = copying.train(model, *budget, cell.copy_learning_rate, run.seed)
        accuracy = copying.accuracies(model, scale.copy_distances, scale.copy_keys)
        return trained | {"accuracy": accuracy, "chance": copying.CHANCE}

    def read(self, run: Run, cell: Contestant, config: LSTMConfig, model) -> dict:
        """Train on the text, for equal tokens or equal seconds, and evaluate."""
        scale, train_on, validation = self.scale, self.streams["train"], self.streams["validation"]
        flows = run.task == "tokens" and run.seed == 0
        found = {"gradient_at_start": flow(model, validation, scale)} if flows else {}
        rate, budget = cell.learning_rate, math.inf
        if run.task == "tokens":
            steps = math.ceil(scale.tokens / (scale.lanes * scale.bptt_length))
        else:
            trial = make_model(cell, config, run.seed)
            times = train(trial, train_on, scale, scale.calibration, rate, run.seed).times
            skipped = scale.calibration // 3
            seconds = (times[-1] - times[skipped]) / (scale.calibration - skipped)
            steps, budget = math.ceil(scale.seconds / seconds), scale.seconds
        watch = train(model, train_on, scale, steps, rate, run.seed, budget)
        steps = len(watch.times) - 1
        found |= {"steps": steps, "tokens": steps * scale.lanes * scale.bptt_length, "cpu_seconds": watch.used}
        scores = evaluate_stream(model, validation, batch_size=scale.parts, bptt_length=scale.reset_every)
        found |= {name: scores[name] for name in ("loss", "loss_interval", "accuracy", "bits_per_byte")}
        found["loss_by_distance"] = by_distance(model, validation, scale)
        if flows:
            found["gradient_at_end"] = flow(model, validation, scale)
        return found


def plan(names: list[str], seeds: int, tasks: list[str]) -> Iterator[Run]:
    """Order the runs: one seed of everything comes first, and copying early."""
    for seed in range(seeds):
        chosen = [name for name in names if seed < CONTESTANTS[name].seeds]
        if "shakespeare" in tasks:
            yield from (Run("tokens", name, seed) for name in chosen)
        if "copy" in tasks and seed == 0:
            yield from (Run("copy", name, seed) for name in chosen if CONTESTANTS[name].copies)
        if "shakespeare" in tasks:
            yield from (Run("seconds", name, seed) for name in chosen if CONTESTANTS[name].steps_like is None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--task", nargs="+", default=["shakespeare", "copy"], choices=["shakespeare", "copy"])
    parser.add_argument(
        "--only", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS, help="cells (default: all)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="at most, of each cell")
    parser.add_argument("--quick", action="store_true", help="tiny models, one seed: a test of this script")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of cells.json and cells.png")
    options = parser.parse_args()
    if options.quick and options.results == RESULTS:
        parser.error("`--quick` would replace the results of long runs: give another folder with `--results`.")

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    scale = QUICK if options.quick else Scale()
    compare = Comparison(options.train_file, scale)
    labels = {name: cell.label for name, cell in CONTESTANTS.items()}
    stored = StoredRuns(NAME, options.results, labels=labels, flow_distances=scale.flow_distances)
    for run in plan(options.only, 1 if options.quick else options.seeds, options.task):
        found = stored.add(asdict(run), compare.settings(run), partial(compare, run))
        if found is not None:
            score = found["accuracy"] if run.task == "copy" else f"{found['loss']:.4f} nats per character"
            print(f"{run}: {found['parameters']:,} parameters, {found['cpu_seconds']:.1f} CPU s, {score}", flush=True)
    draw(stored.result, options.results / f"{NAME}.png")
    print("\n" + cells_tables(stored.result))


if __name__ == "__main__":
    main()
