"""Characters and bytes: what goes in comes out, nothing crashes, and no code of ours is needed afterwards."""

import copy
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise, product

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_program
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast, PythonBackend

from hf_lstm import TokenStream, bpe_tokenizer, byte_tokenizer, char_tokenizer, tokenizers, word_tokenizer
from hf_lstm.decoding import StreamDecoder, bytes_of_tokens
from hf_lstm.tokenizers import encode, ends_lines

TEXTS = [
    "床前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。",
    "First Citizen:\n\tBefore we proceed,\r\n  hear me  speak. \n\n",
    "naïve café — “quoted” 👩‍👩‍👧 e\u0301 \u00e9 \u200b\ufeff",
    "a<eos>b <unk> <pad>",
]


MAKERS = {
    "char": lambda: char_tokenizer(TEXTS),
    "char with bytes": lambda: char_tokenizer(["abc"], byte_fallback=True),
    "byte": byte_tokenizer,
    "bpe": lambda: bpe_tokenizer(TEXTS * 3, vocab_size=300),
    "unicode words": lambda: word_tokenizer(TEXTS, split="unicode"),
}


def encoded(texts, tokenizer):
    return [ids.tolist() for ids in encode(texts, tokenizer)]


@pytest.fixture(params=MAKERS, scope="module")
def tokenizer(request):
    return MAKERS[request.param]()


@pytest.mark.parametrize("text", TEXTS, ids=["chinese", "english", "marks", "specials"])
def test_known_text_round_trips(tokenizer, text):
    ids = encode([text], tokenizer)[0].tolist()

    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("text", TEXTS[:3], ids=["chinese", "english", "marks"])
def test_the_bytes_of_tokens_spell_the_text(tokenizer, text):
    added = bytes_of_tokens(tokenizer, len(tokenizer) + 2)

    assert b"".join(added[index] for index in tokenizer(text)["input_ids"]) == text.encode()
    assert added[:4] == [b""] * 4
    assert added[len(tokenizer) :] == [b""] * 2


def test_the_bytes_of_words_that_stand_between_white_space():
    tokenizer = word_tokenizer(["the cat\nsat"])
    added = bytes_of_tokens(tokenizer, len(tokenizer))

    assert b"".join(added[index] for index in tokenizer("cat dog\nthe")["input_ids"]) == b" cat <unk>\n the"
    assert added[:4] == [b"", b" <unk>", b"", b"\n"]


@pytest.mark.parametrize("kind", ["words", "pieces"])
def test_the_bytes_of_added_words_have_the_space_that_decoding_writes(kind):
    tokenizer = word_tokenizer(["the cat"])
    if kind == "pieces":
        backend = Tokenizer(models.WordPiece({"<unk>": 0, "the": 1, "cat": 2, "##s": 3}, unk_token="<unk>"))
        backend.decoder = decoders.WordPiece()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.add_tokens(["fox2", "狐狸", AddedToken("<end>", special=True)])
    words = ["cat", "fox2", "the", "狐狸", "cat"]
    added = bytes_of_tokens(tokenizer, len(tokenizer))

    ids = tokenizer.convert_tokens_to_ids(words)

    assert b"".join(added[index] for index in ids).decode() == f" {tokenizer.decode(ids)}" == " cat fox2 the 狐狸 cat"
    assert added[-1] == b""


def test_the_bytes_of_added_tokens_are_what_they_are_called(tokenizer):
    """Whether GPT-2 has letters for them or not."""
    tokenizer, words = copy.deepcopy(tokenizer), ["two words", "<|user|>", "naïveté", "鳥 啼"]
    tokenizer.add_tokens([*words, AddedToken("<end>", special=True)])

    added = bytes_of_tokens(tokenizer, len(tokenizer) + 2)

    assert added[-7:] == [*(word.encode() for word in words), b"", b"", b""]


def test_the_bytes_of_tokens_with_gaps_between_their_ids():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 3, "b": 9}, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")

    assert bytes_of_tokens(tokenizer, 11) == [b"", b"", b"", b"a", b"", b"", b"", b"", b"", b"b", b""]


def test_special_tokens_have_the_first_ids_and_are_not_added(tokenizer):
    specials = ["<pad>", "<unk>", "<bos>", "<eos>"]

    assert tokenizer.convert_tokens_to_ids(specials) == [0, 1, 2, 3]
    assert [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token] == specials
    assert min(tokenizer(TEXTS[0])["input_ids"]) > 3
    assert tokenizer.decode([2, *tokenizer("a")["input_ids"], 3], skip_special_tokens=True) == "a"


