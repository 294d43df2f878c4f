"""Read a stream in chunks and score the next token of each.

Shapes: B parts of the stream that are read side by side, T tokens of each in a chunk, N targets of a chunk, V vocabulary.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel
from transformers.utils import logging

from hf_lstm.data.streams import Tokens, TokenStream, as_stream
from hf_lstm.model.cells_lstm import at_least_float32
from hf_lstm.model.configuration_lstm import LSTMConfig


@dataclass
class Chunk:
    """Inputs and targets of a chunk: tensors of shape `(B, T)`."""

    indices: torch.Tensor  # in the stream
    starts: torch.Tensor  # index at which the state was last zero
    inputs: torch.Tensor
    targets: torch.Tensor  # the next tokens
    scored: torch.Tensor  # False after the end of a part

    @property
    def positions(self) -> torch.Tensor:
        return self.indices - self.starts


def checked_stream(model: PreTrainedModel, tokens: Tokens) -> TokenStream:
    """
    Return `tokens` as a stream, after checking that the model can read it.

    Raises:
        ValueError: for another kind of model, fewer than two tokens, or ids outside the vocabulary.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` ({type(model).__name__}) must be a model: load it by `from_pretrained`.")
    if model.config.model_type != LSTMConfig.model_type:
        raise ValueError(
            f"The model is a {model.config.model_type!r}: it must be an {LSTMConfig.model_type!r}, which carries a "
            "state of constant size from chunk to chunk."
        )
    stream = as_stream(tokens)
    if len(stream) < 2:
        raise ValueError(f"The stream holds {len(stream)} tokens: it must hold at least two, one to predict another.")
    stream.check_ids(model.config.vocab_size)
    return stream


def read_chunks(
    stream: TokenStream,
    firsts: torch.Tensor,
    ends: torch.Tensor,
    bptt_length: int,
    reset_at_documents: bool = False,
    reset_every: int | None = None,
    description: str = "evaluating",
) -> Iterator[Chunk]:
    """
    Read parts of a stream side by side, with a progress bar.

    Args:
        stream (`TokenStream`): The stream.
        firsts, ends (`torch.LongTensor` of shape `(B,)`):
            The indices at which the inputs of each part begin and end; the token at its end is its last target.
        bptt_length (`int`): Tokens of a chunk, T; the last chunk may be shorter.
        reset_at_documents (`bool`, defaults to `False`): Whether the state restarts at every document.
        reset_every (`int`, *optional*): Restart the state after this many tokens.
        description (`str`, defaults to `"evaluating"`): Label of the progress bar.
    """
    firsts, ends = firsts[:, None], ends[:, None]  # (B, 1)
    longest = int((ends - firsts).max())
    for column in logging.tqdm(range(0, longest, bptt_length), desc=description, leave=False):
        indices = firsts + torch.arange(column, min(column + bptt_length, longest))
        starts = firsts.expand_as(indices)
        if reset_at_documents:
            starts = torch.maximum(starts, stream.starts_of(indices))
        if reset_every is not None:
            starts = torch.maximum(starts, indices - indices % reset_every)
        tokens = torch.zeros(len(indices), indices.shape[1] + 1, dtype=torch.long)
        for row, first in zip(tokens, indices[:, 0].tolist(), strict=True):
            read = stream[first : first + len(row)]
            row[: len(read)] = read
        yield Chunk(indices, starts, tokens[:, :-1], tokens[:, 1:], indices < ends)


def run_chunk(model: PreTrainedModel, chunk: Chunk, cache: Cache, **options) -> Any:
    """Run the model on a chunk; the state continues from `cache`, and is zero where a position is 0."""
    return model(
        input_ids=chunk.inputs.to(model.device),
        position_ids=chunk.positions.to(model.device),
        past_key_values=cache,
        **options,
    )


def scored_logits(logits: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """Select the logits of the scored targets, `(N, V)` from `(B, T, V)`, in float32 or wider."""
    logits = logits.flatten(0, 1) if chunk.scored.all() else logits[chunk.scored.to(logits.device)]
    return logits.to(at_least_float32(logits.dtype))


def token_losses(
    scores: torch.Tensor, chunk: Chunk, name: Callable[[int], str] = lambda index: f"token {index:,}"
) -> torch.Tensor:
    """
    Compute the cross-entropy of each scored target, `(N,)`, in nats, from logits or log-probabilities `(N, V)`.

    Raises:
        ValueError: for a loss that is NaN; `name` describes the token at an index of the stream.
    """
    nats = F.cross_entropy(scores, chunk.targets[chunk.scored].to(scores.device), reduction="none").double().cpu()
    if nats.isnan().any():
        index = int(chunk.indices[chunk.scored][nats.isnan()][0]) + 1
        raise ValueError(
            f"The prediction of {name(index)} is NaN: check the model's weights, or load it in a wider type, such as "
            "float32."
        )
    return nats


def generator_of(seed: int) -> random.Random:
    """Return a generator. Raises `ValueError` for a seed that is not an `int`."""
    if not isinstance(seed, Integral):
        raise ValueError(f"`seed` ({seed!r}) must be an int.")
    return random.Random(int(seed))


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into evaluation mode, and restore its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
