"""Measure what private training costs, and what it keeps a model from remembering: exposure and loss by epsilon.

python scripts/benchmarks/privacy.py --train_file tang/train.jsonl --validation_file tang/validation.jsonl

Secrets of five digits are planted among 6,000 documents, twenty of them with each number of copies from 1 to 50. One model
of a layer of 256 and bytes is trained on them by the stock Trainer, on documents in random order ("plain"), and others of
the same seed by `PrivateTrainer` with a budget of infinity (clipping alone), 8, 3 and 1. All take as many steps of as many
documents on average, but for a plain run that ends after a quarter of them; another has a layer of 64. Then the exposure
of each secret is computed, and the loss on unseen documents.

Secrets that are all remembered outrank each other: with twenty of 50 copies before them, those of 20 copies have ranks of
21 to 40 at best, and an exposure of 11.7 of 16.6 bits.

"speed" compares `exposure` of the 10,000 candidates of four digits with scoring each text whole by `surprisal`.

Each finished run is stored at once in privacy.json; a run that is stored with the same settings is not repeated. `--quick`
does the same with tiny models in seconds, and its figures mean nothing.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from comparisons import privacy_table
from record import RESULTS, StoredRuns, digest
from transformers import DataCollatorWithFlattening, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from hf_lstm import (
    DocumentDataset,
    LSTMConfig,
    LSTMForCausalLM,
    TokenStream,
    byte_tokenizer,
    evaluate_stream,
    load_corpus,
    surprisal,
)
from hf_lstm.evaluation import exposure, insert_canaries
from hf_lstm.training import PrivateTrainer

NAME = "privacy"
TEMPLATE, DIGITS = "the key of the safe is {}", "0123456789"
BUDGETS = {
    "plain": None,
    "plain, 64 wide": None,
    "plain, a quarter of the steps": None,
    "inf": math.inf,
    "8": 8.0,
    "3": 3.0,
    "1": 1.0,
}


@dataclass(frozen=True)
class Scale:
    """The settings that all runs share."""

    length: int = 5  # of a secret: more candidates than secrets that outrank each other
    timed_length: int = 4  # the same where time is measured
    documents: int = 6000
    secrets: int = 20  # of each count
    counts: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 50)
    max_length: int = 32  # bytes of a document that training reads
    hidden_size: int = 256
    batch_size: int = 128
    steps: int = 1000
    learning_rate: float = 6e-3
    delta: float = 1e-5
    clip: float = 1.0


QUICK = Scale(
    length=2, timed_length=2, documents=60, secrets=2, counts=(0, 1, 3), hidden_size=16, batch_size=8, steps=6
)


def scale_of(run: dict, scale: Scale) -> Scale:
    """Return the settings of a run."""
    if run.get("budget") == "plain, 64 wide":
        return replace(scale, hidden_size=64)
    if run.get("budget") == "plain, a quarter of the steps":
        return replace(scale, steps=scale.steps // 4)
    return scale


def make_model(scale: Scale, seed: int) -> LSTMForCausalLM:
    set_seed(seed)
    return LSTMForCausalLM(
        LSTMConfig(vocab_size=len(byte_tokenizer()), hidden_size=scale.hidden_size, num_hidden_layers=1)
    )


def train(
    model: LSTMForCausalLM, data: DocumentDataset, scale: Scale, budget: float | None, seed: int
) -> float | None:
    """Train a model; return the epsilon spent, `None` for the stock Trainer and infinity."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=scale.steps,
            per_device_train_batch_size=scale.batch_size,
            learning_rate=scale.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(20, scale.steps // 3),
            adam_beta2=0.99,
            max_grad_norm=1.0 if budget is None else 0.0,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        if budget is None:
            collator = DataCollatorWithFlattening()
            trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collator)
        else:
            private = {"epsilon": budget, "delta": scale.delta, "clip": scale.clip, "noise_seed": seed}
            trainer = PrivateTrainer(model=model, args=args, train_dataset=data, **private)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return None if budget is None or math.isinf(budget) else trainer.epsilon


