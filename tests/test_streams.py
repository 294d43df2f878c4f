"""Streams: tokenized once, read from where they lie, in the order of their documents or in another."""

import importlib.util
import json
import pickle
import subprocess
import sys

import numpy
import pytest
import torch
from conftest import make_ids, make_model
from datasets import Dataset
from datasets.fingerprint import Hasher
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import run
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerFast

from hf_lstm import (
    DocumentDataset,
    LaneDataset,
    TokenStream,
    bpe_tokenizer,
    byte_tokenizer,
    char_tokenizer,
    evaluate_stream,
    load_corpus,
    tokenizers,
)
from hf_lstm.data import load_documents, streams

POEMS = [f"第{number}首，春風又綠江南岸。\n明月何時照我還？"[: 4 + number % 17] for number in range(60)]


@pytest.fixture
def poems(tmp_path):
    """A stream of documents that lies on disk."""
    path = tmp_path / "poems.jsonl"
    path.write_text("".join(json.dumps({"text": poem}) + "\n" for poem in POEMS), encoding="utf-8")
    return TokenStream.from_documents(load_documents(path)["train"], byte_tokenizer())


@pytest.mark.parametrize(
    ("tokenizer", "kind"),
    [
        (char_tokenizer(["ab"]), "uint8"),
        (byte_tokenizer(), "uint16"),
        (char_tokenizer([chr(0x4E00 + index) for index in range(66_000) if index < 20_000]), "uint16"),
        (char_tokenizer([chr(0x20000 + index) for index in range(66_000)]), "uint32"),
    ],
    ids=["6", "260", "20,004", "66,004"],
)
def test_the_smallest_integers_that_fit_hold_the_tokens(tokenizer, kind):
    stream = TokenStream.from_documents(["ab", "b"], tokenizer)

    assert str(stream.tokens.type) == kind
    assert stream[:].dtype == torch.long


def test_a_data_set_gives_what_its_texts_give(poems):
    stream = TokenStream.from_documents(POEMS, byte_tokenizer())

    assert torch.equal(stream[:], poems[:])
    assert torch.equal(stream.document_starts, poems.document_starts)
    assert stream.num_bytes == poems.num_bytes == sum(len(poem.encode()) for poem in POEMS)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), min_size=1, max_size=300))
def test_a_text_file_gives_what_its_text_gives(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text, encoding="utf-8", newline="")
    text = text.removeprefix("\ufeff")  # a byte order mark
    if not text:
        return
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (tokenizers, sys.modules["hf_lstm.data.corpora"], sys.modules["hf_lstm.data.readers"]):
            monkeypatch.setattr(module, "PIECE_LENGTH", 16)
        rows = load_documents(path)["train"]

        assert "".join(rows["text"]) == text
        assert TokenStream.from_documents(rows, byte_tokenizer())[:].tolist() == [4 + byte for byte in text.encode()]


def test_any_part_can_be_read(poems):
    everything = poems[:].tolist()

    assert len(poems.tokens.chunks) > 1
    for start, stop in ((0, 1), (3, 3), (5, 70), (len(poems) - 2, len(poems) + 5), (len(poems), len(poems) + 1)):
        assert poems[start:stop].tolist() == everything[start:stop]
    assert poems[-3:].tolist() == everything[-3:]
    with pytest.raises(ValueError, match=r"The step of a slice of a stream \(2\) must be 1"):
        poems[::2]


def test_texts_are_tokenized_once(tmp_path, monkeypatch):
    """Also if the tokenizer was used in between; another text or tokenizer begins anew."""
    calls = []
    encode = streams.encode
    monkeypatch.setattr(
        streams, "encode", lambda *arguments, **options: calls.append(1) or encode(*arguments, **options)
    )
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be\n" * 8000)
    tokenizer = bpe_tokenizer([path.read_text()], vocab_size=270)

    def tokenizes():
        calls.clear()
        TokenStream.from_documents(load_corpus(path)["train"], tokenizer)
        return len(calls) > 1  # the bytes of the first token are looked at each time

    assert tokenizes()
    tokenizer(["a", "b"], padding=True, truncation=True, max_length=1)
    assert not tokenizes()
    tokenizer = bpe_tokenizer([path.read_text()], vocab_size=265)
    assert tokenizes()
    path.write_text("to be or not to go\n" * 8000)
    assert tokenizes()


def changed(change):
    """A tokenizer that encodes something else than the plain one."""
    tokenizer = byte_tokenizer()
    if isinstance(change, type):
        tokenizer.__class__ = change
    else:
        change(tokenizer)
    return tokenizer


