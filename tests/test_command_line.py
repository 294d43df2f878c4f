"""A flag by another name, a value that cannot be, a model that is not there: one sentence that says what to type."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from conftest import SCRIPTS, make_model
from hub import Hub, Repository
from huggingface_hub import HfApi
from transformers import TrainingArguments

from hf_lstm import char_tokenizer

TEXT = "the horse raced past the barn fell"


@pytest.fixture
def refuse(run, tmp_path, monkeypatch):
    """Runs a script in an empty folder and gives the sentence that it ends with."""
    monkeypatch.chdir(tmp_path)

    def refuse(script, *arguments):
        with pytest.raises(SystemExit) as stopped:
            run(script, *arguments)
        return str(stopped.value)

    return refuse


@pytest.mark.parametrize(
    ("script", "flag", "meant"),
    [
        ("train.py", "--epochs", "`--num_train_epochs`"),
        ("train.py", "--batch_size", "`--per_device_train_batch_size`"),
        ("train.py", "--lr=0.1", "`--learning_rate`"),
        ("train.py", "--max_length", "`--bptt_length`"),
        ("train.py", "--dropout", "`--output_dropout` or `--hidden_dropout`"),
        ("train.py", "--model", "`--model_name_or_path`"),
        ("train.py", "--hiden-size", "`--hidden_size`"),
        ("train.py", "--initializer", "`--initializer_range`"),
        ("classify.py", "--epochs", "`--num_train_epochs`"),
        ("generate.py", "--max_length", "`--max_new_tokens`"),
        ("generate.py", "--model_name_or_path", "`--model`"),
        ("serve.py", "--prot", "`--port`"),
        ("push.py", "--repo_id", "`--repo`"),
        ("convert.py", "--out", "`--output_dir`"),
        ("verify.py", "--checkpoint", "`--model`"),
    ],
)
def test_the_flag_that_was_meant_is_named(refuse, script, flag, meant):
    written = flag.partition("=")[0].replace("-", "_").replace("__", "--")

    assert refuse(script, flag, 3) == f"{script}: `{written}` is not a flag of {script}: did you mean {meant}?"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", ["--zebra", "3"], "`--zebra` is not a flag of train.py: `--help` lists the flags."),
        (
            "generate.py",
            ["--max_new_tokens", "x"],
            "argument --max_new_tokens: invalid int value: 'x': `--help` lists",
        ),
        ("generate.py", ["text.txt"], "`text.txt` stands without a flag: write the flag before it"),
        ("push.py", ["--model", "x"], "the following arguments are required: --repo: `--help` lists"),
    ],
)
def test_other_mistakes_are_a_sentence_too(refuse, script, arguments, message):
    assert refuse(script, *arguments).startswith(f"{script}: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pairs", "--text", "a"], "`--text` is not a flag of evaluate.py pairs: `--help` lists the flags."),
        (["--input", "a"], "`--input` is not a flag of evaluate.py stream: did you mean `--file`?"),
    ],
)
def test_the_task_of_a_wrong_flag_is_named(refuse, words, message):
    assert refuse("evaluate.py", *words) == f"evaluate.py: {message}"


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (["evaluate.py", "pairs"], "usage: evaluate.py pairs [--FLAG VALUE ...]"),
        (["convert.py"], "usage: convert.py [SOURCE] [--FLAG VALUE ...]"),
        (["push.py"], "usage: push.py [--FLAG VALUE ...]"),
    ],
)
def test_usage_shows_what_stands_before_the_flags(run, capsys, words, usage):
    with pytest.raises(SystemExit):
        run(*words, "--help")

    assert capsys.readouterr().out.startswith(usage + "\n")


def test_a_text_may_look_like_a_flag_and_a_flag_may_have_hyphens(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from command_line import Parser
    from train_arguments import DataArguments

    flags = ["--train-file", "a-b.txt", "--prompt", "-- he said", "--text-column=--x-y", "--nfc"]

    (arguments,) = Parser(DataArguments, "").parse_args_into_dataclasses(flags)

    assert (arguments.train_file, arguments.prompt, arguments.text_column) == ("a-b.txt", "-- he said", "--x-y")
    assert arguments.nfc


def test_names_in_the_table_lead_to_flags_that_a_script_has(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from command_line import MEANT

    sources = "".join(path.read_text() for path in SCRIPTS.glob("*.py"))
    known = set(re.findall(r"^    (\w+): ", sources, flags=re.MULTILINE)) | vars(TrainingArguments("x")).keys()

    assert MEANT.keys() <= known
    assert not [flag for flag, names in MEANT.items() if flag in names.split()]


@pytest.mark.parametrize(
    ("script", "own"), [("train.py", "model data card privacy optimization train"), ("classify.py", "flags training")]
)
def test_help_tells_our_flags_in_groups_and_trainers_on_request(run, capsys, script, own):
    printed = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stopped:
            run(script, flag)
        assert stopped.value.code == 0
        printed[flag] = capsys.readouterr().out

    assert re.findall(r"^(\w+):$", printed["--help"], flags=re.MULTILINE) == ["options", *own.split()]
    assert f"python scripts/{script} --" in printed["--help"]  # an example
    assert "--learning_rate FLOAT" in printed["--help"]
    assert "--dataloader_num_workers" not in printed["--help"]
    assert "--dataloader_num_workers" in printed["--help_all"]
    assert len(printed["--help"].splitlines()) < 260


def test_what_the_machine_lacks_is_refused_before_any_work(refuse, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr("command_line.get_available_reporting_integrations", list)
    monkeypatch.setattr("command_line.is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for script in ("train.py", "classify.py"):
        for flags, message in (
            (
                ["--report_to", "wandb"],
                "`--report_to` wandb needs a package that is not installed: `pip install wandb`",
            ),
            (["--bf16", "true"], "`--bf16` (True) needs a GPU that computes in bfloat16, and this machine has none"),
        ):
            assert refuse(script, "--output_dir", "run", *flags).startswith(f"{script}: {message}")
    assert list(Path().iterdir()) == []


# ---- Models that are not there ----


def save(folder, **config):
    tokenizer = char_tokenizer([TEXT])
    model = make_model(vocab_size=len(tokenizer), **config).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_the_newest_model_is_named_where_none_was(refuse):
    assert refuse("generate.py").endswith("such as `python scripts/train.py --output_dir runs/first` makes.")
    for age, folder in enumerate(("runs/new", "runs/some/old", "runs/new/checkpoint-9")):
        save(folder)
        os.utime(f"{folder}/config.json", (2e9 - age, 2e9 - age))
    os.utime("runs/new/checkpoint-9/config.json", (3e9, 3e9))
    Path("runs/later").mkdir()
    Path("runs/later/config.json").write_text("{}")  # without weights

    remedy = "name the folder of a saved model, such as the newest here, `--model runs/new`."

    for script in ("generate.py", "serve.py", "evaluate.py", "verify.py"):
        assert refuse(script) == f"{script}: `--model` is missing: {remedy}"
    assert refuse("push.py", "--repo", "a/b") == f"push.py: `--model` is missing: {remedy}"
    assert refuse("generate.py", "--model", "runs") == f"generate.py: `--model` runs contains no config.json: {remedy}"
    save("runs/begun/checkpoint-3")
    assert refuse("generate.py", "--model", "runs/begun").endswith(
        "the newest here, `--model runs/begun/checkpoint-3`."
    )


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def online(monkeypatch):
    """Let scripts ask the Hub at an address whether it has a model."""
    known = HfApi.model_info
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def online(address):
        monkeypatch.setattr(
            HfApi, "model_info", lambda self, *name, **options: known(HfApi(address), *name, **options)
        )

    return online


SCRIPTS_THAT_LOAD = {
    "generate.py": ["--model"],
    "serve.py": ["--model"],
    "evaluate.py": ["pairs", "--model"],
    "verify.py": ["--model"],
    "convert.py": ["--to", "torch", "--output_dir", "x", "--model"],
    "classify.py": ["--output_dir", "x", "--train_file", "x", "--model"],
    "train.py": ["--output_dir", "x", "--model_name_or_path"],
    "push.py": ["--repo", "a/b", "--model"],
}


def test_a_model_of_the_hub_is_asked_for_once(online, hub, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from saved_models import check_source

    hub.repositories["author/model"] = Repository()
    hub.repositories["author/model"].commit("main", {"config.json": b"{}"})
    hub.requests.clear()
    online(hub.address)

    check_source("author/model")

    assert len(hub.requests) == 1


@pytest.mark.parametrize("script", SCRIPTS_THAT_LOAD)
def test_a_folder_that_is_missing_is_refused_at_once(refuse, online, hub, script):
    flags = SCRIPTS_THAT_LOAD[script]
    online(hub.address)
    hub.requests.clear()

    for name in ("./runs/frist", "a/b/c", str(Path.cwd() / "gone")):
        assert refuse(script, *flags, name).startswith(
            f"{script}: `{flags[-1]}` {name} does not exist: name the folder"
        )
    assert hub.requests == []
    if script == "push.py":
        return

    message = f"{script}: `{flags[-1]}` runs/frist is neither a folder here nor a repository that the Hub shows you "
    assert refuse(script, *flags, "runs/frist").startswith(message)
    assert len(hub.requests) == 1


def test_an_error_without_words_is_named(refuse, monkeypatch):
    def model_info(*names, **options):
        raise TimeoutError

    monkeypatch.setattr(HfApi, "model_info", model_info)

    message = "`--model` author/model is not a folder here, and the Hub cannot be asked for it (TimeoutError)"
    assert message in refuse("generate.py", "--model", "author/model")


def test_a_hub_that_cannot_be_asked_is_said(refuse, online):
    online("http://127.0.0.1:9")  # where nobody answers

    for flags in (["--model_name_or_path", "author/model"], ["--tokenizer", "charr"]):
        Path("text.txt").write_text(TEXT * 99)
        message = refuse("train.py", "--output_dir", "x", "--train_file", "text.txt", *flags)
        assert message.startswith(
            f"train.py: `{flags[0]}` {flags[1]} is not a folder here, and the Hub cannot be asked"
        )
    assert "give `char`, `byte`, `word`, `unicode_word`, `bpe`, or a folder or Hub name." in message


# ---- Generation ----


def test_a_temperature_of_0_is_greedy(run, tmp_path):
    save(tmp_path)
    command = ["generate.py", "--model", tmp_path, "--prompt", "the", "--max_new_tokens", 20]
    greedy = run(*command, "--do_sample", "false")

    assert run(*command, "--temperature", 0) == greedy != run(*command, "--temperature", 2)


def test_an_adapter_needs_peft_and_the_model_that_it_adapts(refuse, monkeypatch):
    """tests/test_clients.py lets one write."""
    monkeypatch.syspath_prepend(SCRIPTS)
    Path("lora").mkdir()
    Path("lora/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "./base"}))

    for found, message in (
        (object(), "`--model` lora contains no adapter_model.safetensors: save the adapter again."),
        (object(), "`base_model_name_or_path` ./base does not exist: write into lora/adapter_config.json where the"),
        (None, "`--model` lora is an adapter, which PEFT loads: `pip install peft`."),
    ):
        monkeypatch.setattr("saved_models.find_spec", lambda name, found=found: found)
        assert refuse("generate.py", "--model", "lora").startswith(f"generate.py: {message}")
        Path("lora/adapter_model.safetensors").touch()
