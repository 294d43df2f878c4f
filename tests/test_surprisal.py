"""Surprisal is -log of the probability, of each token, word, region and sentence, however it is computed."""

import csv
import importlib
import math
from itertools import product

import numpy
import pandas
import pytest
import reference
import torch
from conftest import make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_lstm import (
    bpe_tokenizer,
    byte_tokenizer,
    char_tokenizer,
    evaluate_stream,
    minimal_pairs,
    surprisal,
    word_surprisal,
    word_tokenizer,
)

MODULE = importlib.import_module("hf_lstm.evaluation.surprisal")  # an import gives the function of that name
TEXTS = ["the horse raced past the barn fell", "the barn", "a", " horse  fell "]
CHARACTERS = char_tokenizer([*TEXTS, "x"])


def model_for(tokenizer, **config):
    return make_model(vocab_size=len(tokenizer), **config)


def expected_nats(model, ids, start=()):
    """Each text read alone, token by token."""
    ids = torch.tensor([*start, *ids])
    logits = model(ids[None]).logits[0].log_softmax(dim=-1)
    return -logits[:-1].gather(1, ids[1:, None])[:, 0]


def test_the_sum_is_the_probability_by_brute_force():
    """Every text of up to two letters and some of three: its probability by the equations, letter by letter."""
    tokenizer = char_tokenizer(["abc"])
    model = model_for(tokenizer, cell_type="gru")
    texts = ["".join(letters) for length in (1, 2) for letters in product("abc", repeat=length)]
    texts += ["aab", "bca", "ccc"]

    frame = surprisal(model, tokenizer, texts, start_token="<eos>")

    sums, weights = frame.groupby("text")["surprisal"].sum(), reference.weights_of(model)
    for number, text in enumerate(texts):
        ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
        logits, _ = reference.language_model(ids, weights, "gru")
        probability = 1.0
        for scores, token in zip(logits, ids[1:], strict=False):
            exponentials = [math.exp(score.value) for score in scores]
            probability *= exponentials[token] / sum(exponentials)
        assert sums[number] == pytest.approx(-math.log2(probability), rel=1e-6)


@pytest.mark.parametrize("start_token", [None, "<eos>"])
@pytest.mark.parametrize(("batch_size", "bptt_length"), [(1, 1000), (2, 7), (8, 256), (100, 1)])
def test_batching_does_not_change_surprisal(start_token, batch_size, bptt_length, cell):
    model = model_for(CHARACTERS, **cell).train()
    options = {"batch_size": batch_size, "bptt_length": bptt_length}

    frame = surprisal(model, CHARACTERS, TEXTS, math.e, start_token, **options)

    assert model.training
    model.eval()
    assert frame["text"].value_counts(sort=False).tolist() == [len(text) for text in TEXTS]
    assert "".join(frame["token"]) == "".join(TEXTS)
    for number, text in enumerate(TEXTS):
        rows, ids = frame[frame["text"] == number], CHARACTERS(text)["input_ids"]
        assert rows["start"].tolist() == list(range(len(text)))
        assert rows["end"].tolist() == list(range(1, len(text) + 1))
        actual = torch.tensor(rows["surprisal"].to_numpy())
        start = [] if start_token is None else [CHARACTERS.eos_token_id]
        if start_token is None:
            assert actual[0].isnan()
            actual = actual[1:]
        torch.testing.assert_close(actual, expected_nats(model, ids, start), rtol=1e-5, atol=1e-5)


def test_many_texts_of_many_lengths():
    generator = numpy.random.default_rng(0)
    texts = ["".join(generator.choice(list("abc "), size=generator.integers(1, 40))) for _ in range(200)]
    tokenizer = char_tokenizer(["abc "])
    model = model_for(tokenizer)

    frames = [surprisal(model, tokenizer, texts, batch_size=size, bptt_length=23) for size in (1, 6, 300)]

    for frame in frames[1:]:
        numpy.testing.assert_allclose(frame["surprisal"], frames[0]["surprisal"], rtol=1e-5)


def test_a_large_vocabulary_is_read_in_small_pieces(monkeypatch):
    model = model_for(CHARACTERS)
    expected = surprisal(model, CHARACTERS, TEXTS)
    shapes, head = [], model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: shapes.append(x.shape[:2].numel()) or head(x))
    monkeypatch.setattr(MODULE, "MAX_LOGITS", 8 * 3 * len(CHARACTERS))

    frame = surprisal(model, CHARACTERS, TEXTS)

    assert max(shapes) <= 8 * 3
    numpy.testing.assert_allclose(frame["surprisal"], expected["surprisal"], rtol=1e-6)