class Shifted(type(byte_tokenizer())):
    """Whose ids are others by the attribute `shift`."""

    def __call__(self, texts, **options):
        encoded = super().__call__(texts, **options)
        if isinstance(texts, list):
            encoded["input_ids"] = [[token + self.shift for token in ids] for ids in encoded["input_ids"]]
        return encoded


def shifting(amount):
    """A class, of which two of the same amount are equal."""

    class Shifting(Shifted):
        @property
        def shift(self):
            return amount

    return Shifting


def shifted(amount):
    def change(tokenizer):
        tokenizer.__class__ = Shifted
        tokenizer.shift = amount

    return change


@pytest.mark.parametrize("role", ["eos_token", "unk_token"])
def test_tokenizers_whose_special_tokens_have_other_roles_share_no_tokens(tmp_path, role):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "a <pad> zebra </s> <eos> <unk>"}) + "\n")

    def tokenizer(name):
        vocabulary = {word: index for index, word in enumerate(["<unk>", "a", "<pad>", "</s>", "<eos>"])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.add_special_tokens(["<unk>", "<pad>", "</s>", "<eos>"])
        names = {"eos_token": "<eos>", "unk_token": "<unk>"} | {role: name}
        return PreTrainedTokenizerFast(tokenizer_object=backend, **names)

    pair = [tokenizer(name) for name in ("<eos>", "</s>")]

    cached = [TokenStream.from_documents(load_documents(path)["train"], each)[:].tolist() for each in pair]

    assert role != "eos_token" or cached[0] != cached[1]
    assert cached == [
        TokenStream.from_documents(load_documents(path)["train"]["text"], each)[:].tolist() for each in pair
    ]


@pytest.mark.parametrize(
    "change",
    [
        shifting(1),
        shifting(2),
        shifted(3),
        shifted(4),
        lambda tokenizer: setattr(tokenizer.backend_tokenizer, "normalizer", normalizers.Lowercase()),
    ],
    ids=["subclass", "another", "attribute", "another", "normalizer"],
)
def test_two_tokenizers_share_tokens_only_where_they_are_equal(tmp_path, monkeypatch, change):
    path = tmp_path / "text.txt"
    path.write_text("To be or not to be\n" * 10)
    rows, calls, encode = load_documents(path)["train"], [], streams.encode
    monkeypatch.setattr(
        streams, "encode", lambda *arguments, **options: calls.append(1) or encode(*arguments, **options)
    )
    plain = TokenStream.from_documents(rows, byte_tokenizer())

    other = TokenStream.from_documents(rows, changed(change))
    first = len(calls)
    again = TokenStream.from_documents(rows, changed(change))

    assert not torch.equal(other[:], plain[:])
    assert torch.equal(other[:], again[:])
    assert len(calls) - first == 1  # the first token alone is looked at each time


def test_a_class_that_was_written_anew_tokenizes_anew(tmp_path, monkeypatch):
    """Under its old name, in a module that was changed between two runs."""
    path, hashes = tmp_path / "own_tokenizer.py", []
    for shift in (1, 22, 1):
        path.write_text(
            "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n"
            f"    def __call__(self, *arguments, **options):\n        return {shift}\n"
        )
        specification = importlib.util.spec_from_file_location("own_tokenizer", path)
        module = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, "own_tokenizer", module)
        specification.loader.exec_module(module)
        hashes.append(Hasher.hash(streams._Tokenization(changed(module.Own), False)))

    assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.slow
