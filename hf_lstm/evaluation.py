"""Evaluation: how well a model predicts a text."""

import math

import torch
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.utils import logging

from .data import as_stream


@torch.no_grad()
def evaluate_stream(
    model,
    tokens,
    batch_size: int = 1,
    bptt_length: int = 1024,
    reset_at_documents: bool = False,
    reset_every: int | None = None,
) -> dict[str, float | int]:
    """
    Predict every token of a stream but the first, exactly once, with the state carried from chunk to chunk.

    Args:
        model (`LSTMForCausalLM`): Left as it was, in training or evaluation mode; dropout is off meanwhile.
        tokens (`TokenStream`, `torch.Tensor` or array): The stream, a single dimension of integers.
        batch_size (`int`, defaults to 1):
            Parts of equal length that are read side by side. Each part begins without a history: 1 is the exact figure.
        bptt_length (`int`, defaults to 1024): Tokens read at once; it changes the memory needed, not the result.
        reset_at_documents (`bool`, defaults to `False`): Whether the state starts anew with every document.
        reset_every (`int`, *optional*): Start the state anew after so many tokens, to see what a long memory is worth.

    Returns:
        `dict`: `loss` (nats per token), `perplexity`, `bits_per_token`, `bits_per_byte` (where the stream knows its
        bytes), `accuracy` (share of tokens that were the most probable) and `tokens` (how many were predicted).

    Raises:
        ValueError: for fewer than two tokens, ids outside the vocabulary, or numbers below 1.
    """
    stream = as_stream(tokens)
    for name, value in (("batch_size", batch_size), ("bptt_length", bptt_length), ("reset_every", reset_every)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` ({value}) must be at least 1.")
    if len(stream) < 2:
        raise ValueError(f"The stream holds {len(stream)} tokens: it must hold at least two, one to predict another.")
    stream.check_ids(model.config.vocab_size)

    targets = len(stream) - 1
    part = math.ceil(targets / batch_size)
    rows = torch.arange(batch_size)[:, None] * part  # (B, 1): where each begins; the last may lie behind the end

    was_training = model.training
    model.eval()
    cache = DynamicCache(config=model.config)
    nats = torch.zeros((), dtype=torch.float64)
    correct = 0
    try:
        for column in logging.tqdm(range(0, part, bptt_length), desc="evaluating", leave=False):
            indices = rows + torch.arange(column, min(column + bptt_length, part))  # (B, T)
            starts = rows
            if reset_at_documents:
                starts = torch.maximum(starts, stream.starts_of(indices))
            if reset_every is not None:
                starts = torch.maximum(starts, indices - indices % reset_every)
            tokens, inside = _read(stream, indices), indices < targets
            logits = model(
                input_ids=tokens[:, :-1].to(model.device),
                position_ids=(indices - starts).to(model.device),
                past_key_values=cache,
            ).logits
            logits, labels = logits[inside.to(logits.device)].float(), tokens[:, 1:][inside].to(logits.device)
            nats += F.cross_entropy(logits, labels, reduction="none").double().sum().cpu()
            correct += (logits.argmax(dim=-1) == labels).sum().item()
    finally:
        model.train(was_training)

    loss = nats.item() / targets
    result = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,  # beyond a float
        "bits_per_token": loss / math.log(2),
        "accuracy": correct / targets,
        "tokens": targets,
    }
    if stream.num_bytes > 0:
        result["bits_per_byte"] = nats.item() / math.log(2) / stream.num_bytes
    return result


def _read(stream, indices) -> torch.Tensor:
    """The tokens at consecutive indices of shape `(B, T)` and the ones behind them, `(B, T + 1)`; 0 behind the end."""
    tokens = torch.zeros(len(indices), indices.shape[1] + 1, dtype=torch.long)
    for row, start in zip(tokens, indices[:, 0].tolist(), strict=True):
        read = stream[start : start + len(row)]
        row[: len(read)] = read
    return tokens