def test_the_mean_is_the_loss_of_the_stream():
    model = model_for(CHARACTERS)
    tokens = torch.tensor(CHARACTERS(TEXTS[0])["input_ids"])

    frame = surprisal(model, CHARACTERS, TEXTS[:1])

    assert frame["surprisal"].mean() == pytest.approx(evaluate_stream(model, tokens)["bits_per_token"], rel=1e-6)


def test_a_long_text_is_read_in_pieces(monkeypatch):
    text = "one two three four\nfive six seven"
    tokenizer = bpe_tokenizer([text] * 4, vocab_size=265)
    model = model_for(tokenizer)
    whole = surprisal(model, tokenizer, [text])

    monkeypatch.setattr("hf_lstm.tokenizers.PIECE_LENGTH", 20)
    pieces = surprisal(model, tokenizer, [text])

    assert len(whole) > 10
    assert pieces.equals(whole)


def test_white_space_belongs_to_the_word_behind_it():
    model = model_for(CHARACTERS)
    tokens = surprisal(model, CHARACTERS, TEXTS, start_token="<eos>")

    words = word_surprisal(tokens, TEXTS)

    assert words["word"].tolist() == [word for text in TEXTS for word in text.split()]
    assert [TEXTS[row.text][row.start : row.end] for row in words.itertuples()] == words["word"].tolist()
    assert words["tokens"].tolist() == [3, 6, 6, 5, 4, 5, 5, 3, 5, 1, 6, 7]  # " horse", "  fell "
    costs = tokens[tokens["text"] == 0]["surprisal"]
    assert words["surprisal"][1] == pytest.approx(costs[3:9].sum())
    for number in range(len(TEXTS)):
        total = tokens[tokens["text"] == number]["surprisal"].sum()
        assert words[words["text"] == number]["surprisal"].sum() == pytest.approx(total)


def test_pieces_of_a_word_are_summed():
    texts = ["the unhappiest horse", "of them"]
    tokenizer = bpe_tokenizer(texts * 3, vocab_size=270)
    tokens = surprisal(model_for(tokenizer), tokenizer, texts)

    words = word_surprisal(tokens, texts)

    assert words["word"].tolist() == ["the", "unhappiest", "horse", "of", "them"]
    assert words["tokens"].sum() == len(tokens) > 5
    assert words["surprisal"].isna().tolist() == [True, False, False, True, False]  # nothing predicts the first token
    unhappiest = tokens[(tokens["text"] == 0) & (tokens["start"] >= 3) & (tokens["end"] <= 14)]
    assert "".join(unhappiest["token"]) == " unhappiest"
    assert words["surprisal"][1] == pytest.approx(unhappiest["surprisal"].sum())


def test_regions_are_summed_wherever_their_borders_stand():
    """With the space before a region or without it: the same region, the same sum."""
    model = model_for(CHARACTERS)
    tokens = surprisal(model, CHARACTERS, TEXTS, start_token="<eos>")
    costs = tokens[tokens["text"] == 0]["surprisal"]

    regions = word_surprisal(tokens, TEXTS, [[(4, 15), (15, 34)], [], [(0, 1)], [(0, 13), (1, 6)]])
    others = word_surprisal(tokens, TEXTS, [[(3, 15), (16, 34)], [], [(0, 1)], []])

    assert regions["word"].tolist() == ["horse raced", " past the barn fell", "a", TEXTS[3], "horse"]
    assert regions["surprisal"][0] == pytest.approx(costs[3:15].sum())
    assert regions["surprisal"][1] == pytest.approx(costs[15:].sum())
    numpy.testing.assert_allclose(regions["surprisal"][:3], others["surprisal"])
    costs = tokens[tokens["text"] == 3]["surprisal"].to_numpy()
    assert regions["surprisal"][3] == pytest.approx(costs.sum())  # regions may overlap
    assert regions["surprisal"][4] == pytest.approx(costs[:6].sum())


def test_the_words_as_regions_are_the_words():
    tokens = surprisal(model_for(CHARACTERS), CHARACTERS, TEXTS)
    words = word_surprisal(tokens, TEXTS)
    spans = [[(row.start, row.end) for row in words[words["text"] == number].itertuples()] for number in range(4)]

    assert word_surprisal(tokens, TEXTS, spans).equals(words)


