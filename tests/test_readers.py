"""Files of records: text is text as it is written, streamed or not; what cannot be read is refused with file and line."""

import bz2
import csv
import gzip
import json
import lzma
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_lstm import StreamingLanes, TokenStream, byte_tokenizer, load_corpus, load_documents
from hf_lstm.data import read_records, read_text, readers, records
from hf_lstm.data.readers import CorpusError

# Each of them is something else to a reader that guesses.
TEXTS = [
    "1.50",
    "007",
    "NA",
    "null",
    "nan",
    "",
    "true",
    "2024-01-31",
    "2024-01-31T12:00:00Z",
    "1e5",
    "Inf",
    " a ",
    "{}",
]
TEXTS += [
    "[1]",
    "naïve 床 \U0001f600",
    '"',
    'a "b" c',
    "a,b",
    "one\r\ntwo\nthree\rfour",
    "\u2028",
    "\ufeff",
    "x" * 200_000,
]


def texts_of(path, **options):
    """The texts of a file, which are the same streamed."""
    prepared = load_documents(path, **options)["train"]
    streamed = load_documents(path, streaming=True, **options)["train"]

    assert prepared.column_names == streamed.column_names
    texts = list(prepared["text"])
    assert texts == [row["text"] for row in streamed]
    return texts


def write(path, texts):
    records = [{"id": number, "text": text, "date": "2024-01-31"} for number, text in enumerate(texts)]
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.DictWriter(file, ["id", "text", "date"])
            rows.writeheader()
            rows.writerows(records)
    elif path.name == "array.json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    elif path.name == "texts.json":
        path.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    elif path.name == "objects.json":
        path.write_text("\n".join(json.dumps(record, indent=1) for record in records), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


KINDS = [
    "rows.csv",
    "lines.jsonl",
    "LINES.JSONL",
    "lines.ndjson",
    "lines.json",
    "array.json",
    "objects.json",
    "texts.json",
]


@pytest.mark.parametrize("name", KINDS)
def test_text_is_text_as_it_is_written(tmp_path, name):
    assert texts_of(write(tmp_path / name, TEXTS)) == TEXTS


def compress(path, kind):
    """The same file, compressed; a .zip file is named otherwise than what it holds."""
    content, packed = path.read_bytes(), path.with_name(f"packed{path.suffix}{kind}")
    if kind == ".zip":
        packed = path.with_name("archive.ZIP")
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.mkdir("folder")
            archive.writestr(f"folder/{path.name}", content)
    elif kind == ".zst":
        with pyarrow.output_stream(str(packed), compression="zstd") as file:
            file.write(content)
    else:
        packed.write_bytes({".gz": gzip, ".bz2": bz2, ".xz": lzma}[kind].compress(content))
    return packed


@pytest.mark.parametrize("kind", readers.OPENERS)
@pytest.mark.parametrize("name", ["rows.csv", "lines.jsonl", "array.json", "text.txt"])
def test_a_compressed_file_is_read_as_the_file_itself(tmp_path, name, kind):
    path = tmp_path / name
    if name == "text.txt":
        path.write_bytes("".join(TEXTS).encode())
    else:
        write(path, TEXTS)

    packed = compress(path, kind)

    assert texts_of(packed) == texts_of(path)
    assert read_text(packed) == read_text(path)


def test_the_suffixes_of_a_compressed_file_may_be_capitals(tmp_path):
    (tmp_path / "ROWS.CSV.GZ").write_bytes(gzip.compress(b"text\none\n"))

    assert texts_of(tmp_path / "ROWS.CSV.GZ") == ["one"]


@pytest.mark.parametrize("kind", readers.OPENERS)
def test_a_damaged_compressed_file_is_refused(tmp_path, kind):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(f'{{"text": "{number**9}"}}\n' for number in range(5_000)))
    packed = compress(path, kind)
    content = packed.read_bytes()
    for damaged in (content[: len(content) // 2], b"no archive at all", path.read_bytes()):
        packed.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot be unpacked \(.*\): it is damaged, or not a") as refused:
            list(load_documents(packed, streaming=True)["train"])
        assert str(packed) in str(refused.value)


def test_an_empty_compressed_file_is_refused(tmp_path):
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(b""))

    with pytest.raises(ValueError, match=r"text.txt.gz is empty"):
        load_documents(tmp_path / "text.txt.gz")


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_each_reader_of_records_checks_its_file(tmp_path, kind):
    path = tmp_path / f"rows{kind}"
    for encoding, message in (("utf-8", "does not exist"), ("klingon", r"`encoding` \(klingon\) must be")):
        with pytest.raises(CorpusError, match=message):
            next(records.records_of(path, encoding))
    path.touch()
    with pytest.raises(CorpusError, match=f"rows{kind} is empty"):
        next(records.records_of(path))


def test_of_several_files_only_texts_may_be_empty(tmp_path):
    for name, content in (("a.txt", "a"), ("b.txt", ""), ("a.jsonl", '{"text": "a"}'), ("b.jsonl", "")):
        (tmp_path / name).write_text(content)

    assert load_documents(tmp_path / "*.txt")["train"]["text"][:] == ["a", ""]
    with pytest.raises(CorpusError, match=r"b.jsonl is empty"):
        load_documents(tmp_path / "*.jsonl", streaming=True)


def test_an_error_in_a_compressed_file_names_its_line(tmp_path):
    (tmp_path / "lines.jsonl.xz").write_bytes(lzma.compress(b'{"text": "a"}\n{"text": "\\udc00"}\n'))

    with pytest.raises(ValueError, match=r"lines.jsonl.xz cannot be read as jsonl: line 2 holds half of a character"):
        load_documents(tmp_path / "lines.jsonl.xz")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.txt.gz.gz", "a.txt.lz4", "a.7z", "a.parquet.gz"])
def test_an_archive_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"a"))

    with pytest.raises(
        ValueError, match=f"{name} is an archive, or compressed in an unsupported way: unpack it first"
    ):
        load_documents(tmp_path / name)


