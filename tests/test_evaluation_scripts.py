"""scripts/evaluate.py: each of its tasks gives the library's figures, and refuses what it cannot measure."""

import csv
import gzip
import io
import json
import math
import shutil
from pathlib import Path

import numpy
import pandas
import pytest
import torch
from conftest import SCRIPTS, TEXT, run_script
from datasets import Dataset, DatasetDict

from hf_lstm import (
    LSTMConfig,
    LSTMForCausalLM,
    TokenStream,
    char_tokenizer,
    evaluate_stream,
    surprisal,
    word_surprisal,
)
from hf_lstm.evaluation import losses_by_position

SENTENCES = ["99 bottles of beer", "98 bottles of beer on the wall", "take one down"]
TOKENIZER = char_tokenizer([TEXT])


@pytest.fixture(scope="module")
def model():
    """One that has learnt a little: what it says is worth a temperature."""
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=len(TOKENIZER), hidden_size=24, num_hidden_layers=1))
    ids = torch.tensor([TOKENIZER(TEXT)["input_ids"][:400]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(15):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def evaluate(run, folder):
    return lambda task, *arguments: run("evaluate.py", task, "--model", folder, *arguments)


def rows_of(printed):
    return list(csv.DictReader(io.StringIO(printed)))


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_corpus_is_measured_and_drawn(folder, model, text_file, tmp_path, capsys):
    options = ["--reset_every", 50, "--picture", tmp_path / "loss.png", "--output_file", tmp_path / "result.json"]

    run_script("evaluate.py", "stream", "--model", folder, "--file", text_file, *options)

    printed = capsys.readouterr()
    result = json.loads(printed.out)
    stream = TokenStream.from_documents([TEXT], TOKENIZER)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["loss"] == pytest.approx(evaluate_stream(model, stream, reset_every=50)["loss"], rel=1e-6)
    assert result["tokens_without_history"] == math.ceil((len(TEXT) - 1) / 50)
    assert (tmp_path / "loss.png").stat().st_size > 5_000
    assert f"bits_per_character  {result['bits_per_character']:.4f}" in printed.err


def test_the_loss_by_position_adds_up(model):
    stream = TokenStream.from_documents([TEXT], TOKENIZER)

    nats, counts = losses_by_position(model, stream, bptt_length=37, reset_every=50)

    assert counts.tolist() == [len(range(first, len(TEXT) - 1, 50)) for first in range(50)]
    expected = evaluate_stream(model, stream, reset_every=50)["loss"]
    assert nats.sum() / counts.sum() == pytest.approx(expected, rel=1e-6)
    firsts = torch.arange(0, len(TEXT) - 1, 50)
    tokens = stream[:]
    alone = model(tokens[firsts][:, None]).logits[:, 0].log_softmax(dim=-1)
    assert nats[0] == pytest.approx(-alone.gather(1, tokens[firsts + 1][:, None]).sum().item(), rel=1e-5)


def test_a_model_worse_than_chance_is_reported(folder, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("0123456789" * 20)

    run_script("evaluate.py", "stream", "--model", folder, "--file", tmp_path / "other.txt")

    assert "worse than one that finds all tokens equally likely" in capsys.readouterr().err


@pytest.mark.parametrize(("by", "base"), [("token", "2"), ("word", "e")])
def test_each_line_is_a_text(evaluate, model, tmp_path, by, base):
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES) + "\n")
    options = ["--by", by, "--base", base, "--start_token", "<eos>", "--picture", tmp_path / "bars.png"]

    rows = rows_of(evaluate("surprisal", "--file", tmp_path / "sentences.txt", *options))

    expected = surprisal(model, TOKENIZER, SENTENCES, 2 if base == "2" else math.e, "<eos>")
    if by == "word":
        expected = word_surprisal(expected, SENTENCES)
    assert [row[by] for row in rows] == expected[by].tolist()
    numpy.testing.assert_allclose([float(row["surprisal"]) for row in rows], expected["surprisal"], rtol=1e-5)
    assert (tmp_path / "bars.png").stat().st_size > 5_000


def test_a_text_on_the_command_line_and_a_whole_file(evaluate, tmp_path):
    (tmp_path / "text.txt").write_text("99 bottles\nof beer")

    typed = rows_of(evaluate("surprisal", "--text", "99 bottles\nof beer"))
    read = rows_of(evaluate("surprisal", "--file", tmp_path / "text.txt", "--whole", "true"))

    assert typed == read
    assert [row["word"] for row in typed] == ["99", "bottles", "of", "beer"]
    assert typed[0]["surprisal"] == ""  # nothing predicts the first token


def test_a_line_end_in_a_token_ends_no_row(folder, tmp_path):
    command = ["surprisal", "--model", folder, "--text", "99\rof\nbeer\r\nNA", "--by", "token"]

    run_script("evaluate.py", *command, "--output_file", tmp_path / "tokens.csv")

    read = pandas.read_csv(tmp_path / "tokens.csv", keep_default_na=False)
    assert read["start"].tolist() == list(range(14))
    with (tmp_path / "tokens.csv").open(newline="") as file:
        assert [row["unknown"] for row in csv.DictReader(file)] == [str(unknown) for unknown in read["unknown"]]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_compressed_records_are_read_as_records(evaluate, tmp_path, kind):
    file, packed = tmp_path / f"items.{kind}", tmp_path / f"packed.{kind}.gz"
    getattr(Dataset.from_dict({"text": ["99 bottles"]}), {"jsonl": "to_json", "csv": "to_csv"}[kind])(file)
    packed.write_bytes(gzip.compress(file.read_bytes()))

    assert evaluate("surprisal", "--file", packed) == evaluate("surprisal", "--file", file)


@pytest.mark.parametrize("name", ["a.JSONL", "a.json", "a.JSON", "a.csv", "a.parquet"])
def test_the_texts_of_a_file_of_records_are_measured(evaluate, tmp_path, name):
    """The texts alone, without the punctuation of the format."""
    rows, file = Dataset.from_dict({"sentence": SENTENCES, "id": [1, 2, 3]}), tmp_path / name
    {
        "l": rows.to_json,
        "n": lambda path: path.write_text(json.dumps(list(rows))),
        "v": rows.to_csv,
        "t": rows.to_parquet,
    }[name[-1].lower()](file)
    file_of_lines = tmp_path / "lines.txt"
    file_of_lines.write_text("\n".join(SENTENCES))

    measured = evaluate("surprisal", "--file", file, "--text_column", "sentence")

    assert measured == evaluate("surprisal", "--file", file_of_lines)


def test_texts_are_read_however_they_are_stored(evaluate, tmp_path, monkeypatch):
    """In a folder, by a pattern, in another encoding, with semicolons, and in a column of another name."""
    monkeypatch.chdir(tmp_path)
    rows = [{"id": number, "sentence": text} for number, text in enumerate(SENTENCES)]
    Path("texts").mkdir()
    for number, text in enumerate(SENTENCES):
        Path(f"texts/{number}.txt").write_text(text + "\n")
        lines(Path(f"{number}.jsonl"), rows[number : number + 1])
    Path("lines.txt").write_text("\n".join(SENTENCES))
    Path("wide.txt").write_bytes("\n".join(SENTENCES).encode("utf-16"))
    Path("rows.csv").write_text("text;id\n" + "".join(f"{text};1\n" for text in SENTENCES))
    Dataset.from_list(rows).save_to_disk("saved")

    expected = evaluate("surprisal", "--file", "lines.txt")

    for flags in (
        ["texts"],
        ["texts/[0-2].txt"],
        ["wide.txt", "--encoding", "utf-16"],
        ["rows.csv", "--csv_delimiter", ";"],
        ["?.jsonl"],
        ["saved"],
    ):
        assert evaluate("surprisal", "--file", *flags) == expected
    counts = [json.loads(evaluate("stream", "--file", *flags))["tokens"] for flags in (["texts"], ["?.jsonl"])]
    assert counts == [sum(map(len, SENTENCES)) + 3 + 3, sum(map(len, SENTENCES)) + 3]  # an <eos> after each document
    pair = json.dumps({"sentence_good": "99 bottles", "sentence_bad": "99 sbottle"})
    Path("pairs.jsonl").write_bytes(pair.encode("utf-16"))
    assert json.loads(evaluate("pairs", "--file", "pairs.jsonl", "--encoding", "utf-16"))["pairs"] == 1
    with pytest.raises(
        SystemExit, match=r"evaluate.py: pairs.jsonl is not text.* in UTF-16, which `--encoding utf-16`"
    ):
        evaluate("pairs", "--file", "pairs.jsonl")


def test_regions_come_with_their_texts(evaluate, tmp_path):
    records = [{"sentence": "99 bottles of beer", "regions": [[0, 10], [11, 18]]}, {"sentence": "on", "regions": []}]
    file = lines(tmp_path / "items.jsonl", records)

    rows = rows_of(evaluate("surprisal", "--file", file, "--text_column", "sentence", "--by", "region"))

    assert [(row["text"], row["word"], row["tokens"]) for row in rows] == [
        ("0", "99 bottles", "10"),
        ("0", "of beer", "8"),
    ]


def test_pairs_are_counted_by_their_fields(folder, tmp_path, capsys):
    records = [
        {"sentence_good": "bottles of beer", "sentence_bad": "xqxqxqxqxqxqxqx", "field": "syntax", "UID": "a"},
        {"sentence_good": "zzzzzzzzzzzz", "sentence_bad": "of beer", "field": "semantics", "UID": "b"},
        {"sentence_good": "a bottlé", "sentence_bad": "a bottlè", "field": "syntax", "UID": "b"},
    ]

    run_script("evaluate.py", "pairs", "--model", folder, "--file", lines(tmp_path / "pairs.jsonl", records))

    def figures(accuracy, pairs, ties):
        return {"accuracy": accuracy, "pairs": pairs, "ties": ties, "pairs_with_unknown_words": pairs}

    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        **figures(0.5, 3, 1),
        "field": {"semantics": figures(0.0, 1, 0), "syntax": figures(0.75, 2, 1)},
        "UID": {"a": figures(1.0, 1, 0), "b": figures(0.25, 2, 1)},
    }
    assert "ties: 1, half right; BabyLM's own script counts them as right: 66.67%" in printed.err


