"""The README and the guides: links resolve, blocks of Python run and print what they should, commands are parsed and run."""

import json
import re
import shlex
import shutil
from argparse import ArgumentParser
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import SCRIPTS, TEXT, run_script
from processes import Program
from transformers import HfArgumentParser

ROOT = SCRIPTS.parent
PAGES = [
    "README.md",
    "scripts/README.md",
    "scripts/recipes/README.md",
    "scripts/benchmarks/README.md",
    "tests/README.md",
    "model_cards/README.md",
    ".github/CONTRIBUTING.md",
]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}


def headings(page):
    """The anchors of a page, as GitHub makes them from its headings."""
    found = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL), flags=re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_the_readme_is_read_in_ten_minutes():
    assert (ROOT / "README.md").stat().st_size <= 14_000


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    text = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in headings(file.resolve().relative_to(ROOT.resolve()).as_posix()), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    for path in set(re.findall(r"(?<![\w/])(?:scripts|tests|hf_lstm|model_cards)/[\w/]+\.\w+", TEXTS[page])):
        assert (ROOT / path).exists(), path
    for name in set(re.findall(r"`(test_\w+\.py)`", TEXTS[page])):
        assert (ROOT / "tests" / name).exists(), name


def test_every_test_is_named_in_the_guide_of_tests():
    for path in (ROOT / "tests").glob("test_*.py"):
        assert f"`{path.name}`" in TEXTS["tests/README.md"], path.name


def test_the_test_command_stands_where_ci_looks_for_it():
    assert len(re.findall(r"^pip install .*\[dev\].*scripts/check\.py$", TEXTS["README.md"], flags=re.MULTILINE)) == 1


@dataclass
class Example:
    """The blocks of Python under one heading, which are run as one program, and lines that it prints."""

    page: str
    heading: str
    printed: tuple[str, ...]
    last: tuple[float, float] | None = None  # limits of the number in the last line
    trains: bool = False

    @property
    def code(self):
        section = re.search(
            rf"^#+ {re.escape(self.heading)}\n(.*?)(?=^##+ |\Z)",
            hide_comments(TEXTS[self.page]),
            flags=re.MULTILINE | re.DOTALL,
        )
        return "\n".join(blocks(section[1], "python"))


def hide_comments(text):
    """Keep lines of code that begin with # from being read as headings."""
    return re.sub(r"^#(?= )(?=[^\n]*\n(?:(?!^```).*\n)*?^```$)", "#", text, flags=re.MULTILINE)


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


EXAMPLES = [
    Example("README.md", "Quickstart", ("def main(",)),
    Example("README.md", "Your own Trainer", ("'tokens': 1799",), trains=True),
    Example("README.md", "Surprisal", ("main(arguments):", "Error(Exception):")),
    Example("README.md", "A text that goes on", ("def main(",)),
    Example("scripts/README.md", "Three ways to make batches", (), (0, 1.0), trains=True),
    Example("scripts/README.md", "What it remembers that it should not", ("secret", "count")),
    Example("scripts/README.md", "By symptom", ("3 documents, each from a zero state", "bits_per_character: ")),
    Example("scripts/README.md", "From Keras", ("春眠不覺曉，處處聞啼鳥。",), (1, 1.2), trains=True),
    Example(
        "scripts/recipes/README.md",
        "Attention among the LSTM layers",
        ("any text is remembered in 1,056,768 bytes",),
    ),
    Example(
        "scripts/recipes/README.md",
        "Regularisers and optimisers",
        ("'regularization_loss'", "'perplexity'"),
        trains=True,
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder where the README's first command has been run, as far as it goes in two steps."""
    folder = tmp_path_factory.mktemp("documentation")
    options = "--max_steps 2 --logging_steps 2 --eval_steps 2 --save_steps 2 --hidden_size 32 --use_cpu true"
    (folder / "text.txt").write_text("def main():\n    print('hello')\nclass Error(Exception):\n    import os\n" * 100)
    options += " --per_device_train_batch_size 4 --per_device_eval_batch_size 2"
    run_script(
        "train.py", *options.split(), "--train_file", folder / "text.txt", "--output_dir", folder / "runs/first"
    )
    return folder


def test_every_block_belongs_to_an_example():
    for page in PAGES:
        written = sum(len(blocks(example.code + "\n", "python")) for example in EXAMPLES if example.page == page)
        known = [example.code for example in EXAMPLES if example.page == page]
        for block in blocks(TEXTS[page], "python"):
            assert any(block in code for code in known), block
        assert written == 0  # fences do not enter the code


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(
            example,
            id=f"{example.page}-{example.heading}".replace(" ", "_"),
            marks=[pytest.mark.slow] if example.trains else [],
        )
        for example in EXAMPLES
    ],
)
def test_blocks_run_and_print_what_they_should(example, folder):
    ran = Program(example.code, folder=folder).wait()

    assert ran.returncode == 0, ran.stderr
    for line in example.printed:
        assert line in ran.stdout
    if example.last is not None:
        least, most = example.last
        assert least <= float(ran.stdout.splitlines()[-1]) < most


