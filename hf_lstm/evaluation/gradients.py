"""The flow of gradients back in time, which shows how far back a model could have learnt to look.

Shapes: B rows, L layers, D the largest distance in tokens, V vocabulary.
"""

from collections import deque
from typing import Any, NamedTuple

import numpy
import torch
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from hf_lstm.data.lanes import check_at_least_one
from hf_lstm.model.cells_lstm import at_least_float32

from .adaptation import trainable_copy
from .scoring import checked_stream

CHUNK = 1024  # tokens read at once where no gradient is wanted


def gradient_flow(
    model: PreTrainedModel, ids: torch.Tensor, positions: int = 32, max_distance: int = 200
) -> numpy.ndarray:
    """
    Compute how large the gradient of the loss is with respect to earlier states, by their distance in tokens.

        mean over T and rows of ‖∂ loss_T / ∂ state_t‖        T - t = 0, 1, ..., D

    loss_T is the cross-entropy, in nats, of the token at T + 1 given those up to T. state_t is all that a layer keeps
    after token t, as one vector: h and c of an LSTM. Its derivative is its whole influence: h acts on the layers above
    at t and on the tokens after t, c on the tokens after t alone. In the last layer, that at distance 0 is therefore the
    derivative by h, through the output layer.

    A norm that falls exponentially with the distance is the vanishing gradient of Hochreiter (1991) and of Bengio,
    Simard & Frasconi (1994), one that grows the exploding gradient (Pascanu, Mikolov & Bengio 2013). The whole text
    before T is read; training by truncated backpropagation sees no further back than one of its chunks.

    Args:
        model (`LSTMForCausalLM`):
            The model, in either mode; it is not changed. A copy in float32 or wider computes, without dropout.
        ids (`torch.LongTensor` of shape `(B, length)`):
            Texts of one length without padding, each read from a zero state; at least D + `positions` + 1 tokens.
        positions (`int`, defaults to 32): The number of T: evenly spaced, the first at D and the last before the end.
        max_distance (`int`, defaults to 200): D. Memory grows with it and not with the text.

    Returns:
        `numpy.ndarray` of shape `(L, D + 1)`: the mean norms, in nats per unit of the state. They are 0 from where
        gradients vanish from their type, below 1e-45 in float32, and infinite or NaN from where they exceed it.

    Raises:
        ValueError: for another kind of model or one with attention, ids outside the vocabulary, other shapes, too short a
            text, or numbers below 1.
    """
    check_at_least_one(positions=positions, max_distance=max_distance)
    ids = torch.as_tensor(ids)
    if ids.ndim != 2:
        raise ValueError(f"`ids` of shape {tuple(ids.shape)} must be of shape (rows, tokens).")
    checked_stream(model, ids.flatten())
    if model.config.attention_window is not None:
        raise ValueError(
            f"`layer_types` ({model.config.layer_types}) has attention, whose gradients reach all tokens of a window at once "
            "and not from state to state: give a model of LSTM layers alone."
        )
    if ids.shape[1] < max_distance + positions + 1:
        raise ValueError(
            f"`ids` ({ids.shape[1]:,} tokens a row) must hold at least {max_distance + positions + 1:,}, which is "
            "`max_distance` + `positions` + 1: give a longer text, or lower one of the two."
        )

    with torch.inference_mode(False):
        return _mean_norms(trainable_copy(model).eval(), ids, positions, max_distance)


