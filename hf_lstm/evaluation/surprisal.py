"""Surprisal of tokens, words and regions of texts (Hale 2001, Levy 2008), and minimal pairs."""

import math
import operator
import re
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING

import numpy
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_lstm.data.lanes import check_at_least_one
from hf_lstm.data.streams import TokenStream
from hf_lstm.tokenizers import (
    check_texts,
    check_tokenizer,
    check_unicode,
    direction_of,
    encode,
    in_direction,
    start_ids,
)
from hf_lstm.unknown import dropped_characters, unknown_id

from .distributions import Distributions
from .scoring import checked_stream, evaluating, read_chunks, run_chunk, scored_logits, token_losses

if TYPE_CHECKING:
    import pandas

logger = logging.get_logger(__name__)

MAX_LOGITS = 2**26  # computed in one call


def surprisal(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    base: float = 2,
    start_token: str | None = None,
    batch_size: int = 8,
    bptt_length: int | None = None,
    entropy: bool = False,
    top_k: int = 0,
) -> "pandas.DataFrame":
    """
    Compute the surprisal of every token, -log p given all tokens before it. Each text is read from a zero state, by a model
    that reads backward (`config.direction`) from its last token to its first, each given all tokens behind it.

    Args:
        model (`LSTMForCausalLM`): The model; it is not changed, and dropout is off.
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer, the model's own.
        texts (`Iterable[str]`): Any texts, of any lengths.
        base (`float`, defaults to 2): Base of the logarithm: 2 for bits, `math.e` for nats.
        start_token (`str`, *optional*):
            The token that the first one is predicted from: one that stood before the texts in training, `"<eos>"` for a
            model trained on documents of a `TokenStream`. Without it the surprisal of the first token, for a model that
            reads backward of the last one, is NaN.
        batch_size (`int`, defaults to 8): Parts of all texts that are read side by side; it changes the time, not the result.
        bptt_length (`int`, *optional*):
            Tokens of each part that are read at once; it changes the memory, not the result. By default 512, or as many
            as have logits of 256 MB.
        entropy (`bool`, defaults to `False`):
            Whether to add three columns. `entropy`: that of the distribution that predicts the token. `entropy_reduction`:
            `entropy` minus the entropy after the token, the next-word form of Hale (2006), not clipped. The `entred` of
            neural-complexity stands a row later, as max(0, `entropy_reduction` of the row before). `rank`: the place of the
            token by probability, 1 for the likeliest; ties share the best.
        top_k (`int`, defaults to 0):
            The number of likeliest tokens to add, as columns `guess_1`, `probability_1`, `guess_2` and so on.

    Returns:
        `pandas.DataFrame`: a row per token in the order of the text as written, with `text` (its number, from 0), `token`
        (decoded, as written), `start` and `end` (its place in the text, in characters), `surprisal` and `unknown`: whether
        the tokenizer lacks the text there, so that the surprisal is that of `<unk>`, or drops a character beside it, as a
        BPE without an unknown token does. A warning counts those; an `<unk>` written in the text itself, like WikiText's,
        is not unknown.
        Entropies have the unit of `surprisal`; all these columns are NaN where nothing predicts the token.
        `groupby("text")["surprisal"].sum()` is -log p of each text.

        Written by `to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC)` it has the same rows for whatever reads it,
        line ends in tokens included, and `read_csv(path, keep_default_na=False, na_values={"surprisal": ""},
        dtype={"token": str})` of pandas, which would take a token "NA" for a missing one, gives it back.

    Raises:
        ValueError: if `texts` is empty, a text has no token, the tokenizer is slow, not the model's or without the
            `start_token`, `base` is not above 1, `top_k` is not from 0 to the vocabulary, or predictions are NaN.
    """
    import pandas

    if not isinstance(base, Real) or not 1 < base < math.inf:
        raise ValueError(f"`base` ({base!r}) must be a number above 1: 2 for bits, `math.e` for nats.")
    check_at_least_one(batch_size=batch_size, bptt_length=bptt_length)
    check_tokenizer(model, tokenizer)
    start = start_ids(start_token, tokenizer)
    if not isinstance(top_k, Integral) or not 0 <= top_k <= model.config.vocab_size:
        raise ValueError(
            f"`top_k` ({top_k!r}) must be from 0 to `vocab_size` ({model.config.vocab_size}), an int: it is the number of tokens "
            "to add."
        )
    texts = _checked_texts(texts)
    if not texts:
        raise ValueError("`texts` is empty: give at least one text.")
    direction = direction_of(model)
    read = [in_direction(text, direction) for text in texts]
    encoded, spans = encode(read, tokenizer, offsets=True)
    ids = [tokens.tolist() for tokens in encoded]
    for number, tokens in enumerate(ids):
        if not tokens:
            raise ValueError(f"Text {number}, {texts[number]!r}, becomes no token: leave it out.")
    if bptt_length is None:
        bptt_length = min(512, max(1, MAX_LOGITS // (batch_size * model.config.vocab_size)))
    documents = [start + document for document in ids]
    distributions = Distributions(sum(map(len, documents)), entropy, top_k) if entropy or top_k else None
    nats, begins = _losses_of_documents(model, documents, batch_size, bptt_length, distributions)
    lengths = [len(document) for document in ids]
    at = numpy.concatenate(
        [begin + len(start) + numpy.arange(length) for begin, length in zip(begins, lengths, strict=True)]
    )
    guessed = set() if distributions is None else set(numpy.unique(distributions.guesses).tolist())
    decoded = {token: str(tokenizer.decode([token])) for token in guessed.union(*ids)}
    names = {unknown_id(tokenizer), *tokenizer.all_special_ids}  # not pieces of a text, which are shown as written
    shown = {token: text if token in names else in_direction(text, direction) for token, text in decoded.items()}
    numbers, places = numpy.repeat(numpy.arange(len(texts)), lengths), numpy.concatenate(spans)
    rows = pandas.DataFrame(
        {
            "text": numbers,
            "token": [shown[token] for document in ids for token in document],
            "start": places[:, 0],
            "end": places[:, 1],
            "surprisal": nats[at] / math.log(base),
            "unknown": _unknown(numpy.concatenate(encoded), numbers, places, read, tokenizer, direction),
        }
        | ({} if distributions is None else distributions.columns(at, numpy.isnan(nats[at]), base, shown))
    )
    return _mirrored(rows, texts) if direction == "backward" else rows


def word_surprisal(
    tokens: "pandas.DataFrame",
    texts: Iterable[str],
    regions: Sequence[Sequence[tuple[int, int]]] | None = None,
    direction: str = "forward",
) -> "pandas.DataFrame":
    """
    Sum the surprisal of tokens over each word, or each given region, of texts.

    Words stand between white space. White space belongs to the word after it, like in GPT-2's pieces, so that sums over
    characters and over pieces mean the same; white space at the end of a text belongs to its last word. A token that
    spans several words or regions counts for the first of them. The sum is NaN for a word or region in which no token
    begins, or whose first token has no surprisal.

    Where `tokens` has an `entropy`, a word has the one before its first token, and the reduction from there to the entropy
    after its last. For tokens that are not words this is the entropy of the next piece, not of the next word.

    For a model that reads backward all this holds in the order of reading: white space belongs to the word before it, as
    written, and a token that spans several words counts for the last of them.

    Args:
        tokens (`pandas.DataFrame`): The table that [`surprisal`] returned.
        texts (`Iterable[str]`): The same texts.
        regions (`Sequence[Sequence[tuple[int, int]]]`, *optional*):
            The regions of each text, as (start, end) in characters; by default its words.
        direction (`str`, defaults to `"forward"`): The `config.direction` of the model that the table is of.

    Returns:
        `pandas.DataFrame`: a row per word or region, with `text`, `word` (its characters), `start` and `end` (in characters),
        `tokens` (their number), `surprisal` (in the unit of `tokens`) and `unknown` (the number of unknown tokens), and `entropy` and
        `entropy_reduction` where `tokens` has them.

    Raises:
        ValueError: if a region is empty or reaches beyond its text, there are not as many lists of regions as texts,
            `tokens` is not the table of these texts, or `direction` is neither `"forward"` nor `"backward"`.
    """
    import pandas

    columns = ("start", "end", "surprisal", "text", "unknown")
    if not isinstance(tokens, pandas.DataFrame):
        raise ValueError(f"`tokens` ({type(tokens).__name__}) must be the table that `surprisal` returned: give that.")
    if missing := [name for name in columns if name not in tokens]:
        raise ValueError(f"`tokens` has no column `{missing[0]}`: give the table that `surprisal` returned.")
    texts = _checked_texts(texts)
    if regions is not None:
        regions = _checked_regions(regions, texts)
    starts, _, costs, numbers, unknown = (tokens[name].to_numpy() for name in columns)
    if not numpy.array_equal(numpy.unique(numbers), numpy.arange(len(texts))):
        raise ValueError(
            f"`tokens` belong to {len(numpy.unique(numbers))} texts, and there are {len(texts)}: give the same texts, and "
            "all of their tokens."
        )
    read = [in_direction(text, direction) for text in texts]
    if direction == "backward":
        turned = regions and [
            [(len(text) - end, len(text) - start) for start, end in own[::-1]]
            for text, own in zip(texts, regions, strict=True)
        ]
        words = _mirrored(word_surprisal(_mirrored(tokens, texts), read, turned), texts)
        return words.assign(word=[word[::-1] for word in words["word"]])
    text_bounds = numpy.searchsorted(numbers, numpy.arange(len(texts) + 1))
    names = [name for name in ("entropy", "entropy_reduction") if name in tokens]
    entropies = tokens[names].to_numpy()  # (tokens, 0 or 2)
    rows = []
    for number, text in enumerate(texts):
        own = slice(text_bounds[number], text_bounds[number + 1])
        words = [match.span() for match in re.finditer(r"\S+", text)] or [(0, len(text))]
        first, last = numpy.array(words).T
        # A token counts at its first character; white space counts in the next word, or the last. The places ascend.
        word_of = numpy.minimum(numpy.searchsorted(last, starts[own], side="right"), len(words) - 1)
        places = numpy.clip(starts[own], first[word_of], last[word_of] - 1)
        spans = words if regions is None else regions[number]
        for (start, end), (low, high) in zip(spans, numpy.searchsorted(places, spans).tolist(), strict=True):
            cost = costs[own][low:high].sum() if high > low else numpy.nan
            added = numpy.full(len(names), numpy.nan)
            if high > low:  # the reductions of tokens add up to that of their word
                added[:1], added[1:] = entropies[own][low, :1], entropies[own][low:high, 1:].sum(axis=0)
            rows.append((number, text[start:end], start, end, high - low, cost, unknown[own][low:high].sum(), *added))
    return pandas.DataFrame(rows, columns=["text", "word", "start", "end", "tokens", "surprisal", "unknown", *names])


def minimal_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Iterable[dict], start_token: str | None = None
) -> "pandas.DataFrame":
    """
    Compare the probabilities of the good and the bad sentence of each pair (Warstadt et al. 2020, BLiMP).

    Args:
        model, tokenizer, start_token: As in [`surprisal`]. Without a `start_token` the first token does not count.
        pairs (`Iterable[dict]`): Each with `sentence_good` and `sentence_bad`, and any other fields.

    Returns:
        `pandas.DataFrame`: a row per pair, with its fields, `log_probability_good` and `log_probability_bad` (nats),
        `correct`, `tie` (whether the two are equal), and `unknown_good` and `unknown_bad` (the number of unknown tokens in
        each, of which [`surprisal`] warns). `correct` is 1.0, 0.0, or 0.5 for a tie, which sentences of the same
        tokens always are: in 0.1.0 it was a bool, False for a tie, and BabyLM's own script counts ties as right. Its
        `["correct"].mean()` is the accuracy, and its `groupby("field")["correct"].mean()` that of each field.

    Raises:
        ValueError: for a pair without the two sentences, or a sentence without a predicted token.
    """
    import pandas

    if not isinstance(pairs, Iterable) or isinstance(pairs, str | dict):
        raise ValueError(
            f"`pairs` ({type(pairs).__name__}) must be a list of dicts with `sentence_good` and `sentence_bad`."
        )
    pairs = list(pairs)
    if not pairs:
        raise ValueError("`pairs` is empty: give at least one pair.")
    names = ("sentence_good", "sentence_bad")
    for number, pair in enumerate(pairs):
        for name in names:
            if not isinstance(pair, dict):
                raise ValueError(
                    f"Pair {number} is {pair!r}: it must be a dict with `sentence_good` and `sentence_bad`."
                )
            if not isinstance(pair.get(name), str) or pair[name] == "":
                raise ValueError(
                    f"Pair {number} has no text in `{name}`, only the fields {', '.join(map(str, pair))}: each needs both "
                    "`sentence_good` and `sentence_bad`."
                )
    tokens = surprisal(model, tokenizer, [pair[name] for name in names for pair in pairs], math.e, start_token)
    predicted = tokens.dropna().groupby("text")["surprisal"]
    sums, counts = (-predicted.sum()).reindex(range(2 * len(pairs))), predicted.size()
    for index in range(2 * len(pairs)):
        if index not in counts.index:
            kind, number = divmod(index, len(pairs))
            raise ValueError(
                f"The single token of `{names[kind]}` of pair {number} has no surprisal: give longer sentences, or a "
                "`start_token`."
            )
    good, bad = sums.to_numpy().reshape(2, -1)
    tie = good == bad
    unknown_good, unknown_bad = tokens.groupby("text")["unknown"].sum().to_numpy().reshape(2, -1)
    return pandas.DataFrame(pairs).assign(
        log_probability_good=good,
        log_probability_bad=bad,
        correct=numpy.where(tie, 0.5, good > bad),
        tie=tie,
        unknown_good=unknown_good,
        unknown_bad=unknown_bad,
    )


def _checked_texts(texts: Iterable[str]) -> list[str]:
    check_texts(texts)
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str) or text == "":
            raise ValueError(f"Text {number} is {text!r}: it must be a str with characters, so leave it out.")
        check_unicode(text, f"Text {number}")
    return texts


