"""Time the evaluation against what it cannot be faster than, and many sentences against one at a time.

python scripts/benchmarks/evaluation.py --file tinyshakespeare.txt

A model of one layer of 512 units reads the validation text in lanes and as a single stream; so does torch's own LSTM,
with the same weights, an embedding before it and an output layer behind it, that keeps nothing of what it computes.
Medians of rounds in which the contestants take turns.
"""

from dataclasses import dataclass, field
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


@dataclass
class Arguments:
    file: str | None = field(default=None, metadata={"help": "The text; Python's standard library without it."})
    lanes: int = field(default=16, metadata={"help": "Lanes read side by side."})
    sentences: int = field(default=10_000, metadata={"help": "Sentences whose surprisal is computed at once."})
    rounds: int = field(default=5, metadata={"help": "Times that each contestant is timed."})


@torch.no_grad()
def bare_forward(model, stream: TokenStream, lanes: int) -> None:
    """The least that a forward takes: torch's LSTM over equal lanes, chunk by chunk, the state carried."""
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
    """The shortest loop that one would write; returns the sum in nats."""
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
    corpus = load_corpus(arguments.file)
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
