"""Push to and load from a Hub on the loopback address: no private data is uploaded, and failures do no harm.

Each client runs in a process with an environment of its own, so that the tests also pass with HF_HUB_OFFLINE=1.
"""

import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, SCRIPTS, make_model, run_script
from hub import TOKEN, Failure, Hub
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_lstm
from hf_lstm import bpe_tokenizer, byte_tokenizer, word_tokenizer
from hf_lstm.hub import check_text, files_to_push

PRIVATE = (".env", "training_args.bin", "optimizer.pt", "lanes_0.safetensors", "main.session", "notes.txt")
ELSEWHERE = """
import sys
sys.modules["hf_lstm"] = None  # importing it raises, as where it is not installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
name, revision = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(name, revision=revision, trust_remote_code=True)
inputs = tokenizer("the horse", return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)[0].tolist())
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder written by scripts/train.py, with its checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    text = folder.parent / "text.txt"
    text.write_text("the horse raced past the barn fell\n" * 200)
    command = (
        f"--train_file {text} --output_dir {folder} --tokenizer byte --hidden_size 16 --max_steps 4 --use_cpu true"
    )
    command += " --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --bptt_length 16 --eval_steps 2"
    command += " --save_steps 2 --logging_steps 2"
    run_script("train.py", *command.split(), shortened=False)  # the curve is among the files that are checked
    return folder


@pytest.fixture
def model_folder(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "small"))


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub
        hub.shutdown()


def environment_of(hub, tmp_path, token=TOKEN):
    kept = {name: os.environ[name] for name in ("PATH", "MKL_CBWR", "OMP_NUM_THREADS")}
    kept |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    return kept | ({"HF_TOKEN": token} if token else {})


@pytest.fixture
def push(hub, tmp_path, model_folder):
    def push(*flags, token=TOKEN, folder=model_folder):
        command = [sys.executable, SCRIPTS / "push.py", "--model", folder, "--repo", "author/small", *flags]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment_of(hub, tmp_path, token), timeout=120
        )

    return push


@pytest.fixture
def load(hub, tmp_path):
    def load(revision="main", token=None, name="author/small"):
        command = [sys.executable, "-c", ELSEWHERE, name, revision]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment_of(hub, tmp_path, token), timeout=120
        )

    return load


@pytest.mark.slow
def test_a_pushed_model_generates_without_hf_lstm_installed(push, load, hub, model_folder):
    for name in PRIVATE:
        (model_folder / name).write_text("secret")

    pushed, loaded = push(), load()

    assert pushed.returncode == 0, pushed.stderr
    assert "uploaded: http://127.0.0.1" in pushed.stdout
    assert loaded.returncode == 0, loaded.stderr
    inputs = byte_tokenizer()("the horse", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)[0].tolist()
    assert json.loads(loaded.stdout.splitlines()[-1]) == expected
    uploaded = hub.files("author/small")
    assert set(uploaded) - {".gitattributes"} == {
        path.relative_to(model_folder).as_posix() for path in files_to_push(model_folder)
    }
    for name, content in uploaded.items():
        if name == "README.md":
            assert content.decode() == (model_folder / name).read_text().replace(
                'model="small"', 'model="author/small"'
            )
            assert b'model="author/small"' in content
        elif name != ".gitattributes":
            assert content == (model_folder / name).read_bytes()
            assert content != b"secret"
            assert not name.startswith("checkpoint-")
    content = b"".join(uploaded.values())
    assert TOKEN.encode() not in content
    assert str(model_folder).encode() not in content
    assert str(Path.home()).encode() + b"/" not in content


def test_verify_tells_files_of_training_from_code(run, model_folder):
    printed = run("verify.py", "--model", model_folder)

    for name in ("training_args.bin", "checkpoint-2/optimizer.pt", "checkpoint-2/rng_state.pth"):
        assert re.search(rf"not read \s+{name}\n", printed)
    assert {line.split()[0] for line in printed.splitlines()[:-2]} == {"same", "not"}  # "not read"
    assert f"\nAll code is that of hf-lstm {hf_lstm.__version__}.\n" in printed


@pytest.mark.slow
def test_a_push_deletes_old_weights_and_training_args(push, hub):
    push()
    files = hub.files("author/small")
    other = {"training_args.bin": b"secret", "model-00001-of-00002.safetensors": b"old", "LICENSE": b"mine"}
    other["kernels_lstm.py"] = b"code of version 0.1.0"
    hub.repositories["author/small"].commit("main", files | other)

    assert push().returncode == 0
    assert not (other.keys() - {"LICENSE"}) & set(hub.files("author/small"))
    assert hub.files("author/small")["LICENSE"] == b"mine"


@pytest.fixture
def nobody(monkeypatch):
    """Fail on any request to the Hub."""
    monkeypatch.setattr("hf_lstm.hub.HfApi", lambda: pytest.fail("the Hub was asked"))


def test_a_dry_run_lists_the_files_without_a_request(run, nobody, model_folder):
    for name in PRIVATE:
        (model_folder / name).write_text("secret")

    printed = run("push.py", "--model", model_folder, "--repo", "author/small", "--dry_run", "true")

    assert printed.endswith("Nothing was uploaded.\n")
    assert "model.safetensors" in printed
    listed = {line.split()[-1] for line in printed.splitlines() if line[:1] == " "}
    code = {path.name for path in (Path(hf_lstm.__file__).parent / "model").glob("*_lstm.py")}
    assert listed == code | {
        "README.md",
        "config.json",
        "generation_config.json",
        "learning_curve.png",
        "metrics.json",
        "model.safetensors",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_an_invalid_repository_name_is_refused(run, nobody, model_folder):
    with pytest.raises(SystemExit, match=r"push\.py: Repo id must be in the form"):
        run("push.py", "--model", model_folder, "--repo", "a/b/c", "--dry_run", "true")


@pytest.mark.slow
def test_a_model_can_be_pushed_privately_and_to_a_branch(push, load, hub):
    done = push("--private", "true", "--revision", "trial")

    assert done.returncode == 0, done.stderr
    assert hub.repositories["author/small"].private
    assert set(hub.files("author/small")) == {".gitattributes"}
    assert "model.safetensors" in hub.files("author/small", "trial")
    assert load("trial", token=TOKEN).returncode == 0
    assert load("trial").returncode != 0


@pytest.mark.slow
def test_a_second_push_sends_only_changed_files(push, hub, model_folder):
    push()
    hub.requests.clear()
    with (model_folder / "README.md").open("a") as card:
        card.write("\nMore.\n")

    assert push().returncode == 0
    assert not [request for request in hub.requests if request.startswith("PUT /lfs")]
    assert hub.files("author/small")["README.md"].endswith(b"More.\n")


FAILURES = {
    "cut upload": Failure("PUT /lfs", "cut", 20),
    "broken upload": Failure("PUT /lfs", "500", 20),
    "refused upload": Failure("PUT /lfs", "401", 20),
    "broken commit": Failure("POST .*/commit/", "500", 20),
    "cut commit": Failure("POST .*/commit/", "cut", 20),
    "broken creation": Failure("POST /api/repos/create", "500", 20),
}


@pytest.mark.slow  # huggingface_hub tries again for half a minute before it gives up
@pytest.mark.parametrize("name", FAILURES)
def test_after_a_failed_upload_the_same_command_finishes_it(push, load, hub, name, model_folder):
    failure = FAILURES[name]
    hub.failures.append(Failure(failure.pattern, failure.kind, failure.times))

    failed = push()

    assert failed.returncode == 1
    assert "push.py: " in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "the same command finishes it" in failed.stderr
    if "author/small" in hub.repositories:
        assert set(hub.files("author/small")) == {".gitattributes"}
    hub.failures.clear()
    assert push().returncode == 0
    assert hub.files("author/small")["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "failure",
    [
        Failure("PUT /lfs", "429"),
        Failure("PUT /lfs", "slow"),
        Failure("PUT /lfs", "500"),
        Failure("/preupload/", "429"),
    ],
    ids=lambda failure: f"{failure.kind} {failure.pattern}",
)
def test_a_temporary_failure_is_retried(push, hub, failure):
    hub.failures.append(failure)

    done = push()

    assert done.returncode == 0, done.stderr
    assert failure.times == 0


@pytest.mark.slow
def test_a_push_without_a_token_creates_no_repository(push, hub):
    done = push(token=None)

    assert done.returncode == 1
    assert "401" in done.stderr
    assert hub.repositories == {}


@pytest.mark.slow
def test_an_interrupted_download_is_resumed(push, load, hub):
    push()
    hub.failures.append(Failure("GET .*/resolve/.*model.safetensors", "cut"))

    loaded = load()

    assert loaded.returncode == 0, loaded.stderr


def damage(name):
    def decorate(function):
        DAMAGES[name] = function
        return function

    return decorate


DAMAGES = {}


@damage("contains no config.json: name the folder of a saved model")
def _(folder):
    (folder / "config.json").unlink()


@damage("contains no tokenizer.json")
def _(folder):
    (folder / "tokenizer.json").unlink()


@damage("contains no README.md: write a model card")
def _(folder):
    (folder / "README.md").unlink()


@damage("contains neither model.safetensors")
def _(folder):
    (folder / "model.safetensors").unlink()


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@damage("names the code file modeling_lstm.py, which is missing")
def _(folder):
    (folder / "modeling_lstm.py").unlink()


@damage("has no `auto_map`")
def _(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))


@damage("`auto_map` ([]) in")
def _(folder):
    change_config(folder, auto_map=[])


@damage("`auto_map` ('modeling_lstm.LSTMModel') in")
def _(folder):
    change_config(folder, auto_map="modeling_lstm.LSTMModel")


@damage("config.json has no `auto_map`, so the model needs an installed hf_lstm")
def _(folder):
    change_config(folder, auto_map=None)


@damage("`auto_map` ({'AutoTokenizer': [None, 'modeling_lstm.X']}) in")
def _(folder):
    change_config(folder, auto_map={"AutoTokenizer": [None, "modeling_lstm.X"]})


@damage("`auto_map` ({'AutoModel': 3}) in")
def _(folder):
    change_config(folder, auto_map={"AutoModel": 3})


@damage("`auto_map` ({'AutoModel': 'LSTMModel'}) in")
def _(folder):
    change_config(folder, auto_map={"AutoModel": "LSTMModel"})


@damage("names the code file other/model--modeling_lstm.py, which is missing")
def _(folder):
    change_config(folder, auto_map={"AutoModel": "other/model--modeling_lstm.LSTMModel"})


@damage("does not fit the weights: `model.embed_tokens.weight` must have the shape [260, 20] and has [260, 16]")
def _(folder):
    change_config(folder, hidden_size=20, embedding_size=20)


@damage("`model.layers.1.hidden_gates.weight` must have the shape [64, 16] and has None")
def _(folder):
    change_config(folder, num_hidden_layers=2)


@damage("`model.embed_tokens.weight` must have the shape [270, 16] and has [260, 16]")
def _(folder):
    change_config(folder, vocab_size=270)


@damage("`lm_head.weight` must have the shape [260, 16] and has None")
def _(folder):
    change_config(folder, tie_word_embeddings=False)


@damage("`embed_tokens.weight` must have the shape [260, 16] and has None")
def _(folder):
    change_config(folder, architectures=["LSTMModel"])


@damage("config.json does not describe a model (Field 'hidden_size' expected int, got str (value: 'wide'))")
def _(folder):
    change_config(folder, hidden_size="wide")


@damage("config.json does not describe a model (module 'torch' has no attribute 'float99')")
def _(folder):
    change_config(folder, dtype="float99")


@damage("`architectures` ([['LlamaForCausalLM']]) in")
def _(folder):
    change_config(folder, architectures=[["LlamaForCausalLM"]])


@damage("`model_type` ('llama')")
def _(folder):
    change_config(folder, model_type="llama")


@damage("nor all files of an index")
def _(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@damage("merges.txt is a link")
def _(folder):
    (folder.parent / "elsewhere").write_text("mine")
    (folder / "merges.txt").symlink_to(folder.parent / "elsewhere")


@damage("vocab.txt is a link")
def _(folder):
    (folder / ".env").write_text("mine")
    (folder / "vocab.txt").symlink_to(".env")


@damage("onnx/step.onnx is a link")
def _(folder):
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "step.onnx").write_text("mine")
    (folder / "onnx").symlink_to(folder.parent / "elsewhere")


@damage("metrics.json is a link")
def _(folder):
    (folder / "metrics.json").unlink()
    (folder / "metrics.json").symlink_to("gone")


@damage("config.json is not valid JSON")
def _(folder):
    (folder / "config.json").write_text("{")


@damage("is not a valid safetensors file, or is truncated")
def _(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


@damage("contains NaN or infinite values")
def _(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.input_gates.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@damage("`model.layers.0.input_gates.weight` in ")
def _(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.input_gates.weight"
    weights[name] = weights[name].fill_(torch.nan).to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@damage("has a dtype (torch.float4_e2m1fn_x2) whose values torch cannot check")
def _(folder):
    save_file({"x": torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, folder / "model.safetensors")


@damage("README.md is not valid UTF-8")
def _(folder):
    (folder / "README.md").write_bytes("Zoë".encode("latin-1"))


@damage("learning_curve.png has the chunk b'eXIf'")
def _(folder):
    picture = (folder / "learning_curve.png").read_bytes()
    (folder / "learning_curve.png").write_bytes(picture[:33] + chunk(b"eXIf", b"secret") + picture[33:])


@damage("learning_curve.png is not a complete PNG picture, or has data after it")
def _(folder):
    with (folder / "learning_curve.png").open("ab") as file:
        file.write(b"more")


@damage("seems to contain an access token (hf_ttt...)")
def _(folder):
    (folder / "run.json").write_text(json.dumps({"command": f"--hub_token {TOKEN}"}))


@damage("seems to contain an access token (github...)")
def _(folder):
    (folder / "run.json").write_text(json.dumps({"command": "github_pat_" + "a" * 40}))


@damage("a folder of this machine: remove it")
def _(folder):
    (folder / "metrics.json").write_text(json.dumps({"file": str(folder.resolve() / "text.txt")}))


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_or_private_files_are_not_uploaded(model_folder, message):
    DAMAGES[message](model_folder)

    with pytest.raises(ValueError, match=re.escape(message)):
        files_to_push(model_folder)


def test_8_bit_weights_can_be_uploaded(model_folder):
    weights = load_file(model_folder / "model.safetensors")
    weights = {name: weight.to(torch.float8_e5m2) for name, weight in weights.items()}
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})

    assert model_folder / "model.safetensors" in files_to_push(model_folder)


@pytest.mark.parametrize("kind", ["base", "sharded", *CONFIGS])
def test_saved_models_fit_their_config(tmp_path, kind):
    model = make_model(torch.float32, vocab_size=260, **CONFIGS.get(kind, {}))
    (model.model if kind == "base" else model).save_pretrained(
        tmp_path, max_shard_size="2KB" if kind == "sharded" else "1GB"
    )
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("A model.")

    weights = [path.name for path in files_to_push(tmp_path) if path.suffix == ".safetensors"]

    assert len(weights) > 1 if kind == "sharded" else weights == ["model.safetensors"]


def test_checking_a_config_downloads_no_kernel(model_folder):
    change_config(model_folder, attn_implementation="someone/kernel")

    assert model_folder / "config.json" in files_to_push(model_folder)


def chunk(kind, content):
    """A chunk of a PNG."""
    return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)


def write_into(folder, place, text):
    """Write a text into a file in the format of that file."""
    if place == "the weights":
        weights = load_file(folder / "model.safetensors")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "comment": text})
    elif place == "the picture":
        picture = (folder / "learning_curve.png").read_bytes()
        comment = chunk(b"tEXt", b"Comment\0" + text.encode())
        (folder / "learning_curve.png").write_bytes(picture[:33] + comment + picture[33:])
    elif place == "onnx/step.onnx":
        (folder / "onnx").mkdir()
        (folder / place).write_bytes(b"\x08\x0a\x12\xf0" + text.encode() + b"\0\xff\x80")
    else:
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(json.dumps({"text": text}) if place.endswith(".json") else text)


PLACES = ["README.md", "run.json", "onnx/run_onnx.py", "chat_template.jinja", "tokenizer_config.json"]
PLACES += ["the weights", "the picture", "onnx/step.onnx"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("text", ["key: glpat-" + "a1" * 10, "in {home}/text"])
def test_every_file_is_searched_for_tokens_and_paths(model_folder, monkeypatch, place, text):
    monkeypatch.setenv("HOME", "/home/me")
    write_into(model_folder, place, text.format(home="/home/me"))

    with pytest.raises(
        ValueError, match=r"\.(md|json|py|jinja|safetensors|png|onnx) (seems to contain|contains /home/me)"
    ):
        files_to_push(model_folder)


# Assembled here, so that no secret scanner reports this file.
LETTERS = "Ab1" * 20
TOKENS = ["glpat-" + LETTERS[:20], "xoxb-" + "1" * 12 + "-" + LETTERS[:24], "xapp-1-" + LETTERS[:30]]
TOKENS += ["AIza" + LETTERS[:35], "npm_" + LETTERS[:36], "sk-ant-api03-" + "a_b-" * 20, "sk-proj-" + "a_b-" * 20]
TOKENS += ["sk_" + "live_" + LETTERS[:24], "pypi-AgE" + LETTERS, "dckr_pat_" + LETTERS[:27], "dop_v1_" + "0" * 64]
TOKENS += [
    "SG." + LETTERS[:22] + "." + LETTERS[:43],
    "eyJ" + LETTERS + ".eyJ" + LETTERS + "." + LETTERS,
    "ASIA" + "A" * 16,
]
TOKENS += ["aws_secret_access_key = " + LETTERS[:40], "AccountKey=" + LETTERS, "gsk_" + LETTERS[:52], "hvs." + LETTERS]
TOKENS += ["WANDB_API_KEY=" + "0a" * 20, "https://hooks.slack.com/" + "services/T0/B0/" + LETTERS[:24]]
TOKENS += [f"-----BEGIN {kind}PRIVATE KEY" for kind in ("", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED ", "PGP ")]
TOKENS += [
    '"password": "' + LETTERS[:32],
    r"\u0067lpat-" + LETTERS[:20],
    r"x\nghp_" + LETTERS[:36],
    "a%20npm_" + LETTERS[:36],
]


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: token[:20])
def test_access_tokens_and_keys_are_found(tmp_path, token):
    with pytest.raises(ValueError, match=r"README\.md seems to contain an access token"):
        check_text(f"It was trained with {token}, which is mine.", tmp_path / "README.md", tmp_path)


HOMES = {
    "/home/me": [
        *("/home/me", "/home/me.", "(/home/me)", "[/home/me/x]", "</home/me>", "'/home/me/x'", "file:///home/me/x"),
        *(
            r"\/home\/me\/x",
            r"\u002fhome\u002fme",
            r"\\u002fhome\\u002fme",
            r"a\n/home/me/x",
            "%2Fhome%2Fme",
            "//home//me/x",
        ),
    ],
    "/home/josé": ["/home/josé/x", r"/home/jos\u00e9/x", r"\/home\/jos\u00e9", "/home/jos%C3%A9"],
    "/root": [
        "/root/x",
        "[/root/x]",
        "(/root/.cache)",
        r"\/root\/x",
        "file:///root/x",
        r"a\n/root/x",
        "--file=/root/x",
    ],
    r"C:\Users\nora": [
        r"C:\Users\nora\x",
        r"C:\\Users\\nora",
        "C:/Users/nora",
        "file:///C:/Users/nora/x",
        r"C:\\\\Users\\\\nora",
    ],
}
HARMLESS = {
    "/home/me": ["/home", "/home/", "/home/mean", "/home/me2", "/home/me-and-you", "~/x", "home/me"],
    "/root": ["/root", "/root2/x", "/roots/x", "https://example.org/root/x", "a/root/x", "root/x", '"/root": 17'],
}


@pytest.mark.parametrize(("home", "text"), [(home, text) for home in HOMES for text in HOMES[home]])
def test_paths_of_this_machine_are_found(tmp_path, monkeypatch, home, text):
    monkeypatch.setenv("HOME", home)

    with pytest.raises(ValueError, match=re.escape(f"README.md contains {home}, a folder of this machine")):
        check_text(f"Read {text} first.", tmp_path / "README.md", tmp_path)


@pytest.mark.parametrize(("home", "text"), [(home, text) for home in HARMLESS for text in HARMLESS[home]])
def test_other_paths_are_allowed(tmp_path, monkeypatch, home, text):
    monkeypatch.setenv("HOME", home)

    check_text(f"Read {text} first.", tmp_path / "README.md", tmp_path)


def test_a_vocabulary_of_source_code_is_allowed(tmp_path, monkeypatch):
    """The standard library of Python contains home folders, /root and the names of keys."""
    monkeypatch.setenv("HOME", "/root")
    words = "/ /home /root /root/ root sk- hf_ token= -----BEGIN secrets.token_hex password"
    text = [Path(posixpath.__file__).read_text(), words]

    for tokenizer in (bpe_tokenizer(text, vocab_size=500), word_tokenizer(text)):
        check_text(tokenizer.backend_tokenizer.to_str(), tmp_path / "tokenizer.json", tmp_path)


def test_an_incomplete_model_is_refused_without_a_request(run, nobody, model_folder):
    (model_folder / "README.md").unlink()

    with pytest.raises(SystemExit, match=r"push.py: .* contains no README\.md"):
        run("push.py", "--model", model_folder, "--repo", "author/small")


@pytest.mark.slow
def test_a_model_saved_without_train_py_can_be_pushed(push, hub, tmp_path):
    folder = tmp_path / "by hand"
    make_model(torch.float32, vocab_size=260).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")

    assert push(folder=folder).returncode == 0
    assert "modeling_lstm.py" in hub.files("author/small")
