"""Several processes train as one does: the same lanes, the same losses, each process with the states of its own."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lanes_script
import pytest
import torch
from conftest import CHECKPOINTING, SCRIPTS, SMALL, make_model
from processes import run_ranks
from safetensors.torch import load_file

STEP = 4  # whose checkpoint is looked at


def launch_two(folder, *command):
    # `--multi_gpu` is what starts several processes by torchrun; the scripts themselves say `use_cpu=True`
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--num_processes", "2", "--num_cpu_threads_per_process", "1", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", *map(str, command)]
    return subprocess.run([sys.executable, *launch], capture_output=True, text=True, cwd=folder.parent)


def train_in_two(folder, **options):
    ran, other = run_ranks(Path(lanes_script.__file__), folder, json.dumps(options | {"processes": 2}))
    assert (ran.returncode, other.returncode) == (0, 0), ran.stderr + other.stderr
    return json.loads([line for line in ran.stdout.splitlines() if line.startswith('{"train"')][-1])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run in two processes: its folder and its losses."""
    folder = tmp_path_factory.mktemp("processes") / "run"
    return folder, train_in_two(folder)


def check(two, one, two_folder, one_folder):
    assert len(one["train"]) >= 4
    assert one["eval"]
    assert two["train"] == pytest.approx(one["train"], rel=1e-5)
    assert two["eval"] == pytest.approx(one["eval"], rel=1e-5)
    (whole,), parts = (
        [load_file(folder / f"checkpoint-{STEP}" / f"lstm_state_rank{rank}.safetensors") for rank in range(ranks)]
        for folder, ranks in ((one_folder, 1), (two_folder, 2))
    )
    for name, state in whole.items():
        assert (state[:2] - state[2:]).abs().max() > 0.01  # or the lanes could be anyone's
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), state, rtol=1e-4, atol=1e-5)


def test_two_processes_train_as_one_does(tmp_path, plain):
    folder, two = plain

    check(two, lanes_script.train(tmp_path / "one"), folder, tmp_path / "one")


@pytest.mark.slow
def test_two_processes_accumulate_chunks_of_random_lengths(tmp_path):
    options = {"gradient_accumulation_steps": 2, "length_seed": 3, CHECKPOINTING: True}

    two = train_in_two(tmp_path / "two", **options)

    check(two, lanes_script.train(tmp_path / "one", **options), tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_shuffle_documents(tmp_path):
    two = train_in_two(tmp_path / "two", shuffle_seed=2)

    check(two, lanes_script.train(tmp_path / "one", shuffle_seed=2), tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_stream_and_resume(tmp_path):
    """Each its own documents: the states of the two differ, and both go on where they were."""
    folder, options = tmp_path / "two", {"streaming": True, "vocab_size": 260, "max_steps": 10}
    whole = train_in_two(folder, **options)
    shutil.rmtree(folder / "checkpoint-10")
    (folder / "checkpoint-8" / "lstm_state_rank1.safetensors").unlink()
    states = [load_file(folder / f"checkpoint-{STEP}" / f"lstm_state_rank{rank}.safetensors") for rank in (0, 1)]

    resumed = train_in_two(folder, resume=True, **options)

    assert resumed["train"] == whole["train"][STEP:]
    assert all((states[0][name] - states[1][name]).abs().max() > 0.01 for name in states[0])


@pytest.mark.slow
def test_two_processes_resume_bit_equal(tmp_path, plain):
    """From the last checkpoint that both of them finished."""
    folder = tmp_path / "killed"
    shutil.copytree(plain[0], folder)
    (folder / "checkpoint-8" / "lstm_state_rank1.safetensors").unlink()
    shutil.rmtree(folder / "checkpoint-10")

    resumed = train_in_two(folder, resume=True)

    assert resumed["train"] == plain[1]["train"][STEP:]
    assert resumed["eval"] == plain[1]["eval"][1:]


def test_a_checkpoint_of_two_processes_is_refused_by_one(plain):
    with pytest.raises(ValueError, match=r"`world_size` was 2 in .* and is 1 now"):
        lanes_script.train(Path(plain[0]), resume=True)


def check_rows(losses):
    """Each step's loss is that of its four rows alone."""
    model, documents = make_model(torch.float32, vocab_size=260), lanes_script.documents_of(8)
    sums = []
    with torch.no_grad():
        for document in documents:
            ids = torch.tensor([document["input_ids"]])
            sums.append((model(ids, labels=ids).loss.item() * (ids.shape[1] - 1), ids.shape[1] - 1))
    for step, loss in enumerate(losses):
        nats, targets = zip(*sums[4 * step : 4 * step + 4], strict=True)
        assert loss == pytest.approx(sum(nats) / sum(targets), rel=1e-5)
    assert len(losses) == 2


def test_padded_rows_have_the_loss_they_have_alone(tmp_path):
    """As the README says, with the stock Trainer and its collator."""
    check_rows(lanes_script.train_documents(tmp_path)["train"])


@pytest.mark.slow
def test_padded_rows_have_the_same_loss_in_two_processes(tmp_path):
    check_rows(train_in_two(tmp_path / "two", documents=True)["train"])


@pytest.mark.slow
def test_both_processes_end_where_a_run_diverges(tmp_path):
    options = {"processes": 2, "optim": "sgd", "learning_rate": 1e38}

    ran = launch_two(tmp_path / "two", lanes_script.__file__, tmp_path / "two", json.dumps(options))

    assert ran.returncode != 0
    seen = "(the loss of step 2 is|the evaluation at step 3 gives a loss of) nan"  # first, by the machine's arithmetic
    assert re.search(f"ValueError: The run has diverged: {seen}", ran.stderr)
    assert not list((tmp_path / "two").glob("checkpoint-*"))


@pytest.mark.slow
def test_two_processes_take_a_folder_together(tmp_path, text_file):
    """Both train in it; both are refused where it holds something; and both only report once they have had all steps."""
    folder = tmp_path / "run"
    command = [SCRIPTS / "train.py", "--train_file", text_file, "--output_dir", folder, "--max_steps", 6, *SMALL]
    command += ["--per_device_train_batch_size", 2]
    first = launch_two(folder, *command)
    assert first.returncode == 0, first.stderr
    checkpoints = {path: path.stat().st_mtime_ns for path in folder.glob("checkpoint-*/*")}

    refused = launch_two(folder, *command)
    resumed = launch_two(folder, *command, "--resume_from_checkpoint", "true")

    assert refused.returncode != 0
    assert f"train.py: `--output_dir` {folder} already holds something" in refused.stderr
    assert resumed.returncode == 0, resumed.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.glob("checkpoint-*/*")} == checkpoints
    assert not (folder / ".lock").exists()
