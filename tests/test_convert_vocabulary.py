"""Tokenizers of converted models give the ids that the models were trained with."""

import json
import random
import re

import foreign
import pytest
from conftest import make_model
from transformers import AutoTokenizer

from hf_lstm import Session, byte_tokenizer
from hf_lstm.convert.vocabulary import make_tokenizer, read_vocabulary
from hf_lstm.tokenizers import encode

SPACES = [" ", "  ", "\t", "\u00a0", "\u2003", "\x1c", "\x0b", "\u3000"]
ENDS = ["\n", "\r\n", "\r", "\n\n", " \n"]
STRANGE = [
    "THE",
    "cat,sat",
    "unknown",
    "🙂",
    "a🙂b",
    "x" * 300,
    "<eos>",
    "<unk>",
    "the<eos>",
    "e\u0301",
    "\u00e9",
    "\ufeff",
    "\x85",
]


def awkward_text(known, lines=1000, strange=STRANGE):
    """Lines of capitals, punctuation, unknown words and characters, empty ones, several spaces and all line ends."""
    generator = random.Random(0)
    text = ""
    for _ in range(lines):
        words = [generator.choice([*known, *strange]) for _ in range(generator.randrange(8))]
        text += "".join(word + generator.choice(SPACES) for word in words) + generator.choice(ENDS)
    return text


def ids_of_words(text, entries, unknown="<unk>"):
    """word_language_model's and its forks': each line of a file, split, and <eos>."""
    known = {entry: index for index, entry in enumerate(entries)}
    ids = []
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]:
        ids += [known.get(word, known.get(unknown)) for word in [*line.split(), "<eos>"]]
    return ids


def saved(vocabulary, folder):
    """The tokenizer as a user loads it."""
    make_tokenizer(vocabulary).save_pretrained(folder / "saved")
    return AutoTokenizer.from_pretrained(folder / "saved")


@pytest.fixture
def words(tmp_path):
    vocabulary = read_vocabulary(foreign.word_file(tmp_path), foreign.V, "words")
    return saved(vocabulary, tmp_path)


def test_words_have_the_ids_of_the_source(words):
    text = awkward_text(foreign.WORDS)
    expected = ids_of_words(text, foreign.WORDS)

    assert encode([text], words)[0].tolist() == expected
    plain = text.replace("the<eos>", "unknown")  # transformers finds special tokens within words
    assert words(plain).input_ids == expected


def test_characters_have_the_ids_of_the_source(tmp_path):
    entries = [*foreign.CHARACTERS, "<unk>", "\r", "\x1c", "e\u0301"[1]]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    characters = saved(read_vocabulary(str(tmp_path / "list.json"), len(entries)), tmp_path)
    text = awkward_text(foreign.WORDS)
    known = {entry: index for index, entry in enumerate(entries)}

    expected = [known.get(character, known["<unk>"]) for character in text]

    assert encode([text], characters)[0].tolist() == expected
    assert characters(text.replace("<unk>", "12345")).input_ids == [
        known.get(character, known["<unk>"]) for character in text.replace("<unk>", "12345")
    ]


@pytest.mark.parametrize("unit", ["words", "characters"])
def test_what_a_vocabulary_without_an_unknown_token_lacks_is_refused(tmp_path, unit):
    entries = ["the", "cat", "<eos>"] if unit == "words" else ["t", "h", "e", " "]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    tokenizer = saved(read_vocabulary(str(tmp_path / "list.json"), len(entries)), tmp_path)

    assert encode(["the the"], tokenizer)[0].tolist() == ([0, 0] if unit == "words" else [0, 1, 2, 3, 0, 1, 2])
    missing = "dog" if unit == "words" else "d"
    with pytest.raises(ValueError, match=f"lacks '{missing}' and has no unknown token"):
        encode(["the the the dog"], tokenizer)
    with pytest.raises(Exception, match="Missing"):  # tokenizers' own words
        tokenizer("the dog")
    session = Session(make_model(vocab_size=len(entries), eos_token_id=None, bos_token_id=None), tokenizer)
    with pytest.raises(ValueError, match=f"lacks '{missing}'"):
        session.feed("the dog")


def test_lines_are_decoded_as_they_were(words):
    text = "the cat sat\n\n, 1984\nthe cat"

    assert words.decode(words(text).input_ids) == text


