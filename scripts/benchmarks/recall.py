"""Associative recall: read pairs of a key and a value, then keys, and answer each with its value (Arora et al. 2024).

    k1 v1 ... kP vP  noise ... noise  k5 v5 k2 v2 ...      is read
                                      v5    v2             is predicted

Nothing else is a target. The keys of a text are distinct, and each is asked once, in another order.
"""

import time

import torch
from torch.nn import functional as F

FIRST = 4  # the ids below are those of special tokens
KEYS, VALUES, NOISE = 32, 32, 8
VOCABULARY = FIRST + KEYS + VALUES + NOISE
CHANCE = 1 / VALUES
WARMUP = 50  # steps


def examples(pairs: int, distance: int, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw pairs and noise; return the input and, -100 where there is none, the target of each position."""
    keys = FIRST + torch.rand(rows, KEYS, generator=generator).argsort(dim=1)[:, :pairs]
    values = FIRST + KEYS + torch.randint(VALUES, (rows, pairs), generator=generator)
    noise = FIRST + KEYS + VALUES + torch.randint(NOISE, (rows, distance), generator=generator)
    order = torch.rand(rows, pairs, generator=generator).argsort(dim=1)
    told = torch.stack([keys, values], dim=2).flatten(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], dim=2).flatten(1)
    ids = torch.cat([told, noise, asked], dim=1)
    targets = torch.full_like(ids, -100)
    targets[:, -2 * pairs :: 2] = values.gather(1, order)
    return ids, targets


def train(
    model, pairs: int, distance: int, rows: int, seconds: float, learning_rate: float, seed: int, goal: float = 2.0
) -> dict:
    """Train for so many seconds of CPU time, or until an accuracy is the `goal`, which is looked at every 50 steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    model.train()
    steps, start, used = 0, time.process_time(), 0.0
    while used < seconds:
        ids, targets = examples(pairs, distance, rows, generator)
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (steps + 1) / WARMUP)
        asked = targets != -100
        F.cross_entropy(model(ids, use_cache=False).logits[asked], targets[asked]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, used = steps + 1, time.process_time() - start
        if steps % 50 == 0 and goal <= 1 and accuracy(model, pairs, distance, 200) >= goal:
            break
        model.train()
    return {"steps": steps, "cpu_seconds": time.process_time() - start}


@torch.no_grad()
def accuracy(model, pairs: int, distance: int, rows: int) -> float:
    """Return the share of values recalled, of texts that were not trained on."""
    ids, targets = examples(pairs, distance, rows, torch.Generator().manual_seed(10**6))
    asked = targets != -100
    return (model.eval()(ids).logits.argmax(dim=-1)[asked] == targets[asked]).double().mean().item()
