"""Several processes train as one does: the same lanes, the same losses, each process with the states of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import lanes_script
import pytest
import torch
from safetensors.torch import load_file

STEP = 4  # whose checkpoint is looked at


def train_in_two(folder, **options):
    # `--multi_gpu` is what starts several processes by torchrun; the script itself says `use_cpu=True`
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--num_processes", "2", "--num_cpu_threads_per_process", "1", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", lanes_script.__file__]
    options = json.dumps(options | {"processes": 2})
    ran = subprocess.run([sys.executable, *launch, folder, options], capture_output=True, text=True, cwd=folder.parent)
    assert ran.returncode == 0, ran.stderr
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
    options = {"gradient_accumulation_steps": 2, "length_seed": 3, "activation_checkpointing": True}

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


def test_the_states_of_two_processes_are_not_those_of_one(plain):
    with pytest.raises(ValueError, match=r"`world_size` was 2 in .* and is 1 now"):
        lanes_script.train(Path(plain[0]), resume=True)
