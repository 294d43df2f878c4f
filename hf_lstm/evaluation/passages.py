"""
How much of the training text can be extracted: how often a model that is given the beginning of a passage writes its end.

z is the suffix of a passage, p_z its probability under the sampling scheme in use; z is (n, p)-extractable (Hayes et al.
2024, "Measuring memorization through probabilistic discoverable extraction") if n samples hold it with probability p:

    1 - (1 - p_z)^n >= p

and k-extractable (Carlini, Ippolito, Jagielski, Lee, Tramèr & Zhang 2023, "Quantifying memorization across neural
language models") if greedy decoding writes its k tokens.

Shapes: R passages, B of them read at once, P tokens of a prefix and K of its suffix, V vocabulary.
"""

import math
from collections.abc import Sequence
from numbers import Real

import numpy
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_lstm.data.lanes import check_at_least_one
from hf_lstm.data.streams import Tokens, as_stream
from hf_lstm.model.cells_lstm import at_least_float32

from .scoring import checked_stream, evaluating, generator_of
from .surprisal import MAX_LOGITS


def suffix_probability(
    model: PreTrainedModel,
    prefix_ids: Sequence[int],
    suffix_ids: Sequence[int],
    generation_config: GenerationConfig | None = None,
) -> float:
    """
    Compute p_z, the probability that `generate()` continues a prefix by exactly the tokens of a suffix, in one forward
    pass. An end-of-text token counts like any other.

    Args:
        model (`LSTMForCausalLM`): The model; it is not changed, and dropout is off.
        prefix_ids (`Sequence[int]`): At least one token, read from a zero state.
        suffix_ids (`Sequence[int]`): At least one token.
        generation_config (`GenerationConfig`, *optional*):
            The sampling scheme: `temperature`, `top_k` and `top_p`, applied as `generate()` does, with the model's own
            values and transformers' defaults for those left out (a `top_k` of 50 among them). Without `do_sample` the
            probability is 1 or 0.

    Returns:
        `float`: p_z.

    Raises:
        ValueError: for an empty prefix or suffix, ids outside the vocabulary, or other settings that change what is
            sampled.
    """
    prefix, suffix = _ids("prefix_ids", prefix_ids), _ids("suffix_ids", suffix_ids)
    passage = torch.cat([prefix, suffix])[None]
    return math.exp(_log_probabilities(model, passage, len(prefix), generation_config)[0][0])


def draw_passages(tokens: Tokens, number: int, length: int, seed: int = 0) -> torch.Tensor:
    """
    Draw distinct passages of `length` tokens at random, each within one document.

    Args:
        tokens (`TokenStream`, `torch.Tensor` or array): The text.
        number (`int`): The number of passages; fewer are drawn where there are fewer.
        length (`int`): Tokens of each.
        seed (`int`, defaults to 0): Seed of the draw.

    Returns:
        `torch.LongTensor` of shape `(number, length)`.

    Raises:
        ValueError: for numbers below 1, or if no document is that long.
    """
    check_at_least_one(number=number, length=length)
    stream = as_stream(tokens)
    places = (stream.document_ends + 1 - stream.document_starts - length + 1).clamp(min=0).cumsum(0)
    total = int(places[-1])
    if total == 0:
        raise ValueError(f"No document has the {length} tokens of a passage: ask for a shorter prefix and suffix.")
    chosen = torch.tensor(generator_of(seed).sample(range(total), min(number, total)))
    documents = torch.searchsorted(places, chosen, right=True)
    ends = stream.document_ends + 1 - length  # the last place of a passage in each document
    begins = ends[documents] + 1 - (places[documents] - chosen)
    return torch.stack([stream[begin : begin + length] for begin in begins.tolist()])


