"""From files to lanes: every token once, in order, and documents that know where they begin."""

import ast
import itertools
import json
import logging
import os
from unicodedata import normalize

import numpy
import pytest
import torch
from conftest import make_model, standard_library
from datasets import Dataset, DatasetDict, concatenate_datasets
from tokenizers import normalizers
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from hf_lstm import (
    DocumentDataset,
    LaneDataset,
    StreamingLanes,
    TokenStream,
    byte_tokenizer,
    char_tokenizer,
    evaluate_stream,
    load_corpus,
    tokenizers,
    word_tokenizer,
)
from hf_lstm.data import corpora, load_documents, read_text, readers

POEMS = ["白日依山盡，", "黃河入海流。", "欲窮千里目，\n", "更上一層樓。"]


def test_a_single_text_is_a_stream_without_ends():
    tokenizer = char_tokenizer(["hello"])

    stream = TokenStream.from_documents(["hello"], tokenizer)

    assert stream[:].tolist() == tokenizer("hello")["input_ids"]
    assert stream.document_starts.tolist() == [0]
    assert stream.num_bytes == 4  # the first character is predicted by nothing


def test_documents_stand_between_ends():
    tokenizer = byte_tokenizer()

    stream = TokenStream.from_documents(["ab", "", "床"], tokenizer)

    assert tokenizer.decode(stream[:]) == "<eos>ab<eos>床<eos>"
    assert stream.document_starts.tolist() == [0, 3]
    assert stream.num_bytes == 5
    assert stream.starts_of(torch.arange(8)).tolist() == [0, 0, 0, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(("text", "expected"), [("aé", 2), ("éa", 1), ("床b", 1)])
def test_the_bytes_counted_are_those_of_the_targets(text, expected):
    assert TokenStream.from_documents([text], char_tokenizer([text])).num_bytes == expected


@pytest.mark.parametrize(
    ("text", "tokenizer", "characters", "words"),
    [
        ("a bc\nd", char_tokenizer(["a bc\nd"]), 5, 2),  # "a" is spelled by the first token, and so not predicted
        ("ab c", char_tokenizer(["abc "]), 3, 2),
        (" ab", char_tokenizer(["ab "]), 2, 1),
        ("床b", byte_tokenizer(), 2, 1),
        ("a bc a", word_tokenizer(["a bc a"]), 5, 2),
    ],
)
def test_characters_and_words_are_those_of_the_targets(text, tokenizer, characters, words):
    stream = TokenStream.from_documents([text], tokenizer)

    assert (stream.num_characters, stream.num_words) == (characters, words)


@pytest.mark.parametrize(
    ("normalizer", "text", "read"),
    [
        (normalizers.NFC(), "e\u0301a e\u0301", "éa é"),
        (normalizers.NFD(), "éa é", "e\u0301a e\u0301"),
        (normalizers.NFKC(), "ﬁ Ⅻ", "fi XII"),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]), "É a", "e a"),
        (normalizers.BertNormalizer(), "É 床", "e 床"),
        (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), "a b", "a b"),
        (normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")]), "e\u0301 b", "é b"),
    ],
    ids=["NFC", "NFD", "NFKC", "no accents", "BERT", "Llama", "both"],
)
def test_the_text_that_is_counted_is_the_one_that_is_predicted(normalizer, text, read):
    """In two documents, all of which is predicted."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer

    stream = TokenStream.from_documents([text, text], tokenizer)

    sizes = (stream.num_bytes, stream.num_characters, stream.num_words)
    assert sizes == (2 * len(read.encode()), 2 * len(read), 2 * len(read.split()))


@pytest.mark.parametrize(("text", "expected"), [("e\u0301ab", (2, 2)), ("ae\u0301b", (3, 2)), ("abe\u0301", (3, 2))])
def test_a_composed_text_is_counted_without_its_first_token(text, expected):
    stream = TokenStream.from_documents([text], char_tokenizer([text], nfc=True))

    assert len(stream) == 3
    assert (stream.num_bytes, stream.num_characters) == expected


def test_bits_per_byte_are_those_of_the_text_that_is_predicted():
    """However its characters were written."""
    texts = ["caf\u00e9 cr\u00e8me", "\u00e9t\u00e9"]
    tokenizer = char_tokenizer(texts, nfc=True)
    model = make_model(vocab_size=len(tokenizer))

    composed, apart = (
        evaluate_stream(model, TokenStream.from_documents([normalize(form, text) for text in texts], tokenizer))
        for form in ("NFC", "NFD")
    )

    assert composed == apart


def test_line_ends_that_become_words_are_counted_as_written():
    stream = TokenStream.from_documents(["a b\n", "b\n"], word_tokenizer(["a b"]))

    assert (stream.num_bytes, stream.num_characters, stream.num_words) == (6, 6, 3)


def test_the_first_byte_of_a_character_is_one_byte():
    assert TokenStream.from_documents(["床b"], byte_tokenizer()).num_bytes == 3


def test_long_texts_are_tokenized_in_pieces(monkeypatch):
    text = "line one\nline two\n" + "x" * 50 + "\nend"
    tokenizer = char_tokenizer([text])
    expected = tokenizer(text)["input_ids"]

    for length in (1, 7, 20, 100):
        monkeypatch.setattr(tokenizers, "PIECE_LENGTH", length)
        assert TokenStream.from_documents([text], tokenizer)[:].tolist() == expected


def test_an_empty_corpus_is_refused():
    with pytest.raises(ValueError, match="every document is empty"):
        TokenStream.from_documents(["", None], byte_tokenizer())


def test_a_tokenizer_without_end_cannot_separate_documents():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None

    with pytest.raises(ValueError, match=r"`eos_token` \(None\) must be set, since it separates the 2 documents"):
        TokenStream.from_documents(["a", "b"], tokenizer)


@pytest.mark.parametrize("kind", [torch.tensor, numpy.array, list], ids=["tensor", "array", "list"])
def test_lanes_hold_the_stream_in_order(kind):
    lanes = LaneDataset(kind(list(range(45))), lanes=3, bptt_length=4)

    assert len(lanes) == 3 * (44 // 12)
    for index in range(len(lanes)):
        item, start = lanes[index], (index % 3) * 12 + (index // 3) * 4
        assert item["input_ids"].tolist() == item["labels"].tolist() == list(range(start, start + 4))
        assert item["shift_labels"].tolist() == list(range(start + 1, start + 5))
        assert item["position_ids"].tolist() == [position % 12 for position in range(start, start + 4)]
        assert item["shift_labels"].is_contiguous()
    with pytest.raises(IndexError):
        lanes[len(lanes)]


@pytest.mark.parametrize("options", [{}, {"reset_at_documents": True}, {"length_seed": 3}])
def test_a_batch_is_its_items(options):
    """Of one chunk, as in training, or of any."""
    stream = TokenStream.from_documents(["abc" * 20, "de" * 30, "fgh"] * 4, byte_tokenizer())
    lanes = LaneDataset(stream, lanes=3, bptt_length=12, **options)

    for indices in ([0, 1, 2], list(range(len(lanes))), [7, 2, 2, 9], []):
        batch = lanes.__getitems__(indices)

        assert len(batch) == len(indices)
        for item, index in zip(batch, indices, strict=True):
            assert {name: column.tolist() for name, column in item.items()} == {
                name: column.tolist() for name, column in lanes[index].items()
            }
    for wrong in (-1, len(lanes)):
        with pytest.raises(IndexError, match=f"Item {wrong} of {len(lanes)}"):
            lanes.__getitems__([0, wrong])


class Weighted(LaneDataset):
    def __getitem__(self, index):
        return super().__getitem__(index) | {"weight": torch.tensor(index)}


def test_the_items_of_a_subclass_are_its_own():
    lanes = Weighted(torch.arange(50), lanes=2, bptt_length=4)

    (batch,) = itertools.islice(DataLoader(lanes, batch_size=6), 1)

    assert batch["weight"].tolist() == list(range(6))
    assert batch["input_ids"].tolist() == [lanes[index]["input_ids"].tolist() for index in range(6)]


def test_positions_begin_at_documents_and_lanes():
    stream = TokenStream.from_documents(["abc", "de", "fghij", "k"], byte_tokenizer())  # starts at 0, 4, 7, 13
    lanes = LaneDataset(stream, lanes=2, bptt_length=3, reset_at_documents=True)

    positions = [lanes[index]["position_ids"].tolist() for index in range(len(lanes))]

    assert positions == [[0, 1, 2], [0, 0, 1], [3, 0, 1], [2, 3, 4]]  # lane 1 begins within a document


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lanes": 0, "bptt_length": 4}, r"`lanes` \(0\) must be at least 1"),
        ({"lanes": 4, "bptt_length": -1}, r"`bptt_length` \(-1\) must be at least 1"),
        ({"lanes": 4, "bptt_length": 8}, "holds 32 tokens, and 4 lanes of one chunk of 8 need 33"),
        ({"lanes": 1, "bptt_length": 4, "reset_at_documents": True}, "needs a `TokenStream`"),
    ],
)
def test_invalid_lanes_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        LaneDataset(torch.arange(32), **arguments)


def test_tokens_must_be_integers_in_a_single_dimension():
    with pytest.raises(ValueError, match=r"`tokens` of shape \(2, 3\)"):
        LaneDataset(torch.zeros(2, 3, dtype=torch.long), 1, 1)
    with pytest.raises(ValueError, match="must be integers"):
        LaneDataset([0.5, 1.5], 1, 1)


def write(path, kind):
    dataset = Dataset.from_dict({"text": POEMS, "author": ["王之渙"] * 4})
    if kind == ".txt":
        path.write_bytes("\n".join(POEMS).encode())
    elif kind == ".jsonl":
        path.write_text(
            "".join(json.dumps({"text": poem, "author": "王之渙"}) + "\n" for poem in POEMS), encoding="utf-8"
        )
    elif kind == ".csv":
        dataset.to_csv(path)
    else:
        dataset.to_parquet(path)
    return path


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".parquet"])
def test_files_become_documents(tmp_path, kind):
    train, other = write(tmp_path / f"train{kind}", kind), write(tmp_path / f"other{kind}", kind)

    corpus = load_corpus(train, validation_file=other, test_file=other)

    assert list(corpus) == ["train", "validation", "test"]
    assert all(split.column_names[0] == "text" for split in corpus.values())
    assert list(corpus["test"]["text"]) == (["\n".join(POEMS)] if kind == ".txt" else POEMS)


def test_folders_of_datasets_become_documents(tmp_path):
    dataset = Dataset.from_dict({"poem": POEMS})
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "splits")

    assert {name: len(split) for name, split in load_corpus(tmp_path / "one", text_column="poem").items()} == {
        "train": 3,
        "validation": 1,
    }
    assert list(load_corpus(tmp_path / "splits", text_column="poem")) == ["train", "validation", "test"]


def test_the_last_part_of_a_text_is_for_validation(tmp_path):
    path = tmp_path / "text"
    path.write_text("".join(chr(97 + index % 26) for index in range(1000)))

    corpus = load_corpus(path)

    assert len(corpus["train"][0]["text"]) == 900
    assert corpus["train"][0]["text"] + corpus["validation"][0]["text"] == path.read_text()


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".parquet"])
def test_a_file_that_changed_is_read_again(tmp_path, kind):
    """Also if it has the same size, and says that it is as old."""
    path = tmp_path / f"file{kind}"
    for text in ("one", "two"):
        if kind in (".txt", ".csv"):
            path.write_text(f"text\n{text}")
        elif kind == ".jsonl":
            path.write_text(json.dumps({"text": text}))
        else:
            Dataset.from_dict({"text": [text]}).to_parquet(path)
        os.utime(path, (1_000_000_000, 1_000_000_000))

        assert text in load_documents(path)["train"]["text"][0]


def test_a_corpus_in_memory_is_split_as_one_on_disk(tmp_path):
    train, test = ({"poem": texts, "author": ["王之渙"] * len(texts)} for texts in (POEMS, POEMS[:1]))
    rows = DatasetDict({"train": Dataset.from_dict(train), "test": Dataset.from_dict(test)})
    rows.save_to_disk(tmp_path / "folder")

    corpus, saved = (load_corpus(source, text_column="poem") for source in (rows, tmp_path / "folder"))

    assert {name: split["text"][:] for name, split in corpus.items()} == {
        name: split["text"][:] for name, split in saved.items()
    }
    with pytest.raises(ValueError, match="`name` has no column `text`, only poem, author: name the one"):
        load_corpus(rows)


@pytest.mark.parametrize("name", [None, ["a"], {"train": ["a"]}], ids=str)
def test_a_corpus_must_be_named(name):
    with pytest.raises(ValueError, match=r"`name` \(.*\) must be a str or a Path: name a file, a folder or"):
        load_corpus(name)


def test_a_split_is_that_of_its_name_or_the_only_one(tmp_path):
    dataset, other = (Dataset.from_dict({"text": [text] * 5}) for text in ("train", "other"))
    DatasetDict({"train": dataset, "validation": other}).save_to_disk(tmp_path / "both")
    DatasetDict({"test": other}).save_to_disk(tmp_path / "one")
    DatasetDict({"train": dataset, "test": other}).save_to_disk(tmp_path / "neither")

    for folder in ("both", "one"):
        corpus = load_corpus(tmp_path / "both", validation_file=tmp_path / folder)
        assert corpus["validation"]["text"][0] == "other"
    with pytest.raises(ValueError, match=r"neither has the splits train, test, but not `validation`"):
        load_corpus(tmp_path / "both", validation_file=tmp_path / "neither")
    with pytest.raises(ValueError, match=r"one has the splits test: there must be one called `train`"):
        load_corpus(tmp_path / "one")


def test_a_saved_text_is_still_one_document(tmp_path, monkeypatch):
    for module in ("hf_lstm.tokenizers", "hf_lstm.data.corpora", "hf_lstm.data.readers"):
        monkeypatch.setattr(f"{module}.PIECE_LENGTH", 50)
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + index % 26) for index in range(1000)))
    load_documents(path)["train"].save_to_disk(tmp_path / "saved")

    corpora_ = load_corpus(path), load_corpus(tmp_path / "saved")

    for corpus in corpora_:
        streams = [TokenStream.from_documents(corpus[split], byte_tokenizer()) for split in ("train", "validation")]
        assert [len(stream) for stream in streams] == [900, 100]


def test_a_column_called_continues_joins_no_documents(tmp_path):
    """Whatever its name; only rows that were made here go on with a document."""
    rows = Dataset.from_dict({"text": ["ab", "cd", "ef"], "continues": [True, False, True]})
    rows.to_csv(tmp_path / "rows.csv")
    rows.to_json(tmp_path / "rows.jsonl")
    rows.to_json(tmp_path / "rows.json")
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "folder")
    sources = ["rows.csv", "rows.jsonl", "rows.json", "rows.parquet", "folder"]

    for documents in (rows, *(load_documents(tmp_path / source)["train"] for source in sources)):
        stream = TokenStream.from_documents(documents, byte_tokenizer())
        assert byte_tokenizer().decode(stream[:]) == "<eos>ab<eos>cd<eos>ef<eos>"
        assert stream.document_starts.tolist() == [0, 3, 6]
        lanes = StreamingLanes(documents.to_iterable_dataset(), byte_tokenizer(), lanes=1, bptt_length=9)
        assert torch.equal(next(iter(lanes))["input_ids"], stream[:9])
    for source in sources:
        joined = load_corpus(tmp_path / source, validation_file=tmp_path / source, join_records=True)["train"]
        assert byte_tokenizer().decode(TokenStream.from_documents(joined, byte_tokenizer())[:]) == "abcdef"


def test_a_folder_of_an_earlier_version_is_named(tmp_path, caplog, monkeypatch):
    """Which called the column `continues`: its documents are not taken apart in silence."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_lstm"), "propagate", True)
    Dataset.from_dict({"text": ["ab", "cd"], "continues": [False, True]}).save_to_disk(tmp_path / "old")

    load_documents(tmp_path / "old")

    assert "old has a column `continues`, and each of its rows is read as a document of its own" in caplog.text