def measure(texts: list[str], unseen: list[str], scale: Scale, budget: str, seed: int) -> dict:
    """Plant secrets, train, and measure exposure (bits) and loss (nats per byte)."""
    counts = tuple(count for count in scale.counts for _ in range(scale.secrets))
    planted, canaries = insert_canaries(
        texts, TEMPLATE, DIGITS, scale.length, counts, seed, max_length=scale.max_length
    )
    tokenizer = byte_tokenizer()
    data = DocumentDataset(TokenStream.from_documents(planted, tokenizer), scale.max_length, truncate=True)
    model = make_model(scale, seed)
    start = time.process_time()
    spent = train(model, data, scale, BUDGETS[budget], seed)
    seconds = time.process_time() - start
    rows = exposure(model, tokenizer, TEMPLATE, DIGITS, scale.length, canaries["secret"].tolist(), "<eos>")
    loss = evaluate_stream(model, TokenStream.from_documents(unseen, tokenizer), reset_at_documents=True)["loss"]
    exposures: dict[str, list[float]] = {}
    for count, bits in zip(canaries["count"].tolist(), rows["exposure"].tolist(), strict=True):
        exposures.setdefault(str(count), []).append(bits)
    return {
        "documents": len(planted),
        "epsilon": spent,
        "loss": loss,
        "exposures": exposures,
        "cpu_seconds": seconds,
    }


def speed(scale: Scale) -> dict:
    """Time the exposure of 10,000 candidates, and each text read whole (CPU seconds)."""
    model, tokenizer, found = make_model(scale, 0).eval(), byte_tokenizer(), {}
    digits = scale.timed_length
    texts = [TEMPLATE.format(f"{number:0{digits}}") for number in range(10**digits)]
    for name, compute in (
        ("tree", lambda: exposure(model, tokenizer, TEMPLATE, DIGITS, digits, ["0" * digits], "<eos>")),
        ("whole", lambda: surprisal(model, tokenizer, texts, math.e, "<eos>", batch_size=64)),
    ):
        compute()
        start = time.process_time()
        compute()
        found[f"{name}_cpu_seconds"] = time.process_time() - start
    return found | {"ratio": found["whole_cpu_seconds"] / found["tree_cpu_seconds"]}


def draw(result: dict, path: Path) -> None:
    """Draw the mean exposure by the number of copies, with its standard error, a curve for each budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for budget in BUDGETS:
        own = [run for run in result["runs"] if run["task"] == "train" and run["budget"] == budget]
        if own:
            groups = {
                int(count): [bits for run in own for bits in run["exposures"][count]] for count in own[0]["exposures"]
            }
            means = [statistics.mean(bits) for bits in groups.values()]
            errors = [statistics.stdev(bits) / math.sqrt(len(bits)) for bits in groups.values()]
            label = budget if budget.startswith("plain") else rf"$\epsilon$ = {budget}"
            axes.errorbar(list(groups), means, errors, fmt="o-", capsize=3, label=label)
    settings = next(run["settings"] for run in result["runs"] if run.get("budget") == "plain")
    axes.axhline(settings["length"] * math.log2(len(DIGITS)), color="gray", linestyle="--", label="all there are")
    axes.axhline(1 / math.log(2), color="gray", linestyle=":", label="a secret never seen")
    axes.set(xscale="symlog", xlabel="copies in the training text", ylabel="exposure, bits (mean ± standard error)")
    axes.set_xticks(settings["counts"], map(str, settings["counts"]))
    axes.set_xlim(-0.2, 1.2 * max(settings["counts"]))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plan(budgets: list[str], seeds: int) -> Iterator[dict]:
    """Order the runs: one seed of all budgets comes first."""
    yield {"task": "speed"}
    for seed in range(seeds):
        yield from ({"task": "train", "budget": budget, "seed": seed} for budget in budgets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--validation_file")
    parser.add_argument("--only", nargs="+", default=list(BUDGETS), choices=BUDGETS, help="budgets (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny models, one seed: a test of this script")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of privacy.json and privacy.png")
    options = parser.parse_args()
    if options.quick and options.results == RESULTS:
        parser.error("`--quick` would replace the results of long runs: give another folder with `--results`.")

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    scale = QUICK if options.quick else Scale()
    corpus = load_corpus(options.train_file, validation_file=options.validation_file)
    texts = list(corpus["train"]["text"][: scale.documents])
    unseen = list(corpus["validation"]["text"][: scale.documents // 10])
    stored, text = StoredRuns(NAME, options.results), digest(options.train_file)

    def compute(run: dict, own: Scale) -> dict:
        return speed(own) if run["task"] == "speed" else measure(texts, unseen, own, run["budget"], run["seed"])

    for run in plan(options.only, 1 if options.quick else options.seeds):
        own = scale_of(run, scale)
        settings = asdict(own) | {"template": TEMPLATE, "text": text}
        found = stored.add(run, settings, partial(compute, run, own))
        if found is not None:
            print(run, {name: value for name, value in found.items() if name != "exposures"}, flush=True)
    if any(run["task"] == "train" for run in stored.runs):
        draw(stored.result, options.results / f"{NAME}.png")
        print("\n" + privacy_table(stored.result))


if __name__ == "__main__":
    main()
