"""A run that was killed goes on as if it had not been: bit-equal losses and weights."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, make_ids, make_model
from datasets import Dataset
from processes import Program
from safetensors.torch import load_file, save_file
from test_tbptt import BPTT, LANES, make_trainer
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hf_lstm import DocumentDataset, LaneDataset, StreamingLanes, TokenStream, byte_tokenizer
from hf_lstm.training import FinishedRunCallback, last_complete_checkpoint

STEPS = 12
SCRIPT = Path(__file__)
TOKENS = make_ids(1, LANES * BPTT * 5 + 1)[0]  # several epochs, so that a run also resumes in the middle of one


def run(folder, resume=None, kill=None, dataset=None, model=None, **options):
    """One run with dropout-free Adam; `kill` is called by name where the process is to end."""
    os.environ["KILL"] = kill or ""
    trainer, _ = make_trainer(
        folder,
        make_model(torch.float32) if model is None else model,
        LaneDataset(TOKENS, LANES, BPTT) if dataset is None else dataset,
        **{
            "max_steps": STEPS,
            "optim": "adamw_torch",
            "learning_rate": 0.01,
            "lr_scheduler_type": "linear",
            "save_strategy": "steps",
            "save_steps": 4,
            "save_total_limit": 2,
        }
        | options,
    )
    trainer.callback_handler.callbacks.insert(0, Killer())
    trainer.train(resume_from_checkpoint=resume)
    return trainer.state.log_history, trainer.model.state_dict()


class Killer:
    """A callback that ends the process at once, without a chance to tidy up."""

    def __getattr__(self, event):
        def at(args, state, control, **kwargs):
            if os.environ["KILL"] == f"{event} {state.global_step}":
                os.kill(os.getpid(), signal.SIGKILL)

        return at


KILLS = {
    "between steps": "on_step_end 6",
    "in the middle of a save": "on_save 8",
    "just after a save": "on_step_begin 8",
}
CELLS = {"between steps": "lstm", "in the middle of a save": "gru", "just after a save": "mogrifier"}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with a run for each kill."""
    folder = tmp_path_factory.mktemp("killed")
    runs = [Program(SCRIPT, folder / name, kill, CELLS[name]) for name, kill in KILLS.items()]
    assert [run.wait().returncode for run in runs] == [-signal.SIGKILL] * len(KILLS)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that is not killed, and what it logs and learns."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run(folder)


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of that folder, to be changed."""
    return Path(shutil.copytree(whole[0], tmp_path / "finished"))


@pytest.mark.parametrize(
    ("kill", "resumed"), [("between steps", 4), ("in the middle of a save", 4), ("just after a save", 8)]
)
def test_a_killed_run_resumes_bit_equal(killed, tmp_path, kill, resumed):
    folder, config = killed, {"cell_type": CELLS[kill]}
    expected_logs, expected_weights = run(tmp_path, model=make_model(torch.float32, **config))

    checkpoint = last_complete_checkpoint(folder / kill)
    logs, weights = run(folder / kill, resume=str(checkpoint), model=make_model(torch.float32, **config))

    assert checkpoint.name == f"checkpoint-{resumed}"
    assert [entry["loss"] for entry in logs if "loss" in entry] == [
        entry["loss"] for entry in expected_logs if "loss" in entry
    ]
    for name, weight in expected_weights.items():
        assert torch.equal(weights[name], weight), name


def test_a_window_of_attention_resumes_bit_equal(tmp_path):
    """The checkpoint holds the window, and the run that goes on from it is the same."""
    expected, weights = run(tmp_path, model=make_model(torch.float32, **CONFIGS["hybrid"]))
    checkpoint = tmp_path / "checkpoint-8"

    logs, resumed = run(tmp_path, resume=str(checkpoint), model=make_model(torch.float32, **CONFIGS["hybrid"]))

    names = load_file(checkpoint / "lstm_state_rank0.safetensors").keys()
    assert {"layers.0.h", "layers.1.keys", "layers.1.values", "layers.1.real", "layers.2.c"} <= names
    assert [entry.get("loss") for entry in logs] == [entry.get("loss") for entry in expected]
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


def test_an_incomplete_checkpoint_is_skipped_and_named(finished, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_lstm.training.checkpoints.logger.warning", warnings.append)
    assert last_complete_checkpoint(finished).name == "checkpoint-12"

    (finished / "checkpoint-12" / "lstm_state_rank0.safetensors").unlink()

    assert last_complete_checkpoint(finished).name == "checkpoint-8"
    assert warnings == [
        f"{finished / 'checkpoint-12'} is not complete and is skipped: the run was stopped while it was written."
    ]
    assert last_complete_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_checkpoint_that_is_being_deleted_is_skipped(finished, name):
    """Trainer would go on without an optimizer's state, and say nothing."""
    (finished / "checkpoint-12" / name).unlink()

    assert last_complete_checkpoint(finished).name == "checkpoint-8"