@pytest.mark.parametrize("members", [[], ["a.txt", "b.txt"]], ids=len)
def test_a_zip_file_holds_one_file(tmp_path, members):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for member in members:
            archive.writestr(member, "text")

    with pytest.raises(ValueError, match=rf"a.zip holds {len(members)} files: unpack it"):
        load_documents(tmp_path / "a.zip")


def test_a_compressed_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "text.txt.gz"
    for text in ("one", "two"):
        path.write_bytes(gzip.compress(text.encode(), mtime=0))

        assert load_documents(path)["train"]["text"][0] == text


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30), min_size=1),
    st.sampled_from(KINDS),
)
@example(["\r\n" * 9, "x" * 15 + "\r\n", "\ufeff"], "rows.csv")
def test_any_text_comes_back_from_any_file(tmp_path_factory, texts, name):
    path = write(tmp_path_factory.mktemp("texts") / name, texts)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(readers, "PIECE_LENGTH", 16)

        assert [row["text"] for row in load_documents(path, streaming=True)["train"]] == texts


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".json"])
def test_late_words_and_late_numbers_are_both_text(tmp_path, kind):
    """Later than in the first thousand rows, by which `datasets` knows the kind of a column."""
    for texts in (["word"] * 1_500 + ["1.50", "007"], ["1.50"] * 1_500 + ["word"]):
        assert texts_of(write(tmp_path / f"{texts[0]}{kind}", texts)) == texts


def test_a_csv_is_read_as_it_is_written(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'\xef\xbb\xbf\r\ntext,author\r\n"one\r\ntwo",a\r\n\r\nsix 6" nails,b\r\n"say ""hi"", you",\r\n NULL ,c\r\nlast,d'
    )

    assert texts_of(path) == ["one\r\ntwo", 'six 6" nails', 'say "hi", you', " NULL ", "last"]
    assert texts_of(path, text_column="author") == ["a", "b", "", "c", "d"]


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n", "\r\r\n"])
def test_the_rows_of_a_csv_may_all_end_in_any_way(tmp_path, end):
    path = tmp_path / "rows.csv"
    path.write_bytes(end.join(["text", '"one\rtwo\nthree"', "four", ""]).encode())

    assert [row["text"] for row in load_documents(path, streaming=True)["train"]] == ["one\rtwo\nthree", "four"]