def test_a_word_in_which_no_token_begins_has_no_surprisal():
    """Not 0 bits, which would be certainty: white space, and half of a piece."""
    text = "the unhappy the unhappy"
    tokenizer = bpe_tokenizer([text] * 9, vocab_size=300)
    tokens = surprisal(model_for(tokenizer), tokenizer, [text], start_token="<eos>")

    regions = word_surprisal(tokens, [text], [[(3, 4), (6, 11), (4, 11)]])

    assert " unhappy" in tokens["token"].tolist()
    assert regions["tokens"].tolist() == [0, 0, 1]
    assert regions["surprisal"].isna().tolist() == [True, True, False]


def test_every_tokenizer_says_where_its_tokens_stand():
    text = "to be 床 to be"
    for tokenizer in (byte_tokenizer(), word_tokenizer([text]), bpe_tokenizer([text], 262)):
        tokens = surprisal(model_for(tokenizer), tokenizer, [text], start_token="<eos>")

        words = word_surprisal(tokens, [text])

        assert words["word"].tolist() == ["to", "be", "床", "to", "be"]
        assert words["tokens"].min() >= 1
        assert words["surprisal"].sum() == pytest.approx(tokens["surprisal"].sum())


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of a test."""
    warnings = []
    monkeypatch.setattr(MODULE.logger, "warning", warnings.append)
    return warnings


def test_unknown_words_are_marked_counted_and_told_once(warnings):
    tokenizer = word_tokenizer(["to be or not"])
    texts = ["to sleep to dream", "to be", "perchance to sleep"]

    tokens = surprisal(model_for(tokenizer), tokenizer, texts, start_token="<eos>")
    regions = word_surprisal(tokens, texts, [[(0, 8), (3, 17), (2, 3)], [(0, 5)], [(0, 18)]])

    assert tokens["token"].tolist() == ["to", "<unk>", "to", "<unk>", "to", "be", "<unk>", "to", "<unk>"]
    assert tokens["unknown"].dtype == bool
    assert tokens["unknown"].tolist() == [token == "<unk>" for token in tokens["token"]]
    assert word_surprisal(tokens, texts)["unknown"].tolist() == tokens["unknown"].astype(int).tolist()
    assert regions["unknown"].tolist() == [1, 2, 0, 0, 2]
    assert len(warnings) == 1
    assert "4 of 9 tokens, in 2 of 3 texts, are unknown to the tokenizer and scored as <unk>" in warnings[0]
    assert "('sleep', 'dream', 'perchance')" in warnings[0]


def test_unknown_characters_are_marked_within_their_words(warnings):
    tokens = surprisal(model_for(CHARACTERS), CHARACTERS, ["the Barn ÆØ"], start_token="<eos>")

    assert word_surprisal(tokens, ["the Barn ÆØ"])["unknown"].tolist() == [0, 1, 2]
    assert "3 of 11 tokens, in 1 of 1 texts" in warnings[0]


@pytest.mark.parametrize("make", [lambda: word_tokenizer(["to be"]), lambda: bpe_tokenizer(["to be"] * 2, 261)])
def test_known_text_is_never_marked_unknown(make, warnings):
    """An `<unk>` that stands in the text, as in WikiText, is what the text says; bytes know everything."""
    tokenizer = make()

    tokens = surprisal(model_for(tokenizer), tokenizer, ["to <unk> be", "be\nto"])

    assert not tokens["unknown"].any()
    assert warnings == []


@pytest.mark.parametrize("unk_token", [None, "<eos>"])
def test_a_tokenizer_without_an_unknown_token_of_its_own(unk_token, warnings):
    """GPT-2 names its end of text as the unknown token: what its bytes spell is never unknown."""
    tokenizer = bpe_tokenizer(["to be"] * 2, vocab_size=261)
    tokenizer.unk_token = unk_token

    tokens = surprisal(model_for(tokenizer), tokenizer, ["to sleep"], start_token="<eos>")

    assert not tokens["unknown"].any()
    assert warnings == []


def fast(model, cut, **names):
    backend = Tokenizer(model)
    backend.pre_tokenizer = cut
    backend.add_special_tokens([word for word in ("[UNK]", "<eos>") if word in backend.get_vocab()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.mark.parametrize("names", [{}, {"unk_token": "<unk>"}], ids=["none", "another"])
@pytest.mark.parametrize("kind", ["words", "pieces", "unigrams"])
def test_the_unknown_token_is_the_one_that_the_model_has(kind, names, warnings):
    """The tokenizer's wrapper may name another unknown token, or none."""
    words = ["[UNK]", "the", "fox", "<eos>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    model = {
        "words": lambda: models.WordLevel(vocabulary, unk_token="[UNK]"),
        "pieces": lambda: models.WordPiece(vocabulary, unk_token="[UNK]"),
        "unigrams": lambda: models.Unigram([(word, -1.0) for word in words], unk_id=0, byte_fallback=False),
    }[kind]()
    tokenizer = fast(model, pre_tokenizers.WhitespaceSplit(), eos_token="<eos>", **names)
    pairs = [{"sentence_good": "the zebra fox", "sentence_bad": "the lion fox"}]

    frame = minimal_pairs(model_for(tokenizer), tokenizer, pairs)

    assert frame[["unknown_good", "unknown_bad", "correct"]].to_numpy().tolist() == [[1, 1, 0.5]]
    assert "2 of 6 tokens, in 2 of 2 texts, are unknown to the tokenizer and scored as [UNK]" in warnings[0]


