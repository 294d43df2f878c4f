"""scripts/classify.py learns to tell texts apart, and refuses what it cannot learn from."""

import csv
import io
import json
import re
import runpy
from logging import StreamHandler, getLogger

import numpy
import pytest
import torch
from conftest import SCRIPTS, make_model
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lstm import char_tokenizer

TRAIN = [("aaab abaa", "a"), ("abaa aaa", "a"), ("bbba bb", "b"), ("babb bbb", "b"), ('aa, "ab"\na', "a")] * 4
TEST = [("aaa baa", "a"), ("bbb abb", "b"), ("bb bb", "b")]


@pytest.fixture
def files(tmp_path):
    """A language model, and labelled texts as .csv and .jsonl."""
    tokenizer = char_tokenizer(['ab ,"\n'])
    make_model(torch.float32, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    for name, rows in (("train", TRAIN), ("test", TEST)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([("text", "label"), *rows])
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def classify(files, run, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr("evaluate_pictures.draw_confusion", lambda confusion, classes, path: path.touch())

    def classify(*flags, model="language", output="out"):
        command = [
            "--model",
            files / model,
            "--output_dir",
            files / output,
            "--use_cpu",
            "true",
            "--disable_tqdm",
            "true",
        ]
        return run("classify.py", *command, *flags)

    return classify


def test_it_learns_saves_and_measures(files, classify):
    flags = ["--train_file", files / "train.csv", "--test_file", files / "test.jsonl", "--num_train_epochs", 8]

    printed = classify(*flags, "--per_device_train_batch_size", 5)

    metrics = json.loads((files / "out/metrics.json").read_text())
    assert (metrics["part"], metrics["texts"], metrics["classes"]) == ("test", 3, ["a", "b"])
    assert metrics["accuracy"] == 1
    assert metrics["confusion"] == [[1, 0], [0, 2]]
    assert metrics["majority"] == pytest.approx(2 / 3)
    assert "test: 100.00% of 3 texts right" in printed
    assert (files / "out/confusion.png").is_file()
    model = AutoModelForSequenceClassification.from_pretrained(files / "out")
    tokenizer = AutoTokenizer.from_pretrained(files / "out")
    assert model.config.classifier_pooling == "concat"
    assert model.config.classifier_hidden_size == 50
    for text, label in TEST:
        logits = model.eval()(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
        assert model.config.id2label[int(logits.argmax())] == label

    classify(
        "--train_file", files / "train.csv", "--max_steps", 1, model="out", output="more"
    )  # goes on with its head
    assert AutoModelForSequenceClassification.from_pretrained(files / "more").config.classifier_hidden_size == 50


def test_a_batch_of_one_text_costs_no_text_of_the_test(files, classify):
    """Batch norm cannot learn from the last of 33 texts in batches of 32; the 10 texts of the test fill no batch."""
    for name, rows in (("train", (TRAIN * 2)[:33]), ("test", (TEST * 4)[:10])):
        with (files / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])

    printed = classify("--train_file", files / "train.csv", "--test_file", files / "test.csv", "--num_train_epochs", 1)

    metrics = json.loads((files / "out/metrics.json").read_text())
    assert (metrics["training_texts"], metrics["steps"], metrics["texts"]) == (32, 1, 10)
    assert "The last training text is left out" in printed


def test_validation_chooses_the_epoch_and_scratch_begins_anew(files, classify):
    flags = ["--train_file", files / "train.jsonl", "--validation_file", files / "test.csv", "--num_train_epochs", 2]

    scratch = ["--from_scratch", "true", "--classifier_hidden_size", 0, "--classifier_pooling", "last"]
    printed = classify(*flags, *scratch, "--logging_steps", 1)

    assert re.search(r"^step 1 of 2: loss [\d.]+, learning rate [\d.e-]+, \d:\d\d:\d\d left$", printed, re.MULTILINE)
    for epoch in (1, 2):
        assert re.search(
            rf"^epoch {epoch}: validation, loss [\d.]+, accuracy [\d.]+%, F1 [\d.]+$", printed, re.MULTILINE
        )
    assert "{" not in printed
    assert json.loads((files / "out/metrics.json").read_text())["part"] == "validation"
    model = AutoModelForSequenceClassification.from_pretrained(files / "out")
    assert model.score.norm is None
    assert model.score.out_proj.in_features == model.config.output_size


def test_only_a_new_head_may_lack_weights(files, classify):
    classify("--train_file", files / "train.csv", "--max_steps", 1)
    for model, name in (("out", "score.out_proj.bias"), ("language", "model.layers.0.hidden_gates.weight")):
        weights = load_file(files / model / "model.safetensors")
        del weights[name]
        save_file(weights, files / model / "model.safetensors", {"format": "pt"})

        with pytest.raises(SystemExit, match=f"lacks the weights {name}: name a whole model"):
            classify("--train_file", files / "train.csv", model=model, output="more")


def test_ctrl_c_names_a_folder_that_exists_only(files, classify, monkeypatch, capsys):
    def load(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("saved_models.check_source", load)

    with pytest.raises(SystemExit) as stopped:
        classify("--train_file", files / "train.csv")

    assert stopped.value.code == 130
    assert capsys.readouterr().err == "classify.py: stopped before the classifier was finished: begin anew.\n"


def test_ctrl_c_ends_in_a_sentence(files, classify, monkeypatch, capsys):
    def train(trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.Trainer.train", train)
    handler = StreamHandler(io.StringIO())
    monkeypatch.setattr(getLogger("transformers"), "handlers", [handler])

    with pytest.raises(SystemExit) as stopped:
        classify("--train_file", files / "train.csv")

    assert handler.stream.getvalue() == ""  # a new head is not reported as a lack of weights
    assert stopped.value.code == 130
    said = f"classify.py: stopped before the classifier was finished: delete {files / 'out'}, and begin anew.\n"
    assert capsys.readouterr().err == said


def test_figures_are_those_of_the_definitions(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    figures = runpy.run_path(str(SCRIPTS / "classify.py"))["figures"]

    found = figures(numpy.array([0, 0, 0, 1, 1, 2]), numpy.array([0, 0, 1, 1, 0, 0]), 3)

    assert found["confusion"] == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert found["accuracy"] == 0.5
    # precision 2/4 and recall 2/3; 1/2 and 1/2; neither
    assert found["f1_of_classes"] == pytest.approx([2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3), 0.5, 0])
    assert found["f1"] == pytest.approx(sum(found["f1_of_classes"]) / 3)


def test_files_of_other_forms_are_read(files, classify):
    (files / "train.csv").write_bytes("label;body\na;aaab äb\nb;bb, ä\n".encode("cp1252"))
    flags = ["--train_file", files / "train.csv", "--max_steps", 1]

    classify(*flags, "--encoding", "cp1252", "--csv_delimiter", ";", output="read")

    assert json.loads((files / "read/metrics.json").read_text())["texts"] == 2
    for more, message in (
        ([], r"train.csv is not UTF-8 .* such as `--encoding cp1252`"),
        (["--encoding", "cp1252"], r"columns seem to be separated by ';', so add `--csv_delimiter ';'`"),
        (
            ["--encoding", "cp1252", "--csv_delimiter", ";", "--label_column", "sort"],
            r"train.csv has no column `text`, only label, body",
        ),
        (
            ["--encoding", "cp1252", "--csv_delimiter", ";", "--label_column", "sort", "--text_column", "body"],
            r"train.csv has no column `sort` in line 2, only `label`, `body`: name another by `--label_column`",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            classify(*flags, *more)


def test_numbered_classes_of_a_data_set_get_their_names(files, classify, monkeypatch):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    parts = {"train": [0, 1], "test": [1, 1]}
    data = {
        part: Dataset.from_dict({"text": ["aa", "bb"], "label": labels}, features) for part, labels in parts.items()
    }
    monkeypatch.setattr("datasets.load_dataset", lambda name: data)
    flags = ["--dataset_name", "author/data", "--max_steps", 1]

    classify(*flags)

    metrics = json.loads((files / "out/metrics.json").read_text())
    assert (metrics["classes"], metrics["part"], metrics["majority"]) == (["bad", "good"], "test", 1)
    data["test"] = Dataset.from_dict({"text": ["aa"], "label": [-1]}, features)
    with pytest.raises(
        SystemExit, match="Row 1 of the test part of author/data has the label -1, and the classes are"
    ):
        classify(*flags, output="more")


ONE = [("aa", "a"), ("ab", "a")]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (ONE, [], "All texts of the training part have the label 'a': give at least two classes"),
        (TRAIN, [("b", "c")], "The test part has the label 'c', which no training text has"),
        (TRAIN, [("", "a")], r"test.csv has nothing in `text` in line 2 \(''\)"),
        (TRAIN, [("a", "")], r"test.csv has nothing in `label` in line 2 \(''\)"),
        ([], TEST, "train.csv holds no record"),
    ],
    ids=["a single class", "an unknown label", "no text", "no label", "no row"],
)
def test_rows_that_cannot_be_learnt_from_are_refused(files, classify, train, test, message):
    for name, rows in (("train", train), ("test", test)):
        with (files / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    flags = ["--train_file", files / "train.csv"] + (["--test_file", files / "test.csv"] if test else [])

    with pytest.raises(SystemExit, match=message):
        classify(*flags)
    assert not (files / "out/model.safetensors").exists()


def test_a_missing_column_is_named(files, classify):
    (files / "train.csv").write_text("text,class\na,a\n")

    message = r"train.csv has no column `label` in line 2, only `text`, `class`: name another by `--label_column`"
    with pytest.raises(SystemExit, match=message):
        classify("--train_file", files / "train.csv")


def test_a_head_keeps_the_order_of_its_classes(files, classify):
    """A head made elsewhere need not know them in the order of the alphabet."""
    names = {"id2label": {0: "b", 1: "a"}, "label2id": {"b": 0, "a": 1}}
    model = AutoModelForSequenceClassification.from_pretrained(files / "language", **names)
    model.score.out_proj.weight.data.zero_()
    model.score.out_proj.bias.data = torch.tensor([1.0, 0.0])  # it calls every text b
    model.save_pretrained(files / "head")
    AutoTokenizer.from_pretrained(files / "language").save_pretrained(files / "head")

    flags = ["--train_file", files / "train.csv", "--test_file", files / "test.csv", "--learning_rate", 1e-9]
    classify(*flags, "--max_steps", 1, model="head")

    metrics = json.loads((files / "out/metrics.json").read_text())
    assert (metrics["classes"], metrics["confusion"]) == (["b", "a"], [[2, 0], [1, 0]])
    assert AutoModelForSequenceClassification.from_pretrained(files / "out").config.id2label == {0: "b", 1: "a"}


def test_a_classifier_of_other_classes_is_refused(files, classify):
    classify("--train_file", files / "train.csv", "--max_steps", 1)
    (files / "train.csv").write_text("text,label\na,a\nb,b\nab,c\n")

    with pytest.raises(
        SystemExit,
        match=r"tells 2 classes \('a', 'b'\) apart, and the training part has 3 classes \('a', 'b', 'c'\): name the language",
    ):
        classify("--train_file", files / "train.csv", model="out", output="more")
    (files / "train.csv").write_text("text,label\na,a\nb,c\n")
    with pytest.raises(
        SystemExit, match=r"tells 2 classes \('a', 'b'\) apart, and the training part has 2 classes \('a', 'c'\)"
    ):
        classify("--train_file", files / "train.csv", model="out", output="more")
    with pytest.raises(SystemExit, match="already holds something"):
        classify("--train_file", files / "train.csv")
