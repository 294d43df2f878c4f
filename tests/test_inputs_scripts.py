"""scripts/train.py as newcomers call it: a bare text, a recipe by its name, a short text, and few of the flags of steps."""

import json
from pathlib import Path

import pytest
from conftest import SCRIPTS
from transformers import AutoTokenizer


@pytest.fixture
def flags(monkeypatch):
    """The module train_flags, and the groups of arguments of train.py."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import train_arguments
    import train_flags

    return train_flags, train_arguments.GROUPS


def test_a_short_text_is_trained_on_by_its_name_alone(run, tmp_path, monkeypatch):
    """In another encoding, by a recipe's name, without evaluations."""
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_bytes(("naïve " * 90).encode("cp1252"))

    printed = run(
        *("train.py", "--recipe", "quickstart", "--output_dir", "run", "short.txt", "--encoding", "cp1252"),
        *("--hidden_size", 16, "--eval_strategy", "no", "--max_steps", 4, "--save_steps", 2, "--use_cpu", "true"),
    )

    assert "`--load_best_model_at_end false` follows `--eval_strategy no`." in printed
    assert "The model of the last step is the result" in printed
    assert "`--logging_steps 2` follows `--save_steps 2`." in printed
    assert (
        "`--per_device_train_batch_size` is 15 instead of 32: the train text has 486 tokens, and each lane" in printed
    )
    assert "`--per_device_eval_batch_size` is 1 instead of 32: the validation text has 54 tokens" in printed
    assert "validation, lanes" not in printed  # no evaluation but the last report
    assert json.loads(Path("run/metrics.json").read_text())["train_steps"] == 4
    assert "ï" in AutoTokenizer.from_pretrained("run").get_vocab()
    command = json.loads(Path("run/run.json").read_text())["command"]
    assert command.startswith("python scripts/train.py --train_file short.txt --recipe quickstart")


def test_a_folder_and_a_column_of_another_name_are_trained_on(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("books").mkdir()
    for name in "abcdefghij":
        Path(f"books/{name}.txt").write_text(f"book {name} " * 40)
    Path("poems.csv").write_text("id;poem\n" + "1;a poem, and a half\n" * 40)
    options = ["--hidden_size", 16, "--max_steps", 1, "--bptt_length", 8, "--use_cpu", "true", "--prompt", ""]
    options += ["--per_device_train_batch_size", 4, "--per_device_eval_batch_size", 2]

    printed = run("train.py", "--output_dir", "run", "books", *options)
    table = ["--train_file", "poems.csv", "--csv_delimiter", ";", "--text_column", "poem"]
    rows = run("train.py", "--output_dir", "table", *table, *options)
    streamed = run(
        *("train.py", "--output_dir", "stream", *table, *options, "--streaming", "true"),
        *("--validation_file", "poems.csv", "--tokenizer", "byte"),
    )

    assert "train: 9 documents, " in printed
    assert "validation: 1 documents, " in printed
    assert "train: 36 documents, " in rows
    assert "train: streamed" in streamed
    assert "validation: 40 documents, " in streamed


def test_a_text_without_a_flag_is_the_training_file(flags):
    train_flags, groups = flags

    for typed, understood in (
        ("a.txt", "--train_file a.txt"),
        ("--output_dir x a.txt --seed 1", "--train_file a.txt --output_dir x --seed 1"),
        ("a --output_dir a", "--train_file a --output_dir a"),
        ("--no_decay bias norm", "--no_decay bias norm"),  # which takes several words
        ("--output_dir x", "--output_dir x"),
        ("a.txt --no_such_flag 1", "a.txt --no_such_flag 1"),  # the parser itself refuses them
        ("a.txt --seed b", "a.txt --seed b"),
    ):
        assert train_flags.with_train_file(typed.split(), groups) == understood.split()
    for typed in ("b/a.txt b/c.txt", "--train_file b/d.txt b/a.txt"):
        with pytest.raises(ValueError, match=r"`b/a.txt` is one text too many: .* `--train_file 'b/\*.txt'`"):
            train_flags.with_train_file(typed.split(), groups)


@pytest.mark.parametrize(
    ("typed", "followers"),
    [
        ("", ""),
        ("--save_steps 1000", ""),  # the defaults fit: 500 divides it, and so does 50
        ("--save_steps 100", "--eval_steps 100"),
        ("--save_steps 499", "--eval_steps 499 --logging_steps 499"),
        ("--eval_steps 5000", "--save_steps 5000"),
        ("--logging_steps 30", "--save_steps 510 --eval_steps 510"),
        ("--eval_steps 200 --logging_steps 30", "--save_steps 600"),
        ("--save_steps 1000000007", "--eval_steps 1000000007 --logging_steps 1000000007"),
        ("--save_steps 0.1", "--eval_steps 0.1"),
        ("--save_steps 0", ""),
        ("--eval_strategy epoch", "--save_strategy epoch"),
        ("--save_strategy epoch", "--eval_strategy epoch"),
        ("--save_strategy best", ""),
        ("--save_strategy no", "--load_best_model_at_end false"),
        ("--eval_strategy no --save_steps 30", "--load_best_model_at_end false --logging_steps 30"),
        ("--eval_steps 100 --load_best_model_at_end false --save_steps 150", ""),
        ("--logging_strategy epoch --save_steps 70", "--eval_steps 70"),
    ],
)
def test_flags_of_steps_follow_one_another(flags, monkeypatch, tmp_path, typed, followers):
    train_flags, groups = flags
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true", *typed.split()]

    found, reasons = train_flags.with_following(words, groups)

    assert found == words + followers.split()
    assert bool(reasons) == bool(followers)
    if typed != "--save_steps 0":
        groups[-1](**train_flags.given_flags(found, groups)[0])  # Trainer accepts them


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            "--eval_strategy epoch --save_steps 9",
            r"`--eval_strategy` epoch and `--save_steps` \(9\) exclude each other",
        ),
        ("--save_steps 100 --eval_steps 30", r"`--save_steps` \(100\) must be a multiple of `--eval_steps` \(30\)"),
        (
            "--eval_strategy no --load_best_model_at_end true",
            "needs evaluations and checkpoints, and not `--eval_strategy no`",
        ),
        (
            "--eval_strategy epoch --save_strategy steps",
            "must be the same, so that the best model is saved: leave one",
        ),
    ],
)
def test_flags_of_steps_that_contradict_each_other_are_refused(flags, typed, message):
    train_flags, groups = flags

    with pytest.raises(ValueError, match=message):
        train_flags.with_following(typed.split(), groups)