@pytest.mark.parametrize("byte_level", [True, False], ids=["bytes", "characters"])
def test_characters_that_a_tokenizer_drops_are_marked_in_their_words(byte_level, warnings):
    space = "Ġ" if byte_level else " "
    known = bpe_tokenizer(["é"], 261).backend_tokenizer.pre_tokenizer.pre_tokenize_str("é")[0][0]
    letters = ["<eos>", *"thefox", space, *(known if byte_level else "é")]
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else None
    tokenizer = fast(
        models.BPE({letter: index for index, letter in enumerate(letters)}, merges=[]), cut, eos_token="<eos>"
    )
    texts = ["the zebra fox", "Zfox é", "the fox é", "è hot"]  # half of the bytes of è are those of é

    words = word_surprisal(surprisal(model_for(tokenizer), tokenizer, texts, start_token="<eos>"), texts)

    marked = words[words["unknown"] > 0]["word"].tolist()
    assert marked == ["zebra", "Zfox", "è"]
    assert len(warnings) == 1
    assert "beside characters that are unknown to the tokenizer and dropped" in warnings[0]
    assert "'Z'" in warnings[0]


PAIRS = [
    {"sentence_good": "the barn", "sentence_bad": "barn the", "field": "syntax", "UID": "x"},
    {"sentence_good": "horse past", "sentence_bad": "past horse the", "field": "semantics", "UID": "y"},
    {"sentence_good": "the fell", "sentence_bad": "the fell", "field": "syntax", "UID": "y"},
]


@pytest.mark.parametrize("start_token", [None, "<eos>"])
def test_the_more_probable_sentence_is_chosen(start_token):
    model = model_for(CHARACTERS)
    start = [] if start_token is None else [CHARACTERS.eos_token_id]
    good, bad = (
        [-expected_nats(model, CHARACTERS(pair[name])["input_ids"], start).sum().item() for pair in PAIRS]
        for name in ("sentence_good", "sentence_bad")
    )

    frame = minimal_pairs(model, CHARACTERS, PAIRS, start_token)

    numpy.testing.assert_allclose(frame["log_probability_good"], good, rtol=1e-5)
    numpy.testing.assert_allclose(frame["log_probability_bad"], bad, rtol=1e-5)
    assert frame["correct"].dtype == float
    assert frame["correct"].tolist() == [float(good[0] > bad[0]), float(good[1] > bad[1]), 0.5]
    assert frame["tie"].tolist() == [False, False, True]
    assert frame["unknown_good"].tolist() == frame["unknown_bad"].tolist() == [0, 0, 0]
    assert frame["UID"].tolist() == ["x", "y", "y"]
    assert frame.groupby("field")["correct"].count().to_dict() == {"semantics": 1, "syntax": 2}


