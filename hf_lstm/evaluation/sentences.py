"""Surprisal: how unexpected each token, word or region of a text is to a model (Hale 2001, Levy 2008)."""

import math
import re
from collections.abc import Iterable, Sequence

import numpy
import torch
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_lstm.data.streams import TokenStream
from hf_lstm.tokenizers import dropped_characters, encode_raw, pieces_of, unknown_id

from .reading import evaluating, nats_of, predict, read_chunks, scored_logits, stream_for

logger = logging.get_logger(__name__)

MAX_LOGITS = 2**26  # numbers that a call may compute at once


def surprisal(
    model,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    base: float = 2,
    start_token: str | None = None,
    batch_size: int = 8,
    bptt_length: int | None = None,
):
    """
    -log p of every token given all before it in its text. Each text is read from a zero state, whatever its length.

    Args:
        model (`LSTMForCausalLM`): Left as it was; dropout is off meanwhile.
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer, the model's own.
        texts (`Iterable[str]`): Any texts, of any lengths.
        base (`float`, defaults to 2): That of the logarithm: 2 for bits, `math.e` for nats.
        start_token (`str`, *optional*):
            What the first token is predicted from: a token that the model has seen before its texts, `"<eos>"` if it was
            trained on documents of a `TokenStream`. Without it nothing predicts the first token: its surprisal is NaN.
        batch_size (`int`, defaults to 8): Parts of all texts that are read side by side: time, not the numbers.
        bptt_length (`int`, *optional*):
            Tokens of each part that are read at once: memory, not the numbers. By default 512, or as many as have logits
            of a quarter of a gigabyte.

    Returns:
        `pandas.DataFrame`: a row per token, with `text` (its number, from 0), `token` (what it decodes to), `start` and
        `end` (where it stands in the text, in characters), `surprisal` and `unknown`: whether the tokenizer lacks what
        stands there, so that the surprisal is that of `<unk>`, or leaves out a character beside it, as a BPE without an
        unknown token does. A warning counts those; an `<unk>` that the text itself holds, as WikiText does, is not
        one. `groupby("text")["surprisal"].sum()` is -log p of each text.

        Written by `to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC)` it has the same rows for whatever reads it,
        line ends in tokens included, and `read_csv(path, keep_default_na=False, na_values={"surprisal": ""},
        dtype={"token": str})` of pandas, which would take a token "NA" for a missing one, gives it back.

    Raises:
        ValueError: if there is no text, or one is empty or becomes no token, the tokenizer is slow, not the model's or without the
            `start_token`, `base` is not above 1, or predictions are not numbers.
    """
    import pandas

    if isinstance(texts, str):
        raise ValueError("`texts` is one str: it must be an iterable of texts. Wrap it in a list.")
    if not 1 < base < math.inf:
        raise ValueError(f"`base` ({base}) must be a number above 1: 2 for bits, `math.e` for nats.")
    for name, value in (("batch_size", batch_size), ("bptt_length", bptt_length)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` ({value}) must be at least 1.")
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where in a text its tokens stand: a fast tokenizer is needed."
        )
    check_tokenizer(model, tokenizer)
    start = start_ids(start_token, tokenizer)
    texts = list(texts)
    if not texts:
        raise ValueError("`texts` are none: there must be at least one.")
    ids, spans = _encode(texts, tokenizer)
    if bptt_length is None:
        bptt_length = min(512, max(1, MAX_LOGITS // (batch_size * model.config.vocab_size)))
    nats = _nats_of_documents(model, [start + document for document in ids], batch_size, bptt_length)
    lengths = [len(document) for document in ids]
    decoded = {token: tokenizer.decode([token]) for token in set().union(*ids)}
    numbers, spans = numpy.repeat(numpy.arange(len(texts)), lengths), numpy.concatenate(spans)
    return pandas.DataFrame(
        {
            "text": numbers,
            "token": [decoded[token] for document in ids for token in document],
            "start": spans[:, 0],
            "end": spans[:, 1],
            "surprisal": numpy.concatenate([costs[len(start) :] for costs in nats]) / math.log(base),
            "unknown": _unknown(numpy.concatenate(ids), numbers, spans, texts, tokenizer),
        }
    )


def word_surprisal(tokens, texts: Sequence[str], regions: Sequence[Sequence[tuple[int, int]]] | None = None):
    """
    The surprisal of each word, or each given region, of texts: the sum over its tokens.

    Words are what stands between white space. White space belongs to the word behind it, as it does in the pieces of
    GPT-2's kind, so that the sums of characters and of pieces mean the same; white space at the end of a text belongs to
    its last word. A token that spells parts of several words or regions counts for the first of them. NaN is what is not
    known: the sum of a word or region in which no token begins, or whose first token nothing predicted.

    Args:
        tokens (`pandas.DataFrame`): What [`surprisal`] returned.
        texts (`Sequence[str]`): The same texts.
        regions (`Sequence[Sequence[tuple[int, int]]]`, *optional*):
            For each text the regions, as where they begin and end in it, in characters; by default its words.

    Returns:
        `pandas.DataFrame`: a row per word or region, with `text`, `word` (what it is), `start` and `end` (in characters),
        `tokens` (how many), `surprisal` (in the unit of `tokens`) and `unknown` (how many tokens are unknown).

    Raises:
        ValueError: if a region is empty or reaches beyond its text, there are not as many lists of regions as texts, or
            `tokens` are not what [`surprisal`] returned for these texts.
    """
    import pandas

    columns = ("start", "surprisal", "text", "unknown")
    if missing := [name for name in columns if name not in tokens]:
        raise ValueError(f"`tokens` have no column `{missing[0]}`: give what `surprisal` returned.")
    if regions is not None and len(regions) != len(texts):
        raise ValueError(
            f"`regions` are given for {len(regions)} texts, and there are {len(texts)}: one list for each."
        )
    starts, costs, numbers, unknown = (tokens[name].to_numpy() for name in columns)
    if not numpy.array_equal(numpy.unique(numbers), numpy.arange(len(texts))):
        raise ValueError(
            f"`tokens` are those of {len(numpy.unique(numbers))} texts, and there are {len(texts)}: give the same texts, and "
            "all of their tokens."
        )
    text_bounds = numpy.searchsorted(numbers, numpy.arange(len(texts) + 1))
    rows = []
    for number, text in enumerate(texts):
        own = slice(text_bounds[number], text_bounds[number + 1])
        words = [match.span() for match in re.finditer(r"\S+", text)] or [(0, len(text))]
        first, last = numpy.array(words).T
        # Where each token counts: at its first character, but white space in the next word, or the last; they ascend.
        word_of = numpy.minimum(numpy.searchsorted(last, starts[own], side="right"), len(words) - 1)
        places = numpy.clip(starts[own], first[word_of], last[word_of] - 1)
        spans = words if regions is None else [_checked_region(region, text, number) for region in regions[number]]
        for (start, end), (low, high) in zip(spans, numpy.searchsorted(places, spans).tolist(), strict=True):
            cost = costs[own][low:high].sum() if high > low else numpy.nan
            rows.append((number, text[start:end], start, end, high - low, cost, unknown[own][low:high].sum()))
    return pandas.DataFrame(rows, columns=["text", "word", "start", "end", "tokens", "surprisal", "unknown"])


def minimal_pairs(model, tokenizer: PreTrainedTokenizerBase, pairs: Iterable[dict], start_token: str | None = None):
    """
    Whether a model finds the good sentence of each pair more probable than the bad one (Warstadt et al. 2020, BLiMP).

    Args:
        model, tokenizer, start_token: As in [`surprisal`]. Where nothing predicts the first token, it does not count.
        pairs (`Iterable[dict]`): Each with `sentence_good` and `sentence_bad`, and any other fields.

    Returns:
        `pandas.DataFrame`: a row per pair, with its fields, `log_probability_good` and `log_probability_bad` (nats),
        `correct`, `tie` (whether the two are equal), and `unknown_good` and `unknown_bad` (how many tokens of each are
        unknown, as in [`surprisal`], which warns of them). `correct` is 1.0, 0.0, or 0.5 for a tie, which sentences of the same
        tokens always are: in 0.1.0 it was a bool, False for a tie, and BabyLM's own script counts ties as right. Its
        `["correct"].mean()` is the accuracy, and its `groupby("field")["correct"].mean()` that of each field.

    Raises:
        ValueError: for a pair without the two sentences, or a sentence of which nothing is predicted.
    """
    import pandas

    pairs = list(pairs)
    if not pairs:
        raise ValueError("`pairs` are none: there must be at least one.")
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
                f"Nothing predicts the single token of `{names[kind]}` of pair {number}: give longer sentences, or a "
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


def check_tokenizer(model, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` where a tokenizer cannot be the one that a model was trained with."""
    most = max(tokenizer.get_vocab().values())
    if most >= model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {most}, and the model a vocabulary of {model.config.vocab_size}: give the "
            "tokenizer that the model was trained with."
        )


def start_ids(start_token: str | None, tokenizer) -> list[int]:
    """The tokens before a text: one or none. Raises `ValueError` for one that the tokenizer lacks."""
    if start_token is None:
        return []
    if start_token not in tokenizer.get_vocab():
        raise ValueError(f"`start_token` ({start_token!r}) is no token of the tokenizer: name one that it has.")
    return [tokenizer.get_vocab()[start_token]]


def _checked_region(region: tuple[int, int], text: str, number: int) -> tuple[int, int]:
    start, end = region
    if not 0 <= start < end <= len(text):
        raise ValueError(
            f"Region {start} to {end} lies outside text {number}, which has {len(text)} characters: it must begin at 0 or "
            "later, and end behind its beginning and not behind the text."
        )
    return start, end


def _unknown(ids: numpy.ndarray, numbers: numpy.ndarray, spans: numpy.ndarray, texts: list[str], tokenizer):
    """Which tokens stand for text that the tokenizer lacks, `(tokens,)`: not those that a text itself writes as `<unk>`."""
    written, unknown = _beside_dropped(numbers, spans, texts, tokenizer), unknown_id(tokenizer)
    name = None if unknown is None else tokenizer.convert_ids_to_tokens(unknown)
    if unknown is not None:
        for row in numpy.flatnonzero(ids == unknown):
            text = texts[numbers[row]][slice(*spans[row])]
            if text.strip() != name:  # some tokenizers' special tokens take the space beside them
                written[row] = text
    if written:
        examples = ", ".join(repr(text[:30]) for text in list(dict.fromkeys(written.values()))[:5])
        among = len(numpy.unique(numbers[list(written)]))
        fault = (
            f"are unknown to the tokenizer and scored as {name}"
            if name is not None
            else "stand beside characters that are unknown to the tokenizer and dropped"
        )
        logger.warning(
            f"{len(written):,} of {len(ids):,} tokens, in {among:,} of {len(texts):,} texts, {fault}, whatever they say "
            f"({examples}): leave out what `unknown` marks, or train with a tokenizer that knows every text, such as "
            "`bpe_tokenizer`."
        )
    return numpy.isin(numpy.arange(len(ids)), list(written))


def _beside_dropped(numbers: numpy.ndarray, spans: numpy.ndarray, texts: list[str], tokenizer) -> dict[int, str]:
    """
    The rows of the tokens beside which the tokenizer left characters out, and these: of the token behind them in the same
    word, or else of the one before.
    """
    beside, dropped = {}, dropped_characters(texts, tokenizer)
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


def _encode(texts: list[str], tokenizer) -> tuple[list[list[int]], list[numpy.ndarray]]:
    """The tokens of each text, and where they stand in it, `(tokens, 2)`; as [`TokenStream`] reads them, in pieces."""
    for number, text in enumerate(texts):
        if not isinstance(text, str) or text == "":
            raise ValueError(f"Text {number} is {text!r}: it must hold characters. Leave it out.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"Text {number} holds half of a character ({error.reason}): mend it.") from error
    pieces = [(number, piece) for number, text in enumerate(texts) for piece in pieces_of(text)]
    encoded = encode_raw([piece for _, piece in pieces], tokenizer, offsets=True)
    ids, spans, lengths = [[] for _ in texts], [[] for _ in texts], [0] * len(texts)
    for (number, piece), tokens, offsets in zip(pieces, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids[number] += tokens
        spans[number].append(numpy.array(offsets, dtype=numpy.int64).reshape(-1, 2) + lengths[number])
        lengths[number] += len(piece)
    for number, tokens in enumerate(ids):
        if not tokens:
            raise ValueError(f"Text {number}, {texts[number]!r}, becomes no token: there is nothing to predict.")
    return ids, [numpy.concatenate(parts) for parts in spans]


@torch.no_grad()
def _nats_of_documents(model, documents: list[list[int]], batch_size: int, bptt_length: int) -> list[numpy.ndarray]:
    """
    What each token costs in nats, NaN for the first of each document. The documents are dealt out to `batch_size` parts
    by their length, and stand one behind the other in each: of what is read at once the model packs as many documents
    side by side as there are, and they are about equally long. Of equal documents the first alone is read, so that they
    cost the same to the last bit, wherever they would have stood.
    """
    firsts = {}
    for number, document in enumerate(documents):
        firsts.setdefault(tuple(document), number)
    by_length = sorted(firsts.values(), key=lambda number: len(documents[number]))
    parts = [by_length[part::batch_size] for part in range(min(batch_size, len(by_length)))]
    order = [number for part in parts for number in part]
    ends = torch.tensor([len(documents[number]) for number in order]).cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])
    stream = stream_for(model, TokenStream(numpy.concatenate([*(documents[number] for number in order), [0]]), starts))
    part_ends = ends[torch.tensor([len(part) for part in parts]).cumsum(0) - 1]
    part_starts = torch.cat([torch.zeros(1, dtype=torch.long), part_ends[:-1]])
    predicted = torch.ones(len(stream), dtype=torch.bool)
    predicted[starts] = predicted[-1] = False  # what the end of one document says of the next

    def name(index):
        place = int(torch.searchsorted(starts, index, right=True)) - 1
        return f"token {index - int(starts[place])} of text {order[place]}"

    nats = numpy.full(len(stream), numpy.nan)
    state = DynamicCache(config=model.config)
    with evaluating(model):
        for chunk in read_chunks(stream, part_starts, part_ends, bptt_length, reset_at_documents=True):
            chunk.scored &= predicted[(chunk.indices + 1).clamp(max=len(stream) - 1)]
            logits = scored_logits(predict(model, chunk, state).logits, chunk)
            nats[chunk.indices[chunk.scored].numpy() + 1] = nats_of(logits, chunk, name).numpy()
    dealt = dict(zip(order, numpy.split(nats[:-1], ends[:-1].numpy()), strict=True))
    return [dealt[firsts[tuple(document)]] for document in documents]
