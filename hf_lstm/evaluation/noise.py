"""Robustness: how a model predicts and writes after text in which characters are wrong."""

import math

import numpy
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lstm.data.lanes import check_at_least_one
from hf_lstm.tokenizers import direction_of, encode, in_direction

from .scoring import evaluating
from .surprisal import surprisal

KINDS = ("substitute", "drop", "swap")


def add_character_noise(
    text: str, share: float, kind: str | None = None, seed: int | list[int] = 0
) -> tuple[str, numpy.ndarray]:
    """
    Corrupt characters of a text at random.

    Args:
        text (`str`): The text.
        share (`float`): Probability of a character to be corrupted.
        kind (`str`, *optional*):
            `"substitute"` (by a character drawn from the text), `"drop"`, or `"swap"` with the character behind it; by
            default each with the same probability.
        seed (`int` or `list[int]`, defaults to 0): Seed of the noise.

    Returns:
        `tuple`: the new text, and which of its characters are not as they were, `(characters,)`.

    Raises:
        ValueError: for a `share` outside [0, 1] or another `kind`.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` ({share}) is a probability: it must be at least 0 and at most 1.")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"`kind` ({kind!r}) must be one of {', '.join(KINDS)}, or None for all.")
    generator = numpy.random.default_rng(seed)
    hit, other = generator.random(len(text)) < share, generator.integers(max(1, len(text)), size=len(text))
    kinds = generator.integers(len(KINDS), size=len(text)) if kind is None else [KINDS.index(kind)] * len(text)
    characters: list[str] = []
    changed: list[bool] = []
    place = 0
    for index in [*numpy.flatnonzero(hit).tolist(), len(text)]:
        if index < place:  # swapped already
            continue
        characters += text[place:index]
        changed += [False] * (index - place)
        how, place = KINDS[kinds[index]] if index < len(text) else "", index + 1
        if how == "substitute":
            characters.append(text[other[index]])
            changed.append(True)
        elif how == "swap":
            characters += text[index : index + 2][::-1]
            changed += [place < len(text)] * len(text[index : index + 2])
            place += 1
    return "".join(characters), numpy.array(changed, dtype=bool)


def loss_after_noise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    share: float,
    kind: str | None,
    seed: int = 0,
) -> float:
    """
    Compute the loss of what is left of a text with noise in it: nats per token, the mean over the tokens without a corrupted
    character. The noise stands in their history; predicting it is not asked for.

    Args:
        model (`LSTMForCausalLM`): The model; it is not changed, and dropout is off.
        tokenizer (`PreTrainedTokenizerBase`): The model's own.
        text (`str`): A text, read from a zero state.
        share, kind, seed: See [`add_character_noise`].
    """
    noisy, changed = add_character_noise(text, share, kind, seed)
    rows = surprisal(model, tokenizer, [noisy], math.e)
    wrong = numpy.concatenate([[0], changed.cumsum()])
    kept = wrong[rows["end"].to_numpy()] == wrong[rows["start"].to_numpy()]
    return float(rows["surprisal"][kept].mean())


def share_of_known_words(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    words: set[str],
    max_new_tokens: int = 200,
    seed: int = 0,
) -> float:
    """
    Let a model go on with texts, and return the share of the words it writes that are among `words`, such as those of its
    training text. Words stand between white space; the first and the last of a continuation may be parts and do not count.

    Args:
        model (`LSTMForCausalLM`): The model; dropout is off.
        tokenizer (`PreTrainedTokenizerBase`): The model's own.
        prompts (`list[str]`): Texts to go on with, which may hold noise.
        words (`set[str]`): The words that count.
        max_new_tokens (`int`, defaults to 200): Tokens of a continuation.
        seed (`int`, defaults to 0): Seed of the sampling, at a temperature of 0.7; the generators are left as they were.

    Returns:
        `float`: The share, or NaN if no whole word was written.
    """
    check_at_least_one(max_new_tokens=max_new_tokens)
    direction, found = direction_of(model), []
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        for ids in encode(prompts, tokenizer, direction=direction):
            prompt = torch.from_numpy(ids)[None].long().to(model.device)
            written = model.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=0.7,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=[],
            )
            text = str(tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True))
            found += in_direction(text, direction).split()[1:-1]
    return sum(word in words for word in found) / len(found) if found else math.nan