def test_pairs_that_differ_in_unknown_words_alone_are_ties(warnings):
    tokenizer = word_tokenizer(["the cat is here"])
    pairs = [
        {"sentence_good": "the dog is here", "sentence_bad": "the bird is here"},
        {"sentence_good": "the cat is here", "sentence_bad": "the cats is here"},
    ]

    frame = minimal_pairs(model_for(tokenizer), tokenizer, pairs, start_token="<eos>")

    assert frame["correct"][0] == 0.5
    assert frame["tie"].tolist() == [True, False]
    assert frame["unknown_good"].tolist() == [1, 0]
    assert frame["unknown_bad"].tolist() == [1, 1]
    assert len(warnings) == 1
    assert "3 of 16 tokens, in 3 of 4 texts, are unknown" in warnings[0]


def test_equal_texts_cost_the_same_to_the_last_bit():
    """Wherever they are cut, and whatever is read beside them."""
    texts = [text for other in ("past the", "fell") for text in (TEXTS[0], other)] + TEXTS[:1]

    frame = surprisal(
        model_for(CHARACTERS).float(), CHARACTERS, texts, start_token="<eos>", batch_size=2, bptt_length=7
    )

    costs = [frame[frame["text"] == number]["surprisal"].tolist() for number in (0, 2, 4)]
    assert costs[0] == costs[1] == costs[2]


def test_equal_scores_of_different_sentences_are_ties():
    model = model_for(CHARACTERS)
    model.lm_head.weight.data.zero_()  # all tokens are equally likely

    frame = minimal_pairs(model, CHARACTERS, [{"sentence_good": "the barn", "sentence_bad": "past her"}])

    assert frame["correct"].tolist() == [0.5]


NASTY = ["NA", "null", "None", "nan", "007", "1.50", "True", ",", ";", "#", "'", '"', '""', "\\", " ", "  x ", "\t"]
NASTY += ["\r", "\n", "\r\n", "a\rb", "\u2028", "\x85"]


def test_every_reader_finds_the_same_table_in_the_file(tmp_path):
    """Whatever a token holds: line ends, quotes, commas, and what looks like a number or like nothing."""
    tokenizer = char_tokenizer(NASTY)
    tokenizer.add_tokens([word for word in NASTY if len(word) > 1])
    tokens = surprisal(model_for(tokenizer), tokenizer, NASTY)
    words = word_surprisal(tokens, NASTY, [[(0, len(text))] for text in NASTY])

    for frame, column in ((tokens, "token"), (words, "word")):
        frame.to_csv(tmp_path / "table.csv", index=False, quoting=csv.QUOTE_NONNUMERIC)

        options = {"keep_default_na": False, "na_values": {"surprisal": ""}, "dtype": {column: str}}
        for engine in ("c", "python"):
            read = pandas.read_csv(tmp_path / "table.csv", engine=engine, **options)
            pandas.testing.assert_frame_equal(read, frame, check_dtype=False, rtol=1e-12)
        assert len(pandas.read_csv(tmp_path / "table.csv")) == len(frame)
        with (tmp_path / "table.csv").open(newline="") as file:
            assert [row[column] for row in csv.DictReader(file)] == frame[column].tolist()


