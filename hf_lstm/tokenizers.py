"""Tokenizers: stock `PreTrainedTokenizerFast` objects, saved as tokenizer.json, that need no code of ours to load.

`<pad>`, `<unk>`, `<bos>` and `<eos>` are ids 0 to 3 of each. Encoding adds no token. A special or added token that is
written in a text is recognised by `tokenizer(...)`, as everywhere in transformers, and is letters to [`encode_raw`], through
which raw text enters this package. The stock `apply_chat_template` makes one string of a conversation and calls the
tokenizer: there, the content of messages is read as the template's own markers are, unless it is asked to
`sanitize_control_tokens`, where transformers has that. Tokenizers saved by version 0.1.0 keep their setting
(`"split_special_tokens": true` in their tokenizer_config.json), with which every text is letters.

There is no longest text: `model_max_length` is as good as infinite. Batches are padded on the left, as `generate()` needs
it; training collators pad on their own.
"""

import codecs
import copy
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from weakref import WeakKeyDictionary

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging

SPECIAL_TOKENS = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}  # ids 0 to 3
PIECE_LENGTH = 1 << 16  # characters of a text that are read, and given to a tokenizer, at once

# Letters, marks and digits with the space before them; each Chinese or Japanese character, mark of punctuation or other
# symbol with the space before it; any other white space. Every character of a text belongs to one of them.
UNICODE_WORD = r" ?[\p{Han}\p{Hiragana}\p{Katakana}]| ?(?:[\p{L}\p{M}\p{N}&&[^\p{Han}\p{Hiragana}\p{Katakana}]])+| ?[^\s\p{L}\p{M}\p{N}]|\s"


def char_tokenizer(texts: Iterable[str], byte_fallback: bool = False, nfc: bool = False) -> PreTrainedTokenizerFast:
    """
    One token per character (Unicode code point) of `texts`, in order of code points after the special tokens. A
    character that `texts` lack becomes `<unk>`, or its bytes. What is known decodes to itself, newlines and spaces
    included.

    Args:
        texts (`Iterable[str]`): Any texts, read once.
        byte_fallback (`bool`, defaults to `False`):
            Whether 256 more tokens spell what `texts` lack in bytes of UTF-8, so that nothing is ever unknown.
        nfc (`bool`, defaults to `False`):
            Whether texts are composed first (Unicode's normalization form C), so that an é is one character however it
            was written.

    Raises:
        ValueError: if `texts` hold no character at all, or are one `str` (wrap it in a list).
    """
    _check_texts(texts)
    normalizer = normalizers.NFC() if nfc else None
    characters = set()
    for piece in pieces_of_all(texts):
        characters.update(normalizer.normalize_str(piece) if nfc else piece)
    if not characters:
        raise ValueError("`texts` hold no character: there is nothing to make a vocabulary of.")
    vocabulary = _vocabulary([*sorted(characters), *(_FALLBACK if byte_fallback else ())])
    # no merges: single characters
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIAL_TOKENS["unk_token"], byte_fallback=byte_fallback)
    )
    if nfc:
        tokenizer.normalizer = normalizer
    if byte_fallback:
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer.decoder = decoders.Fuse()
    return _fast(tokenizer)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """
    One token per byte of UTF-8: byte b has id 4 + b. Nothing is unknown to it, and every text decodes to itself. Bytes that
    are not UTF-8 decode as `bytes.decode("utf-8", errors="replace")` does.
    """
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(_LETTERS), merges=[]))  # no merges: single bytes
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer)