ROLES = ["<|user|>", "<|assistant|>"]


@pytest.mark.parametrize("name", [*MAKERS, "words"])
@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
def test_tokens_in_a_call_are_letters_in_raw_text(name, special, tmp_path):
    tokenizer = MAKERS[name]() if name in MAKERS else word_tokenizer(["a b <|user|>x"])
    tokenizer.add_tokens(ROLES, special_tokens=special)
    user, assistant = tokenizer.convert_tokens_to_ids(ROLES)
    tokenizer.save_pretrained(tmp_path)
    text = "<|user|>a<eos><|assistant|>b<bos><pad>"

    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        letters = encode([text], one)[0].tolist()
        stream = TokenStream.from_documents([text], one)

        assert [id for id in one(text)["input_ids"] if id in (0, 2, 3, user, assistant)] == [user, 3, assistant, 2, 0]
        words = (
            {user, assistant} if name.endswith("words") and not special else set()
        )  # ordinary ones, that were added
        assert set(letters) & {0, 2, 3, user, assistant} == words
        assert stream[:].tolist() == letters
        assert one(text)["input_ids"] == tokenizer(text)["input_ids"]  # as before: nothing was set on it


def test_a_chat_template_writes_its_markers(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(ROLES, special_tokens=True)
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}]

    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = one.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

        assert ids == [260, 4 + ord("H"), 4 + ord("i"), 3, 261, 4 + ord("A"), 3, 261]


def test_words_know_unk_and_eos_alone():
    tokenizer = word_tokenizer(["the cat sat"])
    text = "the <unk> <eos> <pad> <bos> cat<eos>\n"

    (ids,), (spans,) = encode([text], tokenizer, offsets=True)

    assert ids.tolist() == [tokenizer.convert_tokens_to_ids("the"), 1, 3, 1, 1, 1, 3]
    assert spans[:3].tolist() == [[0, 3], [4, 9], [10, 15]]


@pytest.mark.parametrize("length", [1, 7, 20, 100])
def test_a_text_read_in_pieces_has_the_tokens_and_offsets_of_the_whole(monkeypatch, length):
    texts = ["line one\nline two\n" + "x" * 50 + "\nénd", "", "床前明月光"]
    tokenizer = char_tokenizer(texts)
    whole = tokenizer(texts, return_offsets_mapping=True)
    monkeypatch.setattr(tokenizers, "PIECE_LENGTH", length)
    monkeypatch.setattr(tokenizers, "BATCH_CHARACTERS", 30)

    ids, spans = encode([*texts, None], tokenizer, offsets=True)

    assert [part.tolist() for part in ids] == [*whole["input_ids"], []]
    assert [list(map(tuple, part.tolist())) for part in spans] == [*whole["offset_mapping"], []]
    assert [part.tolist() for part in encode([*texts, None], tokenizer)] == [*whole["input_ids"], []]


def test_half_a_character_is_named_by_its_place_in_a_long_text(monkeypatch):
    """And not by its place in a piece of the text."""
    monkeypatch.setattr(tokenizers, "PIECE_LENGTH", 4)

    with pytest.raises(ValueError, match=r"The text holds '\\udcff' at character 10, half of"):
        encode(["0123456789\udcff"], byte_tokenizer())


def test_added_words_are_words():
    tokenizer = word_tokenizer(["the cat sat"])
    tokenizer.add_tokens(["cat", "dog"])
    tokenizer.add_special_tokens({"sep_token": "sat"})

    the, cat, dog = tokenizer.convert_tokens_to_ids(["the", "cat", "dog"])
    assert encoded(["the cat", "dog sat"], tokenizer) == [[the, cat], [dog, 1]]


MARKED = ["a <bos> b", "<pad><sep>a", "b<eos>"]


def pieces_with_markers(model, pre_tokenizer=None):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokenizers.SPECIAL_TOKENS)
    fast.add_special_tokens({"sep_token": "<sep>"})
    return fast


