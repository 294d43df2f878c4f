"""Vocabularies of other programs, as stock tokenizers with the ids that their models were trained with.

No token is added, since each would change the softmax. Words are read as Python's `str.split()` cuts them, line ends as
`<eos>` if the vocabulary contains that; characters one by one. Text that the vocabulary lacks becomes its own unknown token, or
is refused where it has none.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_lstm.tokenizers import check_unicode, line_decoder

# What programs call the tokens with a task; a vocabulary has at most one of each line.
SPELLINGS = {
    "unk_token": ("<unk>", "<UNK>", "[UNK]"),
    "pad_token": ("<pad>", "<PAD>", "[PAD]"),
    "bos_token": ("<bos>", "<BOS>", "<s>", "<sos>", "<sos/eos>", "[BOS]"),
    "eos_token": ("<eos>", "<EOS>", "</s>", "<sos/eos>", "[EOS]"),
}
PYTHON_SPACE = "".join(
    character for character in map(chr, range(0x3001)) if character.isspace()
)  # where str.split() cuts
NO_UNKNOWN = "\ufdd0"  # a code point that is never a character: what is unknown is then refused
PIECES = ("▁", "##", "@@")  # how SentencePiece, WordPiece and subword-nmt mark parts of words
CORPUS = ("train.txt", "valid.txt", "test.txt")  # in the order in which word_language_model reads them


@dataclass
class Vocabulary:
    """
    Tokens in the order of their ids.

    Args:
        entries (`list[str]`): The tokens.
        unit (`str`): `"words"`, `"characters"`, or `"pieces"` of a tokenizer that is given whole.
        origin (`str`): The file, for messages.
        tokenizer (`tokenizers.Tokenizer`, *optional*): That tokenizer.
        special (`dict[str, str]`, *optional*):
            The tokens with a task by their names in transformers; by default those with usual spellings.
    """

    entries: list[str]
    unit: Literal["words", "characters", "pieces"]
    origin: str
    tokenizer: Tokenizer | None = None
    special: dict[str, str] | None = None

    def __post_init__(self):
        known: dict[str, int] = {}
        for index, entry in enumerate(self.entries):
            check_unicode(entry, f"{self.origin}, entry {index:,},")
            if known.setdefault(entry, index) != index:
                raise ValueError(
                    f"{self.origin} holds {entry!r} twice, as entries {known[entry]:,} and {index:,}: each token has one id. "
                    "Give the vocabulary that the model was trained with."
                )

    def check_size(self, size: int) -> None:
        """Raise `ValueError` if a model has another number of tokens."""
        if len(self.entries) != size:
            raise ValueError(
                f"{self.origin} holds {len(self.entries):,} tokens, and the model {size:,}: give the vocabulary that it was "
                "trained with."
            )

    def special_tokens(self) -> dict[str, str]:
        """
        Return the tokens with a task by their names in transformers. Padding is the vocabulary's own, or else its end of
        text, unless that stands for line ends: a token that text holds is never padding.
        """
        if self.special is not None:
            return self.special
        entries = set(self.entries)
        found = {
            role: next((name for name in spellings if name in entries), None) for role, spellings in SPELLINGS.items()
        }
        if self.unit != "words":
            found["pad_token"] = found["pad_token"] or found["eos_token"]
        return {role: name for role, name in found.items() if name is not None}


def make_tokenizer(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """Make the tokenizer of a vocabulary. `padding_side` is left, which `generate()` needs."""
    special = vocabulary.special_tokens()
    tokenizer = vocabulary.tokenizer
    if tokenizer is None:
        ids = {entry: index for index, entry in enumerate(vocabulary.entries)}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special.get("unk_token", NO_UNKNOWN)))
        if vocabulary.unit == "characters":
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
            tokenizer.decoder = decoders.Fuse()
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"[{PYTHON_SPACE}]+"), "removed")
            if "eos_token" in special:
                tokenizer.normalizer = normalizers.Replace(Regex("\r\n|\r|\n"), f" {special['eos_token']} ")
                tokenizer.decoder = line_decoder(special["eos_token"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **special,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def read_vocabulary(path: str | None, size: int, unit: Literal["words", "any"] = "any") -> Vocabulary:
    """
    Read a vocabulary.

    Args:
        path (`str`, *optional*):
            A text file with one token a line; a JSON file with a list of the tokens, or a dictionary of their ids; the
            tokenizer.json of a Hugging Face tokenizer; or a folder with train.txt, whose words are numbered in the order
            of their first occurrence, line ends as `<eos>`, as word_language_model numbers them. Where valid.txt and
            test.txt lie beside it and train.txt has fewer words than the model, it reads them too.
        size (`int`): Number of tokens that the model has.
        unit (`str`, defaults to `"any"`):
            `"words"` for words in any case; by default tokens of one character each, but for those with a task, make a
            vocabulary of characters.

    Raises:
        ValueError: if there is none, it cannot be read, holds a token twice or has another size than the model.
    """
    if path is None:
        raise ValueError(
            f"The model has {size:,} tokens, and its file does not say which: give `--vocabulary`, a file with one token a "
            "line, a JSON list or dictionary, a tokenizer.json, or the folder of the corpus with its train.txt."
        )
    tokenizer = None
    if Path(path).is_dir():
        entries = words_of_corpus(Path(path), size)
        unit = "words"
    elif path.endswith(".json"):
        entries, tokenizer = entries_of_json(Path(path))
    else:
        lines = read_text(Path(path)).split("\n")
        entries = [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    vocabulary = Vocabulary(entries, "pieces" if tokenizer else unit_of(entries, unit), path, tokenizer)
    vocabulary.check_size(size)
    if vocabulary.unit == "words":
        for index, entry in enumerate(entries):
            if entry.split() != [entry]:
                raise ValueError(
                    f"{path}, entry {index:,}, is {entry!r}: a word is not empty and contains no white space. Give the tokens "
                    "alone, without ids or counts."
                )
        marked = [entry for entry in entries if entry.startswith(PIECES[:2]) or entry.endswith(PIECES[2])]
        if len(marked) > len(entries) / 10:
            raise ValueError(
                f"{path} holds parts of words, such as {marked[0]!r}, and does not say how words are cut: give the tokenizer.json "
                "of the tokenizer that the model was trained with."
            )
    return vocabulary


def unit_of(entries: list[str], unit: Literal["words", "any"]) -> Literal["words", "characters"]:
    special = {name for spellings in SPELLINGS.values() for name in spellings}
    longest = max((len(entry) for entry in entries if entry not in special), default=0)
    return "characters" if unit == "any" and longest == 1 else "words"


def read_text(path: Path) -> str:
    """Read UTF-8, with line ends and a byte order mark as they are: to the old programs it was part of the first word."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: name a text file.")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start:,}: save it in UTF-8.") from error


