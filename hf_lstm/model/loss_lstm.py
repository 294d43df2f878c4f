"""Losses of large vocabularies that never hold all logits.

The chunked loss is exactly the plain cross-entropy: logits are computed for C of the N targets at a time, their part
of both gradients is added up at once, and the logits are freed. Memory falls from N V to C V numbers, and logits are
computed once (Wijmans et al. 2025 compute them again in the backward). The adaptive softmax is a different, cheaper
model of the words (Grave et al. 2017).

Shapes: N tokens in all, D width of the output layer's input, V vocabulary, C tokens of a chunk.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .recurrence_lstm import at_least_float32, is_plain, is_transformed


class AdaptiveSoftmax(nn.AdaptiveLogSoftmaxWithLoss):
    """
    An output layer that splits the vocabulary at `cutoffs` (Grave et al. 2017): frequent words, the first ids, have a
    softmax with one more class for each group of rarer words, and each group has a quarter of the width of the one
    before.
    """

    def __init__(self, hidden_size: int, vocab_size: int, cutoffs: list[int]):
        super().__init__(hidden_size, vocab_size, cutoffs, div_value=4.0)

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
) -> torch.Tensor | None:
    """
    Return the target of each position: the token after it. A token is not a target if no real token of its row comes
    before it, such as the first one after padding on the left, since nothing predicts it.

    Args:
        labels (`(B, T)`, *optional*): The tokens themselves.
        length (`int`): T.
        kept (`slice` or `torch.Tensor`): The positions to return targets for.
        attention_mask (`(B, T)`, *optional*): 0 marks padding; of a wider one, the last `T` columns are used.
        read_before (`(B,)`, *optional*): Which rows have read a token in earlier calls.
        shift_labels (`(B, T)`, *optional*): The target of each position, used instead of `labels`.
        ignore_index (`int`, defaults to -100): The value that marks positions without a target.

    Returns:
        `(B, T)`, of the positions kept; `None` without labels.
    """
    if shift_labels is None:
        if labels is None:
            return None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    # `shift_labels` may already be cut to the kept positions.
    targets = shift_labels[:, kept] if shift_labels.shape[1] == length else shift_labels
    targets = targets.contiguous()  # transformers' loss flattens it with `view`
    if attention_mask is None:
        return targets
    follows = (attention_mask[:, -length:] != 0).cumsum(dim=1) > 0
    if read_before is not None:
        follows = follows | read_before[:, None].to(follows.device)
    return targets.masked_fill(~follows[:, kept].to(targets.device), ignore_index)


def loss_without_logits(
    hidden: torch.Tensor,
    lm_head: nn.Module,
    targets: torch.Tensor,
    chunk_size: int | None = None,
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
        total = F.cross_entropy(scores, targets, ignore_index=ignore_index, reduction="sum")
    elif isinstance(lm_head, AdaptiveSoftmax):
        total = lm_head.sum_of_losses(hidden[kept], targets[kept])
    else:
        hidden, targets = hidden[kept], targets[kept]
        total = _SumOfCrossEntropies.apply(hidden, lm_head.weight, targets, chunk_size)
    count = kept.sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if torch.is_tensor(count) else count)


class _SumOfCrossEntropies(torch.autograd.Function):
    """Sum of the cross-entropies of `hidden` `(N, D)` and `targets` `(N,)`, in chunks."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_size):
        total = hidden.new_zeros((), dtype=at_least_float32(hidden.dtype))
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        # Hundreds of chunks are summed in float32: in bfloat16 most of the last ones would be lost to rounding.
        weight_grad = torch.zeros_like(weight, dtype=total.dtype) if needs_weight else None
        for start in range(0, len(targets), chunk_size):
            part, wanted = hidden[start : start + chunk_size], targets[start : start + chunk_size, None]
            scores = (part @ weight.t()).to(total.dtype)  # (C, V)
            normalizer = scores.logsumexp(dim=-1, keepdim=True)
            total += (normalizer - scores.gather(1, wanted)).sum()
            # softmax minus the target, in place: the gradient of the sum
            change = scores.sub_(normalizer).exp_().scatter_add_(1, wanted, -torch.ones_like(normalizer))
            change = change.to(hidden.dtype)
            if needs_hidden:
                hidden_grad[start : start + chunk_size] = change @ weight
            if needs_weight and part.dtype == weight_grad.dtype:
                weight_grad.addmm_(change.t(), part)
            elif needs_weight:
                weight_grad += change.t() @ part
        ctx.save_for_backward(hidden_grad, weight_grad, hidden, weight, targets)
        return total

    @staticmethod
    def backward(ctx, scale):
        *grads, hidden, weight, targets = ctx.saved_tensors
        if torch.is_grad_enabled():  # `create_graph=True`: derivatives of the gradients are wanted
            scores = F.linear(hidden, weight)
            total = F.cross_entropy(scores.to(at_least_float32(scores.dtype)), targets, reduction="sum")
            wanted = [tensor for tensor, needed in zip((hidden, weight), ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(total, wanted, scale, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None, None
        hidden_grad, weight_grad = (None if grad is None else grad * scale.to(grad.dtype) for grad in grads)
        return hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype), None, None
