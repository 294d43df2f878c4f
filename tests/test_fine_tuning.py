"""ULMFiT's ways of fine-tuning inside the stock Trainer, by the paper's equations."""

import pytest
import torch
from conftest import CONFIGS, make_ids, make_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lstm import LSTMConfig, LSTMForSequenceClassification
from hf_lstm.training import GradualUnfreezingCallback, parameter_groups, slanted_triangular
from hf_lstm.training.optimization import depth_of, number_of_depths


def make_classifier(**config):
    torch.manual_seed(0)
    return LSTMForSequenceClassification(LSTMConfig(vocab_size=31, hidden_size=8, num_labels=2, **config))


@pytest.mark.parametrize("name", CONFIGS)
def test_each_layer_has_its_learning_rate(name):
    model = make_model(**CONFIGS[name])
    layers, names = model.config.num_hidden_layers, {p: n for n, p in model.named_parameters()}

    groups = parameter_groups(model, 0.1, learning_rate=0.01, layer_divisor=2.6)

    assert sorted(names.values()) == sorted(names[p] for group in groups for p in group["params"])
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] * (layers + 2)
    for group in groups:
        for parameter in group["params"]:
            name = names[parameter]
            above = next((layers - n for n in range(layers) if f"layers.{n}." in name), None)
            above = layers + 1 if "embed_tokens" in name or "in_proj" in name else above or 0
            assert group["lr"] == pytest.approx(0.01 / 2.6**above), name
    torch.optim.AdamW(groups, lr=1.0)  # takes them, empty ones too


def test_one_learning_rate_leaves_two_groups():
    assert [set(group) for group in parameter_groups(make_model(), 0.1)] == [{"params", "weight_decay"}] * 2
    assert [group["lr"] for group in parameter_groups(make_model(), 0.1, learning_rate=0.3)] == [0.3, 0.3]
    for options in ({"layer_divisor": 2.6}, {"layer_divisor": 0.5, "learning_rate": 1.0}):
        with pytest.raises(ValueError, match="must be at least 1, and more needs a `learning_rate`"):
            parameter_groups(make_model(), 0.1, **options)


@pytest.mark.parametrize("steps", [5, 100, 1003])
def test_the_schedule_is_that_of_the_equation(steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule, cut = slanted_triangular(optimizer, steps), max(1, int(steps * 0.1))

    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()

    for t, rate in enumerate(found):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / 0.1 - 1))
        assert rate == pytest.approx(0.5 * (1 + max(p, 0) * 31) / 32)
    assert max(found) == found[cut] == 0.5
    assert found[0] == 0.5 / 32


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 9, "cut_fraction": 1}, {"steps": 9, "ratio": 0.5}])
def test_schedules_that_cannot_be_are_refused(options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)

    with pytest.raises(ValueError, match=r"`cut_fraction` .* between 0 and 1"):
        slanted_triangular(optimizer, **options)


class Watch(TrainerCallback):
    """Records the parts of the model that changed in each epoch."""

    def __init__(self):
        self.changed = []

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        self.before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        depths = number_of_depths(model)
        names = {name for name, parameter in model.named_parameters() if not parameter.equal(self.before[name])}
        self.changed.append({depth_of(name, depths) for name in names})


def unfreeze(folder, watch, epochs=5, **resume):
    model = make_classifier(num_hidden_layers=2)
    rows = [{"input_ids": row, "labels": number % 2} for number, row in enumerate(make_ids(6, 5))]
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=2,
        save_strategy="epoch",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, learning_rate=0.01, layer_divisor=2.6))
    optimizers = (optimizer, slanted_triangular(optimizer, 15))
    callbacks = [GradualUnfreezingCallback(), watch]
    Trainer(model, arguments, train_dataset=rows, optimizers=optimizers, callbacks=callbacks).train(**resume)
    return model


def test_layers_are_freed_from_the_head_down_and_a_resumed_run_goes_on(tmp_path):
    """The head alone, then a layer more an epoch, and the embeddings last."""
    watch, again = Watch(), Watch()
    model = unfreeze(tmp_path, watch)

    assert watch.changed == [{3}, {3, 2}, {3, 2, 1}, {3, 2, 1, 0}, {3, 2, 1, 0}]
    assert all(parameter.requires_grad for parameter in model.parameters())
    resumed = unfreeze(tmp_path, again, resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.changed == watch.changed[2:]
    for name, parameter in resumed.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=0, atol=0)


def test_what_was_frozen_stays_frozen():
    model = make_classifier()
    model.model.embed_tokens.requires_grad_(False)
    callback, state = GradualUnfreezingCallback(), type("State", (), {"epoch": 9.0})

    callback.on_train_begin(None, state, None, model=model)
    callback.on_epoch_begin(None, state, None, model=model)
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.model.layers[0].input_gates.weight.requires_grad
    callback.on_train_end(None, state, None)
    assert not model.model.embed_tokens.weight.requires_grad