def test_an_empty_value_is_an_empty_text(tmp_path):
    path = tmp_path / "nulls.json"
    path.write_text('[{"text": null}, {"text": "a"}]')

    assert texts_of(path) == ["", "a"]


BAD = {
    "ragged.csv": (
        b"text\nTo be, or not to be\n",
        r"line 2 has 2 fields, and the first line names 1: put quotation marks",
    ),
    "short.csv": (b'text,author\n"a\n\nb",c\n\nd\n', "line 6 has 1 fields, and the first line names 2"),
    "twice.csv": (b"text,text\na,b\n", r'The column `text` of .* holds \["a", "b"\] in line 2: '),
    "bare.csv": (
        b"text\nfirst\rhalf\nb\n",
        "some rows end in a carriage return alone, .* first in line 2: put quotation",
    ),
    "bare first.csv": (b"text\na\n\rb\n", "some rows end in a carriage return alone, .* first in line 3"),
    "bare header.csv": (b"text\ra\r\nb\n", "some rows end in a carriage return alone, .* first in line 2"),
    "bare end.csv": (b'text\r\n"a\rb"\r\nc\r', "some rows end in a carriage return alone, .* first in line 4"),
    "semicolon.csv": (
        b"\ntext;author\na;b\n",
        "semicolon.csv has no column `text`, only text;author: columns seem .* so add `--csv_delimiter ';'`, or",
    ),
    "header.csv": (b"text\n\n", "header.csv holds no record in its 2 lines"),
    "open.csv": (
        b'text\na\n"b\nc\nd\n',
        "open.csv cannot be read as csv: the row that begins in line 3 is not quoted",
    ),
    "torn.csv": (b'text\n"a"\n"b" c\n', "the row that begins in line 3 is not quoted correctly"),
    "latin.csv": (b"text\ncaf\xe9\n", r"latin.csv is not UTF-8 \(byte 8: .*--encoding cp1252`"),
    "nul.csv": (b"text\na\0b\n", r"nul.csv is not text, since byte 6 is NUL: .*--encoding utf-16-be`"),
    "wide.json": (
        '[{"text": "a"}]'.encode("utf-16-le"),
        "wide.json is not text, since byte 1 is NUL: .*--encoding utf-16-le`",
    ),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"latin.jsonl is not UTF-8 \(byte 27: "),
    "wide.jsonl": (
        '{"text": "a"}\n'.encode("utf-16"),
        "wide.jsonl is not text, since byte 3 is NUL: .*--encoding utf-16`",
    ),
    "twice.jsonl": (b'{"text": "a"}\n{"text": "a", "text": "b"}\n', "line 2 is not JSON .'text' occurs twice"),
    "comma.jsonl": (
        b'{"text": "a"}\n{"text": "a" "b"}\n',
        "line 2 is not JSON .Expecting ',' delimiter at character 14",
    ),
    "deep.jsonl": (
        b'{"text": "a"}\n{"a": ' + b"[" * 200_000,
        "deep.jsonl cannot be read as jsonl: line 2 is not JSON",
    ),
    "number.json": (b'[{"text": "a"},\n\n{"text": 1.50}]', r"holds 1.5 in record 2 \(line 3\): it must hold text"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 7}\n', "number.jsonl holds 7 in line 2: it must hold text"),
    "true.json": (b'{"text": true}', r"holds true in record 1 \(line 1\): it must hold text"),
    "columns.json": (b'{"text": ["a", "b"]}', r'holds \["a", "b"\] in record 1 \(line 1\): it must hold text'),
    "data.json": (
        b'{"data": [{"text": "a"}]}',
        "data.json has no column `text`, only data: name the one .*`--text_column`",
    ),
    "half.json": (b'[\n{"text": "a"},\n{"text": "a \\ud800 b"}]', r"record 2 \(line 3\) holds half of a character"),
    "half.jsonl": (
        b'{"text": "a"}\n\n{"text": "\\udc00"}',
        "half.jsonl cannot be read as jsonl: line 3 holds half of a char",
    ),
    "twice.json": (b'[{"text": "a", "text": "b"}]', r"record 1 \(line 1\) is not JSON \('text' occurs twice\)"),
    "none.json": (b"[]", r"none.json cannot be read as json: there is '\]' where record 1 \(line 1\) should begin"),
    "blank.json": (b" \n ", r"the file ends where record 1 \(line 2\) should begin"),
    "string.json": (b'"a"', r"""there is '"' where record 1 \(line 1\) should begin"""),
    "nested.json": (b'[["a"]]', r"there is '\[' where record 1 \(line 1\) should begin"),
    "cut.json": (b'[{"text": "a"},\n{"text": "b"}', r"the file ends after record 2 \(line 2\), in line 2"),
    "broken.json": (
        b'[{"text": "a"},\n{"text": \n"b" 5}]',
        r"record 2 \(line 2\) is not JSON \(Expecting ',' .* in line 3\)",
    ),
    "comma.json": (b'[{"text": "a"},]', r"there is '\]' where record 2 \(line 1\) should begin"),
    "missing.json": (
        b'[{"text": "a"} {"text": "b"}]',
        r"there is '{' after record 1 \(line 1\), in line 1: put a comma",
    ),
    "behind.json": (b'[{"text": "a"}]\n[]', r"there is '\[' in line 2, after the array"),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
