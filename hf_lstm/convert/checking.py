"""Comparison of converted files with their model, over several calls with carried state."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache

from hf_lstm.model.modeling_lstm import LSTMForCausalLM


@torch.no_grad()
def largest_difference(
    model: LSTMForCausalLM, read: Callable[[torch.Tensor], torch.Tensor], chunk_length: int, rows: int, length: int
) -> float:
    """
    Return the largest difference, in nats, between the log-probabilities of `read` and those of the model.

    Args:
        model (`LSTMForCausalLM`): The model.
        read (`Callable`): Maps the next tokens `(rows, T)` to logits `(rows, T, V)` and keeps its state.
        chunk_length (`int`): Number of tokens per call, T.
        rows, length (`int`): Shape of the random tokens.
    """
    ids = torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    cache, largest = DynamicCache(config=model.config), []
    for chunk in ids.split(chunk_length, dim=1):
        expected = model(chunk.to(model.device), past_key_values=cache).logits
        found, expected = (logits.float().log_softmax(dim=-1).cpu() for logits in (read(chunk), expected))
        largest.append((found - expected).abs().max())
    return torch.stack(largest).max().item()


def check_file(path: Path, difference: Callable[[], float], dtype: torch.dtype | None) -> float:
    """
    Return the difference between a file and its model, in nats, and remove a file that is wrong.

    Args:
        path (`Path`): The file.
        difference (`Callable`): Runs the file and returns the largest difference.
        dtype (`torch.dtype`, *optional*):
            Data type of the file: half of its digits must agree. Without it, as for 8 bits, any finite value passes.

    Raises:
        ValueError: if the file cannot be run or the difference is too large.
    """
    limit = math.inf if dtype is None else 10 * math.sqrt(torch.finfo(dtype).eps)
    try:
        found = difference()
    except Exception as error:  # raised by the library that runs the file
        path.unlink()
        raise ValueError(
            f"{path} could not be run and was removed: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    if not (math.isfinite(found) and found <= limit):
        path.unlink()
        raise ValueError(
            f"{path} was removed: its log-probabilities differ from the model's by {found:.2g} nats, more than "
            f"rounding explains ({limit:.2g})."
        )
    return found
