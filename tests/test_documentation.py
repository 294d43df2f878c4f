"""The README and the guides: links resolve, blocks of Python run and print what they should, commands are parsed and run."""

import re
import shlex
from argparse import ArgumentParser
from dataclasses import dataclass

import pytest
from conftest import SCRIPTS, run_script
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
    Example("README.md", "A text that goes on", ("\n",)),
    Example("scripts/README.md", "Three ways to make batches", (), (0, 1.0), trains=True),
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
    for words in commands(page):
        found = script_of(words)
        if found is None:
            assert (
                words[0] in OTHERS
                or words[:2] == ["python", "runs/first/onnx/run_onnx.py"]
                or words[:2]
                == [
                    "python",
                    "tests/mutations.py",
                ]
            ), words
            continue
        name, arguments = found
        assert (SCRIPTS / name).is_file(), words
        for flag, value in zip(arguments, arguments[1:], strict=False):
            if flag in ("--model", "--model_name_or_path") and value.startswith("runs/"):
                assert value in OUTPUTS | {"runs/secrets", "runs/gru", "runs/lstm"}, words
        if arguments:
            with pytest.raises(Parsed):
                run_script(name, *arguments)
