"""
Memorisation audit: the exposure of secrets planted in a training text.

Exposure (Carlini, Liu, Erlingsson, Kos & Song 2019, "The Secret Sharer") compares a secret with all texts that might stand
in its place:

    exposure(s) = log2 |R| - log2 rank(s)        rank 1: the most probable of the |R| candidates

Shapes: R candidates, B of them read at once, V vocabulary.
"""

import copy
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import numpy
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hf_lstm.data.lanes import check_at_least_one
from hf_lstm.model.cells_lstm import at_least_float32
from hf_lstm.tokenizers import check_texts, check_tokenizer, direction_of, encode, start_ids

from .scoring import checked_stream, evaluating, generator_of
from .surprisal import MAX_LOGITS

if TYPE_CHECKING:
    import pandas

ENUMERATED = 100_000  # candidates, at most: beyond them a sample is read
SAMPLED = 10_000  # candidates in it
MAX_ROWS = 4096  # read at once


def insert_canaries(
    documents: Iterable[str],
    template: str,
    alphabet: str = "0123456789",
    length: int = 3,
    counts: Sequence[int] = (1, 4, 9),
    seed: int = 0,
    max_length: int | None = None,
) -> "tuple[list[str], pandas.DataFrame]":
    """
    Plant random secrets in a corpus, to measure with [`exposure`] how well a model that is trained on it remembers them.

    Args:
        documents (`Iterable[str]`): The texts, such as `load_corpus(file)["train"]["text"]`; their order is kept.
        template (`str`): The text around a secret, with one slot: `"the key is {}."`.
        alphabet (`str`, defaults to the digits): The characters of a secret.
        length (`int`, defaults to 3): Their number.
        counts (`Sequence[int]`, defaults to `(1, 4, 9)`):
            The number of copies of each secret: `(1,) * 20 + (5,) * 20` plants twenty secrets once, and twenty others
            five times. With 0 copies a secret is unseen.
        seed (`int`, defaults to 0): Seed of the secrets and of their places.
        max_length (`int`, *optional*):
            The tokens of a document that training reads, to refuse a canary that it would cut off: one of more bytes.

    Returns:
        `tuple`: the documents, a `list[str]` in which each copy is a document of its own at a random place; and a
        `pandas.DataFrame` with a row for each of `counts`, with `secret`, all distinct, and `count`.

    Raises:
        ValueError: for a template without one slot, an alphabet that repeats a character, fewer candidates than `counts`
            or less than two, a negative count, or a canary longer than `max_length`.
    """
    import pandas

    check_texts(documents)
    documents = list(documents)
    for number, document in enumerate(documents):
        if not isinstance(document, str):
            raise ValueError(f"Document {number} is {document!r}: it must be a str, so leave it out.")
    before, after = _around_slot(template)
    candidates = _number_of_candidates(alphabet, length)
    check_at_least_one(max_length=max_length)
    counts = list(counts) if isinstance(counts, Iterable) else counts
    if not isinstance(counts, list) or not all(isinstance(count, Integral) for count in counts):
        raise ValueError(f"`counts` ({counts!r}) must be a list of int, the copies of each secret: give `(1, 4, 9)`.")
    if candidates < len(counts):
        raise ValueError(
            f"`counts` asks for {len(counts):,} distinct secrets, and `alphabet` ({alphabet!r}) and `length` ({length}) allow "
            f"{candidates:,}: raise `length`."
        )
    for count in counts:
        if count < 0:
            raise ValueError(f"`counts` holds {count}: a number of copies must be at least 0.")
    longest = len((before + after).encode()) + length * max(len(character.encode()) for character in alphabet)
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"A canary of `template` ({template!r}) has up to {longest} bytes, and a document is cut after `max_length` "
            f"({max_length}) tokens: shorten the template or the secret, or let training read more."
        )
    generator = generator_of(seed)
    secrets: dict[str, int] = {}  # and the number of copies
    for count in counts:
        while (secret := "".join(generator.choices(alphabet, k=length))) in secrets:
            pass
        secrets[secret] = count
    copies = [before + secret + after for secret, count in secrets.items() for _ in range(count)]
    generator.shuffle(copies)
    total = len(documents) + len(copies)
    places = set(generator.sample(range(total), len(copies)))
    planted, kept = iter(copies), iter(documents)
    mixed = [next(planted) if place in places else next(kept) for place in range(total)]
    return mixed, pandas.DataFrame({"secret": list(secrets), "count": list(secrets.values())})