def word_tokenizer(
    texts: Iterable[str], vocab_size: int | None = None, min_frequency: int = 1, split: str = "whitespace"
) -> PreTrainedTokenizerFast:
    """
    One token per word, the most frequent first; any other becomes `<unk>`.

    `split="whitespace"` is for texts that come in words, as WikiText and the Penn Treebank do (Mikolov et al. 2010):
    what stands between white space is a word, a line end is `<eos>`, and `<unk>` and `<eos>` in a text are those tokens.
    A line whose words stand one space apart decodes to itself. Decoded alone, a continuation lacks the space before its
    first word, since nothing says that something stood before it: so it is in the stock `pipeline` and in
    `TextStreamer(skip_prompt=True)`. `Session`, [`StreamDecoder`] and the scripts decode it behind its prompt.

    `split="unicode"` is for any text: a word is a run of letters and digits with the space before it, and each mark of
    punctuation, Chinese or Japanese character and line end is a word of its own. What is known decodes to itself.

    Args:
        texts (`Iterable[str]`): Any texts, read once.
        vocab_size (`int`, *optional*): Most tokens to keep, the four special ones included; all by default.
        min_frequency (`int`, defaults to 1): Times that a word must occur to be kept.
        split (`str`, defaults to `"whitespace"`): `"whitespace"` or `"unicode"`.

    Raises:
        ValueError: if no word is left, `split` is neither, or `texts` are one `str`.
    """
    _check_texts(texts)
    if split not in ("whitespace", "unicode"):
        raise ValueError(f"`split` ({split!r}) must be `whitespace` or `unicode`.")
    _check_vocab_size(vocab_size, len(SPECIAL_TOKENS) + 1, f"the {len(SPECIAL_TOKENS)} special tokens and a word")
    if split == "unicode":
        cut = pre_tokenizers.Split(Regex(UNICODE_WORD), "isolated")
    else:
        cut = pre_tokenizers.WhitespaceSplit()
    counts = Counter()
    for piece in pieces_of_all(texts):
        counts.update(word for word, _ in cut.pre_tokenize_str(piece))
    for token in SPECIAL_TOKENS.values():
        counts.pop(token, None)
    words = [
        word for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= min_frequency
    ]
    if not words:
        raise ValueError(
            f"`texts` hold no word that occurs {min_frequency:,} times: there is nothing to make a vocabulary of."
        )
    limit = None if vocab_size is None else vocab_size - len(SPECIAL_TOKENS)
    tokenizer = Tokenizer(models.WordLevel(_vocabulary(words[:limit]), unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = cut
    if split == "unicode":
        tokenizer.decoder = decoders.Fuse()
        return _fast(tokenizer)
    eos = SPECIAL_TOKENS["eos_token"]
    tokenizer.normalizer = normalizers.Replace("\n", f" {eos} ")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(eos, "\n"),
            decoders.Replace(Regex(r"\A(?!\n)"), " "),
            decoders.Fuse(),
            decoders.Replace("\n ", "\n"),
            decoders.Strip(" ", left=1, right=0),
        ]
    )
    return _fast(tokenizer)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Pieces of words (byte-pair encoding, Sennrich et al. 2016) made of bytes as GPT-2's are (Radford et al. 2019):
    learnt from `texts` with a progress bar, a word's pieces with the space before it. Nothing is unknown to it, and
    every text decodes to itself.

    Args:
        texts (`Iterable[str]`): Any texts, read once, in pieces of at most `PIECE_LENGTH` characters.
        vocab_size (`int`):
            Tokens, the four special ones and the 256 bytes included; fewer where no pair occurs twice any more.

    Raises:
        ValueError: for a `vocab_size` that holds no pair, or `texts` that are one `str` or hold no character.
    """
    _check_texts(texts)
    least = len(SPECIAL_TOKENS) + len(_LETTERS) + 1
    _check_vocab_size(vocab_size, least, f"the {len(SPECIAL_TOKENS)} special tokens, {len(_LETTERS)} bytes and a pair")
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
        raise ValueError("`texts` hold no character: there is nothing to make a vocabulary of.")
    tokenizer.train_from_iterator(chain([first], pieces), trainer)
    return _fast(tokenizer)


def encode_raw(texts: list[str], tokenizer: PreTrainedTokenizerBase, offsets: bool = False) -> BatchEncoding:
    """
    Encode text as it is written: what looks like a special or an added token is letters. Corpora, sentences to score,
    prompts and the content of messages are encoded here, so that no text can end a document or speak for another.

    In the words of `word_tokenizer`, `<unk>` and `<eos>` stay those tokens, as the corpora write them, and added tokens
    that are not special are words. An added token of white space alone stays a token too, since models of code have those
    for ordinary text.

    Args:
        texts (`list[str]`): Any texts, whole or in pieces.
        tokenizer (`PreTrainedTokenizerBase`): Any tokenizer. It is not changed, so that threads may share it.
        offsets (`bool`, defaults to `False`): Whether to say where in its text each token stands; fast tokenizers can.

    Returns:
        `BatchEncoding`: `input_ids`, a list for each text, and `offset_mapping` if it was asked for.

    Raises:
        ValueError: if a text holds half of a surrogate pair.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text holds {text[error.start]!r} at character {error.start}, half of a surrogate pair or a byte that "
                "is not UTF-8: mend it, or leave it out."
            ) from error
    if not texts:
        return BatchEncoding({"input_ids": [], "offset_mapping": []} if offsets else {"input_ids": []})
    options = {"return_offsets_mapping": True} if offsets else {}
    return _raw_reader(tokenizer)(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
        **options,
    )


