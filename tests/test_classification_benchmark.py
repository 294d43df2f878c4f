"""The task of speakers has parts that share no speech, and the comparison of classifiers stores each run once."""

import json
from collections import Counter

import pytest
from conftest import SCRIPTS

NAMES = [f"Speaker {letter}" for letter in "ABCDEFGHIJ"]
# Speaker A has the most lines, J the fewest; every word says its speech.
SPEECHES = [
    (name, "\n".join(f"s{number} {name[-1]} line {line}" for line in range(1 + number % 7)))
    for place, name in enumerate(NAMES)
    for number in range(60 - place)
]
TEXT = "\n\n".join(f"{name}:\n{words}" for name, words in SPEECHES)


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")


def test_no_speech_lies_in_two_parts(benchmarks):
    from speakers import make_task

    parts, language = make_task(TEXT, {"test": 8, "validation": 4})

    speech_of = {name: {tuple(text.split()[:2]) for text, _ in rows} for name, rows in parts.items()}
    assert not speech_of["train"] & (speech_of["test"] | speech_of["validation"])
    assert not speech_of["test"] & speech_of["validation"]
    assert set(Counter(label for _, label in parts["test"]).values()) == {8}
    assert set(Counter(label for _, label in parts["validation"]).values()) == {4}
    assert {label for rows in parts.values() for _, label in rows} == set(NAMES[:8])
    assert max(text.count("\n") for rows in parts.values() for text, _ in rows) == 3
    held_out = {" ".join(speech) for name in ("test", "validation") for speech in speech_of[name]}
    written = {" ".join(line.split()[:2]) for line in language.splitlines()}
    assert not held_out & written
    assert {" ".join(speech) for speech in speech_of["train"]} < written
    assert make_task(TEXT, {"test": 8, "validation": 4}) == (parts, language)
    with pytest.raises(ValueError, match="has too few passages for the test part"):
        make_task(TEXT, {"test": 500})


def test_the_table_takes_the_rate_that_validation_chose(benchmarks):
    from comparisons import classification_table

    runs = [
        {
            "labels": 50,
            "way": way,
            "learning_rate": rate,
            "seed": seed,
            "validation_accuracy": good,
            "accuracy": accuracy,
        }
        for way, rate, good, accuracies in (
            ("language model", 0.1, 0.9, (0.5, 0.7)),
            ("language model", 0.2, 0.1, (1.0, 1.0)),
            ("scratch", 0.1, 0.2, (1.0, 1.0)),
            ("scratch", 0.2, 0.3, (0.3, 0.4)),
        )
        for seed, accuracy in enumerate(accuracies)
    ]

    row = classification_table(runs).splitlines()[-1]

    # Differences 0.2 and 0.3: mean 0.25, standard error 0.05, and t of one degree of freedom 12.706.
    assert row == "| 50 | 60.0% | 35.0% | +25.0%, -38.5% to +88.5% |"


def test_labels_are_drawn_evenly(benchmarks):
    import classification

    rows = [(f"text {number}", "ab"[number % 2]) for number in range(20)] + [("text", "c")]

    drawn = classification.draw(rows, 9, seed=1)

    assert Counter(label for _, label in drawn) == {"a": 4, "b": 4, "c": 1}
    assert drawn == classification.draw(rows, 9, seed=1) != classification.draw(rows, 9, seed=2)


@pytest.mark.slow
def test_each_run_is_stored_once(benchmarks, run, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    command = (
        "benchmarks/classification.py",
        "--train_file",
        tmp_path / "text.txt",
        "--folder",
        tmp_path / "task",
        "--quick",
    )

    first = run(*command, "--results", tmp_path)
    again = run(*command, "--results", tmp_path)

    runs = json.loads((tmp_path / "classification.json").read_text())["runs"]
    assert len(runs) == 4
    assert (first.count(": stored"), again.count(": stored")) == (0, 4)
    assert again.splitlines()[-1] == first.splitlines()[-1]
