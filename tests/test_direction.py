"""A model that reads backward does to a text what one that reads forward, with the same weights, does to the reversed text."""

import importlib
import json

import numpy
import pytest
import torch
from conftest import make_model
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError

from hf_lstm import (
    LSTMConfig,
    StreamingLanes,
    TokenStream,
    bpe_tokenizer,
    byte_tokenizer,
    char_tokenizer,
    load_documents,
    word_tokenizer,
)
from hf_lstm.data.readers import CONTINUES
from hf_lstm.tokenizers import encode, in_direction

MODULE = importlib.import_module("hf_lstm.evaluation.surprisal")  # an import gives the function of that name
SONG = "roses are red\nviolets are blue, 春眠不覺曉\n"
TEXTS = [SONG, "", "red  roses ", "blue", None, "é and e\u0301 <unk>"]
TURNED = [text and text[::-1] for text in TEXTS]
TOKENIZERS = {
    "char": char_tokenizer([SONG]),
    "byte": byte_tokenizer(),
    "bpe": bpe_tokenizer([SONG[::-1]] * 2, 280),
    "word": word_tokenizer([SONG[::-1]]),
    "unicode_word": word_tokenizer([SONG[::-1]], split="unicode"),
}
EACH_TOKENIZER = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
CHARACTERS = TOKENIZERS["char"]


def both(tokenizer, dtype=torch.float64, **config):
    """Two models with the same weights: one that reads forward, and one that reads backward."""
    models = [
        make_model(dtype, vocab_size=len(tokenizer), direction=name, **config) for name in ("forward", "backward")
    ]
    for model in models:
        model.generation_config.eos_token_id = None
    return models


def test_a_direction_is_one_of_two(tmp_path):
    with pytest.raises(StrictDataclassError, match="Field 'direction' expected one of"):
        LSTMConfig(direction="sideways")
    with pytest.raises(ValueError, match=r"`direction` \('up'\) must be `forward` or `backward`"):
        in_direction("text", "up")

    LSTMConfig(direction="backward").save_pretrained(tmp_path)

    saved = json.loads((tmp_path / "config.json").read_text())
    assert LSTMConfig.from_pretrained(tmp_path).direction == saved.pop("direction") == "backward"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert LSTMConfig.from_pretrained(tmp_path).direction == "forward"  # as every earlier version wrote it


@EACH_TOKENIZER
@pytest.mark.parametrize("piece_length", [7, 1 << 16])
def test_a_text_is_reversed_whole_and_its_places_are_those_of_the_text(tokenizer, piece_length, monkeypatch):
    monkeypatch.setattr("hf_lstm.tokenizers.PIECE_LENGTH", piece_length)

    ids, places = encode(TEXTS, tokenizer, offsets=True, direction="backward")

    expected, mirrored = encode(TURNED, tokenizer, offsets=True)
    for text, row, place, other, mirror in zip(TEXTS, ids, places, expected, mirrored, strict=True):
        assert row.tolist() == other.tolist()
        assert place.tolist() == (len(text or "") - mirror[:, ::-1]).tolist()
        assert (numpy.diff(place[:, 0]) <= 0).all()
    if tokenizer is CHARACTERS:
        assert [SONG[begin:end] for begin, end in places[0]] == [*SONG[::-1]]


@EACH_TOKENIZER
@pytest.mark.parametrize("texts", [TEXTS, [SONG]], ids=["documents", "one text"])
def test_a_stream_is_that_of_the_reversed_documents(tokenizer, texts):
    actual = TokenStream.from_documents(texts, tokenizer, "backward")

    expected = TokenStream.from_documents([text and text[::-1] for text in texts], tokenizer)
    assert actual.digest() == expected.digest()
    for name in ("num_bytes", "num_characters", "num_words"):
        assert getattr(actual, name) == getattr(expected, name)


@pytest.mark.parametrize("piece_length", [16, 1 << 16])
def test_a_text_that_is_stored_in_pieces_is_reversed_whole(piece_length, tmp_path, monkeypatch):
    """Both directions of one file are tokenized: neither finds the other's tokens in the cache."""
    for module in ("hf_lstm.tokenizers", "hf_lstm.data.readers"):
        monkeypatch.setattr(f"{module}.PIECE_LENGTH", piece_length)
    (tmp_path / "song.txt").write_text(SONG, encoding="utf-8")
    rows = load_documents(tmp_path / "song.txt")["train"]
    assert (len(rows) > 2) == (piece_length == 16)

    streams = {name: TokenStream.from_documents(rows, CHARACTERS, name) for name in ("forward", "backward")}

    for direction, stream in streams.items():
        assert CHARACTERS.decode(stream[:]) == in_direction(SONG, direction)
        assert stream.num_characters == len(SONG) - 1  # all but the first, which nothing predicts


def test_several_documents_of_several_rows_are_reversed():
    pieces, continues = ["ab", "c", "", "de", "f", "gh"], [False, True, True, False, False, True]
    rows = Dataset.from_dict({"text": pieces, CONTINUES: continues})

    stream = TokenStream.from_documents(rows, byte_tokenizer(), "backward")

    assert stream.digest() == TokenStream.from_documents(["cba", "ed", "hgf"], byte_tokenizer()).digest()


def test_streamed_records_are_reversed(tmp_path):
    texts = [text for text in TEXTS if text]
    for name, records in (("written", texts), ("turned", [text[::-1] for text in texts])):
        lines = [json.dumps({"text": text}) + "\n" for text in records]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    written, turned = (
        load_documents(tmp_path / f"{name}.jsonl", streaming=True)["train"] for name in ("written", "turned")
    )

    actual = iter(StreamingLanes(written, CHARACTERS, lanes=2, bptt_length=5, direction="backward"))

    for _, item, other in zip(range(40), actual, StreamingLanes(turned, CHARACTERS, 2, 5), strict=False):
        assert all(torch.equal(item[name], other[name]) for name in other)


def test_a_streamed_text_of_several_rows_is_refused(tmp_path, monkeypatch):
    for module in ("hf_lstm.tokenizers", "hf_lstm.data.readers"):
        monkeypatch.setattr(f"{module}.PIECE_LENGTH", 16)
    (tmp_path / "song.txt").write_text(SONG, encoding="utf-8")
    rows = load_documents(tmp_path / "song.txt", streaming=True)["train"]

    with pytest.raises(
        ValueError, match=r"a model that reads backward needs the last row first: put each document into one"
    ):
        next(iter(StreamingLanes(rows, CHARACTERS, lanes=1, bptt_length=5, direction="backward")))