def words_of_corpus(folder: Path, size: int) -> list[str]:
    if not (folder / CORPUS[0]).is_file():
        raise ValueError(
            f"{folder} is a folder without {CORPUS[0]}: give the folder of the corpus, or a vocabulary file."
        )
    words: dict[str, None] = {}
    for path in map(folder.joinpath, CORPUS):
        if len(words) < size and path.is_file():
            for line in read_text(path).replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n"):
                words |= dict.fromkeys([*line.split(), "<eos>"])
    return list(words)


def entries_of_json(path: Path) -> tuple[list[str], Tokenizer | None]:
    try:
        content = json.loads(read_text(path).removeprefix("\ufeff"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): save it again.") from error
    tokenizer = None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the class that tokenizers raises
            raise ValueError(f"{path} is not a tokenizer of Hugging Face ({error}): save it again.") from error
        content = tokenizer.get_vocab()
    if isinstance(content, dict):
        if {repr(index) for index in content.values()} != {repr(index) for index in range(len(content))}:
            raise ValueError(f"{path} must give {len(content):,} tokens the ids 0 to {len(content) - 1:,}, each once.")
        content = sorted(content, key=content.__getitem__)
    if not isinstance(content, list) or not all(isinstance(entry, str) for entry in content):
        raise ValueError(f"{path} must hold a list of strings, a dictionary of ids by strings, or a tokenizer.")
    return content, tokenizer
