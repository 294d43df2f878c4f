r"""Compare LSTMs, hybrid models of LSTMs and attention, and GPT-2: on texts, in associative recall, and in writing.

python scripts/benchmarks/hybrid.py --train_file tinyshakespeare.txt \
    --words wikitext-2/valid.txt --words_validation wikitext-2/test.txt

Texts: four models of as nearly the same number of parameters as their width allows, an LSTM, a residual LSTM, a hybrid with
one layer of attention, and GPT-2. `tokens` trains each on 1.5 M characters of Shakespeare; `seconds` for 120 seconds of CPU
time after the warm-up, on Shakespeare and on words: "WT2-small", trained on WikiText-2's validation part and scored on its
test part. The LSTMs and the hybrid carry their state from chunk to chunk; GPT-2 reads windows of 64 tokens at random places,
as many tokens a step, and is scored by windows of 64 whose second half counts.

Recall (recall.py): one small model of each for each number of pairs and distance. Decode: CPU time of a token and bytes of
the state after 1,000 and 100,000 tokens.

Seconds are CPU time of this process in one thread, since wall time says little on a shared machine. Each finished run is
stored at once in hybrid.json; a run that is stored with the same settings is not repeated. `--quick` does the same with tiny
models in seconds, and its figures mean nothing.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import recall
import torch
from comparisons import hybrid_tables
from hybrid_picture import draw
from record import RESULTS, StoredRuns
from torch.nn import functional as F
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel, set_seed

from hf_lstm import (
    LSTMConfig,
    LSTMForCausalLM,
    TokenStream,
    char_tokenizer,
    evaluate_stream,
    load_corpus,
    word_tokenizer,
)

NAME = "hybrid"
PATTERN = ["hf_lstm", "hf_lstm_window", "hf_lstm"]
MODELS = {
    "lstm": {"num_hidden_layers": 1},
    "residual": {"num_hidden_layers": 3, "block_type": "residual"},
    "hybrid": {"num_hidden_layers": 3, "block_type": "residual", "layer_types": PATTERN},
    "gpt2": {"n_layer": 4},
}
RECALL = {"heads": 2, "mlp": False}  # small models have wide heads, and no MLP between the layers
LABELS = {"lstm": "LSTM", "residual": "residual LSTM", "hybrid": "hybrid", "gpt2": "GPT-2"}


@dataclass(frozen=True)
class Scale:
    """The size of the comparison."""

    parameters: int = 1_250_000  # of a model of characters
    word_parameters: int = 8_000_000
    lanes: int = 16
    bptt_length: int = 64
    window: int = 256  # of attention in the hybrid
    tokens: int = 1_500_000
    seconds: float = 120.0
    warmup: int = 50  # steps
    recall_parameters: int = 95_000
    recall_seconds: float = 60.0
    recall_rows: int = 64
    recall_tasks: tuple[tuple[int, int], ...] = ((4, 0), (8, 0), (16, 0), (8, 32), (8, 128))  # pairs, distance
    lengths: tuple[int, ...] = (1_000, 100_000)
    timed: int = 500


QUICK = Scale(3000, 20_000, 2, 16, 16, 256, 0.05, 2, 3000, 0.05, 2, ((2, 0), (2, 3)), (10, 30), 5)


def find_model(
    name: str, vocabulary: int, parameters: int, window: int, positions: int, heads: int = 4, mlp: bool = True
) -> PreTrainedModel:
    """Make the model whose width, a multiple of 4, brings its parameters nearest to a number; the embedding is tied."""

    def make(quarter: int) -> PreTrainedModel:
        width, options = 4 * quarter, MODELS[name]
        if name == "gpt2":
            sizes = {"n_embd": width, "n_head": heads, "n_positions": positions, "vocab_size": vocabulary}
            left_out = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
            left_out |= dict.fromkeys(("bos_token_id", "eos_token_id"))
            return GPT2LMHeadModel(GPT2Config(**options, **sizes, **left_out))
        if "layer_types" in options:
            options = options | {"attention_window": window, "num_attention_heads": heads}
        if options.get("block_type") == "residual" and mlp:
            options = options | {"intermediate_size": round(8 * width / 3)}
        return LSTMForCausalLM(LSTMConfig(vocab_size=vocabulary, hidden_size=width, **options))

    def size(quarter: int) -> int:
        with torch.device("meta"):
            return make(quarter).num_parameters()

    low, high = 1, 2
    while size(high) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < parameters else (low, middle)
    return make(min((low, high), key=lambda quarter: abs(size(quarter) - parameters)))


def train(model: PreTrainedModel, ids: torch.Tensor, scale: Scale, steps: float, seconds: float) -> dict:
    """
    Train on a text, for a number of steps or seconds of CPU time after the warm-up, whichever ends first: on lanes, with the
    state carried, or on windows at random places. The learning rate rises while it warms up and then falls as a cosine of
    what is used.
    """
    carries, lanes, length = isinstance(model, LSTMForCausalLM), scale.lanes, scale.bptt_length
    lane = (len(ids) - 1) // lanes
    inputs, targets = ids[: lanes * lane].view(lanes, -1), ids[1 : lanes * lane + 1].view(lanes, -1)
    rate = 4e-3  # for GPT-2 the best of 1e-3, 2e-3 and 4e-3 after 1.5 M characters: 1.87, 1.77 and 1.73
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    model.train()
    done, start, used, place, cache = 0, time.process_time(), 0.0, 0, None
    while done < steps and used < seconds:
        if carries:
            if place + length > lane or cache is None:
                place, cache = 0, DynamicCache(config=model.config)
            x, y = inputs[:, place : place + length], targets[:, place : place + length]
        else:
            starts = torch.randint(len(ids) - length, (lanes, 1))
            windows = ids[starts + torch.arange(length + 1)]
            x, y = windows[:, :-1], windows[:, 1:]
        share = max(done / steps, used / seconds)
        optimizer.param_groups[0]["lr"] = (
            rate * min(1, (done + 1) / scale.warmup) * (1 + math.cos(math.pi * share)) / 2
        )
        logits = model(x, past_key_values=cache).logits if carries else model(x, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for layer in cache.layers if carries else ():
            layer.detach_()
        place, done = place + length, done + 1
        if done == scale.warmup:
            start = time.process_time()
        used = time.process_time() - start if done >= scale.warmup else 0.0
    return {"steps": done, "tokens": done * lanes * length, "cpu_seconds": used}


@torch.no_grad()
def loss_of(model: PreTrainedModel, stream: TokenStream, scale: Scale) -> float:
    """Return the loss in nats per token: with a carried state, or by windows of which the second half counts."""
    model.eval()
    if isinstance(model, LSTMForCausalLM):
        return evaluate_stream(model, stream, batch_size=16, bptt_length=512)["loss"]
    ids, half, total, count = stream[:].long(), scale.bptt_length // 2, 0.0, 0
    for start in range(0, len(ids) - 1, half):
        first = max(0, start - half)
        x, y = ids[first : start + half][None], ids[first + 1 : start + half + 1]
        logits = model(x[:, : len(y)], use_cache=False).logits[0]
        scored = min(len(y), len(ids) - 1 - start, half)
        total += F.cross_entropy(logits[len(y) - scored :], y[-scored:], reduction="sum").item()
        count += scored
    return total / count


@torch.no_grad()
def decode(name: str, scale: Scale) -> dict:
    """Return the median CPU time of a token, in ms, and the bytes of the state, after each number of tokens."""
    model = find_model(name, 69, scale.parameters, scale.window, scale.bptt_length).eval()
    parameters = model.num_parameters()
    if isinstance(
        model, GPT2LMHeadModel
    ):  # with positions for the longest text, beyond the parameters that are compared
        model.config.n_positions = max(scale.lengths) + scale.timed
        model = GPT2LMHeadModel(model.config).eval()
    found = {}
    for length in scale.lengths:
        cache: Any = DynamicCache(config=model.config)
        if isinstance(model, LSTMForCausalLM):
            for part in torch.randint(4, 69, (1, length)).split(1000, dim=1):
                model(part, past_key_values=cache, logits_to_keep=1)
        else:  # random keys and values: reading them would take hours, and the time of a token is the same
            shape = (1, model.config.n_head, length, model.config.n_embd // model.config.n_head)
            for index in range(model.config.n_layer):
                cache.update(torch.randn(shape), torch.randn(shape), index)
        times = []
        for token in torch.randint(4, 69, (scale.timed, 1, 1)):
            start = time.process_time()
            model(token, past_key_values=cache)
            times.append(1000 * (time.process_time() - start))
        parts = [part for layer in cache.layers for part in vars(layer).values() if isinstance(part, torch.Tensor)]
        found[str(length)] = {"ms": statistics.median(times), "bytes": sum(part.nbytes for part in parts)}
    return {"parameters": parameters, "decode": found}


@dataclass(frozen=True)
class Run:
    """One run: its task, its text or setting, its model and its seed."""

    task: str
    on: str
    model: str
    seed: int


class Comparison:
    """The runs of a comparison, and what each needs."""

    def __init__(self, scale: Scale, train_file: str | None, words: str | None, words_validation: str | None):
        self.scale, self.streams, self.vocabulary = scale, {}, {}
        for name, path, validation, make in (
            ("characters", train_file, None, char_tokenizer),
            ("words", words, words_validation, word_tokenizer),
        ):
            if path is not None:
                corpus = load_corpus(path, validation_file=validation)
                tokenizer = make(corpus["train"]["text"])
                self.streams[name] = {
                    split: TokenStream.from_documents(corpus[split]["text"], tokenizer)
                    for split in ("train", "validation")
                }
                self.vocabulary[name] = len(tokenizer)

    def plan(self, tasks: list[str], models: list[str], seeds: int) -> Iterator[Run]:
        """Order the runs: one seed of everything comes first."""
        for seed in range(seeds):
            for name in models:
                if "tokens" in tasks and "characters" in self.streams:
                    yield Run("tokens", "characters", name, seed)
                if "seconds" in tasks:
                    yield from (Run("seconds", text, name, seed) for text in self.streams)
                if "recall" in tasks:
                    for pairs, distance in self.scale.recall_tasks:
                        yield Run("recall", f"{pairs} pairs, {distance} between", name, seed)
                if "decode" in tasks and seed == 0:
                    yield Run("decode", "random weights", name, seed)

    def settings(self, run: Run) -> dict:
        """Return whatever decides the result of a run."""
        digest = {"text": self.streams[run.on]["train"].digest()} if run.on in self.streams else {}
        own = RECALL if run.task == "recall" else {}
        return MODELS[run.model] | digest | asdict(self.scale) | own

    def __call__(self, run: Run) -> dict:
        """Train and measure."""
        set_seed(run.seed)
        scale = self.scale
        if run.task == "decode":
            return decode(run.model, scale)
        if run.task == "recall":
            pairs, distance = next(t for t in scale.recall_tasks if run.on == f"{t[0]} pairs, {t[1]} between")
            length = 4 * pairs + distance
            model = find_model(run.model, recall.VOCABULARY, scale.recall_parameters, length, length, **RECALL)
            budget = (scale.recall_rows, scale.recall_seconds, 3e-3, run.seed)
            trained = recall.train(model, pairs, distance, *budget, goal=0.999)
            return {
                "parameters": model.num_parameters(),
                "accuracy": recall.accuracy(model, pairs, distance, 1000),
            } | trained
        size = scale.parameters if run.on == "characters" else scale.word_parameters
        model, streams = (
            find_model(run.model, self.vocabulary[run.on], size, scale.window, scale.bptt_length),
            self.streams[run.on],
        )
        steps, seconds = (scale.tokens / (scale.lanes * scale.bptt_length), math.inf)
        if run.task == "seconds":
            steps, seconds = math.inf, scale.seconds
        trained = train(model, streams["train"][:].long(), scale, steps, seconds)
        return {"parameters": model.num_parameters(), "loss": loss_of(model, streams["validation"], scale)} | trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", help="text of characters, such as tinyshakespeare.txt")
    parser.add_argument("--words", help="text of words, such as WikiText-2's")
    parser.add_argument("--words_validation", help="text of words to score (default: the last tenth of `--words`)")
    tasks = ["tokens", "seconds", "recall", "decode"]
    parser.add_argument("--task", nargs="+", default=tasks, choices=tasks)
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=MODELS, help="models (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=90.0, help="of wall time, after which no run begins")
    parser.add_argument("--quick", action="store_true", help="tiny models, one seed: a test of this script")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of hybrid.json")
    options = parser.parse_args()
    if options.quick and options.results == RESULTS:
        parser.error("`--quick` would replace the results of long runs: give another folder with `--results`.")

    torch.set_num_threads(1)
    end = time.monotonic() + 60 * options.minutes
    compare = Comparison(
        QUICK if options.quick else Scale(), options.train_file, options.words, options.words_validation
    )
    stored = StoredRuns(NAME, options.results, labels=LABELS)
    for run in compare.plan(options.task, options.only, 1 if options.quick else options.seeds):
        if time.monotonic() > end:
            print("no time left: run the script again", flush=True)
            break
        found = stored.add(asdict(run), compare.settings(run), partial(compare, run))
        if found is not None:
            score = next(found[name] for name in ("loss", "accuracy", "decode") if name in found)
            print(f"{run}: {found['parameters']:,} parameters, {score}", flush=True)
    if stored.runs:
        draw(stored.result, options.results / f"{NAME}.png")
        print("\n" + hybrid_tables(stored.result))


if __name__ == "__main__":
    main()