def test_texts_are_tokenized_once_for_all_processes(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be\n" * 8000)
    tokenizer = bpe_tokenizer([path.read_text()], vocab_size=270)
    TokenStream.from_documents(load_corpus(path)["train"], tokenizer)
    program = (
        "import datasets, sys; from hf_lstm import TokenStream, bpe_tokenizer, load_corpus\n"
        "from hf_lstm.data import streams\n"
        f"datasets.config.HF_DATASETS_CACHE = {str(streams_cache())!r}\n"
        f"rows = load_corpus({str(path)!r})['train']\n"
        f"tokenizer = bpe_tokenizer([open({str(path)!r}).read()], vocab_size=270)\n"
        "calls, encode = [], streams.encode\n"
        "streams.encode = lambda *arguments, **options: calls.append(1) or encode(*arguments, **options)\n"
        "TokenStream.from_documents(rows, tokenizer); print(len(calls))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "1"


def streams_cache():
    import datasets

    return datasets.config.HF_DATASETS_CACHE


def test_another_process_gets_the_name_of_the_file(poems):
    """As a worker of a data loader that is not forked."""
    pickled = pickle.dumps(poems)
    again = pickle.loads(pickled)

    assert torch.equal(again[:], poems[:])
    assert len(pickle.dumps(poems.shuffled(0))) < 10_000
    assert str(poems._rows.cache_files[0]["filename"]).encode() in pickled


@pytest.mark.parametrize("seed", [0, 1, [3, 7]])
def test_documents_are_shuffled_whole(poems, seed):
    shuffled = poems.shuffled(seed)
    tokenizer = byte_tokenizer()
    text = tokenizer.decode(shuffled[:])

    assert len(shuffled) == len(poems)
    assert text != tokenizer.decode(poems[:])
    assert sorted(text.split("<eos>")) == sorted(["", *POEMS, ""])
    assert text.startswith("<eos>")
    assert text.endswith("<eos>")
    assert all(shuffled[start : start + 1] == tokenizer.eos_token_id for start in shuffled.document_starts.tolist())
    everything = shuffled[:]
    for start, stop in ((0, 30), (17, 200), (100, 101), (len(poems) - 5, len(poems))):
        assert torch.equal(shuffled[start:stop], everything[start:stop])
    assert torch.equal(poems.shuffled(seed)[:], everything)
    assert not torch.equal(poems.shuffled(9)[:], everything)


def test_lanes_hold_documents_in_another_order_in_each_epoch(poems):
    lanes = LaneDataset(poems, lanes=2, bptt_length=7, reset_at_documents=True, shuffle_seed=5)

    def epoch(number):
        lanes.set_epoch(number)
        return [lanes[index] for index in range(len(lanes))]

    first, second, again = epoch(0), epoch(1), epoch(0)

    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    for item in second:
        starts = item["input_ids"] == 3  # `<eos>`
        assert torch.equal(starts[1:], item["position_ids"][1:] == 0)
    lane = torch.cat([item["input_ids"] for item in second[::2]])
    assert torch.equal(lane, poems.shuffled([5, 1])[: len(lane)])


def test_shuffling_twice_keeps_documents_whole(poems):
    text = byte_tokenizer().decode(poems.shuffled(1).shuffled(2)[:])

    assert sorted(text.split("<eos>")) == sorted(["", *POEMS, ""])


def test_texts_that_are_not_one_split_are_refused(poems):
    rows = Dataset.from_dict({"text": ["a"], "poem": ["b"]})

    with pytest.raises(ValueError, match=r"`texts` has the splits train, test: give the texts of one"):
        TokenStream.from_documents({"train": rows, "test": rows}, byte_tokenizer())
    with pytest.raises(ValueError, match="`texts` is streamed"):
        TokenStream.from_documents(rows.to_iterable_dataset(), byte_tokenizer())
    with pytest.raises(ValueError, match="`texts` has no column `text`, only poem"):
        TokenStream.from_documents(rows.select_columns("poem"), byte_tokenizer())


def test_a_large_document_is_tokenized_a_little_at_a_time(monkeypatch):
    sizes = []

    class Watched(type(byte_tokenizer())):
        def __call__(self, text, **options):
            sizes.append(sum(map(len, text)) if isinstance(text, list) else 0)
            return super().__call__(text, **options)

    monkeypatch.setattr(tokenizers, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(tokenizers, "PIECE_LENGTH", 100)
    tokenizer = byte_tokenizer()
    tokenizer.__class__ = Watched
    text = "to be or not to be " * 600

    stream = TokenStream.from_documents([text], tokenizer)

    assert stream[:].tolist() == [4 + byte for byte in text.encode()]
    assert len(sizes) >= 10
    assert max(sizes) <= 1100


def test_a_single_document_cannot_be_shuffled():
    with pytest.raises(ValueError, match="a single document cannot be shuffled"):
        LaneDataset(torch.arange(100), 2, 5, shuffle_seed=1)
    with pytest.raises(ValueError, match=r"`shuffle_seed` \(-1\) must be an integer of at least 0"):
        LaneDataset(torch.arange(100), 2, 5, shuffle_seed=-1)


def test_shuffled_training_resumes_bit_equal(tmp_path):
    """In the second epoch, from the middle of it."""
    starts = torch.arange(0, 76, 4)
    lanes = LaneDataset(TokenStream(make_ids(1, 76)[0], starts), 3, 5, shuffle_seed=2)
    plain = LaneDataset(TokenStream(make_ids(1, 76)[0], starts), 3, 5)
    expected_logs, expected_weights = run(tmp_path / "run", dataset=lanes)
    other_logs, _ = run(tmp_path / "plain", dataset=plain)

    logs, weights = run(tmp_path / "run", dataset=lanes, resume=str(tmp_path / "run" / "checkpoint-8"))

    losses, expected, other = (
        [entry["loss"] for entry in log if "loss" in entry] for log in (logs, expected_logs, other_logs)
    )
    assert losses == expected
    assert expected != other
    assert all(torch.equal(weights[name], weight) for name, weight in expected_weights.items())
    with pytest.raises(ValueError, match=r"`shuffle_seed` was 2 in .* and is None now"):
        run(tmp_path / "run", dataset=plain, resume=str(tmp_path / "run" / "checkpoint-8"))
    with pytest.raises(ValueError, match=r"`dataloader_persistent_workers` \(True\) must be False where documents"):
        run(tmp_path / "no", dataset=lanes, dataloader_persistent_workers=True, dataloader_num_workers=1)


def test_counts_are_those_of_each_token(poems):
    counts = poems.counts(300)

    assert torch.equal(counts, torch.bincount(poems[:], minlength=300))
    with pytest.raises(ValueError, match=r"ids from 3 to .*: they must lie within the model's vocabulary of 100"):
        poems.counts(100)


@pytest.mark.parametrize("max_length", [1, 3, 10, 1000])
def test_documents_hold_every_target_once(poems, max_length):
    documents = DocumentDataset(poems, max_length)
    items = [documents[index] for index in range(len(documents))]

    targets = [token for item in items for token in item["labels"][1:]]
    assert targets == poems[1:].tolist()
    assert all(item["input_ids"] == item["labels"] and 2 <= len(item["labels"]) <= max_length + 1 for item in items)
    assert sum(item["input_ids"][0] == 3 for item in items) == len(POEMS)
    with pytest.raises(IndexError):
        documents[len(documents)]


def test_a_single_text_is_cut_into_documents():
    documents = DocumentDataset(TokenStream(torch.arange(10)), 4)

    assert [documents[index]["input_ids"] for index in range(len(documents))] == [
        [0, 1, 2, 3, 4],
        [4, 5, 6, 7, 8],
        [8, 9],
    ]
    with pytest.raises(ValueError, match="holds 1 tokens: it must hold at least two"):
        DocumentDataset(TokenStream([1]), 4)
    with pytest.raises(ValueError, match=r"`max_length` \(0\) must be at least 1"):
        DocumentDataset(TokenStream([1, 2]), 0)


def test_documents_packed_or_padded_have_the_loss_of_the_stream(poems):
    """Lanes, packed and padded documents are three ways of computing one thing where documents know nothing of another."""
    model = make_model(vocab_size=260)
    documents = DocumentDataset(poems, 1000)
    items = [documents[index] for index in range(len(documents))]
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "right"

    packed = model(**DataCollatorWithFlattening(return_tensors="pt")([dict(item) for item in items])).loss
    padded = model(**DataCollatorForSeq2Seq(tokenizer)([dict(item) for item in items])).loss
    streamed = evaluate_stream(model, poems, batch_size=1, reset_at_documents=True)["loss"]

    assert packed.item() == pytest.approx(streamed, rel=1e-6)
    assert padded.item() == pytest.approx(streamed, rel=1e-6)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "file").write_text("no folder")
    (tmp_path / "text.txt").write_text("some text\n" * 9)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")

    with pytest.raises(ValueError, match=r"The cache folder .*file/cache cannot be written \(.*HF_DATASETS_CACHE"):
        load_corpus(tmp_path / "text.txt")


def test_arrays_of_any_integers_are_streams():
    for kind in (numpy.uint8, numpy.uint16, numpy.int32, numpy.int64, numpy.uint32):
        assert LaneDataset(numpy.arange(20, dtype=kind), 2, 3)[0]["input_ids"].tolist() == [0, 1, 2]
    assert TokenStream(Dataset.from_dict({"ids": [1, 2, 3]}).data["ids"])[:].tolist() == [1, 2, 3]


@pytest.mark.parametrize("where", ["reading", "tokenizing"])
def test_a_failed_tokenization_leaves_no_files(tmp_path, monkeypatch, where):
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    path = tmp_path / "text.txt"
    path.write_bytes(b"a line of text\n" * 30_000 + (b"\xff" if where == "reading" else b""))

    class Failing(type(byte_tokenizer())):
        calls = 0

        def __call__(self, *arguments, **options):
            Failing.calls += 1
            if Failing.calls > 1:
                raise RuntimeError("out of order")
            return super().__call__(*arguments, **options)

    monkeypatch.setattr("hf_lstm.data.streams.BATCH_CHARACTERS", 100_000)
    tokenizer = byte_tokenizer()
    tokenizer.__class__ = Failing
    with pytest.raises((ValueError, RuntimeError), match=r"is not UTF-8|out of order"):
        TokenStream.from_documents(load_documents(path)["train"], tokenizer)

    left = {file.name for file in cache.rglob("*") if file.is_file() and not file.name.endswith(".lock")}
    assert left == (set() if where == "reading" else {"dataset_info.json", "generator-train.arrow"})
