"""Whether a converted file computes what the model does, over several calls that hand the state on."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache


@torch.no_grad()
def largest_difference(
    model, read: Callable[[torch.LongTensor], torch.Tensor], chunk_length: int, rows: int, length: int
) -> float:
    """
    The largest difference, in nats, of the log-probabilities of what `read` gives and of the model's.

    Args:
        model (`LSTMForCausalLM`): The model.
        read (`Callable`): Takes the next tokens `(rows, T)`, keeps its state, and gives logits `(rows, T, V)`.
        chunk_length (`int`): Tokens of a call, T.
        rows, length (`int`): The number of random tokens.
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
    The difference of a file from its model, in nats; a file that is wrong is removed.

    Args:
        path (`Path`): The file.
        difference (`Callable`): Runs it and gives the largest difference.
        dtype (`torch.dtype`, *optional*):
            What it computes in, half of whose digits have to agree; without it, as in 8 bits, any number will do.

    Raises:
        ValueError: if the file cannot be run, or computes something else.
    """
    limit = math.inf if dtype is None else 10 * math.sqrt(torch.finfo(dtype).eps)
    try:
        found = difference()
    except Exception as error:  # of the libraries that run it
        path.unlink()
        raise ValueError(
            f"{path} was written, could not be run and is removed: {str(error).splitlines()[0]}"
        ) from error
    if not (math.isfinite(found) and found <= limit):
        path.unlink()
        raise ValueError(
            f"{path} was written and is removed: its log-probabilities differ from the model's by {found:.2g} nats, more than "
            f"rounding does ({limit:.2g}), so it holds another model than this one."
        )
    return found