SMALL = word_tokenizer(["a b"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: surprisal(m, CHARACTERS, "the barn"), "`texts` is one str"),
        (lambda m: surprisal(m, CHARACTERS, []), "`texts` is empty"),
        (lambda m: surprisal(m, CHARACTERS, ["a", ""]), "Text 1 is '': it must be a str with characters"),
        (lambda m: surprisal(m, CHARACTERS, [None]), "Text 0 is None"),
        (lambda m: surprisal(m, SMALL, ["a", " "]), "Text 1, ' ', becomes no token"),
        (lambda m: minimal_pairs(m, CHARACTERS, []), "`pairs` is empty"),
        (
            lambda m: minimal_pairs(m, CHARACTERS, [*PAIRS, {"sentence_good": "a", "sentence_bad": ""}]),
            "Pair 3 has no text in `sentence_bad`",
        ),
        (lambda m: surprisal(m, CHARACTERS, ["a"], base=1), r"`base` \(1\) must be a number above 1"),
        (lambda m: surprisal(m, CHARACTERS, ["a"], base=math.inf), r"`base` \(inf\) must be a number above 1"),
        (
            lambda m: surprisal(m, CHARACTERS, ["a", "a\ud800"]),
            r"Text 1 holds '\\ud800' at character 1, half of a surrogate pair",
        ),
        (lambda m: minimal_pairs(m, CHARACTERS, ["a", "b"]), "Pair 0 is 'a': it must be a dict"),
        (lambda m: surprisal(m, CHARACTERS, ["a"], batch_size=0), r"`batch_size` \(0\) must be at least 1"),
        (lambda m: surprisal(m, CHARACTERS, ["a"], batch_size="a"), r"`batch_size` \('a'\) must be an int"),
        (lambda m: surprisal(m, CHARACTERS, ["a"], bptt_length=2.5), r"`bptt_length` \(2.5\) must be an int"),
        (lambda m: surprisal(m, CHARACTERS, ["a"], top_k=2.5), r"`top_k` \(2.5\) must be from 0 to `vocab_size`"),
        (lambda m: surprisal(m, CHARACTERS, ["a"], base="2"), r"`base` \('2'\) must be a number above 1"),
        (lambda m: surprisal(m, CHARACTERS, None), r"`texts` \(None\) must be an iterable of texts"),
        (
            lambda m: surprisal(CHARACTERS, m, ["a"]),
            r"`tokenizer` \(LSTMForCausalLM\) must be a model and its tokenizer",
        ),
        (lambda m: word_surprisal([0.5], ["a"]), r"`tokens` \(list\) must be the table that `surprisal` returned"),
        (lambda m: word_surprisal(surprisal(m, CHARACTERS, ["a"]), [1]), "Text 0 is 1: it must be a str"),
        (lambda m: minimal_pairs(m, CHARACTERS, None), r"`pairs` \(NoneType\) must be a list of dicts"),
        (lambda m: surprisal(m, CHARACTERS, ["a"], start_token="<s>"), r"`start_token` \('<s>'\) is not a token"),
        (lambda m: surprisal(m, byte_tokenizer(), ["a"]), r"ids up to 259, and the model a vocabulary of \d+"),
        (lambda m: minimal_pairs(m, CHARACTERS, [*PAIRS, {"good": "a"}]), "Pair 3 has no text in `sentence_good`"),
        (
            lambda m: minimal_pairs(m, CHARACTERS, [{"sentence_good": "th", "sentence_bad": "a"}]),
            "single token of `sentence_bad` of pair 0",
        ),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call(model_for(CHARACTERS))


@pytest.mark.parametrize("regions", [5, [1, 2, 3, 4], [[1], [], [], []], [[(0, 1.5)], [], [], []]])
def test_what_is_not_a_pair_of_places_is_refused(regions):
    tokens = surprisal(model_for(CHARACTERS), CHARACTERS, TEXTS)

    with pytest.raises(
        ValueError, match=r"must be a (list for each text, of pairs|pair of int,) \(start, end\) in characters"
    ):
        word_surprisal(tokens, TEXTS, regions)


@pytest.mark.parametrize("region", [(0, 9), (-1, 3), (3, 3), (5, 4)])
def test_a_region_outside_its_text_is_refused(region):
    tokens = surprisal(model_for(CHARACTERS), CHARACTERS, TEXTS)

    with pytest.raises(ValueError, match=f"Region {region[0]} to {region[1]} lies outside text 1, which has 8"):
        word_surprisal(tokens, TEXTS, [[], [region], [], []])


def test_texts_must_match_the_tokens():
    tokens = surprisal(model_for(CHARACTERS), CHARACTERS, TEXTS)

    with pytest.raises(ValueError, match="belong to 4 texts, and there are 3"):
        word_surprisal(tokens, TEXTS[:3])
    with pytest.raises(ValueError, match="belong to 3 texts, and there are 4"):
        word_surprisal(tokens[tokens["text"] != 1], TEXTS)
    with pytest.raises(ValueError, match="for 1 texts, and there are 4"):
        word_surprisal(tokens, TEXTS, [[]])
    with pytest.raises(ValueError, match="`tokens` has no column `unknown`: give the table that `surprisal` returned"):
        word_surprisal(tokens.drop(columns="unknown"), TEXTS)


@pytest.mark.parametrize("start_token", [None, "<eos>"])
def test_a_nan_prediction_names_its_token(start_token):
    model = model_for(CHARACTERS, tie_word_embeddings=False).train()
    model.model.embed_tokens.weight.data[CHARACTERS.vocab["x"]] = math.nan
    texts = ["the horse", "the barn", "a xa", "fell x"]

    with pytest.raises(ValueError, match=f"token {3 if start_token is None else 4} of text 2 is NaN"):
        surprisal(model, CHARACTERS, texts, start_token=start_token)
    assert model.training
    surprisal(model, CHARACTERS, [texts[3]])  # nothing is predicted from the last token
