"""Tokenizers: stock `PreTrainedTokenizerFast` objects, saved as tokenizer.json; loading one needs no code of this package.

`<pad>`, `<unk>`, `<bos>` and `<eos>` are ids 0 to 3 of each. Encoding adds no token. A special or added token that is
written in a text is recognised by `tokenizer(...)`, as everywhere in transformers, and read as plain characters by
[`encode`], through which raw text enters this package. The stock `apply_chat_template` makes one string of a conversation and calls the
tokenizer: there, the content of messages is read as the template's own markers are, unless it is asked to
`sanitize_control_tokens`, where transformers has that. Tokenizers saved by version 0.1.0 keep their setting
(`"split_special_tokens": true` in their tokenizer_config.json), with which every text is letters.

Texts may have any length: `model_max_length` is transformers' very large default. Batches are padded on the left, which
`generate()` needs; training collators pad on their own.
"""

import copy
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from typing import Literal, cast, overload
from weakref import WeakKeyDictionary

import numpy
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from hf_lstm.unknown import FALLBACK_BYTES, LETTER_BYTES, check_known, unknown_id

SPECIAL_TOKENS = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}  # ids 0 to 3
PIECE_LENGTH = 1 << 16  # characters of a text that are read, and given to a tokenizer, at once
BATCH_CHARACTERS = 1_000_000  # of pieces that a tokenizer gets at once; it keeps about 200 bytes for each meanwhile

# Letters, marks and digits with the space before them; each Chinese or Japanese character, mark of punctuation or other
# symbol with the space before it; any other white space. Every character of a text belongs to one of them.
UNICODE_WORD = r" ?[\p{Han}\p{Hiragana}\p{Katakana}]| ?(?:[\p{L}\p{M}\p{N}&&[^\p{Han}\p{Hiragana}\p{Katakana}]])+| ?[^\s\p{L}\p{M}\p{N}]|\s"


def char_tokenizer(texts: Iterable[str], byte_fallback: bool = False, nfc: bool = False) -> PreTrainedTokenizerFast:
    """
    Make a tokenizer with one token per character (Unicode code point) of `texts`, in order of code points after the
    special tokens. Other characters become `<unk>`, or their bytes. Known text decodes to itself, newlines and spaces
    included.

    Args:
        texts (`Iterable[str]`): Any texts, read once.
        byte_fallback (`bool`, defaults to `False`):
            Whether 256 more tokens spell what `texts` lack in bytes of UTF-8, so that nothing is ever unknown.
        nfc (`bool`, defaults to `False`):
            Whether texts are composed first (Unicode's normalization form C), so that an é is one character however it
            was written.

    Raises:
        ValueError: if `texts` contain no characters, or are one `str` (wrap it in a list).
    """
    check_texts(texts)
    normalizer = normalizers.NFC() if nfc else None
    characters: set[str] = set()
    for piece in pieces_of_all(texts):
        characters.update(piece if normalizer is None else normalizer.normalize_str(piece))
    if not characters:
        raise ValueError("`texts` contain no characters: give at least one, to make a vocabulary of.")
    vocabulary = _vocabulary([*sorted(characters), *(FALLBACK_BYTES if byte_fallback else ())])
    # no merges: single characters
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIAL_TOKENS["unk_token"], byte_fallback=byte_fallback)
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if byte_fallback:
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer.decoder = decoders.Fuse()
    return _fast(tokenizer)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """
    Make a tokenizer with one token per byte of UTF-8: byte b has id 4 + b. No text is unknown, and every text decodes to
    itself. Bytes that are not UTF-8 decode as `bytes.decode("utf-8", errors="replace")` does.
    """
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(LETTER_BYTES), merges=[]))  # no merges: single bytes
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer)


