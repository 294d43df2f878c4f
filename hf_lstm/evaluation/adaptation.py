"""What a model can still do while it is tested: be less sure of itself, remember what it read, and learn from it."""

import copy
import math
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from hf_lstm.model.kernels_lstm import at_least_float32

from .reading import Chunk, evaluating, nats_of, predict, read_chunks, scored_logits, stream_for


@dataclass
class NeuralCache:
    """
    The continuous cache of Grave, Joulin & Usunier (2017): what followed in the recent past where the hidden state was
    like the present one, h_t, is likely to follow again.

        p(w) = (1 - λ) p_model(w) + λ p_cache(w)        p_cache(w) ∝ Σ_i [x_{i+1} = w] exp(θ h_t · h_i)

    over the last `size` tokens i before t, as far as the state reaches back. The authors choose θ and λ on validation
    text; these defaults are those that Merity, Keskar & Socher (2018) publish for the Penn Treebank.

    Args:
        size (`int`, defaults to 500): Tokens that are remembered.
        theta (`float`, defaults to 1.0): θ, how much likeness counts; large states ask for less.
        weight (`float`, defaults to 0.1): λ, the share of the cache.
    """

    size: int = 500
    theta: float = 1.0
    weight: float = 0.1

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"`size` ({self.size}) must be at least 1: it is the number of tokens remembered.")
        if not 0 <= self.weight < 1:
            raise ValueError(f"`weight` ({self.weight}) must lie in [0, 1): it is the share of the cache.")
        if not 0 <= self.theta < math.inf:
            raise ValueError(f"`theta` ({self.theta}) must be a number of at least 0.")

    def memory(self) -> "_Memory":
        """An empty one."""
        return _Memory(self)