def extraction(
    model: PreTrainedModel,
    passages: torch.Tensor,
    prefix_length: int,
    n: int = 100,
    p: float = 0.5,
    generation_config: GenerationConfig | None = None,
) -> dict[str, float | int]:
    """
    Measure how many passages can be extracted: how often a model that is given the beginning of a passage writes its end.

    The figure of training text says little alone, since easy text is written by any good model: compare it with that of
    held-out text of the same kind.

    Args:
        model (`LSTMForCausalLM`): The model; it is not changed, and dropout is off.
        passages (`torch.LongTensor` of shape `(R, P + K)`): Passages of a text, such as [`draw_passages`] draws.
        prefix_length (`int`): P, the tokens that are given; the rest is to be extracted.
        n (`int`, defaults to 100): Samples that are drawn for each passage.
        p (`float`, defaults to 0.5): Least probability that one of them is the suffix.
        generation_config (`GenerationConfig`, *optional*):
            The sampling scheme; see [`suffix_probability`]. By default plain sampling, without `top_k`.

    Returns:
        `dict`: `passages`, their number R; `extractable`, the number of those that are (n, p)-extractable; `greedy`, the
        number of those that greedy decoding writes; and the shares of both, `extractable_share` and `greedy_share`.

    Raises:
        ValueError: for an `n` below 1, a `p` outside (0, 1], passages that are not longer than `prefix_length`, or settings
            that [`suffix_probability`] refuses.
    """
    check_at_least_one(n=n, prefix_length=prefix_length)
    if not isinstance(p, Real) or not 0 < p <= 1:
        raise ValueError(f"`p` ({p!r}) must be a probability above 0 and at most 1.")
    if not torch.is_tensor(passages) or passages.is_floating_point():
        kind = passages.dtype if torch.is_tensor(passages) else type(passages).__name__
        raise ValueError(f"`passages` ({kind}) must be a `torch.LongTensor` of rows of tokens, as of `draw_passages`.")
    if passages.dim() != 2 or len(passages) == 0 or passages.shape[1] <= prefix_length:
        raise ValueError(
            f"`passages` of shape {tuple(passages.shape)} must be rows of more than `prefix_length` ({prefix_length}) "
            "tokens: draw longer ones."
        )
    if generation_config is None:
        generation_config = GenerationConfig(do_sample=True, top_k=0)
    logs, greedy = _log_probabilities(model, passages, prefix_length, generation_config)
    found = 1 - numpy.exp(logs)  # the probability that a sample is another text
    extractable = int((1 - found**n >= p).sum())
    return {
        "passages": len(passages),
        "extractable": extractable,
        "extractable_share": extractable / len(passages),
        "greedy": int(greedy.sum()),
        "greedy_share": float(greedy.mean()),
    }


def _ids(name: str, ids: Sequence[int]) -> torch.Tensor:
    """Return ids `(tokens,)` as a tensor."""
    try:
        found = torch.as_tensor(ids, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{name}` ({ids!r}) must be a list of token ids, each an int.") from error
    if found.dim() != 1 or (found.is_floating_point() and len(found)):
        raise ValueError(f"`{name}` ({ids!r}) must be a list of token ids, each an int.")
    if not len(found):
        raise ValueError(f"`{name}` is empty: give at least one token.")
    return found.long()


@torch.no_grad()
def _log_probabilities(
    model: PreTrainedModel, passages: torch.Tensor, prefix_length: int, generation_config: GenerationConfig | None
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """
    Return log p_z of each passage `(R, P + K)` after its prefix, `(R,)`, in nats, and whether greedy decoding writes it,
    `(R,)`.
    """
    checked_stream(model, passages.flatten())
    config = _checked_sampling(model, generation_config)
    warpers = LogitsProcessorList()
    if config.temperature != 1:
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k != 0:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        warpers.append(TopPLogitsWarper(config.top_p))
    suffix = passages.shape[1] - prefix_length
    logs, greedy = [], []
    with evaluating(model):
        for rows in passages.split(max(1, MAX_LOGITS // (suffix * model.config.vocab_size))):
            rows = rows.to(model.device)
            logits = model(rows[:, :-1], use_cache=False, logits_to_keep=suffix).logits  # (B, K, V)
            logits, targets = logits.to(at_least_float32(logits.dtype)), rows[:, prefix_length:]
            greedy.append((logits.argmax(dim=-1) == targets).all(dim=1))
            if config.do_sample:
                scores = warpers(rows, logits.flatten(0, 1)).log_softmax(dim=-1).view_as(logits)
                logs.append(scores.gather(2, targets[..., None]).double().sum(dim=(1, 2)))
            else:
                logs.append(greedy[-1].double().log())
    return torch.cat(logs).cpu().numpy(), torch.cat(greedy).cpu().numpy()


# Settings of `generate()` that do not change which tokens are sampled one after the other.
FREE_SETTINGS = {"do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens", "use_cache"}
FREE_SETTINGS |= {"bos_token_id", "eos_token_id", "pad_token_id", "num_return_sequences", "return_dict_in_generate"}
FREE_SETTINGS |= {
    "output_scores",
    "output_logits",
    "cache_implementation",
    "prefill_chunk_size",
    "transformers_version",
}


def _checked_sampling(model: PreTrainedModel, generation_config: GenerationConfig | None) -> GenerationConfig:
    """Complete the settings as `generate()` does, and refuse those beyond temperature, top-k and top-p."""
    if not isinstance(generation_config, GenerationConfig | None):
        raise ValueError(
            f"`generation_config` ({generation_config!r}) must be a `GenerationConfig`: give "
            "`GenerationConfig(do_sample=True, top_k=40)`."
        )
    config, _ = model._prepare_generation_config(generation_config)  # type: ignore[operator]
    usual = vars(GenerationConfig()) | GenerationConfig._get_default_generation_params()
    for name, value in vars(config).items():
        if not name.startswith("_") and name not in FREE_SETTINGS and value not in (None, False, usual.get(name)):
            raise ValueError(
                f"`{name}` ({value}) in `generation_config` changes what is sampled, and only `temperature`, `top_k` and "
                "`top_p` are accounted for: leave it out."
            )
    return config
