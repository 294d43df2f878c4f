"""What keeps an LSTM language model from learning its text by heart; all of it is off outside training.

Merity, Keskar & Socher 2018 (AWD-LSTM, section 4) collected it: dropout of whole words and with masks that stay the same
over time (Gal & Ghahramani 2016), DropConnect on the recurrent weights (Wan et al. 2013), and penalties on the outputs
(Merity, McCann & Socher 2017). What is kept of something dropped with probability p is divided by 1 - p.

Shapes: B batch, T tokens of this call, D a width, V vocabulary.
"""

import math

import torch
from torch.nn import functional as F

from .kernels_lstm import at_least_float32


def word_dropout(embeds, input_ids, vocab_size: int, p: float) -> torch.Tensor:
    """Embeddings `(B, T, D)` of tokens `(B, T)` without some words, each of them wherever it stands in the batch."""
    if p == 0:
        return embeds
    return embeds * _kept(embeds, (vocab_size, 1), p)[input_ids]


def locked_dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """`x` of shape `(B, T, D)` without some features, which differ between rows and are the same at all T tokens."""
    return x if p == 0 else x * _kept(x, (x.shape[0], 1, x.shape[2]), p)


def weight_dropout(weight: torch.Tensor, p: float) -> torch.Tensor:
    """A matrix without some of its weights: as a function of it, so that it keeps its name, its values and its place."""
    return weight * _kept(weight, weight.shape, p)


def temporal_change(x: torch.Tensor, firsts: torch.Tensor | None) -> torch.Tensor:
    """`(B, T)`: mean over D of (x_t - x_{t-1})², and 0 at the first token of a row or document, `firsts` `(B, T)`."""
    x = x.to(at_least_float32(x.dtype))
    change = F.pad(x.diff(dim=1).square().mean(dim=-1), (1, 0))
    return change if firsts is None else change.masked_fill(firsts.to(x.device), 0)


def activation_penalty(
    hidden, change, config, targets, num_items_in_batch=None, ignore_index=-100, **kwargs
) -> torch.Tensor | None:
    """
    α h² of the outputs `(B, T, D)` as the output layer takes them, and β (h_t - h_{t-1})² `(B, T)`, if the config asks for
    them: averaged as the cross-entropy is, over the positions whose `targets` `(B, T)` are not `ignore_index`, or their sum
    over `num_items_in_batch`, so that accumulating gradients changes none (Merity, McCann & Socher 2017).
    """
    alpha, beta = config.activation_regularization, config.temporal_activation_regularization
    if alpha == beta == 0:
        return None
    penalty = 0
    if alpha > 0:
        penalty = alpha * hidden.to(at_least_float32(hidden.dtype)).square().mean(dim=-1)
    if beta > 0:
        penalty = penalty + beta * change
    has_target = (targets != ignore_index).to(penalty.device)
    count = has_target.sum() if num_items_in_batch is None else num_items_in_batch
    if torch.is_tensor(count):
        count = count.to(penalty.device)
    return (penalty * has_target).sum() / count


def _kept(like, shape, p):
    """
    1 / (1 - p) where something is kept and 0 where it is dropped. Each decision takes 16 random bits, which rounds p to
    a multiple of 2^-16: a CPU draws the 10^6 of a layer of 512 in 2.6 ms, where `bernoulli_` takes 17.
    """
    dropped = min(round(p * 2**16), 2**16 - 1)
    size = math.prod(shape)
    bits = torch.randint(-(2**63), 2**63 - 1, (math.ceil(size / 4),), device=like.device)
    kept = bits.view(torch.int16)[:size].view(shape) >= dropped - 2**15
    return kept.to(like.dtype).mul_(2**16 / (2**16 - dropped))
