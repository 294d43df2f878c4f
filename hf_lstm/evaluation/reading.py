"""A stream read in chunks, and what a model says of the token behind each.

Shapes: B parts of the stream that are read side by side, T tokens of each in a chunk, N targets of a chunk, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.utils import logging

from hf_lstm.data.streams import TokenStream, as_stream
from hf_lstm.model.configuration_lstm import LSTMConfig
from hf_lstm.model.kernels_lstm import at_least_float32


@dataclass
class Chunk:
    """Tensors of shape `(B, T)`."""

    indices: torch.LongTensor  # where in the stream
    starts: torch.LongTensor  # where the state that a token finds began, from zero
    inputs: torch.LongTensor
    targets: torch.LongTensor  # the tokens behind the inputs
    scored: torch.BoolTensor  # False behind the end of a part

    @property
    def positions(self) -> torch.LongTensor:
        return self.indices - self.starts


def stream_for(model, tokens) -> TokenStream:
    """
    `tokens` as a stream that a model can read.

    Raises:
        ValueError: for a model without a state, fewer than two tokens, or ids outside the vocabulary.
    """
    if model.config.model_type != LSTMConfig.model_type:
        raise ValueError(
            f"The model is a {model.config.model_type!r}: it must be an {LSTMConfig.model_type!r}, which reads documents "
            "one behind the other and goes on from a state of constant size."
        )
    stream = as_stream(tokens)
    if len(stream) < 2:
        raise ValueError(f"The stream holds {len(stream)} tokens: it must hold at least two, one to predict another.")
    stream.check_ids(model.config.vocab_size)
    return stream


def read_chunks(
    stream,
    firsts: torch.LongTensor,
    ends: torch.LongTensor,
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
            Where the inputs of each part begin and end; the target of the last input is the token at its end.
        bptt_length (`int`): Tokens of a chunk, T; the last chunk may be shorter.
        reset_at_documents (`bool`, defaults to `False`): Whether the state starts anew with every document.
        reset_every (`int`, *optional*): Start the state anew after so many tokens.
        description (`str`, defaults to `"evaluating"`): What the progress bar says.
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


def predict(model, chunk: Chunk, cache, **options):
    """The model's output for a chunk: the state goes on from `cache`, or starts from zero where a position is 0."""
    return model(
        input_ids=chunk.inputs.to(model.device),
        position_ids=chunk.positions.to(model.device),
        past_key_values=cache,
        **options,
    )


def scored_logits(logits: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """Those of the targets that are scored, `(N, V)`, of `(B, T, V)`; in float32 at least."""
    logits = logits.flatten(0, 1) if chunk.scored.all() else logits[chunk.scored.to(logits.device)]
    return logits.to(at_least_float32(logits.dtype))


def nats_of(
    scores: torch.Tensor, chunk: Chunk, name: Callable[[int], str] = lambda index: f"token {index:,}"
) -> torch.Tensor:
    """
    What each target costs, `(N,)`, in nats, of the logits or log-probabilities `(N, V)` of those that are scored.

    Raises:
        ValueError: if one is not a number; `name` says what the token at an index of the stream is called.
    """
    nats = F.cross_entropy(scores, chunk.targets[chunk.scored].to(scores.device), reduction="none").double().cpu()
    if nats.isnan().any():
        index = int(chunk.indices[chunk.scored][nats.isnan()][0]) + 1
        raise ValueError(
            f"What the model says of {name(index)} is not a number (NaN), so no average would mean anything: look at its "
            "weights, or load it in a wider type, such as float32."
        )
    return nats


@contextmanager
def evaluating(model):
    """Dropout is off meanwhile, and the model is left in the mode it came in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