NAMES = [
    "<pad>",
    "<unk>",
    "<bos>",
    "<eos>",
    "<sep>",
    *"abdeopsx<> ",
    "##<",
    "##>",
    *(f"##{letter}" for letter in "abdeops"),
]
MERGES = [("<", "s"), ("e", "p"), ("ep", ">"), ("<s", "ep>"), ("<sep>", "x")]
MODELS = {
    "unigram": lambda: pieces_with_markers(models.Unigram([(name, -len(name) / 9) for name in NAMES[:16]], unk_id=1)),
    "wordpiece": lambda: pieces_with_markers(
        models.WordPiece({name: index for index, name in enumerate(NAMES)}, unk_token="<unk>"), WhitespaceSplit()
    ),
    "merges": lambda: pieces_with_markers(
        models.BPE({name: index for index, name in enumerate([*NAMES[:16], "<s", "ep", "ep>", "<sep>x"])}, MERGES)
    ),
    "whole pieces": lambda: pieces_with_markers(
        models.BPE({name: index for index, name in enumerate(NAMES[:16])}, [], ignore_merges=True), WhitespaceSplit()
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_pieces_of_a_vocabulary_that_are_markers_are_letters_in_raw_text(name):
    tokenizer = MODELS[name]()
    markers = set(tokenizer.all_special_ids)

    letters = encoded(MARKED, tokenizer)

    assert tokenizer(MARKED[1])["input_ids"][:2] == [0, 4]
    assert not {index for ids in letters for index in ids} & (markers - {1})
    spelt = ["".join(tokenizer.convert_ids_to_tokens(ids)).replace("##", "") for ids in letters]
    assert [text.replace(" ", "") for text in spelt] == [text.replace(" ", "") for text in MARKED]


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer.add_tokens(["  "]),
        lambda tokenizer: tokenizer.add_special_tokens({"sep_token": "b"}),
        lambda tokenizer: setattr(
            tokenizer.backend_tokenizer, "model", models.WordLevel({"b": 7, "<unk>": 1}, "<unk>")
        ),
        lambda tokenizer: setattr(tokenizer.backend_tokenizer, "pre_tokenizer", WhitespaceSplit()),
    ],
    ids=["white space", "special", "model", "pre-tokenizer"],
)
def test_raw_text_is_read_by_the_tokenizer_as_it_is(change):
    read, fresh = (char_tokenizer(["b <a"]) for _ in range(2))
    before = encoded(["a  b"], read)
    for tokenizer in (read, fresh):
        change(tokenizer)

    assert encoded(["a  b"], read) == encoded(["a  b"], fresh) != before