def commands(page):
    """The commands of a page, each a list of words."""
    for block in blocks(TEXTS[page], "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if not line.startswith("#"):
                yield from (shlex.split(part, comments=True) for part in line.split(" && "))


def script_of(words):
    """Return the script that a command runs, and its arguments; `None` for another program."""
    for place, word in enumerate(words):
        if word.startswith("scripts/") and word.endswith(".py"):
            return word.removeprefix("scripts/"), words[place + 1 :]
    return None


OTHERS = {"pip", "git", "curl", "mv", "source", "python3", "pytest", "lm_eval"}
PROGRAMS = {"runs/first/onnx/run_onnx.py", "tests/mutations.py"}
COMMANDS = [(page, words) for page in PAGES for words in commands(page)]
OUTPUTS = {words[place + 1] for _, words in COMMANDS for place, word in enumerate(words) if word == "--output_dir"}


class Parsed(BaseException):
    """Raised where a script has its arguments, before it works."""


@pytest.fixture
def parse_only(monkeypatch):
    """Let a script end where its arguments are parsed and checked."""
    for kind, name in ((HfArgumentParser, "parse_args_into_dataclasses"), (ArgumentParser, "parse_args")):
        parse = getattr(kind, name)

        def stop(self, *args, parse=parse, **options):
            parse(self, *args, **options)
            raise Parsed

        monkeypatch.setattr(kind, name, stop)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_parsed(page, parse_only, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_TOKEN", "a token")
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")
    for words in commands(page):
        found = script_of(words)
        if found is None:
            assert words[0] in OTHERS or words[1] in PROGRAMS, words
            continue
        name, arguments = found
        assert (SCRIPTS / name).is_file(), words
        for flag, value in pairwise(arguments):
            if flag in ("--model", "--model_name_or_path") and value.startswith("runs/"):
                assert value in OUTPUTS | {"runs/secrets", "runs/gru", "runs/lstm"}, words
        if "shakespeare_gpu" in arguments:
            arguments += ["--use_cpu", "true"]
        if arguments:
            with pytest.raises(Parsed):
                run_script(name, *arguments)


LATE = {"verify.py", "serve.py", "check.py", "common_tests.py"}  # they need a Hub, do not end, or run all tests
SHORT = (
    "--max_steps 2 --logging_steps 2 --eval_steps 2 --save_steps 2 --hidden_size 16 --per_device_train_batch_size 2 "
    "--per_device_eval_batch_size 2 --use_cpu true"
)


def runs_offline(name, arguments):
    """Whether a command ends within two minutes, without a Hub, with files that `corpora` can make."""
    return not (
        name in LATE
        or (name.startswith("benchmarks/") and name != "benchmarks/speakers.py")
        or name == "make_tang.py"  # needs a clone of the poems
        or "--from" in arguments
        or "--interactive" in arguments
        or "--push_to_hub" in arguments
        or (name == "push.py" and "--dry_run" not in arguments)
        or "shakespeare_gpu" in arguments
    )


def corpora(folder):
    """Write small texts under the names that the pages give to large ones."""
    lines = TEXT.splitlines()
    speeches = "\n\n".join(f"Speaker {'ABCDEFGHI'[place % 9]}:\n{TEXT[place % 50 :][:300]}" for place in range(900))
    for name in ("tinyshakespeare.txt", "passages.txt"):
        (folder / name).write_text(speeches)
    for name in ("input.txt", "more.txt", "sentences.txt"):
        (folder / name).write_text(TEXT)
    records = "".join(json.dumps({"text": line}) + "\n" for line in lines * 5)
    (folder / "tang").mkdir()
    for name in ("tang/train.jsonl", "tang/validation.jsonl", "tang/test.jsonl", "planted.jsonl"):
        (folder / name).write_text(records)
    (folder / "wikitext-2").mkdir()
    for name in ("valid", "test"):
        (folder / "wikitext-2" / f"{name}.txt").write_text("\n".join(lines))
    (folder / "pairs.jsonl").write_text(json.dumps({"sentence_good": "she sells", "sentence_bad": "she sell"}) + "\n")
    rows = "".join(f"{line[:40]!r},{'ab'[place % 2]}\n" for place, line in enumerate(lines * 4))
    for name in ("train.csv", "test.csv"):
        (folder / name).write_text("text,label\n" + rows.replace("'", '"'))
    (folder / "canaries.csv").write_text("secret,count\n123,1\n456,4\n")


@pytest.mark.slow
def test_commands_run(tmp_path, monkeypatch, capsys):
    """Every command that ends offline within two minutes, with training cut to two steps."""
    monkeypatch.chdir(tmp_path)
    corpora(tmp_path)
    ran = 0
    trains_first = sorted(
        COMMANDS, key=lambda command: "scripts/train.py" not in command[1]
    )  # pages refer to each other
    for _, words in trains_first:
        found = script_of(words)
        if found is None or not runs_offline(*found) or "accelerate" in words:
            continue
        name, arguments = found
        for model in ("runs/gru", "runs/lstm", "runs/secrets"):  # models of the reader's own
            if model in arguments and not Path(model).exists():
                shutil.copytree("runs/shakespeare", model)
        if "--resume_from_checkpoint" in arguments:
            arguments = [*arguments, "--hidden_size", "384"]
        folder = arguments[arguments.index("--output_dir") + 1] if "--output_dir" in arguments else None
        if folder and Path(folder).exists() and name in ("train.py", "classify.py"):
            continue  # the same command, on another page
        run_script(name, *arguments, *(SHORT.split() if name == "train.py" else ()), shortened=False)
        capsys.readouterr()
        ran += 1
    assert ran >= 30
