"""Each script does what its first lines say, and refuses what it cannot do before it starts."""

import io
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, SMALL, TEXT, run_script
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_lstm import LSTMConfig, LSTMForCausalLM, TokenStream, evaluate_stream, load_corpus
from hf_lstm.training import last_complete_checkpoint


def test_an_early_sample_appears_before_the_first_evaluation(run, tmp_path, text_file):
    command = ["--train_file", text_file, "--output_dir", tmp_path / "run", *SMALL]

    printed = run("train.py", *command, "--max_steps", 102, "--eval_steps", 200, "--save_steps", 200)

    _, _, rest = printed.partition("step 100; a sample:\n")
    sample, found, _ = rest.partition("step 100 of 102: loss ")
    assert found
    assert len(sample.strip()) > 10


def test_training_writes_model_metrics_curve_and_card(run, tmp_path, text_file):
    folder = tmp_path / "run"

    command = ["--train_file", text_file, "--output_dir", folder, "--max_steps", 10, *SMALL]

    printed = run("train.py", *command, shortened=False)

    assert len(printed) > 4 * 300  # characters of a sample at each of three evaluations, and at the end
    assert "step 4: validation" in printed
    assert "step 10: validation" in printed  # the last step is evaluated although it is no multiple of 4
    assert f"are in {folder}" in printed
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "metrics.json",
        "learning_curve.png",
        "README.md",
    }
    assert (folder / "learning_curve.png").stat().st_size > 5_000

    metrics = json.loads((folder / "metrics.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    validation = TokenStream.from_documents(load_corpus(text_file)["validation"], tokenizer)
    for name, value in evaluate_stream(model, validation).items():
        assert metrics[f"eval_{name}"] == value
    assert metrics["eval_tokens"] == len(validation) - 1
    assert model.config.use_cache
    written = pipeline("text-generation", model=str(folder))("99 b", max_new_tokens=4)[0]["generated_text"]
    assert written.startswith("99 b")

    card = (folder / "README.md").read_text()
    assert f"| validation | {metrics['eval_loss']:.4f} |" in card
    assert "python scripts/train.py --train_file beer.txt --output_dir run --max_steps 10" in card
    assert str(tmp_path) not in card


def test_the_best_model_is_kept(run, tmp_path, text_file):
    """A learning rate that ruins the model: what is saved is the model before it did."""
    folder = tmp_path / "run"
    options = ["--max_steps", 12, "--learning_rate", 30, "--warmup_steps", 4, "--max_grad_norm", 0]

    run("train.py", "--train_file", text_file, "--output_dir", folder, *SMALL, *options)

    state = json.loads((last_complete_checkpoint(folder) / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert state["best_global_step"] < 12
    assert load_file(best / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    for name, tensor in load_file(best / "model.safetensors").items():
        assert (load_file(folder / "model.safetensors")[name] == tensor).all()


def test_a_run_resumes_from_its_folder(run, tmp_path, text_file):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    common = ["--train_file", text_file, "--max_steps", 12, *SMALL]
    run("train.py", "--output_dir", whole, *common)
    run("train.py", "--output_dir", broken, *common)
    (broken / "checkpoint-12" / "lstm_state_rank0.safetensors").unlink()

    run("train.py", "--output_dir", broken, "--resume_from_checkpoint", "true", *common)

    with pytest.raises(SystemExit, match=r"or go on with the run it holds by `--resume_from_checkpoint true`\.$"):
        run("train.py", "--output_dir", broken, *common)
    with pytest.raises(SystemExit, match=r"`hidden_size` is 16 in .* and would be 24: resume with"):
        run("train.py", "--output_dir", broken, "--resume_from_checkpoint", "true", *common, "--hidden_size", 24)
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert (load_file(broken / "model.safetensors")[name] == tensor).all()
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, broken)]
    assert metrics[0].pop("train_runtime") > 0
    assert metrics[0] == metrics[1]
    assert "resume" not in (broken / "README.md").read_text()


@pytest.mark.parametrize("batching", ["lanes", pytest.param("packed", marks=pytest.mark.slow)])
def test_a_run_that_has_had_all_its_steps_only_reports(run, tmp_path, batching):
    """It was killed before it did, or is resumed although it has ended."""
    folder, file = tmp_path / "run", tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines()))
    common = ["--train_file", file, "--output_dir", folder, "--max_steps", 7, "--batching", batching, *SMALL]
    run("train.py", *common)
    saved = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json")
    expected = {name: (folder / name).read_bytes() for name in saved}
    metrics = json.loads((folder / "metrics.json").read_text())
    checkpoints = {path: path.stat().st_mtime_ns for path in folder.glob("checkpoint-*/*")}
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()

    run("train.py", *common, "--resume_from_checkpoint", "true")

    assert {path: path.stat().st_mtime_ns for path in folder.glob("checkpoint-*/*")} == checkpoints
    assert {name: (folder / name).read_bytes() for name in saved} == expected
    assert metrics.pop("train_runtime") > 0
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert {"README.md", "learning_curve.png"} <= {path.name for path in folder.iterdir()}


def test_a_diverged_run_ends_in_one_sentence(run, tmp_path, text_file):
    options = [
        "--optim",
        "sgd",
        "--learning_rate",
        "1e38",
        "--warmup_steps",
        0,
        "--max_grad_norm",
        0,
        "--max_steps",
        8,
    ]

    with pytest.raises(SystemExit) as stopped:
        run("train.py", "--train_file", text_file, "--output_dir", tmp_path / "run", *SMALL, *options)

    assert str(stopped.value).startswith("train.py: The run has diverged: ")
    assert "`learning_rate` (1e+38)" in str(stopped.value)


@pytest.mark.parametrize("tokenizer", ["char", "byte", "folder"])
def test_each_poem_is_a_document(run, tmp_path, tokenizer):
    file, folder = tmp_path / "poems.jsonl", tmp_path / "run"
    poems = [f"第{number}首，春風又綠江南岸。\n明月何時照我還？" for number in range(60)]
    file.write_text("".join(json.dumps({"poem": poem}) + "\n" for poem in poems), encoding="utf-8")
    if tokenizer == "folder":
        from hf_lstm import char_tokenizer

        char_tokenizer(poems).save_pretrained(tmp_path / "tokenizer")
        tokenizer = tmp_path / "tokenizer"

    printed = run(
        *("train.py", "--train_file", file, "--text_column", "poem", "--test_file", file, "--output_dir", folder),
        *("--reset_at_documents", "true", "--prompt", "", "--tokenizer", tokenizer, "--max_steps", 4, *SMALL),
    )

    assert "train: 54 documents" in printed
    assert "test: 60 documents" in printed
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generate(max_new_tokens=3, do_sample=False)[0, 0] == model.config.eos_token_id
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test_bits_per_byte"] > 0


@pytest.mark.slow
def test_all_regularizers_with_nt_asgd_resume_to_the_same_bits(run, tmp_path, text_file):
    """Words, random lengths, every kind of regularisation, NT-ASGD and TensorBoard: one run, resumed to the same bits."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tmp_path / "all.args"
    recipe.write_text(
        "--tokenizer word --num_hidden_layers 2 --embedding_size 12 --hidden_size 8\n--random_bptt true\n"
        "--averaging nt_asgd --patience 1 --learning_rate 30 --lr_scheduler_type constant --max_grad_norm 0.25\n"
        "--embedding_dropout 0.1 --input_dropout 0.3 --hidden_dropout 0.2 --output_dropout 0.4 --weight_dropout 0.5\n"
        "--activation_regularization 2 --temporal_activation_regularization 1 --state_drop_probability 0.1\n"
        "--weight_decay 1e-6 --no_decay none --report_to tensorboard --save_total_limit 5"
    )
    common = ["--recipe", recipe, "--train_file", text_file, "--max_steps", 12, *SMALL]
    common[common.index("--eval_steps") + 1] = 2
    runs = [tmp_path / "whole", tmp_path / "broken"]
    for folder in runs:
        printed = run("train.py", "--output_dir", folder, *common)
    for name in ("checkpoint-12", "checkpoint-8"):
        (runs[1] / name / "lstm_state_rank0.safetensors").unlink()
    run("train.py", "--output_dir", runs[1], "--resume_from_checkpoint", "true", *common)

    assert "bits per token" in printed
    config = AutoModelForCausalLM.from_pretrained(runs[0]).config
    assert config.cell_sizes == [16, 12]  # the command line has the last word
    for name, tensor in load_file(runs[0] / "model.safetensors").items():
        assert (load_file(runs[1] / "model.safetensors")[name] == tensor).all()
    (events,) = runs[0].rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events)).Reload()
    wanted = {"loss", "perplexity", "bits_per_token", "regularization_loss", "train_tokens_per_second"}
    assert {f"train/{name}" for name in wanted} <= set(accumulator.Tags()["scalars"])
    assert {"eval/loss", "eval/perplexity", "eval/bits_per_token"} <= set(accumulator.Tags()["scalars"])


def test_records_can_be_lines_of_one_text(run, tmp_path):
    file = tmp_path / "lines.jsonl"
    lines = [" \n" if number % 5 == 0 else f" line {number % 7} of it \n" for number in range(300)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))

    printed = run(
        *(
            "train.py",
            "--train_file",
            file,
            "--validation_file",
            file,
            "--join_records",
            "true",
            "--tokenizer",
            "word",
        ),
        *("--output_dir", tmp_path / "run", "--max_steps", 2, *SMALL),
    )

    assert f"train: 1 documents, {300 + 4 * 240:,} tokens" in printed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").generation_config.eos_token_id is None
    written = run("generate.py", "--model", tmp_path / "run", "--prompt", "line\n", "--max_new_tokens", 40)
    assert written.startswith("line\n")
    assert len(written.split()) > 10  # it did not stop at a line end


RECIPES = sorted((SCRIPTS / "recipes").glob("*.args"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_parse_and_make_a_model(recipe, monkeypatch, tmp_path):
    """Every flag exists, and the model and the optimizer can be made of them."""
    monkeypatch.syspath_prepend(SCRIPTS)
    from train_arguments import parse

    flags = ["--recipe", str(recipe), "--output_dir", str(tmp_path / "run"), "--bf16", "false", "--use_cpu", "true"]
    model_args, data_args, _, _, optimization_args, training_args = parse(flags)

    config = LSTMConfig(vocab_size=70, **vars(model_args))
    with torch.device("meta"):
        assert LSTMForCausalLM(config).num_parameters() < 21_000_000
    assert data_args.recipe is None
    if recipe.stem == "awd_wikitext2":
        assert config.cell_sizes == [1150, 1150, 400]
        assert config.embedding_size == 400
        assert (optimization_args.averaging, optimization_args.no_decay) == ("nt_asgd", [])
        assert training_args.lr_scheduler_kwargs is None


def test_help_names_every_argument(run, capsys):
    with pytest.raises(SystemExit):
        run("train.py", "--help")

    printed = capsys.readouterr().out
    for flag in ("--recipe", "--weight_dropout", "--random_bptt", "--averaging", "--learning_rate"):
        assert flag in printed


SMOOTHED = ["--train_file", "beer.txt", "--label_smoothing_factor", "0.1"]
UNSAVED = ["--save_strategy", "no", "--load_best_model_at_end", "false"]
BAD_ARGUMENTS = {
    "no folder": ([], "`--output_dir` is missing"),
    "a typo": (["--hiden_size", "8"], "hiden_size"),
    "a missing file": (["--train_file", "nowhere.txt"], "The file nowhere.txt does not exist"),
    "two corpora": (["--train_file", "a.txt", "--dataset_name", "b"], "exclude each other"),
    "a short text": (
        ["--train_file", "short.txt"],
        "`--bptt_length` (16) must be at most 4 for the validation text, which has 5 tokens: lower it, or give more text",
    ),
    "a bad tokenizer": (["--train_file", "beer.txt", "--tokenizer", "nowhere/at_all"], "nowhere/at_all"),
    "no such column": (["--train_file", "poems.jsonl"], "has no column `text`, only poem, author: name the one that"),
    "save between logs": (
        ["--eval_steps", "5", "--save_steps", "5"],
        r"`--save_steps` (5) must be a multiple of `--logging_steps` (2)",
    ),
    "a full folder": (
        ["--output_dir", "full"],
        "`--output_dir` full already holds something: name another folder.",  # it holds nothing to go on from
    ),
    "nothing to resume": (
        ["--output_dir", "full", "--resume_from_checkpoint", "true"],
        "holds no complete checkpoint: leave `--resume_from_checkpoint` out, and name a folder that is empty or new.",
    ),
    "no such checkpoint": (
        ["--resume_from_checkpoint", "gone"],
        "`--resume_from_checkpoint` gone is not a complete checkpoint",
    ),
    "no such recipe": (
        ["--recipe", "nowhere"],
        "`--recipe` nowhere must be a file of flags, or one of scripts/recipes: awd_wikitext2, hybrid, hybrid_words, quickstart,",
    ),
    "a recipe in a recipe": (["--recipe", "nested.args"], "`--recipe` nested.args names another recipe"),
    "an unknown average": (["--averaging", "swa"], "`--averaging` swa must be `ema` or `nt_asgd`"),
    "an unknown kind": (["--no_decay", "gates"], "`--no_decay` gates must be among recurrent"),
    "an average of another optimizer": (
        ["--train_file", "beer.txt", "--averaging", "ema", "--optim", "adafactor"],
        "`--averaging ema` averages AdamW",
    ),
    "no evaluations to look at": (
        ["--train_file", "beer.txt", "--averaging", "nt_asgd", "--eval_strategy", "no", *UNSAVED],
        "`--averaging nt_asgd` reads validation losses",
    ),
    "SGD of another kind": (
        ["--train_file", "beer.txt", "--averaging", "nt_asgd", "--optim", "adafactor"],
        "`--averaging nt_asgd` averages SGD",
    ),
    "no patience": (
        ["--train_file", "beer.txt", "--averaging", "nt_asgd", "--patience", "0"],
        "`patience` (0) must be at least 1",
    ),
    "an average of nothing": (
        ["--train_file", "beer.txt", "--averaging", "ema", "--ema_decay", "1"],
        "`decay` (1.0) must be at least 0 and below 1",
    ),
    "smoothing with lanes": (
        SMOOTHED,
        "`label_smoothing_factor` (0.1) must be 0 with lanes",
    ),
    "smoothing with penalties": (
        [*SMOOTHED, "--batching", "packed", "--activation_regularization", "1"],
        "`label_smoothing_factor` (0.1) must be 0 with activation regularization",
    ),
    "a rate out of range": (["--train_file", "beer.txt", "--hidden_dropout", "1"], "`hidden_dropout` (1.0) is a prob"),
    "a state that is always dropped": (
        ["--train_file", "beer.txt", "--state_drop_probability", "1"],
        "`state_drop_probability` (1.0) is a probability",
    ),
    "a rare word": (
        ["--train_file", "beer.txt", "--tokenizer", "word", "--min_frequency", "10000"],
        "no word that occurs 10,000 times",
    ),
    "a single layer": (["--train_file", "beer.txt", "--embedding_size", "8"], "`embedding_size` (8) must equal"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_training_refuses_before_it_starts(run, tmp_path, text_file, monkeypatch, case):
    arguments, message = BAD_ARGUMENTS[case]
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("x" * 50)
    Path("poems.jsonl").write_text('{"poem": "a", "author": "x"}\n{"poem": "b", "author": "y"}\n')
    Path("nested.args").write_text("--recipe other.args")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("mine")
    if case != "no folder" and "--output_dir" not in arguments:
        arguments = ["--output_dir", "run", *arguments]

    with pytest.raises(SystemExit) as stopped:
        run("train.py", *SMALL, "--max_steps", 1, *arguments)

    assert str(stopped.value).startswith("train.py: ")
    assert message in str(stopped.value)
    assert not Path("run").exists()
    assert [path.name for path in Path("full").iterdir()] == ["thesis.txt"]


@pytest.fixture
def take(monkeypatch):
    """Takes a folder as train.py does."""
    monkeypatch.syspath_prepend(SCRIPTS)
    from train_arguments import TrainArguments
    from train_folder import take_folder

    def take(folder, **options):
        return take_folder(TrainArguments(str(folder), use_cpu=True, **options), carried=True)

    return take


def test_a_folder_belongs_to_one_run(take, tmp_path, monkeypatch):
    """However it is spelt, and for as long as that run lasts."""
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("runs")
    with take(tmp_path / "runs" / "first"):
        for spelling in ("runs/first", "link/first", "runs/../runs/first/"):
            for options in ({}, {"resume_from_checkpoint": "true"}):
                with pytest.raises(ValueError, match="belongs to a run that has not ended"), take(spelling, **options):
                    pass
        with take("runs/second"):
            pass

    with take("runs/first"):
        pass
    assert not Path("runs").exists()  # neither was used


def test_one_of_many_runs_gets_the_folder(take, tmp_path):
    begin, all_tried = threading.Barrier(8), threading.Barrier(8)
    takers = [take(tmp_path / "run") for _ in range(8)]

    def attempt(taker):
        begin.wait()
        try:
            with taker:
                all_tried.wait()
                return True
        except ValueError:
            all_tried.wait()
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, takers)) == 1


@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="Windows has no os.fork, by which a child keeps its parent's lock open"
)
def test_a_killed_run_gives_its_folder_back_at_once(take, tmp_path):
    """Although a process that it started lives on, as workers of a data loader do for a while."""
    reading, writing = os.pipe()
    run = os.fork()
    if run == 0:
        with take(tmp_path / "run"):
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
                os._exit(0)
            os.write(writing, str(worker).encode())
            os.kill(os.getpid(), signal.SIGKILL)
    worker = int(os.read(reading, 20))
    os.waitpid(run, 0)

    try:
        with take(tmp_path / "run"):  # nor does what it left behind count as something that the folder holds
            assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


def test_a_second_run_is_refused_before_it_starts(run, take, tmp_path, text_file):
    with take(tmp_path / "run"), pytest.raises(SystemExit) as stopped:
        run("train.py", "--train_file", "nowhere.txt", "--output_dir", tmp_path / "run", *SMALL)

    assert str(stopped.value) == (
        f"train.py: `--output_dir` {tmp_path / 'run'} belongs to a run that has not ended: wait for it, or name another folder."
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model that has learnt the song."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "beer.txt").write_text(TEXT)
    command = ["--train_file", folder / "beer.txt", "--output_dir", folder / "run", *SMALL]
    command += ["--hidden_size", "64", "--num_train_epochs", "5", "--learning_rate", "0.02", "--warmup_steps", "5"]
    run_script("train.py", *command, "--eval_steps", "2000", "--save_steps", "2000")
    return folder / "run"


def test_generation_continues_the_prompt(run, trained):
    printed = run(
        "generate.py",
        "--model",
        trained,
        "--prompt",
        "73 bottles of beer on",
        "--do_sample",
        "false",
        "--max_new_tokens",
        30,
    )

    assert printed.startswith("73 bottles of beer on the wall")


def test_generation_reads_the_standard_input(run, trained, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("73 bottles of\n"))

    assert run("generate.py", "--model", trained, "--num_beams", 2, "--max_new_tokens", 5).startswith(
        "73 bottles of beer"
    )


def test_a_seed_repeats_a_text(run, trained):
    options = ["--model", trained, "--prompt", "5", "--temperature", 2, "--max_new_tokens", 40]

    texts = [run("generate.py", *options, "--seed", seed) for seed in (1, 1, 2)]

    assert texts[0] == texts[1] != texts[2]


def test_evaluation_repeats_the_loss_of_training(run, trained, tmp_path):
    metrics = json.loads((trained / "metrics.json").read_text())
    file = trained.parent / "beer.txt"

    printed = run(
        *("evaluate.py", "stream", "--model", trained, "--file", file, "--split", "validation"),
        *("--output_file", tmp_path / "result.json"),
    )

    result = json.loads(printed)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert {f"eval_{name}": value for name, value in result.items()}.items() <= metrics.items()
    assert json.loads(run("evaluate.py", "stream", "--model", trained, "--file", file))["tokens"] == len(TEXT) - 1


def test_evaluation_refuses_invalid_arguments(run, trained, monkeypatch):
    for arguments, message in (
        (["--file", "nowhere.txt"], "The file nowhere.txt does not exist"),
        (
            ["--file", trained.parent / "beer.txt", "--split", "test"],
            "`--split` test is not among those of the corpus",
        ),
        (["--file", trained.parent / "beer.txt", "--batch_size", 0], r"`batch_size` (0) must be at least 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run("evaluate.py", "stream", "--model", trained, *arguments)
        assert message in str(stopped.value)