def exposure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    alphabet: str,
    length: int,
    secrets: Sequence[str],
    start_token: str | None = None,
    seed: int = 0,
) -> "pandas.DataFrame":
    """
    Compute the exposure of secrets: log2 |R| - log2 of their rank among all |R| texts of `length` characters of
    `alphabet` in the slot of `template`, by their loss.

    A secret that the model was not trained on has an exposure of 1.44 on average (1 / ln 2, for a large |R|), and one that
    is more probable than all others has log2 |R|. Candidates of equal loss share the middle of their ranks.

    Candidates are read as a tree: their common beginning once, and each token after it once for all that share the tokens
    up to it, from copies of one state. Up to `ENUMERATED` candidates are all read. Beyond, `SAMPLED` random ones are, and
    a skew-normal distribution of the same mean, variance and skewness (Azzalini 1985) gives the share of candidates with
    less loss; a rank found in this way lies between 1 and |R|.

    Args:
        model (`LSTMForCausalLM`): The model; it is not changed, and dropout is off.
        tokenizer (`PreTrainedTokenizerBase`): The model's own.
        template, alphabet, length: As given to [`insert_canaries`].
        secrets (`Sequence[str]`): The secrets, such as its column `secret`.
        start_token (`str`, *optional*):
            The token that the first one is predicted from, `"<eos>"` for a model trained on documents. Without it the
            first token does not count.
        seed (`int`, defaults to 0): Seed of the sample.

    Returns:
        `pandas.DataFrame`: a row per secret, in their order, with `secret`, `loss` (nats, the sum over the text), `rank`,
        `exposure` (bits) and `method`, `"enumeration"` or `"skew-normal"`.

    Raises:
        ValueError: for a template without one slot, fewer than two candidates, or candidates that the tokenizer cannot tell
            apart; a secret that is not a candidate; a loss that is NaN.
    """
    import pandas

    before, after = _around_slot(template)
    candidates = _number_of_candidates(alphabet, length)
    if isinstance(secrets, str) or not isinstance(secrets, Iterable) or not (secrets := list(secrets)):
        raise ValueError(f"`secrets` ({secrets!r}) must be a list of at least one text: give the column `secret`.")
    for secret in secrets:
        if not isinstance(secret, str) or len(secret) != length or not set(secret) <= set(alphabet):
            raise ValueError(
                f"`secrets` holds {secret!r}, which is not of {length} characters of `alphabet` ({alphabet!r}): give the "
                "`alphabet` and `length` that it was made with."
            )
    check_tokenizer(model, tokenizer)
    start = start_ids(start_token, tokenizer)
    enumerated = candidates <= ENUMERATED
    if enumerated:
        space = ["".join(letters) for letters in itertools.product(alphabet, repeat=length)]
    else:
        generator = generator_of(seed)
        space = ["".join(generator.choices(alphabet, k=length)) for _ in range(SAMPLED)]
    texts = _encode_around(before, [*space, *secrets], after, tokenizer, direction_of(model))
    rows = [start + ids for ids in texts]
    places: dict[tuple[int, ...], int] = {}  # of each distinct text, which is read once: ties are equal to the bit
    index = [places.setdefault(tuple(ids), len(places)) for ids in rows]
    if len(places) < 2:
        raise ValueError(
            f"The tokenizer writes all candidates of `alphabet` ({alphabet!r}) as the same tokens, so none can be told from "
            "another: give an alphabet that it knows."
        )
    losses = _losses_of_tree(model, list(map(list, places)))[index]
    space_losses, own = losses[: len(space)], losses[len(space) :]
    if enumerated:
        ordered = numpy.sort(space_losses)
        less, up_to = (numpy.searchsorted(ordered, own, side=side) for side in ("left", "right"))
        ranks = (less + up_to + 1) / 2
    else:
        shares = numpy.exp(_log_share_below(own, space_losses))
        ranks = numpy.clip(candidates * shares, 1, candidates)
    return pandas.DataFrame(
        {
            "secret": secrets,
            "loss": own,
            "rank": ranks,
            "exposure": math.log2(candidates) - numpy.log2(ranks),
            "method": "enumeration" if enumerated else "skew-normal",
        }
    )


