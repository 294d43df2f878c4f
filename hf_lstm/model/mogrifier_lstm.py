"""A kernel for training Mogrifier LSTMs on a CPU (Melis, Kočiský & Blunsom 2020), with gradients written by hand.

Autograd would compute the gradient of each matrix at every step and add them up; here it is one product after the last
step. The equations are those of `Mogrifier` in cells_lstm.py, with which tests/test_cells.py compares this kernel.

Shapes: S sequences of N tokens in all, n of the S at one step; D width of the input, H width of the cell.
"""

from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any

import torch


def run_mogrifier(
    by_equations: Callable[..., tuple[torch.Tensor, ...]],
    batch_sizes: list[int],
    x: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    W: torch.Tensor,
    U: torch.Tensor,
    b: torch.Tensor,
    rounds: Sequence[Sequence[torch.Tensor]],
) -> tuple[torch.Tensor, ...]:
    """
    Run a Mogrifier over packed tokens, all in float32 or all in float64.

    Args:
        by_equations (`Callable`):
            The same by differentiable operations, of x, h, c, W, U, b and `rounds`: for second derivatives.
        batch_sizes (`list[int]`): Number of sequences that have a first token, a second, ...
        x (`(N, D)`): The first token of every sequence, then the second of every one that has a second, and so on.
        h, c (`(S, H)`): The state to start from; the longest sequence comes first.
        W (`(4 H, D)`), U (`(4 H, H)`), b (`(4 H,)`): Weights of the gates i, f, g, o.
        rounds (`list`): For each round its matrix, or two to be applied in this order.

    Returns:
        h after each token, `(N, H)`; h and c at the end of each sequence, `(S, H)`.
    """
    lengths = [len(matrices) for matrices in rounds]
    return _Mogrifier.apply(by_equations, batch_sizes, lengths, x, h, c, W, U, b, *chain(*rounds))


