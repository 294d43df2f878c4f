"""Characters and bytes: what goes in comes out, nothing crashes, and no code of ours is needed afterwards."""

import subprocess
import sys

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_lstm import byte_tokenizer, char_tokenizer, word_tokenizer
from hf_lstm.tokenizers import ends_lines

TEXTS = [
    "床前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。",
    "First Citizen:\n\tBefore we proceed,\r\n  hear me  speak. \n\n",
    "naïve café — “quoted” 👩‍👩‍👧 e\u0301 \u00e9 \u200b\ufeff",
    "a<eos>b <unk> <pad>",
]


@pytest.fixture(params=["char", "byte"])
def tokenizer(request):
    return char_tokenizer(TEXTS) if request.param == "char" else byte_tokenizer()


@pytest.mark.parametrize("text", TEXTS, ids=["chinese", "english", "marks", "specials"])
def test_seen_text_comes_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]

    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_special_tokens_have_the_first_ids_and_are_not_added(tokenizer):
    specials = ["<pad>", "<unk>", "<bos>", "<eos>"]

    assert tokenizer.convert_tokens_to_ids(specials) == [0, 1, 2, 3]
    assert [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token] == specials
    assert min(tokenizer(TEXTS[0])["input_ids"]) > 3
    assert tokenizer.decode([2, *tokenizer("a b")["input_ids"], 3], skip_special_tokens=True) == "a b"


def test_characters_are_code_points():
    tokenizer = char_tokenizer(["cab", "a"])

    assert tokenizer.get_vocab() == {"<pad>": 0, "<unk>": 1, "<bos>": 2, "<eos>": 3, "a": 4, "b": 5, "c": 6}
    assert tokenizer("abc")["input_ids"] == [4, 5, 6]


def test_unseen_characters_are_unknown():
    tokenizer = char_tokenizer(["abc"])

    assert tokenizer("a床床b😀")["input_ids"] == [4, 1, 1, 5, 1]
    assert tokenizer.decode([4, 1, 5]) == "a<unk>b"


def test_bytes_have_the_ids_after_the_special_tokens():
    tokenizer = byte_tokenizer()

    assert len(tokenizer) == 260
    assert tokenizer("A床\n")["input_ids"] == [4 + byte for byte in "A床\n".encode()]


def test_offsets_are_those_of_characters(tokenizer):
    text = "é床 ab"
    encoding = tokenizer(text, return_offsets_mapping=True)

    starts = [start for start, _ in encoding["offset_mapping"]]
    assert sorted(set(starts)) == [0, 1, 2, 3, 4]
    assert all(end == start + 1 for start, end in encoding["offset_mapping"])


def test_batches_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["ab", "a"], padding=True)

    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"] == [[1, 1], [0, 1]]
    assert batch["input_ids"][1][0] == tokenizer.pad_token_id


def test_saved_tokenizers_need_no_code_of_ours(tokenizer, tmp_path):
    assert type(tokenizer) is PreTrainedTokenizerFast
    tokenizer.save_pretrained(tmp_path)
    program = (
        "import sys; from transformers import AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})\n"
        f"print([tokenizer(text)['input_ids'] for text in {TEXTS!r}], tokenizer.padding_side, 'hf_lstm' in sys.modules)"
    )

    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert printed.strip() == f"{[tokenizer(text)['input_ids'] for text in TEXTS]} left False"
    assert AutoTokenizer.from_pretrained(tmp_path).decode(tokenizer(TEXTS[1])["input_ids"]) == TEXTS[1]


def test_a_vocabulary_needs_texts():
    with pytest.raises(ValueError, match="`texts` hold no character"):
        char_tokenizer([""])
    with pytest.raises(ValueError, match=r"`texts` is one str.*`\[text\]`"):
        char_tokenizer("abc")
    with pytest.raises(ValueError, match=r"`texts` is one str.*`\[text\]`"):
        word_tokenizer("abc")
    with pytest.raises(ValueError, match="`texts` hold no word that occurs 3 times"):
        word_tokenizer(["a a b", "<eos> <unk> <unk> <unk>"], min_frequency=3)
    with pytest.raises(ValueError, match=r"`vocab_size` \(4\) must leave room for words"):
        word_tokenizer(["a"], vocab_size=4)


def test_words_and_line_ends():
    tokenizer = word_tokenizer([" the cat <unk>\n\n the dog , the end\n", "cat"])

    assert tokenizer.convert_ids_to_tokens(range(10)) == [
        *("<pad>", "<unk>", "<bos>", "<eos>", "the", "cat", ",", "dog", "end"),
        None,
    ]
    encoded = tokenizer(" the  <unk> cow \n\ndog\n", return_offsets_mapping=True)
    assert encoded["input_ids"] == [4, 1, 1, 3, 3, 7, 3]
    assert encoded["offset_mapping"] == [(1, 4), (6, 11), (12, 15), (16, 17), (17, 18), (18, 21), (21, 22)]
    assert len(word_tokenizer(["a a b b c"], vocab_size=6)) == 6
    assert set(word_tokenizer(["a a b b c"], min_frequency=2).get_vocab()) >= {"a", "b"}
    assert "c" not in word_tokenizer(["a a b b c"], min_frequency=2).get_vocab()


def test_a_line_end_may_be_eos():
    assert [ends_lines(one) for one in (word_tokenizer(["a"]), char_tokenizer(["a\n"]), byte_tokenizer())] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("text", ["the cat\nthe dog\n", "\nthe end", "a\n\n", "a 床 b", "cat"])
def test_words_come_back(text, tmp_path):
    word_tokenizer([text]).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