def _around_slot(template: str) -> tuple[str, str]:
    """Return the text before and after the slot."""
    if not isinstance(template, str):
        raise ValueError(f"`template` ({template!r}) must be a str, with one `{{}}` where the secret stands.")
    if template.count("{}") != 1:
        raise ValueError(
            f"`template` ({template!r}) has {template.count('{}')} slots: write one `{{}}` where the secret stands."
        )
    before, after = template.split("{}")
    return before, after


def _number_of_candidates(alphabet: str, length: int) -> int:
    check_at_least_one(length=length)
    if not isinstance(alphabet, str):
        raise ValueError(f"`alphabet` ({alphabet!r}) must be a str of the characters of a secret.")
    if len(set(alphabet)) != len(alphabet) or len(alphabet) ** length < 2:
        raise ValueError(
            f"`alphabet` ({alphabet!r}) and `length` ({length}) must make at least two candidates: give two or more distinct "
            "characters, and a length of at least 1."
        )
    return len(alphabet) ** length


def _encode_around(
    before: str, secrets: list[str], after: str, tokenizer: PreTrainedTokenizerBase, direction: str
) -> list[list[int]]:
    """Encode each secret between two texts; where every letter is a token of its own, each distinct one once."""
    if not _reads_letters(tokenizer):
        texts = [before + secret + after for secret in secrets]
        return [ids.tolist() for ids in encode(texts, tokenizer, direction=direction)]
    letters = sorted(set().union(*secrets))
    first, last, *pieces = (ids.tolist() for ids in encode([before, after, *letters], tokenizer, direction=direction))
    ids_of = dict(zip(letters, pieces, strict=True))
    if direction == "backward":
        first, last, secrets = last, first, [secret[::-1] for secret in secrets]
    return [[*first, *itertools.chain.from_iterable(map(ids_of.__getitem__, secret)), *last] for secret in secrets]