def corpus(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return str(folder)


def test_a_corpus_numbers_words_in_the_order_of_its_files(tmp_path):
    path = corpus(tmp_path, train=" \n = A = \r\n\nb a\n", valid="c b\n", test="d")

    assert read_vocabulary(path, 5).entries == ["<eos>", "=", "A", "b", "a"]
    assert read_vocabulary(path, 7).entries == ["<eos>", "=", "A", "b", "a", "c", "d"]
    with pytest.raises(ValueError, match="holds 7 tokens, and the model 9"):
        read_vocabulary(path, 9)


def test_a_corpus_without_a_last_line_end_ends_a_line(tmp_path):
    assert read_vocabulary(corpus(tmp_path, train="a b"), 3).entries == ["a", "b", "<eos>"]
    assert read_vocabulary(corpus(tmp_path, train="a b\n"), 3).entries == ["a", "b", "<eos>"]


@pytest.mark.parametrize(
    ("entries", "unit", "special"),
    [
        (["a", "b"], "characters", {}),
        (["a", "b", "<eos>"], "characters", {"eos_token": "<eos>", "pad_token": "<eos>"}),
        (["a", "b", "<pad>", "<eos>"], "characters", {"eos_token": "<eos>", "pad_token": "<pad>"}),
        (["ab", "<eos>", "<unk>"], "words", {"eos_token": "<eos>", "unk_token": "<unk>"}),
        (["ab", "<pad>", "<s>", "</s>"], "words", {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}),
    ],
)
def test_padding_is_never_a_token_that_text_holds(tmp_path, entries, unit, special):
    (tmp_path / "list.json").write_text(json.dumps(entries))

    vocabulary = read_vocabulary(str(tmp_path / "list.json"), len(entries))

    assert (vocabulary.unit, vocabulary.special_tokens()) == (unit, special)
    assert saved(vocabulary, tmp_path).get_vocab() == {entry: index for index, entry in enumerate(entries)}


def test_a_dictionary_and_lines_give_the_same_ids(tmp_path):
    (tmp_path / "ids.json").write_text('{"b": 1, "a": 0, " ": 2, "\\n": 3}')
    (tmp_path / "lines.txt").write_bytes(b"the\r\ncat")

    assert read_vocabulary(str(tmp_path / "ids.json"), 4).entries == ["a", "b", " ", "\n"]
    assert read_vocabulary(str(tmp_path / "lines.txt"), 2).entries == ["the", "cat"]


def test_a_byte_order_mark_is_part_of_the_first_word(tmp_path):
    """The old programs read UTF-8 as it is."""
    (tmp_path / "lines.txt").write_bytes(b"\xef\xbb\xbfthe\ncat")

    assert read_vocabulary(str(tmp_path / "lines.txt"), 2).entries == ["\ufeffthe", "cat"]


def test_an_empty_entry_is_not_what_unknown_text_becomes(tmp_path):
    (tmp_path / "list.json").write_text('["", "a", "b"]')
    tokenizer = saved(read_vocabulary(str(tmp_path / "list.json"), 3), tmp_path)

    assert encode(["ab"], tokenizer)[0].tolist() == [1, 2]
    with pytest.raises(ValueError, match="lacks 'z'"):
        encode(["abz"], tokenizer)


def test_a_tokenizer_of_hugging_face_is_kept(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)

    tokenizer = saved(read_vocabulary(str(tmp_path / "tokenizer.json"), 260), tmp_path)

    assert tokenizer("Ünï").input_ids == byte_tokenizer()("Ünï").input_ids
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v.txt", "a\nb\n", "v.txt holds 2 tokens, and the model 3: give the vocabulary"),
        ("v.txt", "the\ncat\nthe\n", "holds 'the' twice, as entries 0 and 2"),
        ("v.txt", "the\nblack cat\nx\n", "entry 1, is 'black cat': a word"),
        ("v.txt", "the\n\nx\n", "entry 1, is '': a word"),
        ("v.txt", "▁the\n▁c\nat\n", "holds parts of words, such as '▁the'"),
        ("v.txt", "the 0\ncat 1\nx 2\n", "Give the tokens alone, without ids or counts"),
        ("v.txt", b"the\n\xff\nx\n", "is not UTF-8 at byte 4"),
        ("v.json", "{", "is not valid JSON"),
        ("v.json", "3", "must hold a list of strings"),
        ("v.json", '["a", 3, "c"]', "must hold a list of strings"),
        ("v.json", '{"a": 0, "b": 2, "c": 3}', "the ids 0 to 2, each once"),
        ("v.json", '{"a": 0, "b": "1", "c": true}', "the ids 0 to 2, each once"),
        ("v.json", '["a", "\\ud800", "c"]', "half of a surrogate pair"),
        ("v.json", '{"model": {"type": "x"}}', "v.json is not a tokenizer of Hugging Face"),
    ],
)
def test_bad_vocabularies_are_refused_in_words(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(ValueError, match=re.escape(message)):
        read_vocabulary(str(tmp_path / name), 3, "words" if name == "v.txt" else "any")


def test_a_missing_vocabulary_is_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match=r"The model has 31 tokens, .* give `--vocabulary`"):
        read_vocabulary(None, 31)
    with pytest.raises(ValueError, match=r"is a folder without train\.txt"):
        read_vocabulary(str(tmp_path), 31)
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        read_vocabulary(str(tmp_path / "missing.txt"), 31)