def word_tokenizer(
    texts: Iterable[str], vocab_size: int | None = None, min_frequency: int = 1, split: str = "whitespace"
) -> PreTrainedTokenizerFast:
    """
    Make a tokenizer with one token per word, the most frequent first; other words become `<unk>`.

    `split="whitespace"` is for texts already split into words, like WikiText and the Penn Treebank (Mikolov et al. 2010):
    words stand between white space, a line end is `<eos>`, and `<unk>` and `<eos>` in a text are those tokens.
    A line whose words stand one space apart decodes to itself. Decoded alone, a continuation lacks the space before its
    first word, since the decoder cannot know what came before: this is so in the stock `pipeline` and in
    `TextStreamer(skip_prompt=True)`. `Session`, [`decoding.StreamDecoder`] and the scripts decode it after its prompt.

    `split="unicode"` is for any text: a word is a run of letters and digits with the space before it, and each mark of
    punctuation, Chinese or Japanese character and line end is a word of its own. Known text decodes to itself.

    Args:
        texts (`Iterable[str]`): Any texts, read once.
        vocab_size (`int`, *optional*): Most tokens to keep, the four special ones included; all by default.
        min_frequency (`int`, defaults to 1): Times that a word must occur to be kept.
        split (`str`, defaults to `"whitespace"`): `"whitespace"` or `"unicode"`.

    Raises:
        ValueError: if no word is frequent enough, `split` is neither, or `texts` are one `str`.
    """
    check_texts(texts)
    if split not in ("whitespace", "unicode"):
        raise ValueError(f"`split` ({split!r}) must be `whitespace` or `unicode`.")
    _check_vocab_size(vocab_size, len(SPECIAL_TOKENS) + 1, f"the {len(SPECIAL_TOKENS)} special tokens and a word")
    cut: pre_tokenizers.PreTokenizer
    if split == "unicode":
        cut = pre_tokenizers.Split(Regex(UNICODE_WORD), "isolated")
    else:
        cut = pre_tokenizers.WhitespaceSplit()
    counts: Counter[str] = Counter()
    for piece in pieces_of_all(texts):
        counts.update(word for word, _ in cut.pre_tokenize_str(piece))
    for token in SPECIAL_TOKENS.values():
        counts.pop(token, None)
    words = [
        word for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= min_frequency
    ]
    if not words:
        raise ValueError(
            f"`texts` contain no word that occurs {min_frequency:,} times: give more text, or lower `min_frequency`."
        )
    limit = None if vocab_size is None else vocab_size - len(SPECIAL_TOKENS)
    tokenizer = Tokenizer(models.WordLevel(_vocabulary(words[:limit]), unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = cut
    if split == "unicode":
        tokenizer.decoder = decoders.Fuse()
        return _fast(tokenizer)
    tokenizer.normalizer = normalizers.Replace("\n", f" {SPECIAL_TOKENS['eos_token']} ")
    tokenizer.decoder = line_decoder(SPECIAL_TOKENS["eos_token"])
    return _fast(tokenizer)


def line_decoder(eos: str) -> decoders.Decoder:
    """Create the decoder of words that stand one space apart in lines, of which `eos` ends each."""
    return decoders.Sequence(
        [
            decoders.Replace(eos, "\n"),
            decoders.Replace(Regex(r"\A(?!\n)"), " "),
            decoders.Fuse(),
            decoders.Replace("\n ", "\n"),
            decoders.Strip(" ", left=1, right=0),
        ]
    )


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Train a byte-level byte-pair encoding (Sennrich et al. 2016; of bytes, like GPT-2's: Radford et al. 2019) on `texts`,
    with a progress bar. A word's first piece includes the space before it. No text is unknown, and every text decodes
    to itself.

    Args:
        texts (`Iterable[str]`): Any texts, read once, in pieces of at most `PIECE_LENGTH` characters.
        vocab_size (`int`):
            Tokens, the four special ones and the 256 bytes included; fewer where no pair occurs twice any more.

    Raises:
        ValueError: for a `vocab_size` too small for a pair, or `texts` that are one `str` or contain no characters.
    """
    check_texts(texts)
    least = len(SPECIAL_TOKENS) + len(LETTER_BYTES) + 1
    _check_vocab_size(
        vocab_size, least, f"the {len(SPECIAL_TOKENS)} special tokens, {len(LETTER_BYTES)} bytes and a pair"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=logging.is_progress_bar_enabled(),
    )
    pieces = pieces_of_all(texts)
    first = next(pieces, None)
    if first is None:
        raise ValueError("`texts` contain no characters: give at least one, to make a vocabulary of.")
    tokenizer.train_from_iterator(chain([first], pieces), trainer)
    return _fast(tokenizer)


@overload
def encode(
    texts: Iterable[str | None],
    tokenizer: PreTrainedTokenizerBase,
    offsets: Literal[False] = False,
    direction: str = "forward",
) -> list[numpy.ndarray]: ...


@overload
def encode(
    texts: Iterable[str | None], tokenizer: PreTrainedTokenizerBase, offsets: Literal[True], direction: str = "forward"
) -> tuple[list[numpy.ndarray], list[numpy.ndarray]]: ...


def encode(texts, tokenizer, offsets=False, direction="forward"):
    """
    Encode raw text: special and added tokens written in it are read as plain characters. Corpora, sentences to score,
    prompts and the content of messages are encoded here, so that no text can end a document or imitate another speaker.

    Three exceptions stay tokens: `<unk>` and `<eos>` in texts for `word_tokenizer`, which the word-level corpora use; added
    tokens of a word-level vocabulary that are not special, which are words; and added tokens of white space alone, which
    models of code use for ordinary text. No special tokens are added.

    A text of more than `PIECE_LENGTH` characters is cut for the tokenizer, after a line end or before a space where
    there is one, and the pieces are shared out among the tokenizer's threads. Before it is cut, a text for a model that
    reads backward is reversed whole; see [`in_direction`].

    Args:
        texts (`Iterable[str]`): Any texts, of any lengths; `None` counts as an empty one.
        tokenizer (`PreTrainedTokenizerBase`): Any tokenizer. It is not changed, so that threads may share it.
        offsets (`bool`, defaults to `False`): Whether to return the place of each token in its text too.
        direction (`str`, defaults to `"forward"`): The model's `config.direction`.

    Returns:
        `list[numpy.ndarray]`: the ids of each text in the order of reading, `(tokens,)`. With `offsets`, a pair: the ids,
        and where each token begins and ends in its text as written, in characters, `(tokens, 2)`.

    Raises:
        ValueError: if a text holds half of a surrogate pair, or a word that the tokenizer lacks and has no token for,
            `offsets` are asked of a slow tokenizer, or `direction` is neither `"forward"` nor `"backward"`.
    """
    if offsets and not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer, which returns no offsets: give a fast one.")
    pieces, ids, spans, lengths = [], [], [], []
    for number, text in enumerate(texts):
        check_unicode(text or "", "The text")
        ids.append([numpy.empty(0, dtype=numpy.int32)])
        spans.append([numpy.empty((0, 2), dtype=numpy.int64)])
        length = 0
        for piece in pieces_of(in_direction(text, direction)):
            pieces.append((number, length, piece))
            length += len(piece)
        lengths.append(length)
    reader = _raw_reader(tokenizer)
    options = {"return_offsets_mapping": True} if offsets else {}
    for batch in _batches(pieces):
        try:
            encoded = reader(
                [piece for _, _, piece in batch],
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                verbose=False,
                **options,
            )
        except Exception as error:  # the class that tokenizers raises
            check_known([piece for _, _, piece in batch], reader, error)
            raise
        for index, (number, begin, _) in enumerate(batch):
            ids[number].append(numpy.array(encoded["input_ids"][index], dtype=numpy.int32))
            if offsets:
                places = numpy.array(encoded["offset_mapping"][index], dtype=numpy.int64).reshape(-1, 2)
                spans[number].append(places + begin)
    joined = [numpy.concatenate(parts) for parts in ids]
    if not offsets:
        return joined
    places = [numpy.concatenate(parts) for parts in spans]
    if direction == "backward":
        places = [length - part[:, ::-1] for length, part in zip(lengths, places, strict=True)]
    return joined, places


def in_direction(text: str | None, direction: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """
    Return a text as a model of this `config.direction` reads it, or a text that it wrote as people read it: reversed by
    Unicode code point for `"backward"`, as flair does. Marks that combine with the letter before them then come first, and
    special tokens written in a text, such as WikiText's `<unk>`, are no longer recognised.

    Args:
        text (`str`, *optional*): The text; `None` counts as an empty one.
        direction (`str`): `"forward"` or `"backward"`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Given for a text that was decoded: the names of its special tokens are kept whole.

    Raises:
        ValueError: if `direction` is neither `"forward"` nor `"backward"`.
    """
    if direction not in ("forward", "backward"):
        raise ValueError(
            f"`direction` ({direction!r}) must be `forward` or `backward`: give the model's `config.direction`."
        )
    text = text or ""
    if direction == "forward":
        return text
    names = [] if tokenizer is None else tokenizer.all_special_tokens
    if not names:
        return text[::-1]
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
    return "".join(part if part in names else part[::-1] for part in reversed(parts))


def direction_of(model: PreTrainedModel) -> str:
    """Return the `config.direction` of a model; models of other types read forward."""
    return getattr(model.config, "direction", "forward")


def check_unicode(text: str, name: str) -> None:
    """Raise `ValueError` for a text that cannot be encoded in UTF-8, called `name` in the message."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds {text[error.start]!r} at character {error.start}, half of a surrogate pair or a byte that is "
            "not UTF-8: correct or remove it."
        ) from error


def _batches(pieces):
    """Yield lists of pieces of about `BATCH_CHARACTERS` in all."""
    batch, length = [], 0
    for piece in pieces:
        batch.append(piece)
        length += len(piece[-1])
        if length >= BATCH_CHARACTERS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def letter_reader(tokenizer: PreTrainedTokenizerFast, markers: Collection[str] = ()) -> PreTrainedTokenizerFast:
    """
    Copy a tokenizer so that it reads its special tokens, and `markers` among the added ones, as plain characters; see
    [`encode`]. `split_special_tokens` passed to a call is set on the shared Rust object, where another thread may change it,
    and covers special tokens only; and the model may contain a piece of that name, which it would find.
    """
    backend = tokenizer.backend_tokenizer
    words = isinstance(backend.model, models.WordLevel)
    added = [token for token in backend.get_added_tokens_decoder().values() if not token.content.isspace()]
    markers = {*markers, *(token.content for token in added if token.special)}
    reader = copy.deepcopy(tokenizer)
    reader.add_tokens(sorted(markers if words else {token.content for token in added}), special_tokens=True)
    reader.split_special_tokens = True
    unknown = unknown_id(tokenizer)  # the model's own, which it cannot do without
    kept = {None if unknown is None else backend.id_to_token(unknown), tokenizer.eos_token if words else None}
    reader.backend_tokenizer.model = _model_without(markers - kept - FALLBACK_BYTES.keys(), backend)
    return reader


def _model_without(tokens: set[str], backend: Tokenizer):
    """The model of a tokenizer that finds none of `tokens` in a text: the other pieces keep their ids."""
    rules = json.loads(backend.to_str())
    model = rules["model"]
    if model["type"] == "Unigram":  # ids are places in a list: a name that no text has
        model["vocab"] = [["\uffff" * (name in tokens) + name, score] for name, score in model["vocab"]]
    else:
        if model["type"] == "BPE":
            if model["unk_token"] is None:  # nothing else spells a single letter
                tokens = {token for token in tokens if len(token) > 1}
            prefix = len(model["continuing_subword_prefix"] or "")
            model["merges"] = [(a, b) for a, b in model["merges"] if not {a, b, a + b[prefix:]} & tokens]
        model["vocab"] = {name: index for name, index in model["vocab"].items() if name not in tokens}
    return Tokenizer.from_str(json.dumps(rules | {"added_tokens": []})).model


def _raw_reader(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if not tokenizer.is_fast:
        return tokenizer
    backend = tokenizer.backend_tokenizer
    parts = (
        backend.normalizer,
        backend.pre_tokenizer,
        backend.post_processor,
        getattr(backend.model, "dropout", None),
    )
    added = (backend.get_added_tokens_decoder(), tokenizer.unk_token, tokenizer.eos_token)
    rules = repr((parts, added, backend.get_vocab_size(with_added_tokens=False)))  # a model's own repr takes 7 ms
    known = _RAW_READERS.get(tokenizer)
    if known is None or known[0] != rules:
        _RAW_READERS[tokenizer] = known = (rules, letter_reader(cast(PreTrainedTokenizerFast, tokenizer)))
    return known[1]


_RAW_READERS: WeakKeyDictionary = WeakKeyDictionary()  # by tokenizer: copying one of 50,000 tokens takes 0.1 s


def ends_lines(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer encodes a line end as `<eos>`, like `word_tokenizer`, instead of using it between documents."""
    try:
        return encode(["\n"], tokenizer)[0].tolist() == [tokenizer.eos_token_id]
    except ValueError:  # it lacks a line end, and refuses what it lacks
        return False


def pieces_of(text: str | None) -> Iterator[str]:
    """Yield pieces of at most `PIECE_LENGTH` characters, cut after a line end, or else before a space, where one exists."""
    text = text or ""
    start = 0
    while start < len(text):
        end = start + PIECE_LENGTH
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or max(text.rfind(" ", start + 1, end), 0) or end
        yield text[start:end]
        start = end


def pieces_of_all(texts: Iterable[str | None]) -> Iterator[str]:
    """Yield the pieces of each text, one after the other."""
    return (piece for text in texts for piece in pieces_of(text))


def check_texts(texts: object) -> None:
    """Raise `ValueError` for a single text, a dictionary of splits, or anything else that is not a series of texts."""
    if isinstance(texts, str):
        raise ValueError("`texts` is one str: it must be an iterable of texts. Put it into a list: `[text]`.")
    if isinstance(texts, dict):
        raise ValueError(
            f"`texts` has the splits {', '.join(texts)}: give the texts of one, such as `texts['train']['text']`."
        )
    try:
        iter(texts)  # type: ignore[call-overload]
    except TypeError as error:
        raise ValueError(f"`texts` ({texts!r}) must be an iterable of texts: give a list of str.") from error


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` for anything but a model and a tokenizer, or a tokenizer with ids beyond the model's vocabulary."""
    if not isinstance(model, nn.Module) or not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"`model` ({type(model).__name__}) and `tokenizer` ({type(tokenizer).__name__}) must be a model and its tokenizer, "
            "in this order: load both by `from_pretrained`."
        )
    most = max(tokenizer.get_vocab().values())
    if most >= model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {most}, and the model a vocabulary of {model.config.vocab_size}: give the "
            "tokenizer that the model was trained with."
        )


def start_ids(start_token: str | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids before a text, one or zero. Raises `ValueError` for a `start_token` that the tokenizer lacks."""
    if start_token is None:
        return []
    if not isinstance(start_token, str) or start_token not in tokenizer.get_vocab():
        raise ValueError(f"`start_token` ({start_token!r}) is not a token of the tokenizer: name one that it has.")
    return [tokenizer.get_vocab()[start_token]]


def _check_vocab_size(vocab_size, least, contents):
    if vocab_size is not None and vocab_size < least:
        raise ValueError(f"`vocab_size` ({vocab_size}) must be at least {least}, to hold {contents}.")


def _vocabulary(tokens: Iterable[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate([*SPECIAL_TOKENS.values(), *tokens])}


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
