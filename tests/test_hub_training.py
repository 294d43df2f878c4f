"""Training with a push to the Hub, and verification of the code beside a model."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import SCRIPTS, TEXT, make_model, run_script
from hub import TOKEN, Failure, Hub
from processes import run_program
from test_hub import environment_of
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    """Run a command in a folder of its own, with the Hub as the only server."""

    def call(*command, token=TOKEN, folder=tmp_path):
        environment = environment_of(hub, tmp_path, token) | {"HF_DATASETS_CACHE": str(tmp_path / "datasets")}
        return run_program(*command, folder=folder, environment=environment)

    (tmp_path / "text.txt").write_text(TEXT * 4)
    return call


def test_one_command_trains_and_publishes_a_model_that_others_can_load(call, hub, tmp_path):
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
    wrote = call(hide + SNIPPET.search(card)[1], token=None, folder=elsewhere)
    assert wrote.returncode == 0, wrote.stderr
    assert wrote.stdout.strip()


@pytest.mark.slow
def test_checkpoints_by_words_are_pushed_to_branches_of_their_names(call, hub):
    done = call(SCRIPTS / "train.py", *FLAGS.split(), "--checkpoint_at_words", "10", "20")

    assert done.returncode == 0, done.stderr
    for branch in ("chck_0.01K", "chck_0.02K"):
        files = hub.files("author/small", branch)
        assert {"model.safetensors", "config.json", "tokenizer.json", "modeling_lstm.py"} <= files.keys()
        assert f"Checkpoint `{branch}` of author/small".encode() in files["README.md"]
    assert files["model.safetensors"] != hub.files("author/small")["model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("callback", ["with", "without"])
def test_every_push_of_the_stock_trainer_uploads_the_code(call, hub, callback):
    done = call(STOCK, callback)

    assert done.returncode == 0, done.stderr
    pushed = [files for files in hub.repositories["author/stock"].commits.values() if "config.json" in files]
    assert len(pushed) >= 2
    code = {path.name for path in (Path(hf_lstm.__file__).parent / "model").glob("*_lstm.py")}
    whole = [code <= files.keys() for files in pushed]
    assert whole[0] == (callback == "with")  # if this fails without the callback, it is no longer needed
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
def test_invalid_hub_arguments_are_refused(flags, message):
    with pytest.raises(SystemExit) as refused:
        run_script("train.py", *FLAGS.split(), *flags)

    assert message in str(refused.value)
    assert TOKEN not in str(refused.value)


@pytest.mark.slow
def test_a_missing_token_is_reported_before_training(call, hub, tmp_path):
    done = call(SCRIPTS / "train.py", *FLAGS.split(), token=None)

    assert done.returncode == 1
    assert "train.py: " in done.stderr
    assert "401" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


@pytest.mark.slow  # huggingface_hub tries again for half a minute before it gives up
def test_a_model_is_saved_if_its_upload_fails(call, hub, tmp_path):
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


def test_verify_accepts_a_saved_model(run, saved):
    shutil.copytree(saved, saved / "checkpoint-2")
    printed = run("verify.py", "--model", saved)

    for path in saved.glob("*.py"):
        assert f"same      {hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" in printed
    assert f"All code is that of hf-lstm {hf_lstm.__version__}." in printed


def test_verify_follows_links_to_files_as_in_the_hub_cache(run, saved, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for number, path in enumerate(saved.iterdir()):
        (snapshot / path.name).symlink_to(path.rename(saved / f"{number}"))

    assert "All code is that of hf-lstm" in run("verify.py", "--model", snapshot)


def test_verify_knows_every_file_and_field_of_an_hf_lstm_model(run, saved):
    tokenizer = hf_lstm.byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<user>"]})
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(saved)
    AutoTokenizer.from_pretrained(saved).save_pretrained(saved)
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.config.id2label = {0: "no", 1: "yes"}
    model.generation_config.update(do_sample=True, temperature=0.7, stop_strings=["."], bad_words_ids=[[4, 5]])
    model.save_pretrained(saved, max_shard_size="2KB")
    (saved / "onnx").mkdir()
    shutil.copy(SCRIPTS / "run_onnx.py", saved / "onnx")
    for name in ("onnx/step.onnx", "README.md", "LICENSE", ".gitattributes", "learning_curve.png"):
        (saved / name).touch()

    printed = run("verify.py", "--model", saved)

    assert (saved / "model.safetensors.index.json").exists()
    assert re.search(r"same      \w{64}  onnx/run_onnx\.py", printed)
    assert printed.splitlines()[-1] == f"All code is that of hf-lstm {hf_lstm.__version__}."


def change(folder):
    with (folder / "cache_lstm.py").open("a") as file:
        file.write("import os\n")


def add(folder):
    (folder / "more_lstm.py").write_text("import os\n")


def take_away(folder):
    (folder / "recurrence_lstm.py").unlink()


def point_elsewhere(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "someone/else--modeling_lstm.LSTMModel"
    (folder / "config.json").write_text(json.dumps(config))


def hide_in_a_checkpoint(folder):
    shutil.copytree(folder, folder / "checkpoint-2")
    change(folder / "checkpoint-2")


def change_the_runner(folder):
    write(folder, "onnx/run_onnx.py", "import os\n")


def write(folder, name, content=""):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def set_field(folder, name, field, value):
    path = folder / name
    write(folder, name, (json.loads(path.read_text()) if path.exists() else {}) | {field: value})


CODE = {
    change: r"differs   \w{64}  cache_lstm\.py",
    add: r"not ours  \w{64}  more_lstm\.py",
    take_away: r"missing   -{64}  recurrence_lstm\.py",
    point_elsewhere: r"differs   \s+auto_map of config\.json",
    hide_in_a_checkpoint: r"differs   \w{64}  checkpoint-2/cache_lstm\.py",
    change_the_runner: r"differs   \w{64}  onnx/run_onnx\.py",
}


@pytest.mark.parametrize("damage", CODE, ids=lambda damage: damage.__name__)
def test_verify_reports_changed_code(capsys, saved, damage):
    damage(saved)

    with pytest.raises(SystemExit, match="This is not the code of hf-lstm"):
        run_script("verify.py", "--model", saved)

    assert re.search(CODE[damage], capsys.readouterr().out)


@pytest.mark.parametrize(
    "name", ["__init__.py", "custom_generate/generate.py", "onnx/more.py", "sub/cache_lstm.py", "checkpoint-2/x.py"]
)
def test_verify_reports_code_in_other_places(capsys, saved, name):
    write(saved, name, "import os\n")

    with pytest.raises(SystemExit, match="This is not the code of hf-lstm"):
        run_script("verify.py", "--model", saved)

    assert re.search(rf"not ours  \w{{64}}  {re.escape(name)}", capsys.readouterr().out)


ELSEWHERE = "someone/else--modeling.Model"
LEADING = [
    ("config.json", "custom_pipelines", {"text-generation": {"impl": "x.X"}}),
    ("config.json", "auto_map", {"AutoModel": ELSEWHERE}),
    ("config.json", "auto_map", [ELSEWHERE]),
    ("config.json", "attn_implementation", "someone/kernel"),
    ("config.json", "transformers_weights", "adapter_model.bin"),
    ("config.json", "configuration_files", ["config.4.0.0.json"]),
    ("config.json", "quantization_config", {"quant_method": "fp8"}),
    ("config.json", "fusion_config", {"x": True}),
    ("config.json", "tokenizer_class", "OtherTokenizer"),
    ("config.json", "model_type", "other"),
    ("config.json", "architectures", ["OtherModel"]),
    ("config.json", "hidden_act", {"auto_map": ELSEWHERE}),
    ("config.json", "not_known_yet", "someone/else"),
    ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["x.X", None]}),
    ("tokenizer_config.json", "tokenizer_class", "OtherTokenizer"),
    ("tokenizer_config.json", "fast_tokenizer_files", ["tokenizer.4.0.0.json"]),
    ("tokenizer_config.json", "tokenizer_file", "/etc/passwd"),
    ("special_tokens_map.json", "auto_map", {"AutoTokenizer": [ELSEWHERE, None]}),
    ("generation_config.json", "custom_generate", "someone/else"),
    ("generation_config.json", "assistant_lookbehind", "someone/else"),
    ("generation_config.json", "compile_config", {"backend": "x"}),
    ("model.safetensors.index.json", "weight_map", {"a": "x.dat"}),
    ("model.safetensors.index.json", "weight_map", {"a": "../outside.safetensors"}),
    ("model.safetensors.index.json", "transformers_weights", "x.bin"),
    ("checkpoint-2/config.json", "auto_map", {"AutoModel": ELSEWHERE}),
]


@pytest.mark.parametrize(("name", "field", "value"), LEADING)
def test_verify_reports_fields_that_may_lead_to_other_code(capsys, saved, name, field, value):
    set_field(saved, name, field, value)

    with pytest.raises(SystemExit, match="This is not the code of hf-lstm"):
        run_script("verify.py", "--model", saved)

    assert re.search(rf"differs   \s+{field} of {re.escape(name)}\n", capsys.readouterr().out)


UNKNOWN = ["adapter_config.json", "adapter_model.bin", "pytorch_model.bin", "processor_config.json", "x.pickle"]
UNKNOWN += ["preprocessor_config.json", "config.4.0.0.json", "tokenizer.model", "tekken.json", "model.gguf", "x.so"]
UNKNOWN += [
    "__pycache__/cache_lstm.cpython-311.pyc",
    "custom_generate/requirements.txt",
    "sub/config.json",
    "notes.txt",
]


@pytest.mark.parametrize("name", UNKNOWN)
def test_verify_reports_files_that_no_hf_lstm_model_needs(capsys, saved, name):
    """For example, the config of an adapter names another repository, whose code is run."""
    write(saved, name, {"base_model_name_or_path": "someone/else"})

    with pytest.raises(SystemExit, match=r"The code is that of hf-lstm .* may lead to other code"):
        run_script("verify.py", "--model", saved)

    assert re.search(rf"unknown   \s+{re.escape(name)}\n", capsys.readouterr().out)


def test_verify_reports_links_to_other_folders(capsys, saved, tmp_path):
    write(tmp_path, "elsewhere/generate.py", "import os\n")
    (saved / "custom_generate").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(SystemExit, match="may lead to other code"):
        run_script("verify.py", "--model", saved)

    assert re.search(r"unknown   \s+custom_generate\n", capsys.readouterr().out)


def test_verify_reports_damaged_files(saved):
    (saved / "tokenizer_config.json").write_text("{")

    with pytest.raises(SystemExit, match=r"verify\.py: .*tokenizer_config\.json is not valid JSON"):
        run_script("verify.py", "--model", saved)


@pytest.mark.slow
def test_verify_checks_a_model_on_the_hub(call, hub):
    trained = call(SCRIPTS / "train.py", *FLAGS.split())
    assert trained.returncode == 0, trained.stderr

    there = call(SCRIPTS / "verify.py", "--model", "author/small", token=None)
    nowhere = call(SCRIPTS / "verify.py", "--model", "author/other", token=None)

    assert there.returncode == 0, there.stderr
    assert "All code is that of hf-lstm" in there.stdout
    assert f"commit {hub.repositories['author/small'].branches['main']}" in there.stdout
    assert nowhere.returncode == 1
    assert "\nverify.py: " in "\n" + nowhere.stderr  # other libraries may print before
    assert "Traceback" not in nowhere.stderr
