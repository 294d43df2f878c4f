"""Decoding token by token: the text, or the bytes, that each token adds."""

import codecs
import re
from collections.abc import Sequence
from itertools import islice
from typing import cast

from transformers import PreTrainedTokenizerBase

from .tokenizers import ends_lines
from .unknown import FALLBACK_BYTES, LETTER_BYTES


class StreamDecoder:
    """
    Decode a continuation token by token: the prompt's text followed by all that [`step`] and [`end`] return equals the whole
    text decoded at once. Only complete characters are returned, spaces between words included. Only the last tokens are
    read, so the cost of a token does not grow with the text. Invalid UTF-8 becomes U+FFFD as soon as no character can
    begin with it. Where the tokenizer's decoder replaces a whole run of bytes by U+FFFD (`char_tokenizer` with
    `byte_fallback`, and the byte tokenizer of version 0.1.0), characters of the run that were returned before stay.

    Special tokens are skipped, unless `<eos>` is a line end.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Any fast tokenizer.
        prompt_ids (`Sequence[int]`, *optional*): The tokens before the continuation; the last `CONTEXT` are enough.

    Attributes:
        context (`tuple[int, ...]`): The last ids that spell text, on which alone the next step depends.
    """

    CONTEXT = 4  # tokens: more than the bytes of an incomplete character

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int] = ()):
        self.tokenizer, self.rules = tokenizer, repr(tokenizer.backend_tokenizer.decoder)
        self.spelt: dict[int, bytes | None] = {}  # by token, of those met
        added = tokenizer.added_tokens_decoder.items()
        self.hidden = set() if ends_lines(tokenizer) else {index for index, token in added if token.special}
        last = islice(filter(self.is_text, reversed(prompt_ids)), self.CONTEXT)
        self.context = tuple(last)[::-1]

    def step(self, token: int) -> str:
        """Return the text that one more token completes; empty inside a character of several bytes."""
        if not self.is_text(token):
            return ""
        before, self.context = self.context, (*self.context, token)[-self.CONTEXT :]
        held, spelt = self._incomplete(before), self.spell(token)
        if spelt is not None:
            return self._characters(held + spelt)[0]
        old, new = (cast(str, self.tokenizer.decode(list(ids))) for ids in (before, (*before, token)))
        return self._broken(held) + new[len(old) :]

    def end(self) -> str:
        """End the text: return U+FFFD for an incomplete character, which later tokens no longer complete."""
        waiting = self.waiting
        while self._incomplete(self.context):
            self.context = self.context[:-1]
        return waiting

    @property
    def waiting(self) -> str:
        """U+FFFD for an incomplete character at the end, or an empty string, like decoding the whole text."""
        return self._broken(self._incomplete(self.context))

    def is_text(self, token: int) -> bool:
        """Whether an id belongs to a token that is not skipped."""
        return token not in self.hidden and self.tokenizer.convert_ids_to_tokens(token) is not None

    def spell(self, token: int) -> bytes | None:
        """Return the bytes of a token, or `None` where its text depends on the tokens around it."""
        if token not in self.spelt:
            name = cast(str, self.tokenizer.convert_ids_to_tokens(token))
            if "ByteLevel" in self.rules:
                letters = all(letter in LETTER_BYTES for letter in name)  # of bytes: an added token may have others
                self.spelt[token] = bytes(LETTER_BYTES[letter] for letter in name) if letters else name.encode()
            elif "ByteFallback" in self.rules:
                self.spelt[token] = FALLBACK_BYTES.get(name)
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
        """Decode UTF-8 bytes; return the text, and the bytes at the end that may begin a character."""
        decoder = codecs.getincrementaldecoder("utf-8")(
            "surrogateescape" if "ByteFallback" in self.rules else "replace"
        )
        text, held = decoder.decode(data), decoder.getstate()[0]
        if len(held.decode(errors="replace")) > 1:  # half a surrogate pair, which Python waits for and then refuses
            text, held = text + decoder.decode(b"", final=True), b""
        return re.sub("[\udc80-\udcff]", "\ufffd", text), held  # of `ByteFallback`: one for each byte

    def _broken(self, data: bytes) -> str:
        return "\ufffd" * (len(data) if "ByteFallback" in self.rules else bool(data))


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[bytes]:
    """
    Return the UTF-8 bytes that each id below `vocab_size` appends to a text, for decoding without a tokenizer. Special
    tokens and ids without a token append nothing; for a tokenizer whose line ends are `<eos>`, `<unk>` is shown and `<eos>`
    is the line end. An added token appends its name, with the space that decoding puts before it.
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
            spelt: bytes | None = b""
        elif "ByteLevel" in decoder.rules and index not in own and index not in special:
            spelt = (backend.id_to_token(index) or "").encode()  # not written in GPT-2's letters for bytes
        else:
            spelt = None if index in special else decoder.spell(index)
        added.append(decoder.step(index).encode() if spelt is None else spelt)
    return added