@torch.enable_grad()
def _mean_norms(reader: PreTrainedModel, ids: torch.Tensor, positions: int, max_distance: int) -> numpy.ndarray:
    """Compute the mean norms with a model that may be changed, `(L, D + 1)`."""
    ids = ids.to(reader.device, torch.long, copy=True)  # a copy of one made in inference mode may be part of a graph
    cache = DynamicCache(config=reader.config)
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.activate_past_recording()  # selects the explicit kernel: the fused one's outputs do not depend on its h
    steps: deque[_Step] = deque(maxlen=max_distance + 1)
    sums, read = numpy.zeros((len(layers), max_distance + 1)), 0
    room = ids.shape[1] - 2 - max_distance  # from the first T to the last
    places = [max_distance + number * room // max(1, positions - 1) for number in range(positions)]
    for last in logging.tqdm(places, desc="taking gradients", leave=False):
        if read < (first := last - max_distance):
            steps.clear()
            _skip(reader, ids[:, read:first], cache)
            read = first
        for index in range(read, last + 1):
            step, logits = _read(reader, ids[:, index : index + 1], cache, is_scored=index == last)
            steps.append(step)
        read = last + 1
        logits = logits[:, -1].to(at_least_float32(logits.dtype))
        sums += _norms(F.cross_entropy(logits, ids[:, last + 1].to(logits.device), reduction="sum"), steps)
    return sums / (positions * len(ids))


class _Step(NamedTuple):
    """
    The states of the layers before and after one token: for each layer a list of tensors `(B, H)`, h first; no layer
    before the first token. Those before are leaves: gradients are passed from token to token by hand, so that old
    tokens are freed.
    """

    before: list[list[torch.Tensor]]
    after: list[list[torch.Tensor]]


def _states(cache: Any) -> list[list[torch.Tensor]]:
    return [list(state) for layer in cache.layers if (state := layer.get_state()) is not None]


def _read(reader: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache, is_scored: bool):
    """Read a token of each row, `(B, 1)`, and return the step and, if scored, the logits `(B, 1, V)`."""
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.detach_()
    before = _states(cache)
    for part in _flat(before):
        part.requires_grad_(True)
    kept = torch.tensor([0] if is_scored else [], dtype=torch.long, device=ids.device)
    logits = reader(ids, past_key_values=cache, use_cache=True, logits_to_keep=kept).logits
    for layer in layers:
        layer.crop(0)  # drops the record, which is not needed, and leaves the states
    return _Step(before, _states(cache)), logits


@torch.no_grad()
def _skip(reader: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache) -> None:
    """Read tokens `(B, T)` for their state alone."""
    layers: list[Any] = cache.layers
    for chunk in ids.split(CHUNK, dim=1):
        kept = torch.tensor([], dtype=torch.long, device=ids.device)
        reader(chunk, past_key_values=cache, use_cache=True, logits_to_keep=kept)
        for layer in layers:
            layer.crop(0)


def _norms(loss: torch.Tensor, steps: "deque[_Step]") -> numpy.ndarray:
    """
    Compute the norms of the derivatives of a loss, summed over the rows, `(L, D + 1)`.

    h and c are separate coordinates of the state. In the graph of its own token, h is computed from c, so that
    autograd's derivative by c would include that by h: the one that arrives from the next token is taken instead.
    """
    norms = []
    arriving: list[list[torch.Tensor]] | None = None  # at the states after a token, from the token after it
    for step in reversed(steps):
        outputs, given = ([loss], None) if arriving is None else (_flat(step.after), _flat(arriving))
        inputs = [state[0] for state in step.after] + _flat(step.before)
        found = iter(torch.autograd.grad(outputs, inputs, given, retain_graph=True))
        by_h = [next(found) for _ in step.after]
        by_others = [[] for _ in step.after] if arriving is None else [state[1:] for state in arriving]
        norms.append([_norm([h, *others]) for h, others in zip(by_h, by_others, strict=True)])
        arriving = [[next(found) for _ in state] for state in step.before]
    return numpy.array(norms).T


def _flat(states: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [part for state in states for part in state]


def _norm(parts: list[torch.Tensor]) -> float:
    """Sum the norms of the rows, in float64 since squares of small gradients would be 0 otherwise."""
    return torch.cat([part.flatten(1) for part in parts], dim=1).cpu().double().norm(dim=1).sum().item()
