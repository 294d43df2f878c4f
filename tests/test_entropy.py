"""Entropy, its reduction, ranks and guesses are those of the distributions, however a table is computed."""

import csv
import io
import math

import numpy
import pandas
import pytest
import torch
from conftest import make_model

from hf_lstm import bpe_tokenizer, char_tokenizer, surprisal, word_surprisal
from hf_lstm.evaluation import distributions

TEXTS = ["the horse raced past the barn fell", "the barn", "a", " horse  fell ", "the barn"]
CHARACTERS = char_tokenizer([*TEXTS, "x"])
ADDED = ["entropy", "entropy_reduction", "rank"]


def model_for(tokenizer, **config):
    return make_model(vocab_size=len(tokenizer), **config)


def by_hand(model, ids):
    """Entropy after each token in nats, and log-probabilities, one entry at a time."""
    logs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1).tolist()
    return [-sum(math.exp(log) * log for log in row) for row in logs], logs


ADAPTIVE = {"adaptive_softmax_cutoffs": [5], "tie_word_embeddings": False}


@pytest.mark.parametrize("config", [{}, {"cell_type": "gru"}, ADAPTIVE], ids=["lstm", "gru", "adaptive softmax"])
@pytest.mark.parametrize("start_token", [None, "<eos>"])
@pytest.mark.parametrize(("batch_size", "bptt_length"), [(1, 1000), (2, 7), (100, 1)])
def test_entropy_is_the_sum_over_the_vocabulary(config, start_token, batch_size, bptt_length, monkeypatch):
    monkeypatch.setattr(distributions, "ENTRIES", 3 * len(CHARACTERS))
    model = model_for(CHARACTERS, **config)
    start = [] if start_token is None else [CHARACTERS.eos_token_id]
    options = {"batch_size": batch_size, "bptt_length": bptt_length}

    table = surprisal(model, CHARACTERS, TEXTS, math.e, start_token, **options, entropy=True, top_k=2)

    for number, text in enumerate(TEXTS):
        rows = table[table["text"] == number].reset_index(drop=True)
        ids = [*start, *CHARACTERS(text)["input_ids"]]
        entropies, logs = by_hand(model, ids)
        for place in range(len(text)):
            row, at = rows.iloc[place], place + len(start)
            if at == 0:
                assert row[[*ADDED, "guess_1", "probability_1", "guess_2", "probability_2"]].isna().all()
                continue
            before = logs[at - 1]
            assert row["entropy"] == pytest.approx(entropies[at - 1], abs=1e-10)
            assert row["entropy_reduction"] == pytest.approx(entropies[at - 1] - entropies[at], abs=1e-10)
            assert row["rank"] == 1 + sum(log > before[ids[at]] for log in before)
            best = sorted(range(len(before)), key=lambda token, before=before: -before[token])[:2]
            assert [row["guess_1"], row["guess_2"]] == [CHARACTERS.decode([token]) for token in best]
            probabilities = [math.exp(before[token]) for token in best]
            assert row[["probability_1", "probability_2"]].tolist() == pytest.approx(probabilities, abs=1e-10)


def test_surprisal_stays_the_same_to_the_last_bit():
    model = model_for(CHARACTERS)
    plain = surprisal(model, CHARACTERS, TEXTS)

    table = surprisal(model, CHARACTERS, TEXTS, entropy=True, top_k=1)

    assert table[plain.columns].equals(plain)
    assert list(table.columns) == [*plain.columns, *ADDED, "guess_1", "probability_1"]
    assert not set(ADDED) & set(surprisal(model, CHARACTERS, TEXTS, top_k=1))
    nats = surprisal(model, CHARACTERS, TEXTS, math.e, entropy=True)
    numpy.testing.assert_allclose(table["entropy"] * math.log(2), nats["entropy"], rtol=1e-12)
    numpy.testing.assert_allclose(table["entropy_reduction"] * math.log(2), nats["entropy_reduction"], atol=1e-12)