def letter_reader(tokenizer: PreTrainedTokenizerFast, markers: Collection[str] = ()) -> PreTrainedTokenizerFast:
    """
    Copy a tokenizer so that its special tokens, and `markers` among the added ones, are letters to it, as [`encode_raw`]
    describes. Asked for per call, `split_special_tokens` is set on the Rust object, where another thread's call would
    change it; it is for special tokens alone; and the model may have a piece of that name, which it would find.
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
    reader.backend_tokenizer.model = _model_without(markers - kept - _FALLBACK.keys(), backend)
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
        _RAW_READERS[tokenizer] = known = (rules, letter_reader(tokenizer))
    return known[1]


_RAW_READERS = WeakKeyDictionary()  # of each tokenizer: copying one of 50,000 tokens takes a tenth of a second


def ends_lines(tokenizer) -> bool:
    """Whether `<eos>` is what a tokenizer makes of a line end, as `word_tokenizer` does, and not a document's end."""
    return encode_raw(["\n"], tokenizer)["input_ids"] == [[tokenizer.eos_token_id]]


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """
    The id that stands for text which the vocabulary lacks, `None` without one. A fast tokenizer's model has a say in it,
    and not its wrapper, which may name another token, or none.
    """
    if not tokenizer.is_fast:
        return None if tokenizer.unk_token_id == tokenizer.eos_token_id else tokenizer.unk_token_id
    tokens = _tokens_of_unknown(tokenizer)
    return tokens[0].id if len(tokens) == 1 else None  # of several, bytes spell it


def drops_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer leaves out what it lacks in silence, as a BPE does that has neither `unk_token` nor all bytes."""
    if not tokenizer.is_fast or not isinstance(tokenizer.backend_tokenizer.model, models.BPE):
        return False
    backend = tokenizer.backend_tokenizer
    if "ByteLevel" in repr((backend.normalizer, backend.pre_tokenizer)):
        return not _tokens_of_unknown(tokenizer) and any(backend.model.token_to_id(byte) is None for byte in _LETTERS)
    return not _tokens_of_unknown(tokenizer)


def dropped_characters(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The characters of texts that the tokenizer leaves out, whole or some of their bytes."""
    if not drops_text(tokenizer):
        return set()
    backend = tokenizer.backend_tokenizer
    model, normalizer, cut = backend.model, backend.normalizer, backend.pre_tokenizer
    before, behind = model.continuing_subword_prefix or "", model.end_of_word_suffix or ""

    def is_dropped(character):
        text = character if normalizer is None else normalizer.normalize_str(character)
        letters = [text] if cut is None else [piece for piece, _ in cut.pre_tokenize_str(text)]
        names = ((letter, before + letter, letter + behind) for letter in "".join(letters))
        return any(all(model.token_to_id(name) is None for name in spellings) for spellings in names)

    return {character for character in set().union(*texts) if is_dropped(character)}


def _tokens_of_unknown(tokenizer) -> list:
    """The tokens that the model itself makes of a character that is never assigned."""
    try:
        return tokenizer.backend_tokenizer.model.tokenize("\U0010fffe")
    except Exception:  # noqa: BLE001 (the class that tokenizers raises: without an unknown token, the text is refused)
        return []


