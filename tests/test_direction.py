"""A model that reads backward does to a text what one that reads forward, with the same weights, does to the reversed text."""

import importlib
import json
import runpy
import sys

import numpy
import pytest
import torch
from conftest import SCRIPTS, SMALL, make_model, run_script
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lstm import (
    LSTMConfig,
    Session,
    StreamingLanes,
    TokenStream,
    bpe_tokenizer,
    byte_tokenizer,
    char_tokenizer,
    load_documents,
    load_state,
    minimal_pairs,
    save_state,
    surprisal,
    word_surprisal,
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


def test_the_names_of_special_tokens_are_kept_whole_in_written_text():
    tokenizer = word_tokenizer(["dna tac"])

    assert in_direction("tac <unk> dna<pad>", "backward", tokenizer) == "<pad>and <unk> cat"
    assert in_direction("tac <unk>", "forward", tokenizer) == "tac <unk>"


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


@EACH_TOKENIZER
@pytest.mark.parametrize("start_token", [None, "<eos>"])
def test_surprisal_is_that_of_the_reversed_text_at_mirrored_places(tokenizer, start_token):
    texts = [SONG, "red  roses ", "blue"]
    forward, backward = both(tokenizer)

    actual = surprisal(backward, tokenizer, texts, start_token=start_token)

    expected = surprisal(forward, tokenizer, [text[::-1] for text in texts], start_token=start_token)
    for number, text in enumerate(texts):
        rows, mirrored = (table[table["text"] == number].reset_index(drop=True) for table in (actual, expected))
        mirrored = mirrored[::-1].reset_index(drop=True)
        assert rows["surprisal"].equals(mirrored["surprisal"])  # to the last bit
        assert rows["start"].tolist() == (len(text) - mirrored["end"]).tolist()
        assert rows["end"].tolist() == (len(text) - mirrored["start"]).tolist()
        names = [token if token == "<unk>" else token[::-1] for token in mirrored["token"]]
        assert rows["token"].tolist() == names
        assert rows["unknown"].tolist() == mirrored["unknown"].tolist()
        assert rows["start"].is_monotonic_increasing
        assert rows["surprisal"].isna().tolist() == [False] * (len(rows) - 1) + [start_token is None]
        if tokenizer is CHARACTERS:
            assert "".join(rows["token"]) == text


@pytest.mark.parametrize("tokenizer", [CHARACTERS, TOKENIZERS["bpe"]], ids=["char", "bpe"])
def test_words_are_summed_in_the_order_of_reading(tokenizer):
    """White space belongs to the word that is read behind it, so that characters and pieces sum to the same."""
    texts, (forward, backward) = ["roses are  red", " blue "], both(tokenizer)
    regions = [[(6, 9), (0, 3), (3, 14)], []]
    turned = [text[::-1] for text in texts]

    tokens = surprisal(backward, tokenizer, texts, start_token="<eos>")
    words = word_surprisal(tokens, texts, direction="backward")
    parts = word_surprisal(tokens, texts, regions, "backward")

    expected = surprisal(forward, tokenizer, turned, start_token="<eos>")
    assert words["word"].tolist() == ["roses", "are", "red", "blue"]
    assert words["start"].tolist() == [0, 6, 11, 1]
    mirrored = word_surprisal(expected, turned)
    assert words["surprisal"].tolist() == mirrored["surprisal"].iloc[[2, 1, 0, 3]].tolist()
    assert words["tokens"].sum() == len(tokens)
    assert parts["word"].tolist() == ["are", "ros", "es are  red"]
    mirrored = word_surprisal(expected, turned, [[(5, 8), (11, 14), (0, 11)], []])
    assert parts["surprisal"].tolist() == mirrored["surprisal"].tolist()
    with pytest.raises(ValueError, match="Region 3 to 15 lies outside text 0, which has 14 characters"):
        word_surprisal(tokens, texts, [[(3, 15)], []], "backward")


def test_unknown_words_are_told_as_written(monkeypatch):
    told = []
    monkeypatch.setattr(MODULE.logger, "warning", told.append)

    tokens = surprisal(both(TOKENIZERS["word"])[1], TOKENIZERS["word"], ["roses are purple"])

    assert "('purple')" in told[0]
    assert tokens["token"].tolist() == ["roses", "are", "<unk>"]


def test_pairs_are_compared_backward():
    pairs = [{"sentence_good": "roses are red", "sentence_bad": "roses is red"}]
    forward, backward = both(CHARACTERS)

    rows = minimal_pairs(backward, CHARACTERS, pairs)

    turned = [{name: text[::-1] for name, text in pair.items()} for pair in pairs]
    expected = minimal_pairs(forward, CHARACTERS, turned)
    for name in ("log_probability_good", "log_probability_bad", "correct", "unknown_bad"):
        numpy.testing.assert_allclose(rows[name], expected[name], rtol=1e-12)  # added up in another order


@EACH_TOKENIZER
def test_a_session_writes_before_what_it_was_fed(tokenizer):
    forward, backward = (Session(model, tokenizer) for model in both(tokenizer, torch.float32))
    fork = None

    for session, begin, more in ((forward, "der era", "eulb"), (backward, "are red", "blue")):
        session.feed(begin)
        fork = session.fork()
        session.first = session.write(9, seed=1)
        session.feed(more)
        session.second = session.write(6, do_sample=False)

    assert backward.first == forward.first[::-1]
    assert backward.second == forward.second[::-1]
    assert backward.waiting == forward.waiting[::-1]
    assert fork.write(9, seed=1) == backward.first


def test_writing_is_streaming_joined():
    forward, backward = (Session(model, CHARACTERS, "<eos>") for model in both(CHARACTERS, torch.float32))

    assert forward.fork().write(20, seed=3) == "".join(forward.stream(20, seed=3))
    with pytest.raises(ValueError, match=r"this model .* writes it from its end: call `write`"):
        backward.stream(20)
    with pytest.raises(ValueError, match=r"`max_new_tokens` \(0\) must be at least 1"):
        backward.write(0)


def test_what_an_interrupted_text_lacks_comes_with_the_next(monkeypatch):
    session = Session(both(CHARACTERS, torch.float32)[1], CHARACTERS, "<eos>")
    torch.manual_seed(0)
    expected = session.fork().write(12)
    torch.manual_seed(0)
    read, calls = Session._read, iter(range(100))

    def interrupted(self, ids, cache):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return read(self, ids, cache)

    monkeypatch.setattr(Session, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.write(12)

    assert session.waiting == expected[-5:] != expected[:-6:-1]
    assert session.write(7) == expected
    assert session.waiting == ""


def test_a_state_belongs_to_its_direction(tmp_path):
    forward, backward = both(CHARACTERS, torch.float32)
    session = Session(backward, CHARACTERS)
    session.feed("roses")
    session.save(tmp_path / "talk")
    save_state(forward, forward(torch.tensor([[5, 6]])).past_key_values, tmp_path / "state")

    assert Session.load(backward, CHARACTERS, tmp_path / "talk").write(5, seed=0) == session.write(5, seed=0)
    with pytest.raises(ValueError, match="belongs to a model with `direction` 'backward', and this one has 'forward'"):
        Session.load(forward, CHARACTERS, tmp_path / "talk")
    with pytest.raises(ValueError, match="belongs to a model with `direction` 'forward', and this one has 'backward'"):
        load_state(backward, tmp_path / "state")


LINES = [f"{number} bottles of beer on the wall, {number} bottles of beer.\n" for number in range(40, 0, -1)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of two runs: backward on documents, and forward on the same documents, reversed."""
    folder = tmp_path_factory.mktemp("directions")
    for direction, texts in (("backward", LINES), ("forward", [text[::-1] for text in LINES])):
        for split, part in (("train", texts[:-5]), ("validation", texts[-5:])):
            file = folder / f"{direction}_{split}.jsonl"
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        command = ["--train_file", folder / f"{direction}_train.jsonl", "--direction", direction]
        command += ["--validation_file", folder / f"{direction}_validation.jsonl", "--prompt", ""]
        command += ["--tokenizer", "bpe", "--vocab_size", 280]
        run_script("train.py", *command, *SMALL, "--max_steps", 4, "--output_dir", folder / direction)
    return {name: folder / name for name in ("forward", "backward")}


def test_training_backward_is_training_on_reversed_documents(trained):
    models = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in trained.items()}
    metrics = {name: json.loads((folder / "metrics.json").read_text()) for name, folder in trained.items()}
    samples = {name: json.loads((folder / "run.json").read_text())["sample"] for name, folder in trained.items()}

    assert models["backward"].config.direction == "backward"
    for name, weight in models["backward"].state_dict().items():
        assert torch.equal(weight, models["forward"].state_dict()[name]), name
    for values in metrics.values():
        del values["train_runtime"]
    assert metrics["backward"] == metrics["forward"]
    assert samples["backward"] == samples["forward"][::-1] != ""


def test_training_refuses_a_streamed_text_of_several_rows_before_it_starts(tmp_path, monkeypatch):
    for module in ("hf_lstm.tokenizers", "hf_lstm.data.readers"):
        monkeypatch.setattr(f"{module}.PIECE_LENGTH", 16)
    file = tmp_path / "song.txt"
    file.write_text(SONG * 9, encoding="utf-8")
    command = [
        "--train_file",
        file,
        "--validation_file",
        file,
        "--streaming",
        "true",
        "--output_dir",
        tmp_path / "run",
    ]

    with pytest.raises(
        SystemExit, match=r"train.py: A row of `documents` continues the document of the row before it"
    ):
        run_script("train.py", *command, "--direction", "backward", *SMALL, "--max_steps", 2)

    assert not (tmp_path / "run").exists()


def test_evaluation_reads_backward(trained, run, tmp_path):
    backward, texts = trained["backward"], [text.strip() for text in LINES[:3]]
    (tmp_path / "lines.txt").write_text("\n".join(texts))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(backward), AutoTokenizer.from_pretrained(backward)
    metrics = json.loads((backward / "metrics.json").read_text())

    measured = run("evaluate.py", "stream", "--model", backward, "--file", f"{backward}_validation.jsonl")
    words = run("evaluate.py", "surprisal", "--model", backward, "--file", tmp_path / "lines.txt")

    assert json.loads(measured)["loss"] == metrics["eval_loss"]
    expected = word_surprisal(surprisal(model, tokenizer, texts), texts, direction="backward")
    assert [line.split(",")[1] for line in words.splitlines()[1:4]] == ['"40"', '"bottles"', '"of"']
    costs = [float(line.split(",")[5].strip('"') or "nan") for line in words.splitlines()[1:]]
    numpy.testing.assert_allclose(costs[:3], expected["surprisal"][:3])


def test_a_continuation_stands_before_its_prompt(trained, run, monkeypatch):
    options = ["--prompt", " of beer.", "--do_sample", "false", "--max_new_tokens", 20]
    printed = run("generate.py", "--model", trained["backward"], *options)
    options[1] = options[1][::-1]
    expected = run("generate.py", "--model", trained["forward"], *options)
    lines = iter([" of beer.", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    conversed = run("generate.py", "--model", trained["backward"], "--interactive", "true", *options[2:])

    assert printed.removesuffix("\n").endswith(" of beer.")
    assert printed.removesuffix("\n") == expected.removesuffix("\n")[::-1]
    assert len(printed) > 20
    assert printed.removesuffix(" of beer.\n").lstrip("\ufffd") in conversed  # half a character waits


def test_the_server_refuses_in_one_sentence(trained, monkeypatch):
    with pytest.raises(SystemExit) as refused:
        run_script("serve.py", "--model", trained["backward"], "--device", "cpu")

    assert str(refused.value.code).startswith(
        f"serve.py: {trained['backward']} reads backward (`direction` in its config"
    )
    assert str(refused.value.code).count(". ") == 0


def test_the_card_says_that_it_reads_backward(trained):
    cards = {name: (folder / "README.md").read_text() for name, folder in trained.items()}

    assert "It reads backward" in cards["backward"]
    assert "`generate()` and `pipeline` see ids only" in cards["backward"]
    assert cards["backward"].count("[::-1]") == 2
    assert "backward" not in cards["forward"]
    assert "[::-1]" not in cards["forward"]


def test_an_exported_model_writes_backward(tmp_path, monkeypatch, capfdbinary):
    onnx = pytest.importorskip("hf_lstm.convert.onnx")
    written = {}
    for model, prompt in zip(both(CHARACTERS, torch.float32), ("眠春 ,der", "red, 春眠"), strict=True):
        folder = tmp_path / model.config.direction
        onnx.export_onnx(model, CHARACTERS, folder)
        monkeypatch.setattr(sys, "argv", ["run_onnx.py", str(folder), prompt])
        runpy.run_path(str(SCRIPTS / "run_onnx.py"))
        sys.stdout.flush()
        written[model.config.direction] = capfdbinary.readouterr().out.decode().removesuffix("\n")

    assert written["backward"] == written["forward"][::-1]
    assert len(written["forward"]) > 20