@pytest.mark.parametrize("first", [3, 4, 5])
def test_the_first_of_some_rows_begins_a_document(first):
    texts = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op"]
    rows = Dataset.from_dict({"text": texts, readers.CONTINUES: [False, True, True, True, True, False, True, False]})
    part, tokenizer = rows.select(range(first, 8)), byte_tokenizer()

    stream = TokenStream.from_documents(part, tokenizer)

    assert tokenizer.decode(stream[:]).split("<eos>") == ["", "".join(texts[first:5]), "klmn", "op", ""][first == 5 :]
    assert stream.document_starts[0] == 0
    lanes = LaneDataset(stream, lanes=1, bptt_length=2, reset_at_documents=True)
    assert min(position for item in lanes for position in item["position_ids"].tolist()) == 0
    documents = DocumentDataset(stream, 100)
    assert [tokenizer.decode(item["input_ids"][1:-1]) for item in documents] == [
        text for text in ("".join(texts[first:5]), "klmn", "op") if text
    ]
    corpus = corpora._hold_out(part, 0.4)
    held = {"".join(corpus[split]["text"]) for split in corpus}
    assert sum(map(len, held)) == 2 * len(part)
    assert all(("klmn" in text) == ("kl" in text) == ("mn" in text) for text in held)
    streamed = StreamingLanes(part.to_iterable_dataset(), tokenizer, lanes=1, bptt_length=4)
    assert next(iter(streamed))["input_ids"][0] == tokenizer.eos_token_id


