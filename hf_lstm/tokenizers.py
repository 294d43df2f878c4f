"""Tokenizers: stock `PreTrainedTokenizerFast` objects, saved as tokenizer.json, that need no code of ours to load."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models
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
    if isinstance(texts, str):
        raise ValueError("`texts` is one str: it must be an iterable of texts. Write `char_tokenizer([text])`.")
    characters = sorted(set().union(*(text or "" for text in texts)))
    if not characters:
        raise ValueError("`texts` hold no character: there is nothing to make a vocabulary of.")
    return _tokenizer(characters, decoders.Fuse(), unk_token=SPECIAL_TOKENS["unk_token"])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """
    One token per byte of UTF-8: byte b has id 4 + b. Nothing is unknown to it, and every text decodes to itself.
    Encoding adds no token, and text that looks like a special token is text.
    """
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _tokenizer([f"<0x{byte:02X}>" for byte in range(256)], decoder, byte_fallback=True)


def _tokenizer(tokens: list[str], decoder, **model_options) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS.values(), *tokens])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], **model_options))  # no merges: single characters
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL_TOKENS,
        padding_side="left",  # what `generate()` needs; the training collators pad on their own
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