def test_a_word_has_the_entropy_of_its_first_piece_and_the_reduction_of_all():
    texts = ["the unhappiest horse ", "of them"]
    tokenizer = bpe_tokenizer(texts * 3, vocab_size=270)
    tokens = surprisal(model_for(tokenizer), tokenizer, texts, start_token="<eos>", entropy=True)

    words = word_surprisal(tokens, texts)
    regions = word_surprisal(tokens, texts, [[(4, 15), (0, 21)], [(1, 2)]])

    first = tokens.index[(tokens["text"] == 0) & (tokens["start"] >= 3)][0]
    last = tokens.index[(tokens["text"] == 0) & (tokens["end"] <= 14)][-1]
    assert last > first
    after = tokens["entropy"][last + 1]
    assert words["word"][1] == "unhappiest"
    assert words["entropy"][1] == tokens["entropy"][first]
    assert words["entropy_reduction"][1] == pytest.approx(tokens["entropy"][first] - after, abs=1e-12)
    assert regions["entropy"][0] == words["entropy"][1]
    own = tokens[tokens["text"] == 0]
    assert regions["entropy_reduction"][1] == pytest.approx(own["entropy_reduction"].sum(), abs=1e-12)
    assert regions[["entropy", "entropy_reduction"]].iloc[2].isna().all() == (regions["tokens"][2] == 0)
    plain = word_surprisal(tokens.drop(columns=ADDED), texts)
    assert words.drop(columns=ADDED[:2]).equals(plain)


def test_a_model_that_reads_backward_has_the_entropy_of_the_reversed_text():
    forward, backward = model_for(CHARACTERS), model_for(CHARACTERS, direction="backward")
    turned = [text[::-1] for text in TEXTS]

    table = surprisal(backward, CHARACTERS, TEXTS, entropy=True, top_k=1)
    words = word_surprisal(table, TEXTS, direction="backward")

    expected = surprisal(forward, CHARACTERS, turned, entropy=True, top_k=1)
    mirrored = word_surprisal(expected, turned)
    for number in range(len(TEXTS)):
        for actual, other, columns in (
            (table, expected, [*ADDED, "probability_1"]),
            (words, mirrored, ["entropy", "entropy_reduction"]),
        ):
            rows = actual[actual["text"] == number][columns].to_numpy()
            numpy.testing.assert_array_equal(rows, other[other["text"] == number][columns].to_numpy()[::-1])


def test_a_guess_that_is_certain_has_no_entropy():
    """Logits of -inf: 0 log 0 is 0."""
    found = distributions.Distributions(1, True, 1)

    found.add(torch.tensor([[0.0, -math.inf, -math.inf]]), torch.tensor([1]), torch.tensor([0]))

    assert (found.entropies[0], found.ranks[0], found.probabilities[0, 0]) == (0, 2, 1)


@pytest.mark.parametrize("top_k", [-1, 1000])
def test_more_guesses_than_tokens_are_refused(top_k):
    with pytest.raises(ValueError, match=rf"`top_k` \({top_k}\) must be from 0 to `vocab_size`"):
        surprisal(model_for(CHARACTERS), CHARACTERS, TEXTS, top_k=top_k)


def test_a_nan_after_the_last_token_is_told():
    model = model_for(CHARACTERS, tie_word_embeddings=False)
    model.model.embed_tokens.weight.data[CHARACTERS.vocab["x"]] = math.nan

    with pytest.raises(ValueError, match="The prediction after token 3 of text 1 is NaN"):
        surprisal(model, CHARACTERS, ["the", "tehx"], entropy=True)


def test_the_script_writes_the_columns(tmp_path, run):
    model_for(CHARACTERS, dtype=torch.float32).save_pretrained(tmp_path)
    CHARACTERS.save_pretrained(tmp_path)
    command = ["evaluate.py", "surprisal", "--model", tmp_path, "--text", TEXTS[0], "--entropy", "true"]

    words, tokens = (
        pandas.read_csv(io.StringIO(run(*command, *more)), keep_default_na=False, quoting=csv.QUOTE_NONNUMERIC)
        for more in ([], ["--by", "token", "--top_k", "2"])
    )

    assert list(words.columns)[-2:] == ["entropy", "entropy_reduction"]
    assert list(tokens.columns)[-7:] == [*ADDED, "guess_1", "probability_1", "guess_2", "probability_2"]
    with pytest.raises(SystemExit, match="`--top_k` 2 belongs to `--by` token"):
        run(*command, "--top_k", "2")