def test_the_state_of_another_step_is_refused(tmp_path):
    """Even if nothing has been logged that could tell."""
    run(tmp_path, logging_steps=100)
    first, second = str(tmp_path / "checkpoint-8"), str(tmp_path / "checkpoint-12")

    with pytest.raises(ValueError, match="belongs to another run than the weights do"):
        run(tmp_path, resume=second, resume_from_checkpoint=first, max_steps=16, logging_steps=100)


def test_a_checkpoint_without_the_state_of_a_process_is_skipped(finished):
    path = finished / "checkpoint-12" / "lstm_state_rank0.safetensors"
    save_file(load_file(path), path, metadata={"world_size": "2", "lanes": str(LANES)})

    assert last_complete_checkpoint(finished).name == "checkpoint-8"


def test_the_carried_state_is_in_the_checkpoint(whole):
    state = load_file(whole[0] / "checkpoint-12" / "lstm_state_rank0.safetensors")

    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        f"layers.{layer}.{name}": (LANES, 12) for layer in range(2) for name in "hc"
    }
    assert all(tensor.abs().sum() > 0 for tensor in state.values())


@pytest.mark.parametrize("what", ["missing", "broken"])
def test_a_checkpoint_without_a_state_is_refused(finished, what):
    path = finished / "checkpoint-12" / "lstm_state_rank0.safetensors"
    path.unlink() if what == "missing" else path.write_bytes(b"broken")

    assert last_complete_checkpoint(finished).name == "checkpoint-8"
    with pytest.raises(ValueError, match="cannot be resumed without a carried state"):
        run(finished, resume=str(finished / "checkpoint-12"))


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (LaneDataset(TOKENS, LANES, BPTT - 1), {}, "`bptt_length` was 5 in .* and is 4 now"),
        (LaneDataset(TOKENS[:-1], LANES, BPTT), {}, "`tokens` was 76 in .* and is 75 now"),
        (LaneDataset(TOKENS.flip(0), LANES, BPTT), {}, "`digest` was .* in .* and is .* now"),
        (LaneDataset(TOKENS, 2, BPTT), {"per_device_train_batch_size": 2}, "`lanes` was 3 in .* and is 2 now"),
    ],
    ids=["chunks", "length", "text", "lanes"],
)
def test_a_checkpoint_of_other_lanes_is_refused(finished, dataset, options, message):
    with pytest.raises(ValueError, match=message):
        run(finished, resume=str(finished / "checkpoint-8"), dataset=dataset, **options)


def test_a_checkpoint_of_a_cell_with_the_same_weights_is_refused(finished):
    """A Mogrifier without rounds has the weights and the state of an LSTM."""
    model = make_model(torch.float32, cell_type="mogrifier", mogrifier_rounds=0)

    with pytest.raises(
        ValueError, match=r"`cell_type` was lstm in .* and is mogrifier now: resume with the same model"
    ):
        run(finished, resume=str(finished / "checkpoint-8"), model=model)


def test_a_checkpoint_outside_output_dir_must_be_named_in_the_arguments(whole, tmp_path):
    """Trainer does not tell callbacks the path that `train()` was given."""
    folder, expected, _ = whole
    run(tmp_path / "two", learning_rate=0.5)
    checkpoint = str(folder / "checkpoint-8")

    with pytest.raises(ValueError, match="belongs to another run than the weights do"):
        run(tmp_path / "two", resume=checkpoint)
    with pytest.raises(
        ValueError, match=r"of step 8 .* is not in `output_dir` .*: name it in .*LSTMTrainingArguments"
    ) as refused:
        run(tmp_path / "three", resume=checkpoint)
    logs, _ = run(tmp_path / "four", resume=checkpoint, resume_from_checkpoint=checkpoint)

    assert "checkpoint-8" not in str(refused.value)  # a folder that nobody gave
    assert [entry.get("loss") for entry in logs[:-1]] == [entry.get("loss") for entry in expected[:-1]]