def _checked_regions(regions: Sequence[Sequence[tuple[int, int]]], texts: list[str]) -> list[list[tuple[int, int]]]:
    try:
        lists = [list(own) for own in regions]
    except TypeError as error:
        raise ValueError(
            f"`regions` ({regions!r}) must be a list for each text, of pairs (start, end) in characters."
        ) from error
    if len(lists) != len(texts):
        raise ValueError(
            f"`regions` are given for {len(lists)} texts, and there are {len(texts)}: give one list for each."
        )
    return [
        [_checked_region(region, text, number) for region in own]
        for number, (text, own) in enumerate(zip(texts, lists, strict=True))
    ]


def _checked_region(region: tuple[int, int], text: str, number: int) -> tuple[int, int]:
    try:
        start, end = map(operator.index, region)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Region {region!r} of text {number} must be a pair of int, (start, end) in characters."
        ) from error
    if not 0 <= start < end <= len(text):
        raise ValueError(
            f"Region {start} to {end} lies outside text {number}, which has {len(text)} characters: it must begin at 0 or "
            "later, and end after its beginning and within the text."
        )
    return start, end


def _mirrored(rows: "pandas.DataFrame", texts: Sequence[str]) -> "pandas.DataFrame":
    """Turn the places in reversed texts into those in the texts as written, or the other way round, and the order of rows."""
    rows = rows.iloc[numpy.lexsort((-numpy.arange(len(rows)), rows["text"].to_numpy(int)))].reset_index(drop=True)
    lengths = numpy.array([len(text) for text in texts])[rows["text"].to_numpy(int)]
    rows["start"], rows["end"] = lengths - rows["end"], lengths - rows["start"]
    return rows


