"""Chunks of random lengths, whose steps are scaled to them, and lanes that sometimes lose their state."""

import pytest
import torch
from conftest import make_ids, make_model
from test_tbptt import LANES, make_trainer
from torch.nn import functional as F
from transformers import DynamicCache, TrainingArguments, default_data_collator

from hf_lstm import LaneDataset
from hf_lstm.training import TruncatedBPTTCallback
from hf_lstm.training.arguments import check_penalties

BPTT = 20
TOKENS = make_ids(1, LANES * BPTT * 9 + 1)[0]
RANDOM = LaneDataset(TOKENS, LANES, BPTT, length_seed=4)


def test_lanes_are_cut_into_chunks_of_every_length():
    lanes = LaneDataset(torch.arange(20_001), lanes=2, bptt_length=70, length_seed=1)
    lengths = lanes.chunk_lengths.tolist()

    for lane in range(2):
        items = [lanes[index] for index in range(lane, len(lanes), 2)]
        tokens = torch.cat([item["input_ids"] for item in items])
        assert torch.equal(tokens, torch.arange(lane * lanes.lane_length, (lane + 1) * lanes.lane_length))
        assert torch.equal(torch.cat([item["shift_labels"] for item in items]), tokens + 1)
        assert torch.equal(torch.cat([item["position_ids"] for item in items]), torch.arange(len(tokens)))
        assert [len(item["labels"]) for item in items] == lengths
    assert min(lengths) >= 5
    whole = [length for length in lengths if length > 55]
    assert sum(whole) / len(whole) == pytest.approx(70, abs=1.5)
    assert 0.85 < len(whole) / len(lengths) < 1
    assert all(20 < length < 90 for length in lengths[:-1])


def test_the_same_seed_draws_the_same_lengths():
    lengths = [LaneDataset(TOKENS, LANES, BPTT, length_seed=seed).chunk_lengths.tolist() for seed in (4, 4, 5)]

    assert lengths[0] == lengths[1] != lengths[2]
    assert sum(lengths[0]) == sum(lengths[2]) == 9 * BPTT


def test_a_seed_must_be_an_integer():
    with pytest.raises(ValueError, match=r"`length_seed` \('3'\) must be an integer"):
        LaneDataset(TOKENS, LANES, BPTT, length_seed="3")


def test_random_lengths_need_a_bptt_length_of_at_least_10(tmp_path):
    with pytest.raises(ValueError, match=r"`bptt_length` \(9\) must be at least 10 where lengths are drawn"):
        LaneDataset(TOKENS, LANES, 9, length_seed=0)


def test_evaluation_data_with_random_lengths_is_refused(tmp_path):
    trainer, _ = make_trainer(tmp_path, make_model(), RANDOM, eval_dataset=RANDOM, eval_strategy="steps", eval_steps=1)

    with pytest.raises(ValueError, match=r"random lengths \(`length_seed` 4\), which Trainer would weigh alike"):
        trainer.train()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_learning_rate_follows_the_length_and_the_loss_does_not(tmp_path, accumulate):
    """The loop by hand of AWD-LSTM: each step's rate is the scheduler's, times its length over `bptt_length`."""
    model, expected_model = make_model(), make_model()
    steps = 2 * (len(RANDOM.chunk_lengths) // accumulate)
    trainer, losses = make_trainer(
        tmp_path,
        model,
        RANDOM,
        max_steps=steps,
        gradient_accumulation_steps=accumulate,
        lr_scheduler_type="linear",
        learning_rate=0.1,
    )
    trainer.train()

    expected, optimizer = [], torch.optim.SGD(expected_model.parameters())
    expected_model.train()
    cache = DynamicCache(config=model.config)
    chunks = [[RANDOM[i * LANES + lane] for lane in range(LANES)] for i in range(len(RANDOM.chunk_lengths))]
    batches = [default_data_collator(items) for items in chunks]
    per_epoch = len(batches) // accumulate + (len(batches) % accumulate > 0)
    step = 0
    while step < steps:
        for start in range(0, len(batches), accumulate):
            if step == steps:
                break
            group = batches[start : start + accumulate]
            targets = sum(batch["shift_labels"].numel() for batch in group)
            nats = 0
            for batch in group:
                logits = expected_model(
                    batch["input_ids"], position_ids=batch["position_ids"], past_key_values=cache
                ).logits
                loss = F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(), reduction="sum")
                (loss / targets).backward()
                nats += loss.item() / targets
                for layer in cache.layers:
                    layer.detach_()
            mean_length = targets / LANES / len(group)
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps) * mean_length / BPTT
            optimizer.step()
            optimizer.zero_grad()
            expected.append(nats)
            step += 1
    assert per_epoch * 2 >= steps
    assert len(set(RANDOM.chunk_lengths.tolist())) > 3
    assert losses.train == pytest.approx(expected, rel=1e-5)
    for actual, wanted in zip(model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.1 * (1 - step / steps) for step in range(steps)])


def test_lanes_lose_their_state_with_the_given_probability(tmp_path, monkeypatch):
    """Zeroed in all layers together, and as often as asked."""
    callback, dropped = TruncatedBPTTCallback(state_drop_probability=0.4), []
    drop = callback._drop_states

    def record(cache):
        drop(cache)
        if cache.layers[0].is_initialized:
            states = torch.cat([state for layer in cache.layers for state in layer.get_state()], dim=1)
            zero = states == 0
            assert (zero.all(dim=1) | ~zero.any(dim=1)).all()
            dropped.extend(zero.all(dim=1).tolist())

    monkeypatch.setattr(callback, "_drop_states", record)
    trainer, losses = make_trainer(tmp_path, make_model(), LaneDataset(TOKENS, LANES, 5), num_train_epochs=4)
    trainer.remove_callback(TruncatedBPTTCallback)
    trainer.add_callback(callback)
    trainer.train()

    assert len(dropped) == LANES * (4 * 36 - 1)
    assert sum(dropped) / len(dropped) == pytest.approx(0.4, abs=0.08)
    trainer, carried = make_trainer(tmp_path, make_model(), LaneDataset(TOKENS, LANES, 5), num_train_epochs=4)
    trainer.train()
    assert losses.train[0] == carried.train[0]
    assert losses.train[-1] != carried.train[-1]


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_an_invalid_state_drop_probability_is_refused(value):
    with pytest.raises(ValueError, match=rf"`state_drop_probability` \({value}\) is a probability"):
        TruncatedBPTTCallback(state_drop_probability=value)


def test_label_smoothing_with_penalties_is_refused(tmp_path):
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to="none")

    with pytest.raises(ValueError, match=r"`label_smoothing_factor` \(0.1\) must be 0 with activation regularization"):
        check_penalties(arguments, make_model(activation_regularization=2.0).config)