def test_fields_of_pairs_may_hold_anything(evaluate, tmp_path):
    """A pair without a field, or with null there, is in a group too."""
    values = [
        {"field": 1, "UID": ["a"]},
        {"field": "1", "UID": {"b": "é"}},
        {"field": 3, "UID": None},
        {"field": None},
    ]
    records = [{"sentence_good": "beer", "sentence_bad": "reeb"} | fields for fields in values]

    result = json.loads(evaluate("pairs", "--file", lines(tmp_path / "pairs.jsonl", records)))

    groups = {name: {key: group["pairs"] for key, group in result[name].items()} for name in ("field", "UID")}
    assert groups == {"field": {"1": 2, "3": 1, "null": 1}, "UID": {'["a"]': 1, '{"b": "é"}': 1, "null": 2}}


@pytest.mark.parametrize("options", [[], ["--rule", "sgd", "--learning_rate", 0.05]], ids=["rms", "sgd"])
def test_adapt_compares_all_methods(evaluate, model, text_file, options):
    results = json.loads(evaluate("adapt", "--train_file", text_file, "--max_segments", 3, *options))

    names = list(results)
    assert names == ["plain", "temperature", "neural cache", "dynamic evaluation", "all"]
    assert results["temperature"]["fitted_temperature"] == results["all"]["fitted_temperature"] > 0
    losses = [result["loss"] for result in results.values()]
    assert len(set(losses)) == 5
    assert all(result["tokens"] == results["plain"]["tokens"] for result in results.values())
    assert losses[2] < losses[0]  # the text repeats itself: to remember it helps
    assert losses[3] < losses[0]  # and so does learning from it


