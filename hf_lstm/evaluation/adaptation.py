"""Adaptation at test time: temperature, the neural cache, and dynamic evaluation."""

import copy
import math
from dataclasses import dataclass
from typing import cast

import torch
from transformers import DynamicCache, PreTrainedModel

from hf_lstm.data.lanes import check_at_least_one
from hf_lstm.data.streams import Tokens
from hf_lstm.model.cells_lstm import at_least_float32

from .scoring import Chunk, checked_stream, evaluating, read_chunks, run_chunk, scored_logits, token_losses


@dataclass
class NeuralCache:
    """
    Continuous cache of Grave, Joulin & Usunier (2017): tokens that followed hidden states similar to the present one, h_t,
    become more probable.

        p(w) = (1 - λ) p_model(w) + λ p_cache(w)        p_cache(w) ∝ Σ_i [x_{i+1} = w] exp(θ h_t · h_i)

    over the last `size` tokens i before t, as far as the state reaches back. The authors choose θ and λ on validation
    text; these defaults are those that Merity, Keskar & Socher (2018) publish for the Penn Treebank.

    Args:
        size (`int`, defaults to 500): Tokens in the cache.
        theta (`float`, defaults to 1.0): θ, the weight of similarity; large states need less.
        weight (`float`, defaults to 0.1): λ, the share of the cache.

    Raises:
        ValueError: for numbers outside these ranges.
    """

    size: int = 500
    theta: float = 1.0
    weight: float = 0.1

    def __post_init__(self):
        check_at_least_one(size=self.size)
        if not 0 <= self.weight < 1:
            raise ValueError(f"`weight` ({self.weight}) must lie in [0, 1): it is the share of the cache.")
        if not 0 <= self.theta < math.inf:
            raise ValueError(f"`theta` ({self.theta}) must be a number of at least 0.")

    def memory(self) -> "_Memory":
        """Return an empty cache."""
        return _Memory(self)


