"""Tokenizers: stock `PreTrainedTokenizerFast` objects, saved as tokenizer.json, that need no code of ours to load.

`<pad>`, `<unk>`, `<bos>` and `<eos>` are ids 0 to 3 of each. Encoding adds no token, and, but for `<unk>` and `<eos>` in
the words of `word_tokenizer`, text that looks like a special token is text. There is no longest text: `model_max_length`
is as good as infinite. Batches are padded on the left, as `generate()` needs it; training collators pad on their own.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
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
    vocabulary = _vocabulary([*sorted(characters), *(_BYTES if byte_fallback else ())])
    # no merges: single characters
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIAL_TOKENS["unk_token"], byte_fallback=byte_fallback)
    )
    if nfc:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = _BYTE_DECODER if byte_fallback else decoders.Fuse()
    return _fast(tokenizer)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8: byte b has id 4 + b. Nothing is unknown to it, and every text decodes to itself."""
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(_BYTES), merges=[], byte_fallback=True))
    tokenizer.decoder = _BYTE_DECODER
    return _fast(tokenizer)


def word_tokenizer(
    texts: Iterable[str], vocab_size: int | None = None, min_frequency: int = 1, split: str = "whitespace"
) -> PreTrainedTokenizerFast:
    """
    One token per word, the most frequent first; any other becomes `<unk>`.

    `split="whitespace"` is for texts that come in words, as WikiText and the Penn Treebank do (Mikolov et al. 2010):
    what stands between white space is a word, a line end is `<eos>`, and `<unk>` and `<eos>` in a text are those tokens.
    A line whose words stand one space apart decodes to itself.

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
    least = len(SPECIAL_TOKENS) + len(_BYTES) + 1
    _check_vocab_size(vocab_size, least, f"the {len(SPECIAL_TOKENS)} special tokens, {len(_BYTES)} bytes and a pair")
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


def ends_lines(tokenizer) -> bool:
    """Whether `<eos>` is what a tokenizer makes of a line end, as `word_tokenizer` does, and not a document's end."""
    return tokenizer("\n", add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]


def bytes_of_tokens(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[bytes]:
    """
    What each id below `vocab_size` adds to a text that it continues, in bytes of UTF-8: for those who write text without a
    tokenizer. Special tokens and ids without a token add nothing, and a token that was added adds what it is called; in a
    text of lines of words, `<unk>` is shown and `<eos>` is the line end.
    """
    backend = tokenizer.backend_tokenizer
    decoder = str(json.loads(backend.to_str())["decoder"])
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}  # GPT-2's name for each byte
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    own, hidden = set(backend.get_vocab(with_added_tokens=False).values()), not ends_lines(tokenizer)
    before = min(index for index in tokenizer.get_vocab().values() if index not in special)

    def text_after(ids):
        return tokenizer.decode([before, *ids], skip_special_tokens=hidden)

    added = []
    for index in range(vocab_size):
        token = backend.id_to_token(index)
        if token is None:
            added.append(b"")
        elif index in special or not ("ByteLevel" in decoder or ("ByteFallback" in decoder and token in _BYTES)):
            added.append(text_after([index]).removeprefix(text_after([])).encode())
        elif "ByteLevel" in decoder:
            spelled = index in own and letters.keys() >= set(token)  # what was added is called as it is written
            added.append(bytes(letters[letter] for letter in token) if spelled else token.encode())
        else:
            added.append(bytes([_BYTES.index(token)]))
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


_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_BYTE_DECODER = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])


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
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