def test_an_empty_document_is_left_out_however_a_corpus_holds_it(tmp_path):
    (tmp_path / "text.txt").write_text("ab")
    text = load_documents(tmp_path / "text.txt")["train"]
    rows = concatenate_datasets([text, Dataset.from_dict({"text": ["", "q", None]})])
    pieces = Dataset.from_dict(
        {"text": ["ab", "", None, "q", "", ""], readers.CONTINUES: [False, False, True, True, False, True]}
    )
    expected = TokenStream.from_documents(["ab", "", "q", None], byte_tokenizer())

    for documents in (rows, pieces):
        stream = TokenStream.from_documents(documents, byte_tokenizer())
        lanes = StreamingLanes(documents.to_iterable_dataset(), byte_tokenizer(), lanes=1, bptt_length=5)

        assert torch.equal(stream[:], expected[:])
        assert torch.equal(stream.document_starts, expected.document_starts)
        assert torch.equal(next(iter(lanes))["input_ids"], expected[:5])


def test_white_space_before_the_first_token_is_counted_with_its_document(monkeypatch):
    tokenizer, text = word_tokenizer(["to be"]), " " * 20 + "to be" + " " * 20
    rows = Dataset.from_dict(
        {"text": [text[:10], text[10:24], text[24:]] * 2, readers.CONTINUES: [False, True, True] * 2}
    )

    streams = [TokenStream.from_documents(documents, tokenizer) for documents in (rows, [text, text])]

    assert [(each.num_bytes, each.num_characters, each.num_words) for each in streams] == [(90, 90, 4)] * 2


