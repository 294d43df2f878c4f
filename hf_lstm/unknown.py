"""Text that a vocabulary lacks: which token stands for it, and whether a tokenizer leaves it out or refuses it."""

from collections.abc import Iterable

from tokenizers import models
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

# The bytes that tokens of a byte fallback, and of a byte-level tokenizer the letters of a token, stand for.
FALLBACK_BYTES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
LETTER_BYTES = {letter: byte for byte, letter in sorted(bytes_to_unicode().items())}  # GPT-2's name for each byte


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
        return not _tokens_of_unknown(tokenizer) and any(
            backend.model.token_to_id(byte) is None for byte in LETTER_BYTES
        )
    return not _tokens_of_unknown(tokenizer)


def dropped_characters(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """
    The characters of texts that the tokenizer leaves out, whole or some of their bytes; none where it spells no characters
    but knows whole words (Keras'), which it leaves out as such.
    """
    if not drops_text(tokenizer) or all(len(token) > 1 for token in tokenizer.get_vocab()):
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


def check_known(pieces: list[str], tokenizer: PreTrainedTokenizerBase, cause: Exception) -> None:
    """Raise `ValueError` for the first word that a tokenizer of words lacks and cannot call unknown."""
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.model, models.WordLevel):
        return
    for piece in pieces:
        text = piece if backend.normalizer is None else backend.normalizer.normalize_str(piece)
        words = [(text, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(text)
        for word, _ in words:
            if backend.model.token_to_id(word) is None:
                raise ValueError(
                    f"The vocabulary lacks {word!r} and has no unknown token: remove it from the text."
                ) from cause
