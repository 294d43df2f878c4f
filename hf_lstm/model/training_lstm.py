"""Dropout, penalties on outputs, and losses, for training.

Dropout and penalties are those of AWD-LSTM, inactive outside training. Merity, Keskar & Socher 2018 (section 4)
collected them: dropout of whole words and with masks that stay the same over time (Gal & Ghahramani 2016), DropConnect
on the recurrent weights (Wan et al. 2013), and penalties on the outputs (Merity, McCann & Socher 2017). Values kept by
a dropout of probability p are divided by 1 - p.

The losses are for large vocabularies and never hold all logits. The chunked loss is exactly the plain cross-entropy:
logits are computed for C of the N targets at a time, their part of both gradients is added up at once, and the logits
are freed. Memory falls from N V to C V numbers, and logits are computed once (Wijmans et al. 2025 compute them again
in the backward). The adaptive softmax is a different, cheaper model of the words (Grave et al. 2017).

Shapes: B batch, T tokens of this call, D a width, V vocabulary; N tokens in all, C tokens of a chunk.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from .cells_lstm import at_least_float32, is_plain, is_transformed
from .configuration_lstm import LSTMConfig


def compute_losses(
    model: Any,
    outputs: Any,
    hidden: torch.Tensor,
    logits: torch.Tensor | None,
    labels: torch.Tensor | None,
    kept: slice | torch.Tensor,
    attention_mask: torch.Tensor | None,
    read_before: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Compute the cross-entropy, and while training the activation regularization, whose gradient is added to it.

    Args:
        model (`LSTMForCausalLM`): The model.
        outputs (`LSTMModelOutputWithPast`): Outputs of its layers.
        hidden (`(B, T, D)`): Input of the output layer.
        logits (`(B, T, V)`, *optional*): Its output; without it, see [`loss_without_logits`].
        labels, kept, attention_mask, read_before, shift_labels: See [`find_targets`].

    Returns:
        The loss and, while training if the config asks for it, the regularization loss, each `()`.
    """
    config, length = model.config, outputs.last_hidden_state.shape[1]
    targets = kwargs["shift_labels"] = find_targets(labels, length, kept, attention_mask, read_before, **kwargs)
    epsilon = config.adversarial_softmax if model.training else 0
    if logits is None:
        loss = loss_without_logits(hidden, model.lm_head, targets, config.loss_chunk_size, epsilon, **kwargs)
    elif epsilon > 0:
        loss = adversarial_loss(hidden, model.lm_head.weight, logits, targets, epsilon, **kwargs)
    else:
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)
    penalty = activation_penalty(config, outputs, hidden, kept, targets, **kwargs) if model.training else None
    if penalty is None:
        return loss, None
    return loss + (penalty - penalty.detach()), penalty.detach()  # adds its gradient and not its value


def word_dropout(embeds: torch.Tensor, input_ids: torch.Tensor, vocab_size: int, p: float) -> torch.Tensor:
    """Drop words of the embeddings `(..., D)` of tokens `(...)`, each of them everywhere in the batch."""
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
    config: LSTMConfig,
    outputs: Any,
    hidden: torch.Tensor,
    kept: slice | torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> torch.Tensor | None:
    """
    Activation regularization (Merity, McCann & Socher 2017): α h² of `hidden` `(B, T, D)`, the outputs as the
    output layer takes them, plus β (h_t - h_{t-1})² of the model's `outputs` at the positions `kept`; `None` if the
    config asks for neither. It is averaged in the same way as the cross-entropy: over the positions whose `targets`
    `(B, T)` are not `ignore_index`, or as a sum divided by `num_items_in_batch`, so that accumulating gradients does
    not change it.
    """
    alpha, beta = config.activation_regularization, config.temporal_activation_regularization
    terms = []
    if alpha > 0:
        terms.append(alpha * hidden.to(at_least_float32(hidden.dtype)).square().mean(dim=-1))
    if beta > 0:
        terms.append(beta * temporal_change(outputs.last_hidden_state, outputs.document_starts)[:, kept])
    if not terms:
        return None
    penalty = sum(terms[1:], start=terms[0])
    has_target = (targets != ignore_index).to(penalty.device)
    count = has_target.sum() if num_items_in_batch is None else num_items_in_batch
    if torch.is_tensor(count):
        count = count.to(penalty.device)
    return (penalty * has_target).sum() / count