@pytest.mark.parametrize("name", BAD)
def test_unreadable_contents_are_refused_with_their_line(tmp_path, name, streaming):
    content, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(ValueError, match=message) as refused:
        list(load_documents(path, streaming=streaming)["train"])

    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_line_of_a_row_is_where_it_begins(tmp_path):
    """Behind long rows of many lines, and behind more than is read at once."""
    path = tmp_path / "rows.csv"
    rows = [f'"{number}\n\r\n{"x" * number}\r"\r\n' for number in range(500)]
    path.write_bytes(("text\n" + "".join(rows) + "a,b\n").encode())

    with pytest.raises(ValueError, match=f"line {2 + 500 * 4} has 2 fields"):
        load_documents(path)


def test_the_line_of_a_record_is_where_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_LENGTH", 16)
    path = tmp_path / "records.json"
    path.write_text(json.dumps([{"text": "x" * number} for number in range(30)] + [{"text": 5}], indent=0))

    with pytest.raises(ValueError, match=rf"holds 5 in record 31 \(line {2 + 30 * 3}\)"):
        list(load_documents(path, streaming=True)["train"])


@pytest.mark.parametrize("name", ["rows.csv", "lines.jsonl", "array.json"])
def test_records_are_read_as_they_are_needed(tmp_path, monkeypatch, name):
    """No more of a file is read than its first record asks for."""
    path, read = write(tmp_path / name, ["a" * 100] * 5_000), []
    decoded = readers.decoded
    counted = lambda *arguments: (read.append(len(text)) or text for text in decoded(*arguments))
    monkeypatch.setattr(records, "decoded", counted)

    next(iter(load_documents(path, streaming=True)["train"]))

    assert sum(read) <= 2 * readers.PIECE_LENGTH < path.stat().st_size / 4


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_every_kind_of_string_is_text(tmp_path, kind, streaming):
    path, texts = tmp_path / "texts.parquet", ["007", "2024-01-31", None, "床"]
    pyarrow.parquet.write_table(pyarrow.table({"poem": pyarrow.array(texts, type=getattr(pyarrow, kind)())}), path)

    rows = load_documents(path, text_column="poem", streaming=streaming)["train"]

    assert [row["text"] for row in rows] == texts
    if not streaming:
        corpus = load_corpus(path, text_column="poem", validation_fraction=0.4)
        assert sorted([*corpus["train"]["text"], *corpus["validation"]["text"]], key=str) == sorted(texts, key=str)
        joined = load_corpus(path, text_column="poem", join_records=True)
        assert "".join(text for rows in joined.values() for text in rows["text"] if text) == "0072024-01-31床"


def not_utf8():
    """Two texts, of which the second holds a byte that no text does."""
    buffers = [None, *map(pyarrow.py_buffer, (b"\0\0\0\0\1\0\0\0\3\0\0\0", b"ab\xff"))]
    return pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)