def _reads_letters(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens of a text are those of its letters, one after the other: no merges, and nothing that looks further."""
    if not tokenizer.is_fast:
        return False
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model, cut = rules["model"], rules["pre_tokenizer"] or {"type": "ByteLevel", "add_prefix_space": False}
    if model["type"] != "BPE" or model["merges"] or model["fuse_unk"] or model["ignore_merges"]:
        return False
    affixes = (model["continuing_subword_prefix"], model["end_of_word_suffix"], rules["normalizer"])
    return not any(affixes) and cut["type"] == "ByteLevel" and not cut["add_prefix_space"]


@torch.no_grad()
def _losses_of_tree(model: PreTrainedModel, rows: list[list[int]]) -> numpy.ndarray:
    """
    Compute the loss of each row of ids, in nats, summed over all tokens but the first, `(R,)`. Their common beginning is
    read once; then, column by column, each token once for all rows of a block that have the same tokens up to it.
    """
    checked_stream(model, numpy.unique(numpy.concatenate(rows)))
    lengths = numpy.array([len(row) for row in rows])
    table = numpy.full((len(rows), lengths.max()), -1)
    table[numpy.arange(table.shape[1]) < lengths[:, None]] = numpy.concatenate(rows)
    order = numpy.lexsort(table.T[::-1])  # rows that share tokens beside each other
    table = table[order]
    shared = int((table != table[0]).any(axis=0).argmax())
    losses = numpy.zeros(len(table))
    state, scores = DynamicCache(config=model.config), None
    with evaluating(model):
        if shared > 0:
            beginning = torch.from_numpy(table[:1, :shared])
            read = _log_softmax(model(beginning.to(model.device), past_key_values=state, use_cache=True).logits[0])
            losses -= read[:-1].gather(1, beginning[0, 1:, None]).double().sum().item()
            scores = read[-1:]
        block = max(1, min(MAX_ROWS, MAX_LOGITS // model.config.vocab_size))
        for first in range(0, len(table), block):
            part = slice(first, first + block)
            losses[part] += _losses_of_block(model, table[part, shared:], copy.deepcopy(state), scores)
    if numpy.isnan(losses).any():
        raise ValueError("The loss of a candidate is NaN: check the model's weights, or load it in a wider type.")
    unordered = numpy.empty_like(losses)
    unordered[order] = losses
    return unordered


def _losses_of_block(
    model: PreTrainedModel, table: numpy.ndarray, state: DynamicCache, scores: torch.Tensor | None
) -> numpy.ndarray:
    """
    Compute the losses of rows of ids, `(B, columns)`, padded with -1, after a state of one row and the log-probabilities
    of the next token in it, `(1, V)`; without these, the first column does not count.
    """
    losses, node = numpy.zeros(len(table)), numpy.zeros(len(table), dtype=int)  # the row of `scores` for each text
    for column in range(table.shape[1]):
        tokens = table[:, column]
        here = tokens >= 0
        if scores is not None:
            losses[here] -= scores[torch.from_numpy(node[here]), torch.from_numpy(tokens[here])].double().numpy()
        going_on = table[:, column + 1] >= 0 if column + 1 < table.shape[1] else numpy.zeros_like(here)
        if not going_on.any():
            break
        vocab_size = model.config.vocab_size
        nodes, node[going_on] = numpy.unique(
            node[going_on] * vocab_size + tokens[going_on], return_inverse=True
        )  # parent and token of each
        parents, read = torch.from_numpy(nodes // vocab_size), torch.from_numpy(nodes % vocab_size)
        state.batch_select_indices(parents.to(model.device))
        logits = model(read[:, None].to(model.device), past_key_values=state, use_cache=True).logits[:, -1]
        scores = _log_softmax(logits)
    return losses


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(at_least_float32(logits.dtype)).log_softmax(dim=-1).cpu()


def _log_share_below(values: numpy.ndarray, sample: numpy.ndarray) -> numpy.ndarray:
    """
    Return log P(X <= x) of each value, for X of a skew-normal distribution with the moments of a sample: with scale ω,
    location ξ and shape α, z = (x - ξ) / ω has the density 2 φ(z) Φ(α z), whose tail is summed in logarithms.
    """
    mean, deviation = sample.mean(), sample.std()
    if deviation == 0:  # all are equal, and share the middle
        return numpy.full(len(values), math.log(0.5))
    skewness = float(numpy.clip(((sample - mean) ** 3).mean() / deviation**3, -0.99, 0.99))  # its range is ±0.9953
    power = abs(skewness) ** (2 / 3)
    delta = math.copysign(math.sqrt(math.pi / 2 * power / (power + ((4 - math.pi) / 2) ** (2 / 3))), skewness)
    alpha = delta / math.sqrt(1 - delta**2)
    scale = deviation / math.sqrt(1 - 2 * delta**2 / math.pi)
    z = torch.from_numpy((values - mean) / scale + delta * math.sqrt(2 / math.pi))
    step = 2e-3
    points = z[:, None] - torch.arange(0, 20 + step, step, dtype=torch.float64)  # (values, points), down from each z
    log_density = math.log(2) - points**2 / 2 - math.log(2 * math.pi) / 2 + torch.special.log_ndtr(alpha * points)
    log_density[:, [0, -1]] -= math.log(2)  # the trapezoidal rule
    return (log_density.logsumexp(dim=1) + math.log(step)).clamp(max=0).numpy()