def test_added_white_space_is_a_token_in_raw_text():
    """As models of code have it for ordinary text."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["    "])

    assert encode(["    a"], tokenizer)[0].tolist() == tokenizer("    a")["input_ids"] == [260, 4 + ord("a")]


def test_a_tokenizer_of_version_0_1_0_keeps_its_setting(tmp_path):
    bytes_of_version_0_1_0().save_pretrained(tmp_path)

    loaded = AutoTokenizer.from_pretrained(tmp_path)

    assert loaded("<eos>")["input_ids"] == encode(["<eos>"], loaded)[0].tolist()
    assert len(loaded("<eos>")["input_ids"]) == 5


def test_raw_text_and_calls_do_not_disturb_each_other():
    tokenizer = bpe_tokenizer(TEXTS * 3, vocab_size=300)
    texts = ["a<eos>", "<eos>b" * 40]
    raw, called = encode(texts, tokenizer), tokenizer(texts)["input_ids"]

    def stays(number):
        if number % 2:
            return all(map(numpy.array_equal, encode(texts, tokenizer), raw))
        return tokenizer(texts, padding=True)["input_ids"][1] == called[1]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(stays, range(100)))


def test_a_changed_normalizer_changes_raw_text():
    tokenizer = char_tokenizer(["e\u0301é"])
    before = encode(["e\u0301"], tokenizer)

    tokenizer.backend_tokenizer.normalizer = NFC()

    assert [len(ids) for ids in before + encode(["e\u0301"], tokenizer)] == [2, 1]


@pytest.mark.parametrize("text", ["ab\ud83d", "\udcff"])
def test_half_a_character_is_refused(text):
    with pytest.raises(
        ValueError, match=r"The text holds '\\ud\w+' at character \d, half of a surrogate pair or a byte"
    ):
        encode(["fine", text], byte_tokenizer())


def test_slow_tokenizers_read_letters():
    class Slow(PythonBackend):
        vocab_size = 128

        def get_vocab(self):
            return {chr(code): code for code in range(128)} | self._added_tokens_encoder

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return ord(token)

        def _convert_id_to_token(self, index):
            return chr(index)

    tokenizer = Slow(eos_token="<eos>")

    assert tokenizer("a<eos>")["input_ids"] == [97, tokenizer.eos_token_id]
    assert encode(["a<eos>"], tokenizer)[0].tolist() == [ord(letter) for letter in "a<eos>"]
    with pytest.raises(ValueError, match="Slow is a slow tokenizer, which returns no offsets: give a fast one"):
        encode(["a"], tokenizer, offsets=True)


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


@pytest.mark.parametrize("name", ["char", "char with bytes", "byte"])
def test_offsets_are_those_of_characters(name):
    text = "é床 ab"
    encoding = MAKERS[name]()(text, return_offsets_mapping=True)

    starts = [start for start, _ in encoding["offset_mapping"]]
    assert sorted(set(starts)) == [0, 1, 2, 3, 4]
    assert all(end == start + 1 for start, end in encoding["offset_mapping"])


@pytest.mark.parametrize("text", TEXTS, ids=["chinese", "english", "marks", "specials"])
def test_offsets_cover_the_text(tokenizer, text):
    """In order, without a gap: what each token was made of."""
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]

    assert (spans[0][0], spans[-1][1]) == (0, len(text))
    for (start, end), (next_start, next_end) in pairwise(spans):
        assert next_start == end or (start <= next_start < end <= next_end)  # several bytes of one character


def test_batches_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["a床b", "a"], padding=True)

    assert set(batch) == {"input_ids", "attention_mask"}
    length = len(batch["input_ids"][0])
    assert length > 1
    assert batch["attention_mask"] == [[1] * length, [0] * (length - 1) + [1]]
    assert batch["input_ids"][1][0] == tokenizer.pad_token_id


def test_tokenizers_have_no_maximum_length(tokenizer):
    assert tokenizer.model_max_length > 10**20


def test_saved_tokenizers_need_no_code_of_ours(tmp_path):
    made = {name: make() for name, make in MAKERS.items()}
    for name, tokenizer in made.items():
        assert type(tokenizer) is PreTrainedTokenizerFast
        tokenizer.save_pretrained(tmp_path / name)
        assert AutoTokenizer.from_pretrained(tmp_path / name).decode(tokenizer(TEXTS[1])["input_ids"]) == (
            tokenizer.decode(tokenizer(TEXTS[1])["input_ids"])
        )
    program = (
        "import json, sys; from transformers import AutoTokenizer\n"
        f"for name in {list(made)!r}:\n"
        f"    tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r} + '/' + name)\n"
        f"    print(json.dumps([tokenizer(text)['input_ids'] for text in {TEXTS!r}]), tokenizer.padding_side)\n"
        "print('hf_lstm' in sys.modules)"
    )

    ran = run_program(program)

    assert ran.returncode == 0, ran.stderr
    expected = [f"{[tokenizer(text)['input_ids'] for text in TEXTS]} left" for tokenizer in made.values()]
    assert ran.stdout.splitlines() == [*expected, "False"]


def test_a_vocabulary_needs_texts():
    with pytest.raises(ValueError, match="`texts` contain no characters"):
        char_tokenizer([""])
    with pytest.raises(ValueError, match=r"`texts` is one str.*`\[text\]`"):
        char_tokenizer("abc")
    with pytest.raises(ValueError, match=r"`texts` is one str.*`\[text\]`"):
        word_tokenizer("abc")
    with pytest.raises(ValueError, match=r"`texts` is one str.*`\[text\]`"):
        bpe_tokenizer("abc", 300)
    with pytest.raises(ValueError, match="`texts` contain no characters"):
        bpe_tokenizer(["", None], 300)
    with pytest.raises(ValueError, match=r"`vocab_size` \(260\) must be at least 261, to hold the 4 special tokens"):
        bpe_tokenizer(["abc"], 260)
    with pytest.raises(ValueError, match=r"`split` \('lines'\) must be `whitespace` or `unicode`"):
        word_tokenizer(["abc"], split="lines")
    with pytest.raises(ValueError, match="`texts` has the splits train, test: give the texts of one"):
        char_tokenizer({"train": ["a"], "test": ["b"]})
    with pytest.raises(ValueError, match="`texts` contain no word that occurs 3 times"):
        word_tokenizer(["a a b", "<eos> <unk> <unk> <unk>"], min_frequency=3)
    with pytest.raises(
        ValueError, match=r"`vocab_size` \(4\) must be at least 5, to hold the 4 special tokens and a word"
    ):
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
def test_words_round_trip(text, tmp_path):
    word_tokenizer([text]).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.mark.parametrize("name", ["byte", "char with bytes", "bpe"])
def test_every_text_round_trips(name):
    tokenizer = MAKERS[name]()

    @settings(max_examples=300, deadline=None)
    @given(UNICODE)
    def check(text):
        ids = encode([text], tokenizer)[0].tolist()
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids

    check()


@settings(max_examples=100, deadline=None)
@given(UNICODE.filter(bool))
def test_known_unicode_words_round_trip(text):
    tokenizer = word_tokenizer([text], split="unicode")

    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.text("aé床,.", min_size=1, max_size=4), min_size=1, max_size=5), min_size=1, max_size=4))
def test_words_of_normalised_text_round_trip(lines):
    text = "\n".join(" ".join(line) for line in lines) + "\n"
    tokenizer = word_tokenizer([text])

    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@settings(max_examples=100, deadline=None)
@given(UNICODE.filter(bool))
def test_composed_text_round_trips(text):
    tokenizer = char_tokenizer([text], nfc=True)

    assert tokenizer.decode(tokenizer(text)["input_ids"]) == NFC().normalize_str(text)


def test_composing_makes_one_character_of_two():
    assert len(char_tokenizer(["e\u0301é"], nfc=True)("e\u0301é")["input_ids"]) == 2
    assert len(char_tokenizer(["e\u0301é"])("e\u0301é")["input_ids"]) == 3


def test_unseen_characters_become_bytes_with_byte_fallback():
    tokenizer = char_tokenizer(["ab"], byte_fallback=True)

    assert len(tokenizer) == 4 + 2 + 256
    assert tokenizer("a床b")["input_ids"] == [4, *(6 + byte for byte in "床".encode()), 5]
    assert tokenizer.decode(tokenizer("<0x41>")["input_ids"]) == "<0x41>"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.binary(max_size=3) | st.sampled_from(["你".encode(), "é".encode(), b"a"]), max_size=8).map(b"".join)
)
def test_bytes_decode_as_pythons(data):
    assert BYTES.decode([4 + byte for byte in data]) == data.decode("utf-8", errors="replace")


BYTES = byte_tokenizer()


def test_bytes_are_told_as_pythons():
    critical = [0x41, 0x80, 0xA0, 0xE0, 0xED, 0xF0]
    for data in chain.from_iterable(product(critical, repeat=length) for length in (1, 2, 3, 4)):
        decoder = StreamDecoder(BYTES)

        text = "".join(decoder.step(4 + byte) for byte in data)

        assert text + decoder.waiting == text + decoder.end() == bytes(data).decode(errors="replace")


def test_half_a_surrogate_pair_does_not_wait():
    decoder = StreamDecoder(BYTES)

    pieces = [decoder.step(4 + byte) for byte in b"a\xed\xa0b"]

    assert pieces == ["a", "", "\ufffd\ufffd", "b"]


def test_one_bad_byte_spoils_no_text():
    text = "hello world, naïve café 你好"
    ids = BYTES(text)["input_ids"][:-1]

    assert BYTES.decode(ids) == text[:-1] + "\ufffd"


def test_a_bad_byte_among_characters_spoils_its_run_alone():
    tokenizer = char_tokenizer(["ab"], byte_fallback=True)
    ids = tokenizer("a床b前a")["input_ids"]

    assert tokenizer.decode(ids[:2] + ids[4:]) == "a\ufffdb前a"


def bytes_of_version_0_1_0():
    """Its decoder works by runs: a single bad byte makes U+FFFD of each byte around it."""
    names = ["<pad>", "<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokenizers.SPECIAL_TOKENS, split_special_tokens=True)


def foreign(decoder, **options):
    names = ["[UNK]", "▁a", "▁床", "b", "##c", "▁", "'", "s", "<0xE5>", "<0xBA>", "<0x8A>", ".", "<s>"]
    model = models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>", **options)


CONTINUED = MAKERS | {
    "words": lambda: word_tokenizer(["roses are red\nviolets are blue\n the end"]),
    "bytes of another decoder": bytes_of_version_0_1_0,
    "metaspace": lambda: foreign(decoders.Metaspace()),
    "wordpiece": lambda: foreign(decoders.WordPiece()),
    "no decoder": lambda: foreign(None),
    "llama": lambda: foreign(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    ),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_prompt_and_continuation_are_the_whole_decoded(name):
    tokenizer = CONTINUED[name]()
    shown = ends_lines(tokenizer)
    choose, runs = random.Random(0), "ByteFallback" in repr(tokenizer.backend_tokenizer.decoder)
    for _ in range(60):
        ids = [choose.randrange(len(tokenizer)) for _ in range(12)]
        start, end = choose.randrange(9), choose.randrange(9, 13)
        whole = tokenizer.decode(ids[:end], skip_special_tokens=not shown)
        if runs and "\ufffd" in whole:
            continue  # a decoder by runs takes back what was told
        before = StreamDecoder(tokenizer)
        prompt = "".join(before.step(token) for token in ids[:start])
        decoder = StreamDecoder(tokenizer, ids[:start])

        text = "".join(decoder.step(token) for token in ids[start:end]) + decoder.end()

        assert prompt + text == whole


def test_bytes_of_version_0_1_0_are_told_at_once():
    tokenizer = bytes_of_version_0_1_0()
    data = b"a\xff\xfe" + "é床".encode() + b"\xe5\xba" + b"z"
    decoder = StreamDecoder(tokenizer, [4 + ord("x")])

    pieces = [decoder.step(4 + byte) for byte in data]

    assert pieces == ["a", "\ufffd", "\ufffd", "", "é", "", "", "床", "", "", "\ufffd\ufffdz"]
    assert tokenizer.decode([4 + byte for byte in data]) == "\ufffd" * len(data)


@pytest.mark.parametrize("after", [[], [5]], ids=["end", "letter"])
def test_half_a_character_among_characters(after):
    tokenizer = char_tokenizer(["ab"], byte_fallback=True)
    ids = [*tokenizer("a床")["input_ids"][:-1], *after]
    decoder = StreamDecoder(tokenizer, ids[:1])

    text = "".join(decoder.step(token) for token in ids[1:])

    assert "a" + text + decoder.waiting == tokenizer.decode(ids) == "a\ufffd\ufffd" + "b" * len(after)


def test_incomplete_characters_are_held_back():
    decoder = StreamDecoder(BYTES)

    pieces = [(decoder.step(4 + byte), decoder.waiting) for byte in "a床".encode()[:3]]

    assert pieces == [("a", ""), ("", "\ufffd"), ("", "\ufffd")]
    assert StreamDecoder(BYTES, decoder.context).step(4 + "床".encode()[2]) == "床"
    assert decoder.end() == "\ufffd"
    assert decoder.step(4 + ord("b")) == "b"


def test_decoding_costs_the_same_after_any_text():
    tokenizer = word_tokenizer(["a b"])
    lengths, decode = [], tokenizer.decode
    tokenizer.decode = lambda ids: (lengths.append(len(ids)), decode(ids))[1]
    decoder = StreamDecoder(tokenizer, [4, 5] * 500)
    for _ in range(50):
        decoder.step(4)

    assert max(lengths) == StreamDecoder.CONTEXT + 1


def test_unicode_words_are_those_of_raw_text():
    tokenizer = word_tokenizer(["Don't stop, 床前 naïve\n\n 3rd."], split="unicode")

    assert tokenizer.tokenize("Don't stop, 床前 naïve\n\n 3rd.") == [
        *("Don", "'", "t", " stop", ",", " 床", "前", " naïve", "\n", "\n", " 3rd", "."),
    ]
    assert tokenizer("stop")["input_ids"] == [tokenizer.unk_token_id]  # without its space it is another word


def test_pieces_of_words_are_learnt():
    tokenizer = bpe_tokenizer(["the cat sat on the mat, the cat"] * 5, vocab_size=270)

    assert len(tokenizer) == 270
    assert tokenizer.tokenize("the cat")[0] == "the"
    assert len(bpe_tokenizer(["aa"], vocab_size=1000)) == 260  # no pair occurs twice


def test_long_texts_are_read_in_pieces(monkeypatch):
    text = "one two, three\nfour five seven, eight nine ten" * 20
    expected = [
        tokenizer.get_vocab() for tokenizer in (word_tokenizer([text]), word_tokenizer([text], split="unicode"))
    ]

    monkeypatch.setattr(tokenizers, "PIECE_LENGTH", 25)

    pieces = list(tokenizers.pieces_of(text))
    assert all(len(piece) <= 25 for piece in pieces)
    assert len(pieces) > 15
    assert "".join(pieces) == text
    assert expected == [
        tokenizer.get_vocab() for tokenizer in (word_tokenizer([text]), word_tokenizer([text], split="unicode"))
    ]
