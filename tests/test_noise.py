"""Noise in characters: what is changed, the loss after it, and the words that are written after it."""

import json
import math

import numpy
import pytest
import torch
from conftest import SMALL, TEXT, make_model, run_script

from hf_lstm import char_tokenizer, surprisal
from hf_lstm.evaluation.noise import KINDS, add_character_noise, loss_after_noise, share_of_known_words

TOKENIZER = char_tokenizer([TEXT])


def test_each_kind_of_noise_does_what_it_says():
    text = "abcdefghijklmnopqrstuvwxyz" * 40

    substituted, changed = add_character_noise(text, 0.1, "substitute")
    assert len(substituted) == len(text)
    assert [one != other for one, other in zip(substituted, text, strict=True) if one != other]
    assert all(mark for mark, one, other in zip(changed, substituted, text, strict=True) if one != other)
    assert changed.mean() == pytest.approx(0.1, abs=0.04)

    dropped, changed = add_character_noise(text, 0.1, "drop")
    assert len(dropped) == len(changed) == pytest.approx(0.9 * len(text), rel=0.05)
    assert not changed.any()
    kept = iter(text)
    assert all(character in kept for character in dropped)  # in their order

    swapped, changed = add_character_noise(text, 0.1, "swap")
    assert sorted(swapped) == sorted(text)
    assert swapped != text
    pairs = numpy.flatnonzero(changed).reshape(-1, 2)
    assert all(swapped[i] == text[j] and swapped[j] == text[i] for i, j in pairs)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_nothing_and_everything(kind):
    assert add_character_noise(TEXT, 0, kind) == (TEXT, pytest.approx(numpy.zeros(len(TEXT), dtype=bool)))
    assert add_character_noise("", 0.5, kind)[0] == ""
    text, changed = add_character_noise("abcde", 1, kind, seed=2)
    assert len(text) == len(changed)
    assert add_character_noise(TEXT, 0.1, kind, 5)[0] == add_character_noise(TEXT, 0.1, kind, 5)[0]


def test_the_last_character_has_no_other_to_swap_with():
    assert add_character_noise("abc", 1, "swap")[0] == "bac"


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_characters_kept(kind):
    model = make_model(vocab_size=len(TOKENIZER))

    loss = loss_after_noise(model, TOKENIZER, TEXT[:300], 0.1, kind)

    noisy, changed = add_character_noise(TEXT[:300], 0.1, kind)
    each = surprisal(model, TOKENIZER, [noisy], math.e)["surprisal"].to_numpy()
    assert loss == pytest.approx(numpy.nanmean(each[~changed]))


def test_whole_words_are_counted():
    model = make_model(torch.float32, vocab_size=len(TOKENIZER))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.05)  # all characters are about as likely, spaces among them
    torch.manual_seed(3)
    state = torch.random.get_rng_state()

    none = share_of_known_words(model, TOKENIZER, ["99 bottles", "beer"], set(), max_new_tokens=200)

    assert none == 0
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(0)
    ids = TOKENIZER("beer", return_tensors="pt")["input_ids"]
    options = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 200, "eos_token_id": [], "pad_token_id": 0}
    written = TOKENIZER.decode(model.generate(ids, **options)[0, 4:], skip_special_tokens=True).split()[1:-1]
    assert share_of_known_words(model, TOKENIZER, ["beer"], {written[0]}, 200) == pytest.approx(
        written.count(written[0]) / len(written)
    )


@pytest.mark.parametrize(
    ("share", "kind", "message"), [(1.5, None, r"`share` \(1.5\)"), (0.1, "typo", r"`kind` \('typo'\)")]
)
def test_other_noise_is_refused(share, kind, message):
    with pytest.raises(ValueError, match=message):
        add_character_noise("text", share, kind)


def test_the_curve_is_measured_and_drawn(run, text_file, tmp_path):
    model = make_model(torch.float32, vocab_size=len(TOKENIZER))
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    options = ["--shares", 0, 0.1, "--characters", 300, "--prompts", 2, "--prompt_length", 20]
    options += ["--picture", tmp_path / "noise.png"]

    result = json.loads(
        run("evaluate.py", "noise", "--model", tmp_path / "model", "--train_file", text_file, *options)
    )

    assert set(result) == set(KINDS)
    assert len({result[kind]["0.0"]["loss"] for kind in KINDS}) == 1
    assert result["swap"]["0.1"]["loss"] != result["swap"]["0.0"]["loss"]
    assert (tmp_path / "noise.png").stat().st_size > 5_000


def test_training_text_gets_noise_and_validation_text_none(monkeypatch, text_file, tmp_path):
    from conftest import SCRIPTS

    monkeypatch.syspath_prepend(SCRIPTS)
    from train_arguments import parse
    from train_data import load_texts

    clean, noisy = (
        load_texts(parse(["--output_dir", str(tmp_path), "--train_file", str(text_file), *SMALL, *flags])[1], 0)
        for flags in ([], ["--character_noise", "0.1"])
    )

    assert noisy["validation"]["text"][:] == clean["validation"]["text"][:]
    assert noisy["train"]["text"][:] != clean["train"]["text"][:]
    with pytest.raises(SystemExit, match=r"`--character_noise` 1.5"):
        run_script("train.py", "--output_dir", tmp_path / "run", "--character_noise", 1.5)