def contents(folder):
    """When each file was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "runs" not in path.parts}


BEST = {"eval_dataset": LaneDataset(TOKENS, LANES, BPTT), "eval_strategy": "steps", "eval_steps": 4}
BEST |= {
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
}  # not the last one


@pytest.mark.parametrize(
    ("options", "again", "last"),
    [
        ({}, {}, 12),
        ({"save_total_limit": 3}, {"max_steps": 9}, 12),
        ({"max_steps": -1, "num_train_epochs": 1.4}, {}, 7),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, {}, 12),
    ],
    ids=str,
)
def test_a_finished_run_trains_nothing(tmp_path, options, again, last):
    """The best model is loaded, as it was; Trainer alone would train a step more, and delete a checkpoint for it."""
    options = BEST | options
    expected_logs, expected = run(tmp_path, **options)
    before = contents(tmp_path)

    logs, weights = run(tmp_path, resume=str(tmp_path / f"checkpoint-{last}"), **(options | again))

    assert logs[-1]["step"] == last
    assert logs[:-1] == expected_logs[:-1]  # the last one says how long it took
    assert contents(tmp_path) == before
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    final = load_file(tmp_path / f"checkpoint-{last}" / "model.safetensors")
    assert not all(torch.equal(weights[name], weight) for name, weight in final.items())


def test_a_finished_run_of_documents_trains_nothing(tmp_path):
    stream = TokenStream(TOKENS, torch.arange(0, len(TOKENS), 7), num_bytes=0)
    options = {"max_steps": 3, "save_steps": 2, "save_total_limit": 2, "use_cpu": True, "report_to": "none"}
    results = []
    for resume in (None, True):
        trainer = Trainer(
            model=make_model(torch.float32, pad_token_id=0),
            args=TrainingArguments(tmp_path, per_device_train_batch_size=3, disable_tqdm=True, **options),
            train_dataset=DocumentDataset(stream, 6),
            data_collator=DataCollatorWithFlattening(),
            callbacks=[FinishedRunCallback()],
        )
        trainer.train(resume_from_checkpoint=resume)
        results.append((trainer.state.global_step, contents(tmp_path), trainer.model.lm_head.weight.tolist()))

    assert results[0] == results[1]
    assert results[0][0] == 3


def test_a_finished_run_of_streamed_lanes_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda message: None)  # that there was no sample
    rows = Dataset.from_dict({"text": [f"{number} bottles" for number in range(40)]}).to_iterable_dataset()
    lanes = StreamingLanes(rows, byte_tokenizer(), LANES, BPTT)
    results = []
    resume = str(tmp_path / "checkpoint-12")
    for options in ({}, {"resume": resume}, {"resume": resume, "max_steps": 8}):
        _, weights = run(tmp_path, dataset=lanes, model=make_model(torch.float32, vocab_size=260), **options)
        results.append((contents(tmp_path), {name: weight.tolist() for name, weight in weights.items()}))

    assert results[0] == results[1] == results[2]
    run(tmp_path, resume, dataset=lanes, model=make_model(torch.float32, vocab_size=260), max_steps=13)
    assert (tmp_path / "checkpoint-13").is_dir()


def test_a_finished_run_of_another_iterable_dataset_is_refused(tmp_path):
    rows = Dataset.from_dict({"input_ids": [[5, 6]] * 9, "labels": [[5, 6]] * 9}).to_iterable_dataset()
    options = {"max_steps": 2, "save_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    model, collator = make_model(torch.float32), DataCollatorWithFlattening()
    trainer = Trainer(model, TrainingArguments(tmp_path, **options), collator, rows, callbacks=[FinishedRunCallback()])
    trainer.train()

    with pytest.raises(
        ValueError, match="The run has taken its 2 steps, and Trainer would read more of IterableDataset"
    ):
        trainer.train(resume_from_checkpoint=True)


def test_a_state_that_is_not_written_leaves_nothing_behind(tmp_path, monkeypatch):
    names = []

    def fail(tensors, path, metadata):
        names.append(path.name)
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_lstm.generation.save_file", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path)

    assert len(set(names)) == 2  # a second run in the same folder would not write over the first one's
    assert not list(tmp_path.rglob("lstm_state_rank*"))


if __name__ == "__main__":
    run(Path(sys.argv[1]), kill=sys.argv[2], model=make_model(torch.float32, cell_type=sys.argv[3]))
