"""A run that has diverged ends before it is saved, and says where it happened."""

import pytest
import torch
from conftest import make_ids, make_model
from safetensors.torch import load_file
from test_tbptt import BPTT, LANES, TOKENS, make_trainer
from transformers import TrainerCallback

from hf_lstm import LaneDataset
from hf_lstm.training import DivergenceCallback, last_complete_checkpoint

DATA, OTHER = LaneDataset(TOKENS, LANES, BPTT), LaneDataset(make_ids(1, LANES * BPTT + 1, seed=2)[0], LANES, BPTT)


class Ruin(TrainerCallback):
    """Leaves one number in all weights, in the place of a step that was too large."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            for parameter in model.parameters():
                parameter.fill_(self.number)


def run(folder, ruin=(), **options):
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "logging_steps": 8} | options
    trainer, _ = make_trainer(
        folder, make_model(torch.float32), DATA, num_train_epochs=2, callbacks=[*ruin, DivergenceCallback()], **options
    )
    return trainer


@pytest.mark.parametrize("step", [7, 8])
def test_the_last_good_checkpoint_stays(tmp_path, step):
    """Between two saves, and in the very step of one, whose loss was still a number."""
    trainer = run(tmp_path, [Ruin(step, float("inf"))])

    message = (
        r"the loss of step 8 is (nan|[\d.]+), and the weights after it are not finite; .* `learning_rate` \(0.1\)"
    )
    with pytest.raises(ValueError, match=message) as diverged:
        trainer.train()

    assert ("nan" in str(diverged.value)) == (step == 7)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    checkpoint = last_complete_checkpoint(tmp_path)
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())
    resumed = run(tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 12


def test_the_error_names_the_loss_of_the_diverged_step(tmp_path):
    trainer = run(tmp_path, logging_steps=1, gradient_accumulation_steps=2, max_steps=2)
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if entry["step"] == 2 and "loss" in entry]

    with pytest.raises(ValueError, match=f"the loss of step 2 is {loss:.4g}"):
        run(tmp_path, [Ruin(2, float("nan"))], gradient_accumulation_steps=2).train()


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_an_evaluation_loss_of_nan_or_infinity_ends_a_run(tmp_path, strategy):
    """Weights that are finite, and too large to be multiplied."""
    trainer = run(
        tmp_path,
        [Ruin(6, 3e38)],
        eval_dataset=OTHER,
        eval_strategy=strategy,
        eval_steps=2,
        save_strategy=strategy,
        load_best_model_at_end=True,
    )

    with pytest.raises(ValueError, match=r"has diverged: the evaluation at step 6 gives a loss of (nan|inf)"):
        trainer.train()

    assert not (tmp_path / "checkpoint-6").exists()


def test_a_diverged_run_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the loss of step 12 is "):
        run(tmp_path, [Ruin(12, float("nan"))], save_strategy="no", logging_strategy="no").train()


def test_the_callback_does_nothing_outside_training(tmp_path):
    trainer = run(tmp_path, eval_dataset=[{"input_ids": ids, "labels": ids} for ids in make_ids(3, 5)])
    trainer.train()

    assert not trainer.model._forward_hooks
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(float("nan"))
    assert not trainer.evaluate()["eval_loss"] > 0  # said by whoever evaluates it
