"""Compare the training step of documents packed into one row with that of the same documents as a padded batch.

python scripts/benchmarks/packing.py
"""

import statistics
import time

import torch
from record import write_result
from transformers import DataCollatorWithFlattening

from hf_lstm import LSTMConfig, LSTMForCausalLM

ROUNDS = 15
LENGTHS = {"alike": (28, 36), "mixed": (4, 64), "one long": (4, 16)}  # shortest and longest document, tokens


def documents(shortest: int, longest: int, with_long_one: bool, count: int = 64):
    lengths = torch.randint(shortest, longest + 1, (count,)).tolist()
    if with_long_one:
        lengths[0] = 256
    return [torch.randint(4, 260, (length,)) for length in lengths]


def padded(texts):
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(texts):
    return DataCollatorWithFlattening()([{"input_ids": text.tolist()} for text in texts])


def seconds(model, batch) -> tuple[float, float]:
    start = time.perf_counter()
    loss = model(**batch).loss
    loss.backward()
    model.zero_grad()
    return time.perf_counter() - start, loss.item()


def main() -> None:
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMConfig(hidden_size=256)).train()
    rows = []
    for name, (shortest, longest) in LENGTHS.items():
        texts = documents(shortest, longest, with_long_one=name == "one long")
        batches = {"padded": padded(texts), "packed": packed(texts)}
        times = {way: [] for way in batches}
        for _ in range(ROUNDS + 2):
            for way, batch in batches.items():
                times[way].append(seconds(model, batch)[0])
        losses = {way: seconds(model, batch)[1] for way, batch in batches.items()}
        medians = {way: statistics.median(values[2:]) for way, values in times.items()}
        rows.append(
            {
                "documents": name,
                "tokens": sum(map(len, texts)),
                "padded_seconds": medians["padded"],
                "packed_seconds": medians["packed"],
                "packed_over_padded": medians["packed"] / medians["padded"],
                "loss_difference": abs(losses["packed"] - losses["padded"]),
            }
        )
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in rows[-1].items()
            )
        )
    write_result("packing", {"model": "2 x 256, float32", "rows": rows})


if __name__ == "__main__":
    main()
