"""Entropy of the distributions that predict tokens, ranks of the tokens in them, and the likeliest tokens."""

import math
from collections.abc import Callable

import numpy
import torch

ENTRIES = 2**18  # scores read at a time: few enough to stay in a CPU's cache


class Distributions:
    """
    Facts about the distribution after each token of a stream, of which no more than `ENTRIES` entries are read at a time.

    The entropy is that of Shannon (1948), in nats:

        H_t = -Σ_w p(w | x_1 ... x_t) log p(w | x_1 ... x_t)

    Args:
        length (`int`): Tokens of the stream, T.
        entropy (`bool`): Whether to compute entropies and ranks.
        top_k (`int`): K, the number of guesses to keep, of at most the vocabulary; 0 for none.
    """

    def __init__(self, length: int, entropy: bool, top_k: int):
        self.has_entropy = entropy
        self.entropies = numpy.full(length, numpy.nan)  # (T,), after each token
        self.ranks = numpy.full(length, numpy.nan)  # (T,), of the next token
        self.guesses = numpy.zeros((length, top_k), dtype=numpy.int64)  # (T, K), ids of the likeliest next tokens
        self.probabilities = numpy.full((length, top_k), numpy.nan)  # (T, K)

    def add(self, scores: torch.Tensor, targets: torch.Tensor, indices: torch.Tensor) -> None:
        """
        Read distributions.

        Args:
            scores (`(N, V)`): Logits or log-probabilities.
            targets (`(N,)`): The next tokens.
            indices (`(N,)`): The places in the stream after which they stand.
        """
        rows = max(1, ENTRIES // scores.shape[-1])
        parts = (tensor.split(rows) for tensor in (scores, targets.to(scores.device), indices))
        for part, wanted, places in zip(*parts, strict=True):
            self._add(part, wanted, places.numpy())

    def _add(self, scores, targets, places):
        logs = scores.log_softmax(dim=-1)
        shares = logs.exp()
        if self.has_entropy:
            finite = logs.clamp(min=torch.finfo(logs.dtype).min)  # 0 log 0 is 0
            self.entropies[places] = -torch.linalg.vecdot(shares, finite).double().cpu().numpy()
            likelier = scores > scores.gather(1, targets[:, None])
            self.ranks[places] = 1 + likelier.sum(dim=-1).cpu().numpy()
        if self.guesses.shape[1]:
            probabilities, tokens = shares.topk(self.guesses.shape[1], dim=-1)
            self.probabilities[places] = probabilities.double().cpu().numpy()
            self.guesses[places] = tokens.cpu().numpy()

    def check(self, indices: torch.Tensor, name: Callable[[int], str]) -> None:
        """Raise `ValueError` for an entropy that is NaN after the tokens `(N,)` that `name` describes."""
        wrong = indices[numpy.isnan(self.entropies[indices.numpy()])]
        if self.has_entropy and len(wrong):
            raise ValueError(
                f"The prediction after {name(int(wrong[0]))} is NaN: check the model's weights, or load it in a wider "
                "type, such as float32."
            )

    def columns(
        self, places: numpy.ndarray, unpredicted: numpy.ndarray, base: float, names: dict[int, str]
    ) -> dict[str, numpy.ndarray]:
        """
        Return the columns of the table of surprisal, `(N,)` each.

        Args:
            places (`(N,)`): The places of tokens in the stream.
            unpredicted (`(N,)`): Which of them nothing predicts.
            base (`float`): Base of the logarithm.
            names (`dict[int, str]`): The text of each guess.
        """

        def where_predicted(values):
            return numpy.where(unpredicted, numpy.nan, values[places - 1])

        found: dict[str, numpy.ndarray] = {}
        if self.has_entropy:
            entropies = self.entropies / math.log(base)
            before = where_predicted(entropies)
            found = {"entropy": before, "entropy_reduction": before - entropies[places]}
            found["rank"] = where_predicted(self.ranks)
        for number in range(self.guesses.shape[1]):
            texts = [names[token] for token in self.guesses[places - 1, number].tolist()]
            found[f"guess_{number + 1}"] = numpy.where(unpredicted, numpy.nan, numpy.array(texts, dtype=object))
            found[f"probability_{number + 1}"] = where_predicted(self.probabilities[:, number])
        return found
