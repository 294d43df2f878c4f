"""Partial shuffle: each lane rotated in each epoch, the state carried over the seam, and runs that resume to the same bits."""

import pytest
import torch
from conftest import make_ids, make_model
from lanes_script import make_trainer

from hf_lstm import LaneDataset, TokenStream

LENGTH, LANES, BPTT = 24, 3, 8
STREAM = TokenStream(torch.arange(LENGTH * LANES + 1), torch.tensor([0, 10, 33, 50]))


def epoch_of(dataset, epoch):
    dataset.set_epoch(epoch)
    rows = [dataset[index] for index in range(len(dataset))]
    return {
        name: torch.stack([torch.cat([row[name] for row in rows[lane::LANES]]) for lane in range(LANES)])
        for name in ("input_ids", "shift_labels", "position_ids")
    }


def test_each_lane_is_rotated_by_its_own_offset():
    dataset = LaneDataset(STREAM, LANES, BPTT, partial_shuffle_seed=5)

    epochs = [epoch_of(dataset, epoch) for epoch in range(6)]

    offsets = torch.stack([epoch["input_ids"][:, 0] % LENGTH for epoch in epochs])
    assert len(offsets.unique(dim=0)) == 6
    assert (offsets[:, 0] != offsets[:, 1]).any()
    for lane in range(LANES):
        for row in (epoch["input_ids"][lane] for epoch in epochs):
            expected = torch.arange(lane * LENGTH, (lane + 1) * LENGTH)
            assert torch.equal(row, expected.roll(-int(row[0] % LENGTH)))
    for epoch in epochs:
        assert torch.equal(epoch["shift_labels"], epoch["input_ids"] + 1)  # each token predicts the one after it
        assert torch.equal(epoch["position_ids"], torch.arange(LENGTH).expand(LANES, -1))  # carried over the seam
    again = LaneDataset(STREAM, LANES, BPTT, partial_shuffle_seed=5)
    assert torch.equal(epoch_of(again, 4)["input_ids"], epochs[4]["input_ids"])
    other = LaneDataset(STREAM, LANES, BPTT, partial_shuffle_seed=6)
    assert not torch.equal(epoch_of(other, 4)["input_ids"], epochs[4]["input_ids"])


def test_documents_that_reset_keep_resetting():
    dataset = LaneDataset(STREAM, LANES, BPTT, reset_at_documents=True, partial_shuffle_seed=5)

    for epoch in range(4):
        found = epoch_of(dataset, epoch)
        starts = torch.isin(found["input_ids"], STREAM.document_starts)
        starts[:, 0] = True
        assert torch.equal(found["position_ids"] == 0, starts)


def test_without_a_seed_nothing_changes():
    dataset = LaneDataset(STREAM, LANES, BPTT)

    found = epoch_of(dataset, 3)

    assert torch.equal(found["input_ids"], torch.arange(LENGTH * LANES).view(LANES, -1))
    assert not dataset.changes_with_epoch


@pytest.mark.parametrize("stopped", [3, 5])  # at the end of an epoch, and within one
def test_a_resumed_run_equals_an_uninterrupted_one(stopped, tmp_path):
    tokens = make_ids(1, 24 * LANES + 1)[0]

    def run(**options):
        lanes = LaneDataset(tokens, LANES, BPTT, partial_shuffle_seed=5)
        settings = {
            "num_train_epochs": 3,
            "per_device_train_batch_size": LANES,
            "save_strategy": "steps",
            "save_steps": 1,
        }
        return make_trainer(tmp_path, make_model(torch.float32), lanes, **settings | options)

    whole, _ = run()
    whole.train()
    resumed, _ = run()
    checkpoint = str(tmp_path / f"checkpoint-{stopped}")
    resumed.args.resume_from_checkpoint = checkpoint
    resumed.train(resume_from_checkpoint=checkpoint)

    losses = [[one["loss"] for one in trainer.state.log_history if "loss" in one] for trainer in (whole, resumed)]
    assert losses[0] == losses[1]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_is_resumed_with_its_own_seed(tmp_path):
    tokens = make_ids(1, 24 * LANES + 1)[0]
    settings = {"max_steps": 2, "per_device_train_batch_size": LANES, "save_strategy": "steps", "save_steps": 1}
    lanes = LaneDataset(tokens, LANES, BPTT, partial_shuffle_seed=5)
    make_trainer(tmp_path, make_model(torch.float32), lanes, **settings)[0].train()

    trainer, _ = make_trainer(tmp_path, make_model(torch.float32), LaneDataset(tokens, LANES, BPTT), **settings)
    with pytest.raises(ValueError, match=r"`partial_shuffle_seed` was 5 .* and is None now"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_seed_must_be_a_whole_number():
    with pytest.raises(ValueError, match=r"`partial_shuffle_seed` \(-1\)"):
        LaneDataset(STREAM, LANES, BPTT, partial_shuffle_seed=-1)