def test_the_last_half_of_several_documents_is_measured(evaluate, tmp_path):
    file = lines(tmp_path / "documents.jsonl", [{"text": f"{number} bottles of beer"} for number in range(10, 90)])
    options = ["--reset_at_documents", "true", "--max_segments", 2, "--rule", "sgd"]

    results = json.loads(evaluate("adapt", "--train_file", file, *options))

    assert results["plain"]["tokens"] == 4 * (len("10 bottles of beer") + 1)  # half of a tenth, held out
    assert results["plain"]["tokens_without_history"] == 4


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("stream", [], "holds no run.json that tells what it was trained on: name a text to measure"),
        ("stream", ["--file", "blank.txt", "--temperature", "0"], "`temperature` (0.0) must be a number above 0"),
        ("stream", ["--file", "blank.txt", "--picture", "x.png"], "`--picture` shows what follows a zero state"),
        (
            "stream",
            ["--output_file", "nowhere/x.json"],
            "`--output_file` nowhere/x.json lies in a folder that does not exist",
        ),
        ("surprisal", [], "Give either a `--text` or a `--file`"),
        ("surprisal", ["--text", "a", "--file", "b"], "Give either a `--text` or a `--file`"),
        ("surprisal", ["--text", ""], "Text 0 is ''"),
        ("surprisal", ["--text", "a", "--by", "letter"], "`--by` letter must be"),
        ("surprisal", ["--text", "a", "--base", "10"], "`--base` 10 must be `2` or `e`"),
        ("surprisal", ["--text", "a", "--by", "region"], "`--by` region needs a .jsonl"),
        ("surprisal", ["--text", "a", "--start_token", "<s>"], "`start_token` ('<s>') is not a token"),
        ("surprisal", ["--file", "blank.txt"], "Line 2 of blank.txt is empty: remove it"),
        ("surprisal", ["--text", "a", "--picture", "x.foo"], "`--picture` x.foo must end in one of .png"),
        ("surprisal", ["--file", "nowhere.txt"], "The file nowhere.txt does not exist"),
        ("surprisal", ["--file", "regions.jsonl", "--by", "region"], "Region 0 to 90 lies outside text 0"),
        ("surprisal", ["--file", "broken.jsonl", "--by", "region"], "`regions` in line 1 of broken.jsonl is [1]"),
        ("surprisal", ["--file", "regions.jsonl", "--text_column", "x"], "Line 1 of regions.jsonl has no text in `x`"),
        ("pairs", [], "`--file` is missing"),
        ("pairs", ["--file", "regions.jsonl"], "Pair 0 has no text in `sentence_good`, only the fields text, regions"),
        ("pairs", ["--file", "blank.txt"], "blank.txt cannot be read as jsonl: line 1 is not JSON"),
        ("adapt", ["--rule", "adam"], "`--rule` adam must be"),
        ("adapt", ["--test_file", "blank.txt"], "`--test_file` blank.txt needs `--train_file`"),
        ("adapt", ["--validation_file", "blank.txt"], "`--validation_file` blank.txt needs `--train_file`"),
        ("adapt", [], "`--train_file` is missing"),
        ("privacy", ["--validation_file", "blank.txt"], "`--validation_file` blank.txt needs `--train_file`"),
        ("privacy", [], "`--train_file` is missing"),
        ("noise", ["--validation_file", "blank.txt"], "`--validation_file` blank.txt needs `--train_file`"),
        ("noise", [], "`--train_file` is missing"),
        ("adapt", ["--max_segments", "0"], "`max_segments` (0) must be at least 1"),
        ("adapt", ["--decay", "2"], "`decay` (2.0) must lie in [0, 1]"),
        ("adapt", ["--cache_weight", "1"], "`weight` (1.0) must lie in [0, 1)"),
    ],
)
def test_invalid_flags_exit_with_one_sentence(evaluate, tmp_path, monkeypatch, task, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.txt").write_text("a line\n\nanother")
    lines(tmp_path / "regions.jsonl", [{"text": "a line", "regions": [[0, 90]]}])
    lines(tmp_path / "broken.jsonl", [{"text": "a line", "regions": [1]}])

    with pytest.raises(SystemExit) as stopped:
        evaluate(task, *arguments)

    assert str(stopped.value).startswith("evaluate.py: ")
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_the_task_is_named_first_or_left_out(run):
    for arguments, message in (
        ([], "`--model` is missing"),
        (["--model", "./x"], "`--model` ./x does not exist"),
        (["measure"], "must be one of stream, surprisal, pairs, adapt, gradients, .* or be left out"),
    ):
        with pytest.raises(SystemExit, match=message):
            run("evaluate.py", *arguments)


RUN = {"data": "songs", "command": "python scripts/train.py --recipe song.args --output_dir x --max_steps 3"}


def test_without_a_file_the_validation_text_of_the_run_is_measured(folder, run, tmp_path, text_file, monkeypatch):
    """As the command in run.json splits it; that of a run on another text is refused."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "model")
    (tmp_path / "song.args").write_text("--train_file beer.txt --bptt_length 9")
    expected = run("evaluate.py", "stream", "--model", "model", "--file", text_file, "--split", "validation")

    (tmp_path / "model/run.json").write_text(json.dumps(RUN))
    assert run("evaluate.py", "--model", "model") == expected
    shutil.copytree(folder, "model/checkpoint-3")
    assert run("evaluate.py", "--model", "model/checkpoint-3") == expected

    for written, message in (
        (RUN | {"command": "python scripts/train.py --train_file gone.txt"}, "The file gone.txt does not exist"),
        (RUN | {"command": "python scripts/train.py"}, "it was trained on songs"),
    ):
        (tmp_path / "model/run.json").write_text(json.dumps(written))
        with pytest.raises(SystemExit, match=f"is not here .{message}.*name a text to measure, such as `--file"):
            run("evaluate.py", "--model", "model")


FEW = {
    "adapt": ["--max_segments", 2, "--rule", "sgd"],
    "privacy": ["--prefix_length", 20, "--suffix_length", 5, "--passages", 10],
    "noise": ["--shares", 0.1, "--characters", 200, "--prompts", 1, "--prompt_length", 20],
}


@pytest.mark.parametrize("task", FEW)
def test_without_a_training_file_the_text_of_the_run_is_read(folder, run, tmp_path, text_file, monkeypatch, task):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "model")
    command = f"python scripts/train.py --train_file {text_file} --output_dir x"
    (tmp_path / "model/run.json").write_text(json.dumps({"data": "songs", "command": command}))

    found, expected = (
        run("evaluate.py", task, "--model", "model", *FEW[task], *flags) for flags in ([], ["--train_file", text_file])
    )

    assert found == expected


@pytest.mark.parametrize("flags", [["--reset_at_documents"], ["--batching", "packed"]], ids=["reset", "packed"])
def test_documents_start_as_in_the_run(folder, tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "model")
    lines(tmp_path / "many.jsonl", [{"text": f"{number} bottles of beer"} for number in range(10, 90)])
    command = " ".join(["python scripts/train.py --train_file many.jsonl", *flags])
    (tmp_path / "model/run.json").write_text(json.dumps({"data": "songs", "command": command}))
    results = {}
    for options in ("", "--reset_at_documents false"):
        run_script("evaluate.py", "--model", "model", *options.split())
        printed = capsys.readouterr()
        results[options] = json.loads(printed.out)
        assert ("Documents start from a zero state, as in the run" in printed.err) == (options == "")

    assert results[""]["tokens_without_history"] == 8
    assert results["--reset_at_documents false"]["tokens_without_history"] == 1


def test_the_library_may_be_described_in_other_words(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(
        "evaluate_common.standard_library", lambda: DatasetDict(train=Dataset.from_dict({"text": [TEXT]}))
    )
    from evaluate_common import corpus_of_run

    command = "python scripts/train.py --data_description 'modules of Python' --output_dir x"
    (tmp_path / "run.json").write_text(json.dumps({"data": "modules of Python", "command": command}))

    corpus, resets = corpus_of_run(str(tmp_path))

    assert "".join(text for rows in corpus.values() for text in rows["text"]) == TEXT
    assert not resets
