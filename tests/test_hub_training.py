"""One command trains, publishes and is loaded elsewhere; the stock Trainer publishes what loads; the code can be checked."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SCRIPTS, TEXT, make_model, run_script
from hub import TOKEN, Failure, Hub
from test_hub import environment_of

import hf_lstm

SNIPPET = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
FLAGS = "--train_file text.txt --output_dir runs/small --tokenizer byte --hidden_size 16 --max_steps 4 --use_cpu true"
FLAGS += " --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --bptt_length 16 --eval_steps 2"
FLAGS += " --save_steps 2 --logging_steps 2 --push_to_hub true --hub_model_id author/small"

STOCK = """
import sys
import hf_lstm
from hf_lstm.training import HubCallback
from transformers import Trainer, TrainingArguments
tokenizer = hf_lstm.byte_tokenizer()
model = hf_lstm.LSTMForCausalLM(hf_lstm.LSTMConfig(hidden_size=16, num_hidden_layers=1))
arguments = TrainingArguments(
    "runs/stock", max_steps=4, save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, push_to_hub=True,
    hub_model_id="author/stock", hub_strategy="every_save", hub_always_push=True,
)
rows = [dict(tokenizer("the horse raced"), labels=tokenizer("the horse raced")["input_ids"]) for _ in range(32)]
callbacks = [HubCallback()] if sys.argv[1] == "with" else []
trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks)
trainer.train()
trainer.push_to_hub()
"""


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub
        hub.shutdown()


@pytest.fixture
def call(hub, tmp_path):
    """Runs something in a folder of its own, with the Hub as the only address there is."""

    def call(*command, token=TOKEN, folder=tmp_path):
        environment = environment_of(hub, tmp_path, token) | {"HF_DATASETS_CACHE": str(tmp_path / "datasets")}
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
        )

    (tmp_path / "text.txt").write_text(TEXT * 4)
    return call


def test_one_command_trains_and_publishes_and_another_process_writes(call, hub, tmp_path):
    options = ("--license", "apache-2.0", "--language", "en", "--data_license", "public domain")
    trained = call(SCRIPTS / "train.py", *FLAGS.split(), *options)

    assert trained.returncode == 0, trained.stderr
    assert "uploaded: http://127.0.0.1" in trained.stdout
    files = hub.files("author/small")
    assert not [name for name in files if name.startswith("checkpoint-") or name.endswith((".bin", ".pt"))]
    card = files["README.md"].decode()
    for line in ("license: apache-2.0", "- en", "(its licence: public domain)", 'model="author/small"', "## Limits"):
        assert line in card
    assert len(hub.repositories["author/small"].commits) == 2  # the first is the empty repository
    assert "--push_to_hub" not in card
    assert "--hub_model_id" not in card
    assert "--data_license 'public domain'" in card

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    hide = 'import sys\nsys.modules["hf_lstm"] = None\n'
    wrote = call("-c", hide + SNIPPET.search(card)[1], token=None, folder=elsewhere)
    assert wrote.returncode == 0, wrote.stderr
    assert wrote.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("callback", ["with", "without"])
def test_every_push_of_the_stock_trainer_brings_the_code(call, hub, callback):
    done = call("-c", STOCK, callback)

    assert done.returncode == 0, done.stderr
    pushed = [files for files in hub.repositories["author/stock"].commits.values() if "config.json" in files]
    assert len(pushed) >= 2
    code = {path.name for path in (Path(hf_lstm.__file__).parent / "model").glob("*_lstm.py")}
    whole = [code <= files.keys() for files in pushed]
    assert whole[0] == (callback == "with")  # without it would be whole too: then the callback is not needed any more
    assert whole[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hub_token", TOKEN], "`--hub_token` would lie in training_args.bin"),
        (["--hub_strategy", "every_save"], "would upload all that lies in `--output_dir`"),
        (["--license", "Apache 2.0"], "must be an identifier of the Hub"),
        (["--language", "English"], "must be a code of ISO 639"),
    ],
)
def test_what_must_not_be_given_is_refused(flags, message):
    with pytest.raises(SystemExit) as refused:
        run_script("train.py", *FLAGS.split(), *flags)

    assert message in str(refused.value)
    assert TOKEN not in str(refused.value)


@pytest.mark.slow
def test_without_a_token_nothing_is_trained(call, hub, tmp_path):
    done = call(SCRIPTS / "train.py", *FLAGS.split(), token=None)

    assert done.returncode == 1
    assert "train.py: " in done.stderr
    assert "401" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


@pytest.mark.slow  # huggingface_hub tries again for half a minute before it gives up
def test_a_model_that_could_not_be_published_is_saved(call, hub, tmp_path):
    hub.failures.append(Failure("POST .*/commit/", "500", 20))

    done = call(SCRIPTS / "train.py", *FLAGS.split())

    assert done.returncode == 1
    assert "not published: `python scripts/push.py --model runs/small --repo author/small` does it." in done.stderr, (
        done.stderr
    )
    hub.failures.clear()
    assert call(SCRIPTS / "push.py", "--model", "runs/small", "--repo", "author/small").returncode == 0
    assert "model.safetensors" in hub.files("author/small")


@pytest.fixture
def saved(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_code_beside_a_model_can_be_checked(run, saved):
    shutil.copytree(saved, saved / "checkpoint-2")  # as training leaves it: nobody's model is loaded from there
    printed = run("verify.py", "--model", saved)

    for path in saved.glob("*.py"):
        assert f"same      {hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" in printed
    assert f"All of it is the code of hf-lstm {hf_lstm.__version__}." in printed


def change(folder):
    with (folder / "cache_lstm.py").open("a") as file:
        file.write("import os\n")


def add(folder):
    (folder / "more_lstm.py").write_text("import os\n")


def take_away(folder):
    (folder / "kernels_lstm.py").unlink()


def point_elsewhere(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "someone/else--modeling_lstm.LSTMModel"
    (folder / "config.json").write_text(json.dumps(config))


def write_a_generate(folder):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("import os\n")


def name_a_tokenizer(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["x.X", None]}}))


def name_a_pipeline(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"custom_pipelines": {"text-generation": {"impl": "x.X"}}})
    )


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (write_a_generate, r"not ours  \w{64}  custom_generate/generate\.py"),
        (name_a_tokenizer, r"differs   \s+auto_map of tokenizer_config\.json"),
        (name_a_pipeline, r"differs   \s+custom_pipelines of config\.json"),
        (change, r"differs   \w{64}  cache_lstm\.py"),
        (add, r"not ours  \w{64}  more_lstm\.py"),
        (take_away, r"missing   -{64}  kernels_lstm\.py"),
        (point_elsewhere, r"differs   \s+auto_map of config\.json"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_other_code_is_named(capsys, saved, damage, line):
    damage(saved)

    with pytest.raises(SystemExit, match="This is not the code of hf-lstm"):
        run_script("verify.py", "--model", saved)

    assert re.search(line, capsys.readouterr().out)


def test_a_damaged_file_is_named(saved):
    (saved / "tokenizer_config.json").write_text("{")

    with pytest.raises(SystemExit, match=r"verify\.py: .*tokenizer_config\.json is no JSON"):
        run_script("verify.py", "--model", saved)


@pytest.mark.slow
def test_the_code_on_the_hub_can_be_checked(call, hub):
    trained = call(SCRIPTS / "train.py", *FLAGS.split())
    assert trained.returncode == 0, trained.stderr

    there = call(SCRIPTS / "verify.py", "--model", "author/small", token=None)
    nowhere = call(SCRIPTS / "verify.py", "--model", "author/other", token=None)

    assert there.returncode == 0, there.stderr
    assert "All of it is the code of hf-lstm" in there.stdout
    assert f"commit {hub.repositories['author/small'].branches['main']}" in there.stdout
    assert nowhere.returncode == 1
    assert "\nverify.py: " in "\n" + nowhere.stderr  # other libraries may have their say before
    assert "Traceback" not in nowhere.stderr