@pytest.mark.parametrize(
    "text", ["床" * 95, "a b" * 30 + " \n" * 9, " ".join("abcdef" * 9)], ids=["one", "many", "short"]
)
def test_words_are_counted_once_however_a_text_is_held(tmp_path, monkeypatch, text):
    for module in ("hf_lstm.tokenizers", "hf_lstm.data.corpora", "hf_lstm.data.readers"):
        monkeypatch.setattr(f"{module}.PIECE_LENGTH", 10)
    (tmp_path / "text.txt").write_text(text)

    sources = ([text], load_documents(tmp_path / "text.txt")["train"])

    for texts in sources:
        stream = TokenStream.from_documents(texts, byte_tokenizer())
        first_is_a_word = text[1].isspace()  # of one letter, which nothing predicts
        assert stream.num_words == len(text.split()) - first_is_a_word


@pytest.mark.parametrize("kind", ["arrow", "pandas", "numpy", "torch"])
def test_a_format_of_a_data_set_changes_no_text(tmp_path, kind):
    texts = ["ab", None, "cd"]
    rows = Dataset.from_dict({"text": texts, "id": [0, 1, 2]})
    rows.with_format(kind, columns=["id"]).save_to_disk(tmp_path / "saved")
    expected = TokenStream.from_documents(texts, byte_tokenizer())[:]

    sources = [rows.with_format(kind), load_documents(tmp_path / "saved")["train"]]

    for documents in sources:
        assert torch.equal(TokenStream.from_documents(documents, byte_tokenizer())[:], expected)
    for documents in (
        rows.to_iterable_dataset().with_format(kind),
        load_documents(tmp_path / "saved", streaming=True)["train"],
    ):
        lanes = StreamingLanes(documents, byte_tokenizer(), lanes=1, bptt_length=6)
        assert torch.equal(next(iter(lanes))["input_ids"], expected[:6])


def test_a_transform_of_a_data_set_gives_its_texts():
    rows = Dataset.from_dict({"text": ["ab", "cd"]})
    rows.set_transform(lambda batch: {"text": [text.upper() for text in batch["text"]]})

    stream = TokenStream.from_documents(rows, byte_tokenizer())

    assert byte_tokenizer().decode(stream[:]) == "<eos>AB<eos>CD<eos>"


def test_rows_of_two_corpora_keep_their_documents(tmp_path):
    """`datasets` fills in null where one of them has no such column."""
    joined = Dataset.from_dict({"text": ["ab", "cd"], readers.CONTINUES: [False, True]})
    rows = concatenate_datasets([joined, Dataset.from_dict({"text": ["ef", "gh"]})])

    stream = TokenStream.from_documents(rows, byte_tokenizer())

    assert byte_tokenizer().decode(stream[:]) == "<eos>abcd<eos>ef<eos>gh<eos>"


@pytest.mark.parametrize("starts", [[1, 2], [0, 2, 2], [0, 3, 1], [0, 5], [], [[0]], [0.0]], ids=str)
def test_invalid_document_starts_raise(starts):
    with pytest.raises(ValueError, match=r"`document_starts` .* must"):
        TokenStream(torch.arange(5), torch.tensor(starts))


def test_records_that_hold_documents_are_joined_whole(tmp_path):
    rows = Dataset.from_dict({"text": ["ab", "cd", "ef"], readers.CONTINUES: [False, True, False]})
    rows.save_to_disk(tmp_path / "folder")

    joined = load_corpus(tmp_path / "folder", validation_file=tmp_path / "folder", join_records=True)["train"]

    assert len(TokenStream.from_documents(joined, byte_tokenizer()).document_starts) == 1


def test_the_rows_of_a_document_are_held_out_together():
    rows = Dataset.from_dict({"text": list("abcdefghij"), readers.CONTINUES: [False, True] * 5})

    corpus = corpora._hold_out(rows, 0.4)

    for split, documents in (("train", 3), ("validation", 2)):
        assert len(corpus[split]) == 2 * documents
        texts = "".join(corpus[split]["text"])
        assert all(texts[index : index + 2] in ("ab", "cd", "ef", "gh", "ij") for index in range(0, len(texts), 2))


def test_line_ends_and_marks_of_a_file_are_kept(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r" + b"three\n" * 20)

    assert read_text(path) == "one\r\ntwo\r" + "three\n" * 20


def test_the_standard_library_is_a_corpus():
    corpus, less = standard_library(1_000_000), standard_library(500_000)

    texts = {split: rows["text"][:] for split, rows in corpus.items()}
    assert list(texts) == ["train", "validation", "test"]
    assert 900_000 < sum(len(text.encode()) for text in texts["train"]) <= 1_000_000
    assert less["train"]["text"][:] == texts["train"][: len(less["train"])]
    assert less["validation"]["text"][:] == texts["validation"]
    assert less["test"]["text"][:] == texts["test"]
    assert less["train"]["text"][:] != texts["train"]
    assert max(len(text.encode()) for text in texts["train"]) <= 20_000
    assert 100_000 < sum(len(text.encode()) for text in texts["validation"]) <= 140_000
    assert 100_000 < sum(len(text.encode()) for text in texts["test"]) <= 210_000
    assert not set(texts["train"]) & {*texts["validation"], *texts["test"]}
    for text in texts["train"][:50]:
        ast.parse(text)


BAD_FILES = {
    "missing.txt": (None, "The file .*missing.txt does not exist"),
    "missing.jsonl": (None, "The file .*missing.jsonl does not exist"),
    "empty.txt": (b"", "empty.txt is empty"),
    "empty.csv": (b"", "empty.csv is empty"),
    "one.txt": (b"a", "The text has 1 characters: too few to split"),
    "latin.txt": ("caf\xe9 au lait".encode("latin-1"), r"latin.txt is not UTF-8 \(byte 3: .*--encoding cp1252`"),
    "broken.jsonl": (b'{"text": "a"', "broken.jsonl cannot be read as jsonl"),
    "[1].jsonl": (b'{"body": 1}\n', r"\[1\].jsonl has no column `text`, only body: name the one"),
    "blank.jsonl": (b"\n\n", "blank.jsonl holds no record in its 2 lines"),
    "empties.jsonl": (b'{"text": ""}\n' * 9 + b'{"text": "a"}\n', "fewer than two documents with text"),
    "noise.parquet": (b"not parquet", "noise.parquet cannot be read as parquet"),
    "column.jsonl": (b'{"body": "a", "id": "1"}\n' * 3, "has no column `text`, only body, id: name the one"),
    "mixed.jsonl": (
        b'{"text": "a"}\n' * 60_000 + b'{"text": {"a": 5}}\n',
        'The column `text` of .*mixed.jsonl holds {"a": 5} in line 60001: it must hold text',
    ),
    "half.jsonl": (
        b'{"text": "a \\ud83d b"}\n',
        "half.jsonl cannot be read as jsonl: line 1 holds half of a character",
    ),
    "header.csv": (b"text\n", "header.csv"),
    "org/absent": (None, r"org/absent cannot be found, on this disk or on the Hub \(.*\): correct its name"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unreadable_files_are_refused_by_name(tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / name if content is not None or "missing" in name else name
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ValueError, match=message):
        load_corpus(path)


def test_a_folder_without_a_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither a .txt file nor a data set .* by a pattern .*\*.jsonl'"):
        load_corpus(tmp_path)


def test_any_tokenizer_makes_a_stream(tmp_path):
    """A byte-level BPE as GPT-2's, with a leading-space convention, saved and loaded from a folder."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the cat sat on the mat"] * 20, vocab_size=280, special_tokens=["<eos>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    stream = TokenStream.from_documents(["the cat", "the mat"], tokenizer)

    assert tokenizer.decode(stream[:]) == "<eos>the cat<eos>the mat<eos>"
    assert stream.num_bytes == 14