class _Memory:
    """The last states (B, W, H), the tokens that followed them, and where they stood (B, W)."""

    def __init__(self, options: NeuralCache):
        self.options = options
        self.states = self.tokens = self.indices = None

    def mix(self, scores: torch.Tensor, hidden: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Log-probabilities `(N, V)` of logits `(N, V)` and the states `(B, T, H)`, which are remembered then."""
        options, device = self.options, hidden.device
        scored = chunk.scored.to(device)
        new = (hidden, chunk.targets.to(device), chunk.indices.to(device))
        if self.states is None:
            self.states, self.tokens, self.indices = new
        else:
            old = (self.states, self.tokens, self.indices)
            self.states, self.tokens, self.indices = (torch.cat(pair, dim=1) for pair in zip(old, new, strict=True))

        now, begin = new[2][..., None], chunk.starts.to(device)[..., None]  # (B, T, 1)
        before = self.indices[:, None]  # (B, 1, W)
        seen = (before < now) & (before >= begin) & (before >= now - options.size)  # (B, T, W)
        likeness = (options.theta * hidden @ self.states.transpose(1, 2)).masked_fill(~seen, -math.inf)
        shares = likeness[scored].softmax(dim=-1).nan_to_num()  # (N, W); nothing was seen: all zero
        followers = self.tokens[:, None].expand_as(seen)[scored]
        cached = torch.zeros_like(scores).scatter_add_(1, followers, shares.to(scores.dtype))
        weight = options.weight * seen[scored].any(dim=-1, keepdim=True)  # without a past, the model alone
        mixed = ((1 - weight).log() + scores.log_softmax(dim=-1)).logaddexp(weight.log() + cached.log())

        self.states, self.tokens, self.indices = (
            part[:, -options.size :] for part in (self.states, self.tokens, self.indices)
        )
        return mixed


@dataclass
class DynamicEvaluation:
    """
    Dynamic evaluation (Krause, Kahembwe, Murray & Renals 2018): after each segment, a gradient step on its loss.

        θ ← θ - η ∇L / (r + ε) + min(1, λ r / mean(r)) (θ_trained - θ)

    where r is the root mean square of the gradient over the training text, by [`gradient_rms`]; without it, plain SGD
    (Mikolov et al. 2010):

        θ ← θ - η ∇L + λ (θ_trained - θ)

    Args:
        gradient_rms (`dict[str, torch.Tensor]`, *optional*): r of each parameter.
        learning_rate (`float`, *optional*):
            η: by default 2e-4, or 0.1 without `gradient_rms`, as Mikolov et al. have it.
        decay (`float`, *optional*): λ: by default 8e-3, or 0 without `gradient_rms`.
        epsilon (`float`, defaults to 2e-5): ε.
        segment_length (`int`, defaults to 20):
            Tokens of a segment. The defaults beside `gradient_rms` are those of the authors' code for 5 words, 5e-5 and
            2e-3, scaled to 20 tokens as its search scales them: another length asks for others. As there, mean(r) is the
            mean over the parameter tensors of the mean of each.
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
            raise ValueError(f"`decay` ({self.decay}) must lie in [0, 1]: it is a share of the way back.")
        if self.segment_length < 1:
            raise ValueError(f"`segment_length` ({self.segment_length}) must be at least 1.")

    def learner(self, model) -> "_Learner":
        """A copy of the model, which learns."""
        return _Learner(self, model)


class _Learner:
    def __init__(self, options: DynamicEvaluation, model):
        self.model, self.learning_rate = _trainable_copy(model), options.learning_rate
        self.parameters = dict(self.model.named_parameters())
        self.trained = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.scale, self.pull = dict.fromkeys(self.parameters, 1.0), dict.fromkeys(self.parameters, options.decay)
        if (rms := options.gradient_rms) is not None:
            if {name: tensor.shape for name, tensor in rms.items()} != {
                n: p.shape for n, p in self.parameters.items()
            }:
                raise ValueError(
                    "`gradient_rms` is not that of this model: call `gradient_rms(model, training_tokens)`."
                )
            mean = sum(tensor.mean() for tensor in rms.values()) / len(rms)
            self.scale = {name: 1 / (tensor + options.epsilon) for name, tensor in rms.items()}
            self.pull = {name: (options.decay * tensor / mean).clamp(max=1) for name, tensor in rms.items()}

    def learn(self, logits: torch.Tensor, chunk: Chunk, state: DynamicCache) -> None:
        """A step on the mean loss of a chunk, from whose end the state goes on."""
        gradients = _gradients(logits, chunk, state, self.parameters)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                step = self.learning_rate * self.scale[name] * gradients[name]
                parameter += self.pull[name] * (self.trained[name] - parameter) - step


def _trainable_copy(model):
    """In float32 at least: steps are too small for half precision."""
    return copy.deepcopy(model).to(at_least_float32(model.dtype)).requires_grad_(True)


def _gradients(logits, chunk, state, parameters) -> dict[str, torch.Tensor]:
    """Those of the mean loss of a chunk; the state is cut from its past."""
    gradients = torch.autograd.grad(nats_of(logits, chunk).mean(), list(parameters.values()))
    for layer in state.layers:
        layer.detach_()
    return dict(zip(parameters, gradients, strict=True))


def gradient_rms(
    model, tokens, lanes: int = 100, segment_length: int = 20, max_segments: int | None = None
) -> dict[str, torch.Tensor]:
    """
    The root mean square of the gradient of each parameter over segments of the training text, which
    [`DynamicEvaluation`] scales its steps by.

    Args:
        model (`LSTMForCausalLM`): Left as it was.
        tokens (`TokenStream`, `torch.Tensor` or array): The text the model was trained on.
        lanes (`int`, defaults to 100): Parts of the text that are read side by side, as Krause et al. do.
        segment_length (`int`, defaults to 20): Tokens of each part in a segment: that of the evaluation.
        max_segments (`int`, *optional*): Segments to read: some hundred say nearly the same as all.

    Raises:
        ValueError: for numbers below 1, more lanes than targets, ids outside the vocabulary, or predictions that are not
            numbers.
    """
    stream = stream_for(model, tokens)
    for name, value in (("lanes", lanes), ("segment_length", segment_length), ("max_segments", max_segments)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` ({value}) must be at least 1.")
    part = (len(stream) - 1) // lanes
    if part < 1:
        raise ValueError(f"`lanes` ({lanes}) must be fewer than the {len(stream):,} tokens.")
    if max_segments is not None:
        part = min(part, max_segments * segment_length)
    firsts = torch.arange(lanes) * ((len(stream) - 1) // lanes)
    reader = _trainable_copy(model)
    parameters, state = dict(reader.named_parameters()), DynamicCache(config=model.config)
    squares, segments = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}, 0
    with evaluating(reader), torch.enable_grad():
        for chunk in read_chunks(stream, firsts, firsts + part, segment_length, description="taking gradients"):
            logits = scored_logits(predict(reader, chunk, state).logits, chunk)
            for name, gradient in _gradients(logits, chunk, state, parameters).items():
                squares[name] += gradient.square()
            segments += 1
    return {name: (square / segments).sqrt().detach() for name, square in squares.items()}


@torch.no_grad()
def fit_temperature(model, tokens, bptt_length: int = 1024, reset_at_documents: bool = False) -> float:
    """
    The temperature T of softmax(logits / T) that makes the loss of a text least, by Newton's method: the loss is convex
    in 1 / T. Fit it on validation text, and use it on another.

    Raises:
        ValueError: if there are fewer than two tokens, predictions are not numbers, or no temperature is the best: the
            surest predictions are, or the flattest.
    """
    stream = stream_for(model, tokens)
    sharpness, targets = 1.0, len(stream) - 1  # 1 / T
    for _ in range(20):
        slope, curvature = torch.zeros(2, dtype=torch.float64)
        state = DynamicCache(config=model.config)
        with evaluating(model):
            for chunk in read_chunks(
                *(stream, torch.tensor([0]), torch.tensor([targets]), bptt_length, reset_at_documents),
                description="fitting the temperature",
            ):
                logits = scored_logits(predict(model, chunk, state).logits, chunk)  # (N, V)
                nats_of(logits, chunk)  # refuses what is not a number
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
        f"No temperature is the best for this text: at {1 / sharpness:.3g} the loss still falls. Is it a text the model "
        "knows nothing of, or one that it knows by heart?"
    )
