"""Copying: read a key, then noise, then a marker, and reproduce the key (after Hochreiter & Schmidhuber 1997).

    k1 ... k10  noise ... noise  marker  k1 ... k9      is read
                                 k1      k2 ... k10     is predicted

Nothing else is a target.
"""

import math
import time

import torch

FIRST = 4  # the ids below are those of special tokens
SYMBOLS, KEY, NOISE = 8, 10, 8  # symbols of a key, their number in it, and symbols of the noise
MARKER = FIRST + SYMBOLS + NOISE
VOCABULARY = MARKER + 1
CHANCE = 1 / SYMBOLS
WARMUP = 50  # steps


def examples(distance: int, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw keys and noise; return the input and, -100 where there is none, the target of each position."""
    keys = torch.randint(FIRST, FIRST + SYMBOLS, (rows, KEY), generator=generator)
    noise = torch.randint(FIRST + SYMBOLS, MARKER, (rows, distance), generator=generator)
    ids = torch.cat([keys, noise, torch.full((rows, 1), MARKER), keys[:, :-1]], dim=1)
    targets = torch.full_like(ids, -100)
    targets[:, -KEY:] = keys
    return ids, targets


def draw_distance(shortest: int, longest: int, generator: torch.Generator) -> int:
    """Draw a number of noise tokens, uniform on a log scale."""
    position = torch.rand((), generator=generator).item()
    return round(shortest * (longest / shortest) ** position)


def train(model, distances: tuple[int, int], rows: int, seconds: float, learning_rate: float, seed: int) -> dict:
    """
    Train on whole sequences, all of a batch with one distance, for so many seconds of CPU time. The learning rate falls
    as a cosine of the time used.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    model.train()
    steps = tokens = 0
    start, used = time.process_time(), 0.0
    while used < seconds:
        ids, targets = examples(draw_distance(*distances, generator), rows, generator)
        rate = learning_rate * min(1, (steps + 1) / WARMUP) * (1 + math.cos(math.pi * used / seconds)) / 2
        optimizer.param_groups[0]["lr"] = rate
        model(ids, shift_labels=targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, tokens, used = steps + 1, tokens + ids.numel(), time.process_time() - start
    return {"steps": steps, "tokens": tokens, "cpu_seconds": used}


@torch.no_grad()
def accuracies(model, distances: list[int], rows: int) -> dict[str, float]:
    """Return the share of symbols reproduced after each number of noise tokens, of keys that were not trained on."""
    generator, found = torch.Generator().manual_seed(10**6), {}
    model.eval()
    for distance in distances:
        ids, targets = examples(distance, rows, generator)
        written = model(ids, logits_to_keep=KEY).logits.argmax(dim=-1)
        found[str(distance)] = (written == targets[:, -KEY:]).double().mean().item()
    return found