def _unknown(
    ids: numpy.ndarray, numbers: numpy.ndarray, spans: numpy.ndarray, texts: list[str], tokenizer, direction: str
):
    """Return a mask of the tokens for text that the tokenizer lacks, `(tokens,)`; `<unk>` written in a text is known."""
    written, unknown = _beside_dropped(numbers, spans, texts, tokenizer), unknown_id(tokenizer)
    name = None if unknown is None else tokenizer.convert_ids_to_tokens(unknown)
    if unknown is not None:
        for row in numpy.flatnonzero(ids == unknown).tolist():
            text = texts[numbers[row]][slice(*spans[row])]
            if text.strip() != name:  # some tokenizers' special tokens include the space beside them
                written[row] = text
    if written:
        shown = [in_direction(text, direction) for text in list(dict.fromkeys(written.values()))[:5]]
        examples = ", ".join(repr(text[:30]) for text in shown)
        among = len(numpy.unique(numbers[list(written)]))
        fault = (
            f"are unknown to the tokenizer and scored as {name}"
            if name is not None
            else "stand beside characters that are unknown to the tokenizer and dropped"
        )
        logger.warning(
            f"{len(written):,} of {len(ids):,} tokens, in {among:,} of {len(texts):,} texts, {fault}, whatever their text "
            f"({examples}): leave out the rows that `unknown` marks, or train with a tokenizer that knows every text, such "
            "as `bpe_tokenizer`."
        )
    return numpy.isin(numpy.arange(len(ids)), list(written))