BAD_TABLES = {
    "bytes": (
        lambda: pyarrow.table({"text": not_utf8()}),
        "The column `text` of .* is not UTF-8 in row 2 .*: write the",
    ),
    "empty": (
        lambda: pyarrow.table({"text": pyarrow.array([], pyarrow.string())}),
        "holds no record: give it at least one",
    ),
    "twice": (
        lambda: pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["text", "text"]),
        "has several columns `text`: give each a name",
    ),
    "other": (
        lambda: pyarrow.table({"body": ["a"], "by": ["b"]}),
        "has no column `text`, only body, by: name the one .*`--text_column`",
    ),
    "numbers": (lambda: pyarrow.table({"text": [1]}), "The column `text` of .* holds int64: it must hold text"),
    "continuing": (
        lambda: pyarrow.table({"text": ["a"], readers.CONTINUES: ["yes"]}),
        "The column `hf_lstm.continues` of .* holds string: it must hold booleans",
    ),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_parquet_file_that_cannot_be_read_is_named(tmp_path, name, streaming):
    make, message = BAD_TABLES[name]
    path = tmp_path / f"{name}.parquet"
    pyarrow.parquet.write_table(make(), path)

    with pytest.raises(ValueError, match=message) as refused:
        list(load_documents(path, streaming=streaming)["train"])

    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_columns_of_a_parquet_file_that_nobody_needs_may_hold_anything(tmp_path):
    """And its name too."""
    path = tmp_path / "a::b [1].parquet"
    maps = pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    pyarrow.parquet.write_table(pyarrow.table({"id": maps, "text": ["a", "b"], "bytes": not_utf8()}), path)

    assert texts_of(path) == ["a", "b"]


def test_texts_of_a_parquet_file_may_be_categories(tmp_path):
    path, texts = tmp_path / "texts.parquet", ["a", "b", None, "a"]
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts).dictionary_encode()}), path)

    assert texts_of(path) == texts


def test_bytes_of_others_that_are_not_utf8_are_refused():
    rows = Dataset(pyarrow.table({"text": not_utf8()}))

    with pytest.raises(ValueError, match="The column `text` is not UTF-8 in one of the rows 0 to 1"):
        TokenStream.from_documents(rows, byte_tokenizer())
    with pytest.raises(ValueError, match="A row of `text` is not UTF-8"):
        next(iter(StreamingLanes(rows.to_iterable_dataset(), byte_tokenizer(), 1, 1)))


@pytest.mark.parametrize("values", [[0, 1], ["a", "b"], [None, None]], ids=["integers", "texts", "nulls"])
def test_a_column_of_continuations_holds_booleans(values):
    rows = Dataset.from_dict({"text": ["a", "b"], readers.CONTINUES: values})

    with pytest.raises(ValueError, match=r"The column `hf_lstm.continues` of `texts` holds .*: it must hold booleans"):
        TokenStream.from_documents(rows, byte_tokenizer())
    if values[0] is not None:
        with pytest.raises(ValueError, match=r"The column `hf_lstm.continues` of `documents` holds"):
            next(iter(StreamingLanes(rows.to_iterable_dataset(), byte_tokenizer(), 1, 1)))


@pytest.mark.parametrize("values", [[1, 2], [b"a"], [["a"]], [True]], ids=["integers", "bytes", "lists", "booleans"])
def test_a_column_of_something_else_is_refused(tmp_path, values):
    rows = Dataset.from_dict({"text": values})
    rows.to_parquet(tmp_path / "texts.parquet")

    with pytest.raises(ValueError, match=r"The column `text` of .*texts.parquet holds .*: it must hold text"):
        load_documents(tmp_path / "texts.parquet")
    with pytest.raises(ValueError, match=r"The column `text` of `texts` holds .*: it must hold text"):
        TokenStream.from_documents(rows, byte_tokenizer())


@pytest.mark.parametrize(
    ("text", "message"), [(1.50, "Text 1 of `texts` is 1.5: it must"), ("\ud800", "half of a surrogate pair")]
)
def test_a_list_of_something_else_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        TokenStream.from_documents(["a", text], byte_tokenizer())


def test_records_of_scripts_are_read_the_same_way(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes('\ufeff{"a": "1"}\n\n{"a": "\u2028"}\r\n'.encode())

    assert list(read_records(path)) == [(1, {"a": "1"}), (3, {"a": "\u2028"})]