class _Mogrifier(torch.autograd.Function):
    """
    The recurrence with a token in each column, `(D, n)`, which a CPU multiplies faster than rows. Each matrix gets its
    gradient in one product after the last step.

    A round scales what the round before it read: with (v, w) = (x, h) at first, it turns them into (w, 2 σ(Q w) ⊙ v).
    """

    @staticmethod
    def forward(ctx, by_equations, batch_sizes, lengths, x, h, c, W, U, b, *factors):
        ctx.by_equations, ctx.batch_sizes, ctx.lengths = by_equations, batch_sizes, lengths
        inputs, rounds = (x, h, c, W, U, b, *factors), _grouped(factors, lengths)
        weights, size = torch.cat([W, U], 1), h.shape[1]  # (4 H, D + H)
        h, c, outputs, saved, ended = h.t(), c.t(), [], [], []
        for read in x.split(batch_sizes):
            n = len(read)
            ended.append((h[:, n:], c[:, n:]))
            h, c = h[:, :n].contiguous(), c[:, :n].contiguous()
            values, scales = [read.t().contiguous(), h], []
            for matrices in rounds:
                scores = values[-1]
                for matrix in matrices:
                    scores = matrix @ scores
                scales.append(scores.sigmoid_().mul_(2))
                values.append(scales[-1] * values[-2])
            gates = torch.addmm(b[:, None], weights, torch.cat(_ordered(*values[-2:], lengths)))  # (4 H, n)
            gates[: 2 * size].sigmoid_(), gates[2 * size : 3 * size].tanh_(), gates[3 * size :].sigmoid_()
            i, f, g, o = gates.chunk(4)
            old_c, c = c, torch.addcmul(f * c, i, g)
            tanh_c = c.tanh()
            h = o * tanh_c
            outputs.append(h)
            saved += [*values, *scales, gates, old_c, tanh_c]
        ctx.save_for_backward(*inputs, *saved)
        h, c = (torch.cat(parts[::-1], 1) for parts in zip(*ended, (h, c), strict=True))
        return tuple(columns.t().contiguous() for columns in (torch.cat(outputs, 1), h, c))

    @staticmethod
    def backward(ctx, outputs_grad, h_end, c_end):
        batch_sizes, lengths, needed = ctx.batch_sizes, ctx.lengths, ctx.needs_input_grad[3:]
        tensors = ctx.saved_tensors  # once, or recomputed activations would be unpacked twice
        inputs, saved = tensors[: len(needed)], tensors[len(needed) :]
        if torch.is_grad_enabled():  # `create_graph=True`: derivatives of the gradients are wanted
            x, h, c, W, U, b, *factors = inputs = [tensor.view_as(tensor) for tensor in inputs]  # cut from each other
            results = ctx.by_equations(x, h, c, W, U, b, _grouped(factors, lengths))
            wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
            found = iter(torch.autograd.grad(results, wanted, (outputs_grad, h_end, c_end), create_graph=True))
            return None, None, None, *(next(found) if need else None for need in needed)

        W, U, _, *factors = inputs[3:]
        r, width = len(lengths), W.shape[1]
        weights = torch.cat([W, U], 1).t().contiguous()  # (D + H, 4 H)
        transposed = _grouped([factor.t().contiguous() for factor in factors], lengths)
        steps = _grouped(saved, [2 * r + 5] * len(batch_sizes))
        h_end, c_end = h_end.t(), c_end.t()
        h, c, passed = h_end[:, :0], c_end[:, :0], []  # in the loop v, w, x, h, c and scores are gradients
        for n, change, step in zip(batch_sizes[::-1], outputs_grad.split(batch_sizes)[::-1], steps[::-1], strict=True):
            values, scales, (gates, old_c, tanh_c) = _grouped(step, [r + 2, r, 3])
            h = torch.cat([h, h_end[:, h.shape[1] : n]], 1).add_(change.t())
            c = torch.cat([c, c_end[:, c.shape[1] : n]], 1)
            i, f, g, o = gates.chunk(4)
            # The differences from 1 are taken first: they are exact near 1, where they are small.
            c.addcmul_(h * o, 1 - tanh_c.square())
            slopes = (1 - gates).mul_(gates)  # of sigmoids
            slopes.chunk(4)[2].copy_(1 - g.square())
            scores = torch.cat([c * g, c * old_c, c * i, h * tanh_c]).mul_(slopes)
            c *= f
            grads = [scores]
            v, w = _ordered(*(weights @ scores).split([width, len(h)]), lengths)
            for matrices, value, scale in zip(transposed[::-1], values[:1:-1], scales[::-1], strict=True):
                scores = (w * value).mul_(torch.rsub(scale, 1, alpha=0.5))
                for matrix in matrices[:0:-1]:
                    grads.append(scores)
                    scores = matrix @ scores
                grads.append(scores)
                v, w = w.mul_(scale), v.addmm_(matrices[0], scores)
            h = w
            passed.append([v, *grads])

        x, scores, *grads = (torch.cat(columns[::-1], 1) for columns in zip(*passed, strict=True))
        values = [torch.cat(columns, 1) for columns in list(zip(*steps, strict=True))[: r + 2]]
        products = [(scores, value) for value in _ordered(*values[-2:], lengths)]
        for matrices, value in zip(_grouped(factors, lengths), values[1:], strict=False):
            for matrix in matrices:
                products.append((grads.pop(), value))
                value = matrix @ value
        starts = (torch.cat([grad, end[:, grad.shape[1] :]], 1).t() for grad, end in ((h, h_end), (c, c_end)))
        needs = needed[3:5] + needed[6:]
        W, U, *factors = (
            grad @ value.t() if need else None for (grad, value), need in zip(products, needs, strict=True)
        )
        found = zip((x.t(), *starts, W, U, scores.sum(1), *factors), needed, strict=True)
        return None, None, None, *(grad if need else None for grad, need in found)


def _grouped(items: Any, lengths: list[int]) -> list[list]:
    """Cut a list into parts of these lengths."""
    items = iter(items)
    return [list(islice(items, length)) for length in lengths]


def _ordered(v, w, lengths):
    """Return x and h, or their gradients, of the last two values after these rounds; or the reverse."""
    return (w, v) if len(lengths) % 2 else (v, w)