class _Memory:
    """Memory of the last states (B, W, H), the tokens that followed them, and their indices (B, W)."""

    def __init__(self, options: NeuralCache):
        self.options = options
        self.kept: tuple[torch.Tensor, ...] = ()

    def mix(self, scores: torch.Tensor, hidden: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Return log-probabilities `(N, V)` for logits `(N, V)` and states `(B, T, H)`, and store the states."""
        options, device = self.options, hidden.device
        scored = chunk.scored.to(device)
        new = (hidden, chunk.targets.to(device), chunk.indices.to(device))
        if self.kept:
            states, tokens, indices = (torch.cat(pair, dim=1) for pair in zip(self.kept, new, strict=True))
        else:
            states, tokens, indices = new

        now, begin = new[2][..., None], chunk.starts.to(device)[..., None]  # (B, T, 1)
        before = indices[:, None]  # (B, 1, W)
        seen = (before < now) & (before >= begin) & (before >= now - options.size)  # (B, T, W)
        similarity = (options.theta * hidden @ states.transpose(1, 2)).masked_fill(~seen, -math.inf)
        shares = similarity[scored].softmax(dim=-1).nan_to_num()  # (N, W); all zero where nothing was seen
        followers = tokens[:, None].expand_as(seen)[scored]
        cached = torch.zeros_like(scores).scatter_add_(1, followers, shares.to(scores.dtype))
        weight = options.weight * seen[scored].any(dim=-1, keepdim=True)  # without a past, the model alone
        mixed = ((1 - weight).log() + scores.log_softmax(dim=-1)).logaddexp(weight.log() + cached.log())

        self.kept = tuple(part[:, -options.size :] for part in (states, tokens, indices))
        return mixed


@dataclass
class DynamicEvaluation:
    """
    Dynamic evaluation (Krause, Kahembwe, Murray & Renals 2018): a gradient step on the loss of each segment, after it.

        θ ← θ - η ∇L / (r + ε) + min(1, λ r / mean(r)) (θ_trained - θ)

    where r is the root mean square of the gradient over the training text, by [`gradient_rms`]; without it, plain SGD
    (Mikolov et al. 2010):

        θ ← θ - η ∇L + λ (θ_trained - θ)

    Args:
        gradient_rms (`dict[str, torch.Tensor]`, *optional*): r of each parameter.
        learning_rate (`float`, *optional*):
            η: by default 2e-4, or 0.1 without `gradient_rms` (Mikolov et al. 2010).
        decay (`float`, *optional*): λ: by default 8e-3, or 0 without `gradient_rms`.
        epsilon (`float`, defaults to 2e-5): ε.
        segment_length (`int`, defaults to 20):
            Tokens of a segment. The defaults beside `gradient_rms` are those of the authors' code for 5 words, 5e-5 and
            2e-3, scaled to 20 tokens like its search does: another length needs others. As in that code, mean(r) is the
            mean over the parameter tensors of the mean of each.

    Raises:
        ValueError: for numbers outside their ranges.
    """

    gradient_rms: dict[str, torch.Tensor] | None = None
    learning_rate: float | None = None
    decay: float | None = None
    epsilon: float = 2e-5
    segment_length: int = 20

    def __post_init__(self):
        if self.learning_rate is None:
            self.learning_rate = 0.1 if self.gradient_rms is None else 2e-4
        if self.decay is None:
            self.decay = 0.0 if self.gradient_rms is None else 8e-3
        for name in ("learning_rate", "epsilon"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be a number of at least 0.")
        if not 0 <= self.decay <= 1:
            raise ValueError(
                f"`decay` ({self.decay}) must lie in [0, 1]: it is the share of the distance to the trained weights."
            )
        check_at_least_one(segment_length=self.segment_length)

    def learner(self, model: PreTrainedModel) -> "_Learner":
        """Return a copy of the model that learns."""
        return _Learner(self, model)

    def adapt(self, model: PreTrainedModel, tokens: Tokens, reset_at_documents: bool = False) -> PreTrainedModel:
        """
        Return a copy of the model that has learned from a text, the adaptive language model of van Schijndel & Linzen
        (2018): the copy whose predictions [`evaluate_stream`] scores, after the last segment. It is saved like any model.

        Args:
            model (`LSTMForCausalLM`): The model, which is not changed.
            tokens (`TokenStream`, `torch.Tensor` or array): The text to learn from, integers in a single dimension.
            reset_at_documents (`bool`, defaults to `False`): Whether the state restarts at every document.

        Returns:
            `LSTMForCausalLM`: in the mode of the model, with weights in float32 or wider.

        Raises:
            ValueError: for fewer than two tokens, ids outside the vocabulary, or predictions that are NaN.
        """
        stream = checked_stream(model, tokens)
        learner, state = self.learner(model), DynamicCache(config=model.config)
        whole = torch.tensor([0]), torch.tensor([len(stream) - 1])
        with evaluating(learner.model), torch.enable_grad():
            for chunk in read_chunks(stream, *whole, self.segment_length, reset_at_documents, description="adapting"):
                learner.learn(scored_logits(run_chunk(learner.model, chunk, state).logits, chunk), chunk, state)
        return learner.model


class _Learner:
    def __init__(self, options: DynamicEvaluation, model: PreTrainedModel):
        decay = cast(float, options.decay)  # neither is None after `__post_init__`
        self.model, self.learning_rate = trainable_copy(model), cast(float, options.learning_rate)
        self.parameters = dict(self.model.named_parameters())
        self.trained = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.scale: dict[str, float | torch.Tensor] = dict.fromkeys(self.parameters, 1.0)
        self.pull: dict[str, float | torch.Tensor] = dict.fromkeys(self.parameters, decay)
        if (rms := options.gradient_rms) is not None:
            if {name: tensor.shape for name, tensor in rms.items()} != {
                n: p.shape for n, p in self.parameters.items()
            }:
                raise ValueError(
                    "`gradient_rms` belongs to another model: call `gradient_rms(model, training_tokens)`."
                )
            mean = sum(tensor.mean() for tensor in rms.values()) / len(rms)
            self.scale = {name: 1 / (tensor + options.epsilon) for name, tensor in rms.items()}
            self.pull = {name: (decay * tensor / mean).clamp(max=1) for name, tensor in rms.items()}

    def learn(self, logits: torch.Tensor, chunk: Chunk, state: DynamicCache) -> None:
        """Take a gradient step on the mean loss of a chunk, and detach the state."""
        gradients = _gradients(logits, chunk, state, self.parameters)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                step = self.learning_rate * self.scale[name] * gradients[name]
                parameter.add_(self.pull[name] * (self.trained[name] - parameter) - step)


def trainable_copy(model):
    """Copy a model in float32 or wider, since the steps are too small for half precision."""
    return copy.deepcopy(model).to(at_least_float32(model.dtype)).requires_grad_(True)


def _gradients(logits, chunk, state, parameters) -> dict[str, torch.Tensor]:
    """Return the gradients of the mean loss of a chunk, and detach the state."""
    gradients = torch.autograd.grad(token_losses(logits, chunk).mean(), list(parameters.values()))
    for layer in state.layers:
        layer.detach_()
    return dict(zip(parameters, gradients, strict=True))


def gradient_rms(
    model: PreTrainedModel, tokens: Tokens, lanes: int = 100, segment_length: int = 20, max_segments: int | None = None
) -> dict[str, torch.Tensor]:
    """
    Compute the root mean square of each parameter's gradient over segments of the training text, by which
    [`DynamicEvaluation`] scales its steps.

    Args:
        model (`LSTMForCausalLM`): The model, which is not changed.
        tokens (`TokenStream`, `torch.Tensor` or array): The text the model was trained on.
        lanes (`int`, defaults to 100): Parts of the text that are read side by side, as Krause et al. do.
        segment_length (`int`, defaults to 20): Tokens of each part in a segment: that of the evaluation.
        max_segments (`int`, *optional*): Segments to read: some hundred give nearly the same as all.

    Returns:
        `dict[str, torch.Tensor]`: by name of the parameter, in its shape.

    Raises:
        ValueError: for numbers below 1, more lanes than targets, ids outside the vocabulary, or predictions that are NaN.
    """
    stream = checked_stream(model, tokens)
    check_at_least_one(lanes=lanes, segment_length=segment_length, max_segments=max_segments)
    part = (len(stream) - 1) // lanes
    if part < 1:
        raise ValueError(f"`lanes` ({lanes}) must be fewer than the {len(stream):,} tokens.")
    if max_segments is not None:
        part = min(part, max_segments * segment_length)
    firsts = torch.arange(lanes) * ((len(stream) - 1) // lanes)
    reader = trainable_copy(model)
    parameters, state = dict(reader.named_parameters()), DynamicCache(config=model.config)
    squares, segments = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}, 0
    with evaluating(reader), torch.enable_grad():
        for chunk in read_chunks(stream, firsts, firsts + part, segment_length, description="taking gradients"):
            logits = scored_logits(run_chunk(reader, chunk, state).logits, chunk)
            for name, gradient in _gradients(logits, chunk, state, parameters).items():
                squares[name] += gradient.square()
            segments += 1
    return {name: (square / segments).sqrt().detach() for name, square in squares.items()}


@torch.no_grad()
def fit_temperature(
    model: PreTrainedModel, tokens: Tokens, bptt_length: int = 1024, reset_at_documents: bool = False
) -> float:
    """
    Fit the temperature T of softmax(logits / T) to the loss of a text, by Newton's method: the loss is convex in 1 / T.
    Fit it on validation text, and use it on another.

    Raises:
        ValueError: for fewer than two tokens, predictions that are NaN, or a loss that has no minimum between T = 0.001
            and T = 1,000.
    """
    stream = checked_stream(model, tokens)
    sharpness, targets = 1.0, len(stream) - 1  # 1 / T
    whole = torch.tensor([0]), torch.tensor([targets])
    for _ in range(20):
        slope, curvature = torch.zeros(2, dtype=torch.float64)
        state = DynamicCache(config=model.config)
        with evaluating(model):
            for chunk in read_chunks(
                stream, *whole, bptt_length, reset_at_documents, description="fitting the temperature"
            ):
                logits = scored_logits(run_chunk(model, chunk, state).logits, chunk)  # (N, V)
                token_losses(logits, chunk)  # raises for NaN
                logits = logits - logits.max(dim=-1, keepdim=True).values
                shares = (sharpness * logits).softmax(dim=-1)
                mean = (shares * logits).sum(dim=-1)
                right = logits.gather(1, chunk.targets.flatten()[:, None].to(logits.device))[:, 0]
                slope += (mean - right).double().sum().cpu() / targets
                curvature += (shares * (logits - mean[:, None]).square()).double().sum().cpu() / targets
        step = (slope / curvature).item()
        if not math.isfinite(step):
            break
        sharpness = max(sharpness - step, sharpness / 4)
        if abs(step) < 1e-5 * sharpness:
            return 1 / sharpness
        if not 1e-3 < sharpness < 1e3:
            break
    raise ValueError(
        f"The loss of this text has no minimum in the temperature: at {1 / sharpness:.3g} it still falls, so give another "
        "text, neither memorised nor foreign to the model."
    )
