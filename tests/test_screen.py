"""Scripts on screen: any encoding, one bar in a terminal, lines in a file, and Ctrl-C."""

import ast
import io
import re
import shlex
import sys

import datasets
import pytest
import torch
from conftest import SCRIPTS, SMALL, make_model, run_script
from transformers.utils import logging

from hf_lstm import char_tokenizer
from hf_lstm.training.report import draw_learning_curve

CHINESE = "春風又綠江南岸。明月何時照我還？"
OTHERS = {"check.py", "common_tests.py"}  # they start other programs


def test_every_script_prepares_its_screen():
    """Before it writes anything."""
    found = set()
    for path in SCRIPTS.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
                found |= {path.name}
                assert path.name in OTHERS or ast.unparse(node.body[0]) == "prepare_screen()", path.name
    assert found > OTHERS
    assert "reconfigure" in (SCRIPTS / "train_minimal.py").read_text()  # it stands alone


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def chinese(tmp_path_factory):
    """A model whose every token is a Chinese character, and its text."""
    folder = tmp_path_factory.mktemp("詩")
    (folder / "詩.txt").write_text(CHINESE * 40, encoding="utf-8")
    tokenizer = char_tokenizer([CHINESE])
    make_model(torch.float32, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def printed_by(monkeypatch, chinese, tmp_path):
    """Runs a script whose standard output is a file in the encoding of Western Windows."""

    def printed_by(script, *arguments):
        places = {"model": chinese, "text": chinese / "詩.txt", "out": tmp_path / "出"}
        output = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="cp1252", errors="strict"))
        run_script(script, *(argument.format(**places) for argument in arguments))
        sys.stdout.flush()
        return output.getvalue().decode("cp1252")

    return printed_by


@pytest.mark.parametrize(
    "command",
    [
        ["train.py", "--train_file", "{text}", "--output_dir", "{out}", "--max_steps", "4", "--prompt", "春", *SMALL],
        ["generate.py", "--model", "{model}", "--prompt", "春", "--max_new_tokens", "5"],
        ["evaluate.py", "surprisal", "--model", "{model}", "--text", CHINESE, "--by", "token"],
        ["serve.py", "--model", "{model}"],
    ],
    ids=lambda command: command[0],
)
def test_what_an_encoding_lacks_is_written_in_escapes(printed_by, monkeypatch, command):
    monkeypatch.setattr("uvicorn.run", lambda app, **options: None)

    assert "\\u" in printed_by(*command)


@pytest.fixture
def train(run, monkeypatch, tmp_path, text_file):
    """Runs train.py with the libraries' bars on, and gives its two outputs; the standard error is of a kind."""

    def train(kind):
        monkeypatch.setattr(sys, "stderr", kind())
        logging.enable_progress_bar()
        datasets.enable_progress_bars()
        folder = tmp_path / "run"
        printed = run("train.py", "--train_file", text_file, "--output_dir", folder, "--max_steps", 8, *SMALL)
        return printed, sys.stderr.getvalue()

    yield train
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.set_tqdm_hook(None)


def test_a_file_gets_lines_and_no_bars(train, tmp_path):
    printed, complained = train(io.StringIO)

    assert complained == ""
    assert "\r" not in printed
    lines = printed.splitlines()
    logs = [line for line in lines if " of 8: loss " in line]
    line = r"step (\d) of 8: loss \d\.\d{4}, learning rate [\d.e-]+, [\d,]+ tokens/s(, \d+:\d\d:\d\d left)?"
    assert [re.fullmatch(line, log)[1] for log in logs] == ["2", "4", "6", "8"]
    assert [line[:6] for line in lines if ": validation, lanes, " in line] == ["step 4", "step 8"]
    assert printed.lower().count("a sample") == 2  # after step 4, and of the best model
    assert "{'" not in printed
    folder = tmp_path / "run"
    assert lines[-3:] == [
        f"The model, its card, metrics.json and learning_curve.png are in {folder}",
        f"Let it write: python {SCRIPTS / 'generate.py'} --model {folder}",
        f"Publish it: python {SCRIPTS / 'push.py'} --model {folder} --repo YOUR_NAME/run --private true",
    ]


def test_a_terminal_shows_one_bar_at_a_time(train):
    _, shown = train(Terminal)

    assert "| 8/8 [" in shown
    assert "tokenizing:" in shown
    assert "evaluating:" in shown  # at the end, after the bar of the steps
    assert "\x1b[A" not in shown  # the way up from a second bar
    assert "model shards" not in shown


def test_a_terminal_obeys_no_sample(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from screen import shown

    assert shown("a\x1b[2J\tb\r\nc\rd\x08\u3000é") == "a\\x1b[2J\tb\r\nc\\rd\\x08\u3000é"


@pytest.fixture
def stop_at(run, monkeypatch, capsys, tmp_path, text_file):
    """Stops a run of train.py at its n-th sample, and gives the sentence with which it ends."""

    def stop_at(number, *flags):
        samples = iter([""] * (number - 1))

        def write_sample(*arguments):
            try:
                return next(samples)
            except StopIteration:
                raise KeyboardInterrupt from None

        command = ["--train_file", text_file, "--output_dir", tmp_path / "run", "--max_steps", 12, *SMALL, *flags]
        with monkeypatch.context() as patched:
            patched.setattr("hf_lstm.training.report.write_sample", write_sample)
            with pytest.raises(SystemExit) as stopped:
                run("train.py", *command)
        assert stopped.value.code == 130
        return capsys.readouterr().err

    return stop_at


def test_ctrl_c_names_the_checkpoint_and_the_command_that_goes_on(run, stop_at, tmp_path):
    said = stop_at(2, "--seed", 3)

    checkpoint = tmp_path / "run" / "checkpoint-4"
    found = re.fullmatch(
        f"train.py: stopped; {checkpoint} is kept, and the run goes on from there by `(.*)`\\.\n", said
    )
    python, script, *arguments = shlex.split(found[1])
    assert (python, script) == ("python", str(SCRIPTS / "train.py"))
    assert arguments[-2:] == ["--resume_from_checkpoint", "true"]
    assert stop_at(1, "--seed", 3, "--resume_from_checkpoint", checkpoint) == said
    run("train.py", *arguments)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_ctrl_c_before_the_first_checkpoint_keeps_nothing(stop_at, tmp_path):
    said = "train.py: stopped before the first checkpoint"

    assert stop_at(1) == f"{said}, and nothing is kept: the same command begins anew.\n"
    assert not (tmp_path / "run").exists()
    begun = f"{said}: delete {tmp_path / 'run'}, and the same command begins anew.\n"
    assert stop_at(1, "--report_to", "tensorboard") == begun


def test_one_process_speaks_for_all(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS)
    from train_arguments import TrainArguments
    from train_folder import take_folder

    monkeypatch.setattr(TrainArguments, "process_index", 1)
    taken = take_folder(TrainArguments(str(tmp_path), use_cpu=True), carried=True)

    with pytest.raises(KeyboardInterrupt, match=r"^$"), taken:
        raise KeyboardInterrupt


@pytest.mark.parametrize("passes", [1, 2])
def test_the_curve_of_one_pass_says_how_to_read_a_gap(tmp_path, passes):
    history = [{"step": step, "loss": 1 / step, "epoch": passes * step / 4} for step in range(1, 5)]

    draw_learning_curve(history, tmp_path / "curve.svg")

    assert ("is not overfitting" in (tmp_path / "curve.svg").read_text()) == (passes == 1)