class StreamDecoder:
    """
    Decode a continuation token by token: the prompt's text and all that [`step`] and [`end`] return are what decoding the
    whole gives, in whole characters, spaces between words included. The last tokens are the only ones looked at, so that a
    token costs the same after any text. What is not UTF-8 becomes U+FFFD as soon as it cannot be a character any more.
    Where the tokenizer's decoder then makes U+FFFD of a whole run of bytes (`char_tokenizer` with `byte_fallback`, and the
    bytes of version 0.1.0), the characters of the run that were told stay.

    Special tokens are left out, unless `<eos>` is a line end.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): Any fast tokenizer.
        prompt_ids (`Sequence[int]`, *optional*): The tokens before the continuation; the last `CONTEXT` are enough.

    Attributes:
        context (`tuple[int, ...]`): The last tokens that spell text: all that the next step depends on.
    """

    CONTEXT = 4  # tokens: more than the bytes of a character that is not complete

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt_ids: Sequence[int] = ()):
        self.tokenizer, self.rules = tokenizer, repr(tokenizer.backend_tokenizer.decoder)
        self.spelt = {}  # by token, of those met
        added = tokenizer.added_tokens_decoder.items()
        self.hidden = set() if ends_lines(tokenizer) else {index for index, token in added if token.special}
        last = islice(filter(self.is_text, reversed(prompt_ids)), self.CONTEXT)
        self.context = tuple(last)[::-1]

    def step(self, token: int) -> str:
        """The text that is certain with one token more: often none while the bytes of a character come in."""
        if not self.is_text(token):
            return ""
        before, self.context = self.context, (*self.context, token)[-self.CONTEXT :]
        held, spelt = self._incomplete(before), self.spell(token)
        if spelt is not None:
            return self._characters(held + spelt)[0]
        old, new = (self.tokenizer.decode(list(ids)) for ids in (before, (*before, token)))
        return self._broken(held) + new[len(old) :]

    def end(self) -> str:
        """Tell what waits, as U+FFFD, where the text ends: what comes then completes it no more."""
        waiting = self.waiting
        while self._incomplete(self.context):
            self.context = self.context[:-1]
        return waiting

    @property
    def waiting(self) -> str:
        """U+FFFD in place of a character that is not complete, or nothing: what decoding the whole shows of it."""
        return self._broken(self._incomplete(self.context))

    def is_text(self, token: int) -> bool:
        """Whether an id is that of a token, and of one that is shown."""
        return token not in self.hidden and self.tokenizer.convert_ids_to_tokens(token) is not None

    def spell(self, token: int) -> bytes | None:
        """The bytes that a token stands for, or `None` where the tokens around it have a say in its text."""
        if token not in self.spelt:
            name = self.tokenizer.convert_ids_to_tokens(token)
            if "ByteLevel" in self.rules:
                letters = all(letter in _LETTERS for letter in name)  # of bytes: an added token may have others
                self.spelt[token] = bytes(_LETTERS[letter] for letter in name) if letters else name.encode()
            elif "ByteFallback" in self.rules:
                self.spelt[token] = _FALLBACK.get(name)
            else:
                joins = self.rules == "Fuse()" and not self.tokenizer.clean_up_tokenization_spaces
                self.spelt[token] = name.encode() if joins else None
        return self.spelt[token]

    def _incomplete(self, context) -> bytes:
        spelt = b""
        for token in reversed(context):
            if (piece := self.spell(token)) is None:
                break
            spelt = piece + spelt
        return self._characters(spelt)[1]

    def _characters(self, data: bytes) -> tuple[str, bytes]:
        """What bytes of UTF-8 spell, and those at the end that a character may begin with."""
        decoder = codecs.getincrementaldecoder("utf-8")(
            "surrogateescape" if "ByteFallback" in self.rules else "replace"
        )
        text, held = decoder.decode(data), decoder.getstate()[0]
        if len(held.decode(errors="replace")) > 1:  # half a surrogate pair, which Python waits for and then refuses
            text, held = text + decoder.decode(b"", final=True), b""
        return re.sub("[\udc80-\udcff]", "\ufffd", text), held  # of `ByteFallback`: one for each byte

    def _broken(self, data: bytes) -> str:
        return "\ufffd" * (len(data) if "ByteFallback" in self.rules else bool(data))


def bytes_of_tokens(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[bytes]:
    """
    What each id below `vocab_size` adds to a text that it continues, in bytes of UTF-8: for those who write text without a
    tokenizer. Special tokens and ids without a token add nothing; in a text of lines of words, `<unk>` is shown and `<eos>`
    is the line end. A token that was added adds what it is called, with the space that decoding puts before it.
    """
    decoder, backend = StreamDecoder(tokenizer), tokenizer.backend_tokenizer
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    own = set(backend.get_vocab(with_added_tokens=False).values())
    shown = {tokenizer.unk_token_id, tokenizer.eos_token_id}  # of special tokens, where they are text at all
    before = min(index for index in tokenizer.get_vocab().values() if index not in special)
    added = []
    for index in range(vocab_size):
        decoder.context = (before,)
        if not decoder.is_text(index) or index in special - shown:
            spelt = b""
        elif "ByteLevel" in decoder.rules and index not in own and index not in special:
            spelt = backend.id_to_token(index).encode()  # GPT-2's letters are not those of a token that was added
        else:
            spelt = None if index in special else decoder.spell(index)
        added.append(decoder.step(index).encode() if spelt is None else spelt)
    return added


def pieces_of(text: str | None) -> Iterator[str]:
    """Pieces of at most `PIECE_LENGTH` characters, cut after a line or else before the space of a word, if there is one."""
    text = text or ""
    start = 0
    while start < len(text):
        end = start + PIECE_LENGTH
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or max(text.rfind(" ", start + 1, end), 0) or end
        yield text[start:end]
        start = end


def pieces_of_all(texts: Iterable[str | None]) -> Iterator[str]:
    """The pieces of each text, one after the other."""
    return (piece for text in texts for piece in pieces_of(text))


_FALLBACK = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
_LETTERS = {letter: byte for byte, letter in sorted(bytes_to_unicode().items())}  # GPT-2's name for each byte


def _check_texts(texts):
    if isinstance(texts, str):
        raise ValueError("`texts` is one str: it must be an iterable of texts. Put it into a list: `[text]`.")
    if isinstance(texts, dict):
        raise ValueError(
            f"`texts` has the splits {', '.join(texts)}: give the texts of one, `texts['train']['text']`."
        )


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
