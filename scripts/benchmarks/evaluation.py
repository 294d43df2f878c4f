"""Time evaluation against its lower bound, and surprisal of many sentences against one at a time.

python scripts/benchmarks/evaluation.py --file tinyshakespeare.txt

A model with one layer of 512 units reads the validation text in lanes and as a single stream. The lower bound is
torch's LSTM with the same weights, embedding and output layer, whose results are discarded. The contestants take
turns, and medians are reported.
"""

from dataclasses import dataclass, field
from pathlib import Path
from runpy import run_path
from statistics import median
from time import perf_counter

import torch
from record import write_result
from torch.nn import functional as F
from transformers import HfArgumentParser
from transformers.utils import logging

from hf_lstm import (
    LSTMConfig,
    LSTMForCausalLM,
    TokenStream,
    char_tokenizer,
    evaluate_stream,
    load_corpus,
    surprisal,
)

BPTT_LENGTH = 1024
STANDARD_LIBRARY = Path(__file__).parents[1] / "standard_library.py"


@dataclass
class Arguments:
    file: str | None = field(default=None, metadata={"help": "The text (default: the standard library of Python)."})
    lanes: int = field(default=16, metadata={"help": "Number of parallel lanes."})
    sentences: int = field(default=10_000, metadata={"help": "Number of sentences in one call of `surprisal`."})
    rounds: int = field(default=5, metadata={"help": "Number of timings of each contestant."})


@torch.no_grad()
def bare_forward(model, stream: TokenStream, lanes: int) -> None:
    """Run torch's LSTM over equal lanes, chunk by chunk with carried state: the lower bound of a forward pass."""
    layer = model.model.layers[0]
    part = (len(stream) - 1) // lanes
    ids = stream[: lanes * part].view(lanes, part)
    weights = [layer.input_gates.weight, layer.hidden_gates.weight, layer.input_gates.bias]
    weights.append(torch.zeros_like(weights[-1]))
    h = c = torch.zeros(1, lanes, model.config.hidden_size)
    for chunk in ids.split(BPTT_LENGTH, dim=1):
        x = model.model.embed_tokens(chunk)
        x, h, c = torch.lstm(x, (h, c), weights, True, 1, 0.0, False, False, True)
        model.lm_head(x)


@torch.no_grad()
def by_hand(model, tokenizer, sentences: list[str]) -> float:
    """Sum the loss of the sentences in nats, with the simplest loop."""
    total = 0.0
    for sentence in sentences:
        ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
        total += F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
    return total


def seconds(call) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def main(arguments: Arguments) -> None:
    logging.disable_progress_bar()
    corpus = load_corpus(arguments.file or run_path(STANDARD_LIBRARY)["standard_library"]())
    tokenizer = char_tokenizer(corpus["train"]["text"])
    stream = TokenStream.from_documents(corpus["validation"], tokenizer)
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=len(tokenizer), hidden_size=512, num_hidden_layers=1)).eval()
    lines = (line for text in corpus["train"]["text"] for line in text.splitlines() if len(line) > 1)
    sentences = [line for line, _ in zip(lines, range(arguments.sentences), strict=False)]
    few = sentences[:: max(1, len(sentences) // 500)]

    contestants = {}
    for name, lanes in (("lanes", arguments.lanes), ("stream", 1)):
        contestants[f"{name}: bare forward"] = lambda lanes=lanes: bare_forward(model, stream, lanes)
        contestants[f"{name}: evaluate_stream"] = lambda lanes=lanes: evaluate_stream(
            model, stream, batch_size=lanes, bptt_length=BPTT_LENGTH
        )
    contestants["sentences: a loop by hand"] = lambda: by_hand(model, tokenizer, few)
    contestants["sentences: surprisal, one at a time"] = lambda: [surprisal(model, tokenizer, [text]) for text in few]
    contestants["sentences: surprisal"] = lambda: surprisal(model, tokenizer, sentences)
    times = {name: [] for name in contestants}
    for turn in range(arguments.rounds + 1):
        for name, call in contestants.items():
            times[name].append(seconds(call))
            print(f"round {turn}, {name}: {times[name][-1]:.3f} s" + (" (warming up)" if turn == 0 else ""))
    medians = {name: median(taken[1:]) for name, taken in times.items()}
    rates = {
        "a loop by hand": len(few) / medians["sentences: a loop by hand"],
        "surprisal, one at a time": len(few) / medians["sentences: surprisal, one at a time"],
        "surprisal": len(sentences) / medians["sentences: surprisal"],
    }
    result = {
        "tokens": len(stream),
        "seconds": medians,
        "lanes_ratio": medians["lanes: evaluate_stream"] / medians["lanes: bare forward"],
        "stream_ratio": medians["stream: evaluate_stream"] / medians["stream: bare forward"],
        "sentences": len(sentences),
        "sentences_per_second": rates,
        "surprisal_ratio": rates["surprisal"] / rates["surprisal, one at a time"],
        "surprisal_ratio_to_a_loop_by_hand": rates["surprisal"] / rates["a loop by hand"],
    }
    for name in ("lanes_ratio", "stream_ratio", "surprisal_ratio", "surprisal_ratio_to_a_loop_by_hand"):
        print(f"{name}: {result[name]:.2f}")
    write_result("evaluation_cpu", result)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
