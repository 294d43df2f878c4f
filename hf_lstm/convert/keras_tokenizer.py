"""Keras' `Tokenizer` (`keras.preprocessing.text`), from its JSON or its pickle, as a stock tokenizer with the same ids.

A text is made lower case, each character of `filters` becomes the separator `split`, and what stands between separators is a
word. With `char_level`, each character is one. Ids begin at 1. A word without an id, or with one of `num_words` or more,
becomes `oov_token`, and is dropped where there is none.

No stock model of words drops what it does not know, but byte-pair encoding does, character by character. So without an
`oov_token` the words are entries of such a model without merges, each with the separator before it: an entry is then at
least two characters long, and no character of an unknown word is one.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from hf_lstm.convert.pickles import StandIn, read_plain_pickle
from hf_lstm.convert.vocabulary import SPELLINGS, Vocabulary, read_text, read_vocabulary

# Python's `str.lower()` writes a Σ at the end of a word as ς, and the stock normalizer each as σ.
FINAL_SIGMA = Regex(r"Σ(?<=\p{Cased}\p{Case_Ignorable}*Σ)(?!\p{Case_Ignorable}*\p{Cased})")


class Settings(NamedTuple):
    """The settings of a `Tokenizer`, under the names that Keras gives them."""

    word_index: dict[str, int]
    num_words: int | None
    filters: str
    lower: bool
    split: str
    char_level: bool
    oov_token: str | None


def read_keras_vocabulary(path: str | None, size: int, mask_zero: bool) -> tuple[Vocabulary, list[str]]:
    """
    Read a `Tokenizer`, or a plain vocabulary as [`vocabulary.read_vocabulary`] reads it.

    Args:
        path (`str`, *optional*): The JSON of `tokenizer.to_json()`, a pickle of the tokenizer, or another vocabulary.
        size (`int`): Number of tokens that the model has.
        mask_zero (`bool`): Whether the model skips id 0, which is then padding; otherwise it is a token like the others.

    Returns:
        The vocabulary, and sentences about it for the model card.

    Raises:
        ValueError: if it cannot be read or reproduced, has another size than the model, or names a word that is skipped.
    """
    settings = None if path is None or not Path(path).is_file() else read_settings(Path(path))
    if settings is not None:
        return vocabulary_of(settings, str(path), size, mask_zero)
    vocabulary = read_vocabulary(path, size)
    first = vocabulary.entries[0]
    if mask_zero and first not in SPELLINGS["pad_token"]:
        raise ValueError(
            f"{path}: entry 0 is {first!r}, and the model skips id 0 (`mask_zero`), so it is padding: give the vocabulary that it "
            f"was trained with, in which entry 0 is {SPELLINGS['pad_token'][0]}."
        )
    special = vocabulary.special_tokens()
    if mask_zero:
        special["pad_token"] = first
    elif special.get("pad_token") == first:
        del special["pad_token"]
    vocabulary.roles = special
    return vocabulary, []


def read_settings(path: Path) -> Settings | None:
    """Return the settings of a `Tokenizer`, or None for a file of another kind."""
    with path.open("rb") as file:
        is_pickle = file.read(1) == b"\x80" or path.suffix in (".pkl", ".pickle")
    if is_pickle:
        held = read_plain_pickle(path)
        if not isinstance(held, StandIn) or not held.name.endswith("text.Tokenizer"):
            kind = held.name if isinstance(held, StandIn) else f"a {type(held).__name__}"
            raise ValueError(
                f"{path} holds {kind}, not a Tokenizer of Keras: save other vocabularies as JSON, a list of the tokens or a "
                "dictionary of their ids."
            )
        fields = held.fields
    else:
        if path.suffix != ".json":
            return None
        content = loads(read_text(path), path)
        if isinstance(content, str):  # json.dump(tokenizer.to_json(), file)
            content = loads(content, path)
        if not isinstance(content, dict) or content.get("class_name") != "Tokenizer":
            return None
        held = content.get("config")
        fields = held if isinstance(held, dict) else {}
        if isinstance(fields.get("word_index"), str):
            fields = fields | {"word_index": loads(fields["word_index"], path)}
    return checked(fields, path)


def loads(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): save it again.") from error


def checked(fields: dict[str, Any], path: Path) -> Settings:
    """Return the settings, with the rules that hold between them checked."""

    def check(name: str, holds: bool, rule: str) -> None:
        if not holds:
            shown = repr(fields.get(name))
            raise ValueError(
                f"{path}: `{name}` ({shown if len(shown) < 80 else shown[:80] + '...'}) {rule}: it is not a Tokenizer of Keras that "
                "was fitted on texts, or is damaged. Save it again with `tokenizer.to_json()`."
            )

    words: Any = fields.get("word_index")
    oov, num_words = fields.get("oov_token"), fields.get("num_words")
    whole = isinstance(words, dict) and all(isinstance(w, str) and type(i) is int and i >= 0 for w, i in words.items())
    check("word_index", whole and len(words) > 0, "must give whole numbers to words")
    check("word_index", len(set(words.values())) == len(words), "must give each word an id of its own")
    check("num_words", num_words is None or (type(num_words) is int and num_words >= 0), "must be a number or null")
    check("oov_token", oov is None or (isinstance(oov, str) and oov in words), "must be null or one of the words")
    check("split", isinstance(fields.get("split"), str) and fields["split"] != "", "must be a string")
    filters = fields.get("filters") or ""
    check("filters", isinstance(filters, str), "must be a string")
    return Settings(
        words, num_words, filters, bool(fields.get("lower")), fields["split"], bool(fields.get("char_level")), oov
    )


def vocabulary_of(settings: Settings, origin: str, size: int, mask_zero: bool) -> tuple[Vocabulary, list[str]]:
    """Return the vocabulary of a `Tokenizer`, one entry an id. Ids without a word have entries that no text holds."""
    oov, split = settings.oov_token, settings.split
    words = {
        w: i for w, i in settings.word_index.items() if not settings.num_words or i < settings.num_words or w == oov
    }
    largest = max(words.values(), default=0)
    own = max(*settings.word_index.values(), settings.num_words or 0) + 1
    if not largest < size <= own:
        raise ValueError(
            f"{origin} holds {len(settings.word_index):,} words with ids up to {largest:,}"
            f"{f' (`num_words` {settings.num_words:,})' if settings.num_words else ''}, and the model has {size:,} tokens: give the "
            f"tokenizer that it was trained with. If it is this one, write {size:,} as its `num_words`."
        )
    prefix = "" if oov is not None or settings.char_level else split
    entries = [f"<id{split}{index}>" for index in range(size)]
    if mask_zero:
        entries[0] = (
            SPELLINGS["pad_token"][0] if prefix or settings.char_level else f"<pad{split}>"
        )  # no text holds either
    for word, index in words.items():
        entries[index] = word if word == oov else f"{prefix}{word}"
    special = (
        {"pad_token": entries[0]} if mask_zero else {}
    )  # a word with the id 0, as some tutorials add, is that too
    if oov is not None and re.fullmatch(r"<.+>|\[.+\]", oov):  # a plain word, as a special token, would cut others
        special["unk_token"] = oov
    unit = "character" if settings.char_level else "word"
    notes = [
        "Its Tokenizer makes text lower case." if settings.lower else "",
        f"A {unit} that it does not know is dropped, as Keras' Tokenizer does." if oov is None else "",
        f"A {unit} that it does not know becomes {oov}." if oov is not None and "unk_token" not in special else "",
    ]
    made = make_tokenizer(settings, {entry: index for index, entry in enumerate(entries)}, prefix)
    return Vocabulary(entries, "pieces", origin, made, special), [note for note in notes if note]


def make_tokenizer(settings: Settings, ids: dict[str, int], prefix: str) -> Tokenizer:
    oov, split = settings.oov_token, settings.split
    steps = [normalizers.Replace(FINAL_SIGMA, "ς"), normalizers.Lowercase()] if settings.lower else []
    if oov is not None:
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token=oov))
    else:
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    if settings.char_level:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    else:
        if settings.filters:
            filtered = "|".join(re.escape(character) for character in dict.fromkeys(settings.filters))
            steps.append(normalizers.Replace(Regex(filtered), split))
        if prefix:
            steps.append(normalizers.Prepend(prefix))
            start = Regex(rf"\A{re.escape(prefix)}")
            tokenizer.decoder = decoders.Sequence(
                [decoders.Replace(start, " "), decoders.Fuse(), decoders.Strip(" ", left=1, right=0)]
            )
        tokenizer.pre_tokenizer = pre_tokenizers.Split(split, "merged_with_next" if prefix else "removed")
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer
