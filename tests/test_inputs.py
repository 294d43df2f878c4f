"""Corpora as newcomers name them: a folder, a pattern, another encoding, another delimiter, a column of another name."""

import gzip
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from hf_lstm import TokenStream, byte_tokenizer, load_corpus, load_documents
from hf_lstm.data import read_records, read_text, readers


def texts_of(name, **options):
    """The texts of a corpus, which are the same streamed."""
    prepared = load_documents(name, **options)["train"]
    streamed = load_documents(name, streaming=True, **options)["train"]

    texts = list(prepared["text"])
    assert texts == [row["text"] for row in streamed]
    return texts


@pytest.fixture
def said(monkeypatch, caplog):
    """The warnings of the package, so far."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_lstm"), "propagate", True)
    return lambda: caplog.text


@pytest.fixture
def books(tmp_path):
    """A folder of texts, one of them empty, one compressed and one below; and files that are not texts."""
    folder = tmp_path / "books"
    for place in ("c", ".hidden", "folder.txt"):
        (folder / place).mkdir(parents=True)
    (folder / "b.TXT").write_text("two " * 10)
    (folder / "a.txt").write_text("one " * 10)
    (folder / "c/d.txt.gz").write_bytes(gzip.compress(b"four " * 10))
    (folder / "c/c.txt").write_text("")
    (folder / "rows.csv").write_text("text\nno\n")
    (folder / "notes.md").write_text("three")
    (folder / ".hidden/a.txt").write_text("no")
    return folder


def test_a_folder_of_texts_is_a_document_a_file(books, monkeypatch):
    monkeypatch.setattr("hf_lstm.tokenizers.PIECE_LENGTH", 16)

    texts = texts_of(books)
    stream = TokenStream.from_documents(load_documents(books)["train"], byte_tokenizer())

    assert "".join(texts) == "one " * 10 + "two " * 10 + "four " * 10
    assert len(texts) > 4  # pieces of documents
    assert stream.document_starts.tolist() == [0, 41, 82]
    assert len(load_corpus(books)["validation"]["text"]) > 1  # pieces of one whole document


def test_a_folder_is_read_again_when_a_file_changed(books):
    before = texts_of(books)
    (books / "a.txt").write_text("another")

    assert texts_of(books) == ["another", *before[1:]]


def test_a_pattern_names_files_of_one_kind(books, tmp_path):
    for number in (2, 1):
        (tmp_path / f"{number}.jsonl").write_text(f'{{"text": "{number}"}}\n' * number)
        pyarrow.parquet.write_table(pyarrow.table({"text": [str(number)]}), tmp_path / f"{number}.parquet")
    Dataset.from_dict({"text": ["3"]}).to_parquet(tmp_path / "3.large")
    (tmp_path / "[x].txt").write_text("a file of this name")

    assert texts_of(books / "**/*.txt*") == ["one " * 10, "", "four " * 10]
    assert texts_of(f"{books}/[bn]*") == ["two " * 10, "three"]
    assert texts_of(tmp_path / "*.jsonl") == ["1", "2", "2"]
    assert texts_of(tmp_path / "?.parquet") == ["1", "2"]
    assert texts_of(tmp_path / "[x].txt") == ["a file of this name"]
    assert isinstance(streamed := load_documents(tmp_path / "*.jsonl", streaming=True)["train"], IterableDataset)
    assert streamed.num_shards == 2  # processes read whole files
    with pytest.raises(ValueError, match=r"No file matches .*\*.tex: correct the pattern"):
        load_documents(books / "*.tex")
    with pytest.raises(ValueError, match=r"\*.* matches files of several kinds, .csv, text: name those of one kind"):
        load_documents(books / "*.*")


def test_tables_of_a_pattern_are_alike(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "1.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["b"], readers.CONTINUES: [True]}), tmp_path / "2.parquet")

    with pytest.raises(ValueError, match=r"2.parquet has the columns .* and .*1.parquet .*: make them alike"):
        load_documents(tmp_path / "*.parquet")


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-be", "utf-8-sig", "gb18030"])
def test_a_file_in_another_encoding_is_read(tmp_path, encoding, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_LENGTH", 16)
    text = "naïve café\r\n" * 20 if encoding == "cp1252" else "春風又綠江南岸\r\n" * 20
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "a.csv").write_bytes(f'text\r\n"{text}"\r\n'.encode(encoding))
    (tmp_path / "a.json").write_bytes(json.dumps([text], ensure_ascii=False).encode(encoding))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(f'{{"text": "{text[:5]}"}}\n'.encode(encoding)))

    assert read_text(tmp_path / "a.txt", encoding) == "".join(texts_of(tmp_path / "a.txt", encoding=encoding)) == text
    assert (
        texts_of(tmp_path / "a.csv", encoding=encoding) == texts_of(tmp_path / "a.json", encoding=encoding) == [text]
    )
    assert texts_of(tmp_path / "a.jsonl.gz", encoding=encoding) == [text[:5]]
    assert list(read_records(tmp_path / "a.jsonl.gz", encoding)) == [(1, {"text": text[:5]})]


def test_an_encoding_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    for content, encoding, message in (
        (
            b"caf\xe9",
            "utf-8",
            r"a.txt is not UTF-8 \(byte 3: .*\): name its encoding, such as `--encoding cp1252`, or",
        ),
        ("x" * 70_000 + "é", "ascii", r"a.txt is not ASCII \(byte 70000: .* such as `--encoding utf-8`, or"),
        (b"a\0b\0", "utf-16", r"a.txt is not UTF-16 \(byte 0: .*: name its encoding, such as `--encoding utf-16-le`"),
        (b"a\0b", "utf-16-le", r"a.txt is not UTF-16-LE \(byte 2: truncated data\): name its encoding"),
        (
            "ab\0".encode("utf-16"),
            "utf-16",
            r"a.txt is not text in UTF-16, since it holds a NUL: remove it, or name another",
        ),
        ("床".encode("utf-16"), "utf-8", r"a.txt is not UTF-8 \(byte 0: .* such as `--encoding utf-16`, or"),
        (b"ab", "utf8-mb4", r"`encoding` \(utf8-mb4\) must be an encoding of text that Python knows, such as utf-8"),
        (b"ab", "hex", r"`encoding` \(hex\) must be an encoding of text"),
    ):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=message) as refused:
            list(load_documents(path, streaming=True, encoding=encoding)["train"])
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("delimiter", "typed"), [(";", ";"), ("\t", r"\t"), ("\t", "\t"), ("|", "|")])
def test_a_table_may_have_another_delimiter(tmp_path, delimiter, typed):
    path = tmp_path / "a.csv"
    path.write_text(f'text{delimiter}by\none, two{delimiter}x\n"a{delimiter}b"{delimiter}y\n')

    assert texts_of(path, csv_delimiter=typed) == ["one, two", f"a{delimiter}b"]
    with pytest.raises(
        ValueError, match=r"columns seem to be separated by .*, so add `--csv_delimiter '.*'`"
    ) as refused:
        load_documents(path)
    assert repr(delimiter) in str(refused.value)


def test_a_delimiter_is_one_character(tmp_path):
    (tmp_path / "a.csv").write_text("text\nb\n")

    for delimiter in ("", ";;", "\n", '"'):
        with pytest.raises(ValueError, match=r"`csv_delimiter` \(.*\) must be one character, such as `;`, or"):
            load_documents(tmp_path / "a.csv", csv_delimiter=delimiter)


def test_the_only_column_of_text_is_taken_and_said(tmp_path, said):
    rows = [{"id": 1, "poem": "a"}, {"id": 2, "poem": "b"}, {"id": 3, "poem": ""}]
    table = Dataset.from_list(rows)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text('poem\na\nb\n""\n')
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "saved"):
        assert texts_of(tmp_path / name) == ["a", "b", ""]
        assert f"{name} has no column `text`: `poem`, its only column of text, is read; `--text_column`" in said()
    assert load_corpus(DatasetDict({"train": table, "validation": table}))["train"]["text"][:] == ["a", "b", ""]
    with pytest.raises(ValueError, match=r"a.jsonl has no `text` in line 1, only id, poem: name the one"):
        load_documents(tmp_path / "a.jsonl", text_column="text")


def test_several_columns_of_text_are_not_chosen_from(tmp_path):
    (tmp_path / "a.csv").write_text("title,body\na,b\n")
    (tmp_path / "a.jsonl").write_text('{"id": "7", "body": "b"}\n')
    (tmp_path / "b.jsonl").write_text('{"body": "b"}\n{"text": "c"}\n')

    with pytest.raises(
        ValueError, match=r"a.csv has no column `text`, only title, body: name .* with `--text_column`"
    ):
        load_documents(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"a.jsonl has no column `text`, only id, body: name the one"):
        load_documents(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"b.jsonl has no `body` in line 2, only text: name the one"):
        load_documents(tmp_path / "b.jsonl")