class AdaptiveSoftmax(nn.AdaptiveLogSoftmaxWithLoss):
    """
    An output layer that splits the vocabulary at `cutoffs` (Grave et al. 2017): frequent words, the first ids, have a
    softmax with one more class for each group of rarer words, and each group has a quarter of the width of the one
    before.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # an output layer, not a loss
        """Compute log-probabilities, which serve as logits: `(B, T, D)` to `(B, T, V)`."""
        return self.log_prob(hidden.flatten(0, -2)).unflatten(0, hidden.shape[:-1])

    def sum_of_losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """
        Return the sum of the losses of `(N, D)` and `(N,)`. Groups without a target are not computed; their weights
        get a gradient of 0, which DDP needs.
        """
        dtype = self.head.weight.dtype
        with torch.autocast(hidden.device.type, enabled=False):  # torch's layer mixes types there
            output = super().forward(hidden.to(dtype), targets).output
        unused = sum(weight.sum() for weight in self.tail.parameters())
        return -output.to(at_least_float32(dtype)).sum() + 0 * unused


def find_targets(
    labels: torch.Tensor | None,
    length: int,
    kept: slice | torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    read_before: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> torch.Tensor:
    """
    Return the target of each position: the token after it. A token is not a target if no real token of its row comes
    before it, such as the first one after padding on the left, since nothing predicts it.

    Args:
        labels (`(B, T)`, *optional*): The tokens themselves; needed without `shift_labels`.
        length (`int`): T.
        kept (`slice` or `torch.Tensor`): The positions to return targets for.
        attention_mask (`(B, T)`, *optional*): 0 marks padding; of a wider one, the last `T` columns are used.
        read_before (`(B,)`, *optional*): Which rows have read a token in earlier calls.
        shift_labels (`(B, T)`, *optional*): The target of each position, used instead of `labels`.
        ignore_index (`int`, defaults to -100): The value that marks positions without a target.

    Returns:
        `(B, T)`, of the positions kept.
    """
    if shift_labels is None:
        shift_labels = F.pad(cast(torch.Tensor, labels), (0, 1), value=ignore_index)[:, 1:]
    # `shift_labels` may already be cut to the kept positions.
    targets = shift_labels[:, kept] if shift_labels.shape[1] == length else shift_labels
    targets = targets.contiguous()  # transformers' loss flattens it with `view`
    if attention_mask is None:
        return targets
    follows = (attention_mask[:, -length:] != 0).cumsum(dim=1) > 0
    if read_before is not None:
        follows = follows | read_before[:, None].to(follows.device)
    return targets.masked_fill(~follows[:, kept].to(targets.device), ignore_index)


def adversarial_margins(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """
    Return by how much adversarial softmax (Wang, Gong & Liu 2019) lowers the logit of each target, `(N,)`, for `hidden`
    `(N, D)`, the output layer's `weight` `(V, D)` and `targets` `(N,)`. The worst that a shift of a target's row w_y by at
    most ε |w_y| can do is to point against h:

        w_y - s,  s = ε |w_y| h / |h|        lowers the logit by s h = ε |w_y| |h|

    The gradient takes s for a constant. The authors' code shifts only where w_y h > 0, which the paper does not ask for and
    this does not do.
    """
    direction = F.normalize(hidden.detach(), dim=-1)
    norms = weight.detach()[targets].norm(dim=-1)
    return (epsilon * norms[:, None] * direction * hidden).sum(dim=-1)


def adversarial_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    epsilon: float,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> torch.Tensor:
    """
    Compute the cross-entropy with the logit of each target lowered by its margin m ([`adversarial_margins`]), from the
    plain loss l of each:

        l + m + log(1 - e^-l (1 - e^-m))

    Args:
        hidden (`(B, T, D)`), weight (`(V, D)`), logits (`(B, T, V)`): Input, weight and output of the output layer.
        targets, num_items_in_batch, ignore_index: See [`loss_without_logits`].

    Returns:
        The loss, `()`, in nats, averaged as that of transformers' `ForCausalLMLoss`.
    """
    targets, scores = targets.flatten().to(hidden.device), logits.flatten(0, 1)
    kept = targets != ignore_index
    plain = F.cross_entropy(
        scores.to(at_least_float32(scores.dtype)), targets, ignore_index=ignore_index, reduction="none"
    )
    margins = adversarial_margins(hidden.flatten(0, 1), weight, targets * kept, epsilon)
    losses = (plain + margins + torch.log1p((-plain).exp() * torch.expm1(-margins))) * kept
    divisor = kept.sum() if num_items_in_batch is None else num_items_in_batch
    return losses.sum() / (divisor.to(losses.device) if torch.is_tensor(divisor) else divisor)


def loss_without_logits(
    hidden: torch.Tensor,
    lm_head: nn.Module,
    targets: torch.Tensor,
    chunk_size: int | None = None,
    epsilon: float = 0,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> torch.Tensor:
    """
    Compute the cross-entropy without holding all logits.

    Args:
        hidden (`(B, T, D)`): Input of the output layer.
        lm_head (`nn.Linear` or `AdaptiveSoftmax`): The output layer; a linear one of weight `(V, D)`.
        targets (`(B, T)`): The target of each position.
        chunk_size (`int`, *optional*): C, for a linear one.
        epsilon (`float`, defaults to 0): ε of adversarial softmax, for a linear one.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): Divisor of the sum; the number of targets by default.
        ignore_index (`int`, defaults to -100): The value that marks positions without a target.

    Returns:
        The loss, `()`, in nats, equal to that of transformers' `ForCausalLMLoss`.

    Raises:
        ValueError: if the output layer is not a plain `nn.Linear`: an adapter, a quantiser, a hook.
    """
    if not isinstance(lm_head, AdaptiveSoftmax) and not is_plain(lm_head):
        raise ValueError(
            f"`loss_chunk_size` ({chunk_size}) reads the weights of a plain `nn.Linear`, and `lm_head` is a "
            f"{type(lm_head).__module__}.{type(lm_head).__name__}, or has hooks: set `model.config.loss_chunk_size = None`, "
            "or leave `lm_head` out of the adapter's `target_modules`."
        )
    targets = targets.flatten().to(hidden.device)
    kept = targets != ignore_index
    hidden = hidden.flatten(0, 1)
    if is_transformed():  # shapes may not depend on values there, and the chunked loss has no transform rule
        scores = lm_head(hidden[None])[0]
        scores = scores.to(at_least_float32(scores.dtype))
        if epsilon > 0:
            some = targets * kept  # id 0 for an ignored target, whose margin has no effect
            weight = cast(torch.Tensor, lm_head.weight)
            scores = _lowered(scores, some, adversarial_margins(hidden, weight, some, epsilon))
        total = F.cross_entropy(scores, targets, ignore_index=ignore_index, reduction="sum")
    elif isinstance(lm_head, AdaptiveSoftmax):
        total = lm_head.sum_of_losses(hidden[kept], targets[kept])
    else:
        hidden, targets = hidden[kept], targets[kept]
        weight = cast(torch.Tensor, lm_head.weight)
        margins = adversarial_margins(hidden, weight, targets, epsilon) if epsilon > 0 else None
        total = _SumOfCrossEntropies.apply(hidden, weight, lm_head.bias, margins, targets, chunk_size)
    count = kept.sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if torch.is_tensor(count) else count)


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


def _lowered(scores: torch.Tensor, targets: torch.Tensor, margins: torch.Tensor | None) -> torch.Tensor:
    """Subtract the margins `(N,)` from the scores `(N, V)` of the targets `(N,)`."""
    return scores if margins is None else scores.scatter_add(1, targets[:, None], -margins[:, None].to(scores.dtype))


class _SumOfCrossEntropies(torch.autograd.Function):
    """
    Sum of the cross-entropies of `hidden` `(N, D)` and `targets` `(N,)`, in chunks, with the logits of the targets lowered by
    `margins` `(N,)`; these and the output layer's bias may be `None`.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, margins, targets, chunk_size):
        total = hidden.new_zeros((), dtype=at_least_float32(hidden.dtype))
        needs_hidden, needs_weight, needs_bias, needs_margins = ctx.needs_input_grad[:4]
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        # Hundreds of chunks are summed in float32: in bfloat16 most of the last ones would be lost to rounding.
        weight_grad = torch.zeros_like(weight, dtype=total.dtype) if needs_weight else None
        bias_grad = torch.zeros_like(bias, dtype=total.dtype) if needs_bias else None
        margins_grad = torch.empty_like(margins) if needs_margins else None
        for start in range(0, len(targets), chunk_size):
            part, wanted = hidden[start : start + chunk_size], targets[start : start + chunk_size, None]
            scores = F.linear(part, weight, bias).to(total.dtype)  # (C, V)
            if margins is not None:
                scores = _lowered(scores, wanted[:, 0], margins[start : start + chunk_size])
            normalizer = scores.logsumexp(dim=-1, keepdim=True)
            total += (normalizer - scores.gather(1, wanted)).sum()
            # softmax minus the target, in place: the gradient of the sum
            change = scores.sub_(normalizer).exp_().scatter_add_(1, wanted, -torch.ones_like(normalizer))
            if needs_bias:
                bias_grad += change.sum(dim=0)
            if needs_margins:
                margins_grad[start : start + chunk_size] = -change.gather(1, wanted)[:, 0]
            change = change.to(hidden.dtype)
            if needs_hidden:
                hidden_grad[start : start + chunk_size] = change @ weight
            if needs_weight and part.dtype == weight_grad.dtype:
                weight_grad.addmm_(change.t(), part)
            elif needs_weight:
                weight_grad += change.t() @ part
        ctx.save_for_backward(
            hidden_grad, weight_grad, bias_grad, margins_grad, hidden, weight, bias, margins, targets
        )
        return total

    @staticmethod
    def backward(ctx, scale):
        *grads, hidden, weight, bias, margins, targets = ctx.saved_tensors
        inputs, needed = (hidden, weight, bias, margins), ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # `create_graph=True`: derivatives of the gradients are wanted
            # Views: `hidden` is computed from a tied `weight`, and the way through it is not part of this gradient.
            inputs = tuple(None if tensor is None else tensor.view_as(tensor) for tensor in inputs)
            scores = _lowered(F.linear(*inputs[:3]), targets, inputs[3])
            total = F.cross_entropy(scores.to(at_least_float32(scores.dtype)), targets, reduction="sum")
            wanted = [tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed]
            found = iter(torch.autograd.grad(total, wanted, scale, create_graph=True))
            return *(next(found) if is_needed else None for is_needed in needed), None, None
        scaled = (
            (grad * scale.to(grad.dtype)).to(tensor.dtype) if is_needed else None
            for grad, tensor, is_needed in zip(grads, inputs, needed, strict=True)
        )
        return *scaled, None, None
