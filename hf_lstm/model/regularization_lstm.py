"""Dropout and activation penalties of AWD-LSTM; inactive outside training.

Merity, Keskar & Socher 2018 (section 4) collected them: dropout of whole words and with masks that stay the same
over time (Gal & Ghahramani 2016), DropConnect on the recurrent weights (Wan et al. 2013), and penalties on the outputs
(Merity, McCann & Socher 2017). Values kept by a dropout of probability p are divided by 1 - p.

Shapes: B batch, T tokens of this call, D a width, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_lstm import LSTMConfig
from .recurrence_lstm import at_least_float32, is_plain


def word_dropout(embeds: torch.Tensor, input_ids: torch.Tensor, vocab_size: int, p: float) -> torch.Tensor:
    """Drop words of the embeddings `(B, T, D)` of tokens `(B, T)`, each of them everywhere in the batch."""
    if p == 0:
        return embeds
    return embeds * _dropout_mask(embeds, (vocab_size, 1), p)[input_ids]


def locked_dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Drop features of `x` `(B, T, D)`, which differ between rows and are the same at all T tokens."""
    return x if p == 0 else x * _dropout_mask(x, (x.shape[0], 1, x.shape[2]), p)


def weight_dropout(linear: nn.Linear, p: float) -> torch.Tensor | None:
    """
    Return the weight of a linear layer with entries dropped, or `None` for a `p` of 0. The layer's own weight keeps
    its name and values.

    Raises:
        ValueError: if the layer is not a plain `nn.Linear`: an adapter, a quantiser, a hook.
    """
    if p == 0:
        return None
    if not is_plain(linear):
        raise ValueError(
            f"`weight_dropout` ({p}) drops weights of a plain `nn.Linear`, and `hidden_gates` is a {type(linear).__module__}."
            f"{type(linear).__name__}, or has hooks: set `model.config.weight_dropout = 0`, or leave `hidden_gates` out of the "
            "adapter's `target_modules`."
        )
    return linear.weight * _dropout_mask(linear.weight, linear.weight.shape, p)


def temporal_change(x: torch.Tensor, firsts: torch.Tensor | None) -> torch.Tensor:
    """Mean over D of (x_t - x_{t-1})², `(B, T)`; 0 at the first token of each row or document, `firsts` `(B, T)`."""
    x = x.to(at_least_float32(x.dtype))
    change = F.pad(x.diff(dim=1).square().mean(dim=-1), (1, 0))
    return change if firsts is None else change.masked_fill(firsts.to(x.device), 0)


def activation_penalty(
    hidden: torch.Tensor,
    change: torch.Tensor | None,
    config: LSTMConfig,
    targets: torch.Tensor,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> torch.Tensor | None:
    """
    Activation regularization (Merity, McCann & Socher 2017): α h² of the outputs `(B, T, D)` as the output layer takes
    them, plus β (h_t - h_{t-1})² `(B, T)`; `None` if the config asks for neither. It is averaged in the same way as
    the cross-entropy: over the positions whose `targets` `(B, T)` are not `ignore_index`, or as a sum divided by
    `num_items_in_batch`, so that accumulating gradients does not change it.
    """
    alpha, beta = config.activation_regularization, config.temporal_activation_regularization
    terms = []
    if alpha > 0:
        terms.append(alpha * hidden.to(at_least_float32(hidden.dtype)).square().mean(dim=-1))
    if beta > 0 and change is not None:
        terms.append(beta * change)
    if not terms:
        return None
    penalty = sum(terms[1:], start=terms[0])
    has_target = (targets != ignore_index).to(penalty.device)
    count = has_target.sum() if num_items_in_batch is None else num_items_in_batch
    if torch.is_tensor(count):
        count = count.to(penalty.device)
    return (penalty * has_target).sum() / count


def _dropout_mask(like: torch.Tensor, shape: Sequence[int], p: float) -> torch.Tensor:
    """
    Draw a mask: 1 / (1 - p) for kept values and 0 for dropped ones. Each decision takes 16 random bits, which rounds p
    to a multiple of 2^-16: a CPU draws the 10^6 of a layer of 512 in 2.6 ms, where `bernoulli_` takes 17.
    """
    dropped = min(round(p * 2**16), 2**16 - 1)
    size = math.prod(shape)
    bits = torch.randint(-(2**63), 2**63 - 1, (math.ceil(size / 4),), device=like.device)
    kept = bits.view(torch.int16)[:size].view(shape) >= dropped - 2**15
    return kept.to(like.dtype).mul_(2**16 / (2**16 - dropped))