def _beside_dropped(numbers: numpy.ndarray, spans: numpy.ndarray, texts: list[str], tokenizer) -> dict[int, str]:
    """
    Find the tokens beside which the tokenizer dropped characters, as a dictionary from their rows to these characters:
    the token after them in the same word, or else the one before.
    """
    beside: dict[int, str] = {}
    dropped = dropped_characters(texts, tokenizer)
    if not dropped:
        return beside
    bounds = numpy.searchsorted(numbers, numpy.arange(len(texts) + 1))
    for text, first, last in zip(texts, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        for place, character in enumerate(text):
            if character not in dropped:
                continue
            behind = first + int(numpy.searchsorted(spans[first:last, 0], place))
            row = behind if behind < last and not re.search(r"\s", text[place : spans[behind, 0] + 1]) else behind - 1
            row = max(first, row)
            beside[row] = beside.get(row, "") + character
    return beside


@torch.no_grad()
def _losses_of_documents(
    model: PreTrainedModel,
    documents: list[list[int]],
    batch_size: int,
    bptt_length: int,
    distributions: Distributions | None = None,
) -> tuple[numpy.ndarray, list[int]]:
    """
    Compute the loss of each token in nats, NaN for the first of each document, and tell `distributions` of each too. The
    documents are sorted by length, dealt to `batch_size` parts, and concatenated in each: the model packs the documents of
    a chunk side by side, and they are about equally long. Equal documents are read once, so that their losses are equal to
    the last bit.

    Returns:
        The losses in the order of reading, and the place among them at which each document begins.
    """
    firsts: dict[tuple[int, ...], int] = {}
    for number, document in enumerate(documents):
        firsts.setdefault(tuple(document), number)
    by_length = sorted(firsts.values(), key=lambda number: len(documents[number]))
    parts = [by_length[part::batch_size] for part in range(min(batch_size, len(by_length)))]
    order = [number for part in parts for number in part]
    ends = torch.tensor([len(documents[number]) for number in order]).cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])
    stream = checked_stream(
        model, TokenStream(numpy.concatenate([*(documents[number] for number in order), [0]]), starts)
    )
    part_ends = ends[torch.tensor([len(part) for part in parts]).cumsum(0) - 1]
    part_starts = torch.cat([torch.zeros(1, dtype=torch.long), part_ends[:-1]])
    predicted = torch.ones(len(stream), dtype=torch.bool)
    predicted[starts] = predicted[-1] = False  # not from the end of one document to the next

    def name(index):
        place = int(torch.searchsorted(starts, index, right=True)) - 1
        return f"token {index - int(starts[place])} of text {order[place]}"

    nats = numpy.full(len(stream), numpy.nan)
    state = DynamicCache(config=model.config)
    with evaluating(model):
        for chunk in read_chunks(stream, part_starts, part_ends, bptt_length, reset_at_documents=True):
            logits = run_chunk(model, chunk, state).logits
            if distributions is not None:  # after the last token of a document too
                read = chunk.indices[chunk.scored]
                distributions.add(scored_logits(logits, chunk), chunk.targets[chunk.scored], read)
            chunk.scored &= predicted[(chunk.indices + 1).clamp(max=len(stream) - 1)]
            costs = token_losses(scored_logits(logits, chunk), chunk, name)
            nats[chunk.indices[chunk.scored].numpy() + 1] = costs.numpy()
            if distributions is not None:
                distributions.check(read, name)
    begins = dict(zip(order, starts.tolist(), strict=True))
    return nats[:-1], [begins[firsts[tuple(document)]] for document in documents]
