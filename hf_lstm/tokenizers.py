"""Tokenizers: stock `PreTrainedTokenizerFast` objects, saved as tokenizer.json, that need no code of ours to load."""

from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}  # ids 0 to 3


def char_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """
    One token per character (Unicode code point) of `texts`, in order of code points after the special tokens.

    Encoding adds no token, and text that looks like a special token is text; a character that `texts` lack becomes
    `<unk>`. What `texts` hold decodes to itself, newlines and spaces included.

    Args:
        texts (`Iterable[str]`): Any texts, read once.

    Raises:
        ValueError: if `texts` hold no character at all, or are one `str` (wrap it in a list).
    """
    _check_texts(texts)
    characters = sorted(set().union(*(text or "" for text in texts)))
    if not characters:
        raise ValueError("`texts` hold no character: there is nothing to make a vocabulary of.")
    vocabulary = _vocabulary(characters)
    # no merges: single characters
    return _fast(models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIAL_TOKENS["unk_token"]), decoders.Fuse())


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """
    One token per byte of UTF-8: byte b has id 4 + b. Nothing is unknown to it, and every text decodes to itself.
    Encoding adds no token, and text that looks like a special token is text.
    """
    vocabulary = _vocabulary(f"<0x{byte:02X}>" for byte in range(256))
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _fast(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True), decoder)


def word_tokenizer(
    texts: Iterable[str], vocab_size: int | None = None, min_frequency: int = 1
) -> PreTrainedTokenizerFast:
    """
    One token per word between white space, and `<eos>` at each line end, as WikiText and the Penn Treebank are read
    (Mikolov et al. 2010); the most frequent words first. `<unk>` and `<eos>` in a text are those tokens.

    A line whose words stand one space apart decodes to itself, unknown words to `<unk>`.

    Args:
        texts (`Iterable[str]`): Any texts, read once.
        vocab_size (`int`, *optional*): Most tokens to keep, the four special ones included; all by default.
        min_frequency (`int`, defaults to 1): Times that a word must occur to be kept.

    Raises:
        ValueError: if no word is left, or `texts` are one `str`.
    """
    _check_texts(texts)
    if vocab_size is not None and vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(
            f"`vocab_size` ({vocab_size}) must leave room for words beside the {len(SPECIAL_TOKENS)} special tokens."
        )
    counts = Counter()
    for text in texts:
        counts.update((text or "").split())
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
    eos = SPECIAL_TOKENS["eos_token"]
    decoder = decoders.Sequence(
        [
            decoders.Replace(eos, "\n"),
            decoders.Replace(Regex(r"\A(?!\n)"), " "),
            decoders.Fuse(),
            decoders.Replace("\n ", "\n"),
            decoders.Strip(" ", left=1, right=0),
        ]
    )
    tokenizer = _fast(models.WordLevel(_vocabulary(words[:limit]), unk_token=SPECIAL_TOKENS["unk_token"]), decoder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\n", f" {eos} ")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def ends_lines(tokenizer) -> bool:
    """Whether `<eos>` is what a tokenizer makes of a line end, as `word_tokenizer` does, and not a document's end."""
    return tokenizer("\n", add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]


def _check_texts(texts):
    if isinstance(texts, str):
        raise ValueError("`texts` is one str: it must be an iterable of texts. Put it into a list: `[text]`.")


def _vocabulary(tokens: Iterable[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate([*SPECIAL_TOKENS.values(), *tokens])}


def _fast(model, decoder) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL_TOKENS,
        padding_side="left",  # what `generate()` needs; the training collators pad on their own
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
