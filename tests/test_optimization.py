"""Weight decay where it was asked for, and averages of weights that are evaluated, saved and resumed."""

import math

import pytest
import torch
from conftest import CONFIGS, make_ids, make_model
from safetensors.torch import load_file
from test_tbptt import BPTT, LANES, make_trainer
from transformers import TrainerCallback
from transformers.trainer_utils import default_compute_objective

from hf_lstm import LaneDataset, LSTMForCausalLM
from hf_lstm.training import NTASGD, EMAAdamW, MetricsCallback, NonMonotonicTrigger, parameter_groups

LANE_DATA, OTHER_DATA = (LaneDataset(make_ids(1, LANES * BPTT * 6 + 1, seed)[0], LANES, BPTT) for seed in (1, 2))


@pytest.mark.parametrize("name", CONFIGS)
def test_each_parameter_is_in_one_group(name):
    model = make_model(**CONFIGS[name])
    names = {parameter: name for name, parameter in model.named_parameters()}

    decaying, spared = parameter_groups(model, 0.1)

    assert (decaying["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert sorted(names.values()) == sorted(names[parameter] for parameter in decaying["params"] + spared["params"])
    for parameter in decaying["params"]:
        assert parameter.ndim == 2
        assert not any(part in names[parameter] for part in ("hidden_gates", "embed_tokens", "bias", "norm"))
    assert any("hidden_gates" in names[parameter] for parameter in spared["params"])


@pytest.mark.parametrize(
    ("exclude", "part"),
    [("recurrent", "hidden_gates"), ("bias", "bias"), ("norm", "norm"), ("embedding", "embed_tokens")],
)
def test_each_kind_can_be_excluded(exclude, part):
    model = make_model(**CONFIGS["residual_narrow"])
    names = {parameter: name for name, parameter in model.named_parameters()}

    decaying, spared = parameter_groups(model, 0.1, exclude=[exclude])

    assert all(part in names[parameter] for parameter in spared["params"])
    assert not any(part in names[parameter] for parameter in decaying["params"])
    assert parameter_groups(model, 0.1, exclude=())[1]["params"] == []


def test_frozen_parameters_are_left_out_and_unknown_kinds_refused():
    model = make_model()
    model.model.embed_tokens.requires_grad_(False)

    assert not any(
        model.model.embed_tokens.weight is p for group in parameter_groups(model, 0) for p in group["params"]
    )
    with pytest.raises(ValueError, match=r"`exclude` \(gates\) must be among recurrent, bias, norm, embedding"):
        parameter_groups(model, 0.1, exclude=["gates"])
    with pytest.raises(ValueError, match=r"`weight_decay` \(-1\) must be at least 0"):
        parameter_groups(model, -1)


def train_one(optimizer, parameter, gradients, observed=()):
    """The iterate and the average after each step."""
    path = []
    for step, gradient in enumerate(gradients):
        optimizer.train()
        parameter.grad = gradient.clone()
        optimizer.step()
        average = parameter.detach().clone()
        optimizer.train()
        path.append((parameter.detach().clone(), average))
        if step < len(observed):
            optimizer.observe(observed[step])
    return path


GRADIENTS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))


def test_ema_adamw_equals_an_average_by_hand():
    parameter = torch.nn.Parameter(torch.ones(5))
    plain = torch.nn.Parameter(torch.ones(5))
    stock, expected = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.2), None

    path = train_one(EMAAdamW([parameter], lr=0.1, weight_decay=0.2, decay=0.5), parameter, GRADIENTS)

    for step, (iterate, average) in enumerate(path, start=1):
        plain.grad = GRADIENTS[step - 1].clone()
        stock.step()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = plain.detach().clone() if expected is None else decay * expected + (1 - decay) * plain.detach()
        torch.testing.assert_close(iterate, plain.detach(), rtol=0, atol=0)
        torch.testing.assert_close(average, expected)


def test_nt_asgd_begins_to_average_when_the_loss_stops_falling():
    """Patience 2: the sixth loss, 3.1, is worse than the best up to two evaluations before, 3.0."""
    parameter, plain = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    stock = torch.optim.SGD([plain], lr=0.1)
    losses = [4.0, 3.5, 3.0, 2.9, 3.2, 3.1, 1.0, 1.0]

    path = train_one(NTASGD([parameter], lr=0.1, patience=2), parameter, GRADIENTS, losses)

    iterates = []
    for step, (iterate, average) in enumerate(path):
        plain.grad = GRADIENTS[step].clone()
        stock.step()
        iterates.append(plain.detach().clone())
        torch.testing.assert_close(iterate, iterates[-1], rtol=0, atol=0)
        torch.testing.assert_close(average, torch.stack(iterates[6:]).mean(dim=0) if step > 5 else iterates[-1])


def test_a_step_with_gradients_at_the_average_is_refused():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = EMAAdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()

    with pytest.raises(RuntimeError, match=r"call `train\(\)` of EMAAdamW before the forward of each step"):
        optimizer.step()


class Watch(TrainerCallback):
    """The weights that a callback, an evaluation or a save would see after each step, and those that learn."""

    def __init__(self):
        self.seen, self.iterates = [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        weight = model.model.layers[0].hidden_gates.weight
        self.seen.append(weight.detach().clone())
        optimizer.train()
        self.iterates.append(weight.detach().clone())
        optimizer.eval()


def run(folder, optimizer, resume=None, callbacks=(), **options):
    model = make_model(torch.float32, output_dropout=0.2)
    options = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 3} | options
    trainer, losses = make_trainer(folder, model, LANE_DATA, callbacks, OTHER_DATA, **options)
    trainer.optimizer_cls_and_kwargs = optimizer
    trainer.train(resume_from_checkpoint=resume)
    return trainer, losses


AVERAGED = {
    "ema": lambda: (EMAAdamW, {"lr": 0.01, "decay": 0.6}),
    "nt_asgd": lambda: (NTASGD, {"lr": 3.0, "patience": 1}),
}


@pytest.mark.parametrize("name", AVERAGED)
def test_checkpoints_hold_both_sets_and_the_model_is_the_average(tmp_path, name, monkeypatch):
    monkeypatch.setattr(NTASGD, "observe", lambda self, loss: self.param_groups[0].update(triggered=True))
    watch = Watch()
    options = {"callbacks": [watch], "save_steps": 3}
    if name == "nt_asgd":
        options |= {"callbacks": [watch, NonMonotonicTrigger()], "eval_strategy": "steps", "eval_steps": 2}

    trainer, _ = run(tmp_path, AVERAGED[name](), **options)

    key = "model.layers.0.hidden_gates.weight"
    for step in (3, 6, 18):  # after an evaluation and without one
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")[key]
        state = torch.load(tmp_path / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["state"]
        sets = [values for values in state.values() if values["average"].shape == saved.shape]
        assert torch.equal(saved, watch.seen[step - 1])
        assert any(torch.equal(values["average"], saved) for values in sets)
        assert any(torch.equal(values["iterate"], watch.iterates[step - 1]) for values in sets)
        assert not torch.equal(saved, watch.iterates[step - 1]) or step == 3
    trainer.save_model(tmp_path / "exported")
    exported = LSTMForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(exported.get_parameter(key), watch.seen[-1])


@pytest.mark.parametrize("name", AVERAGED)
def test_evaluations_see_the_average(tmp_path, name, monkeypatch):
    class Compare(TrainerCallback):
        seen = []

        def on_evaluate(self, args, state, control, model=None, optimizer=None, **kwargs):
            weight = model.model.layers[0].hidden_gates.weight
            self.seen.append(torch.equal(weight, optimizer.state[weight]["average"]))

    Compare.seen.clear()
    monkeypatch.setattr(NTASGD, "_averaging_weight", lambda self: 0.5)
    run(tmp_path, AVERAGED[name](), callbacks=[Compare()], eval_strategy="steps", eval_steps=3)

    assert Compare.seen == [True] * 6


@pytest.mark.parametrize("name", AVERAGED)
def test_an_averaged_run_resumes_bit_equal(tmp_path, name):
    options = {"save_steps": 6}
    if name == "nt_asgd":
        options |= {"callbacks": [NonMonotonicTrigger()], "eval_strategy": "steps", "eval_steps": 2}

    whole, expected = run(tmp_path, AVERAGED[name](), **options)
    if name == "nt_asgd":
        assert 0 < whole.optimizer.param_groups[0]["steps"] < 18
    resumed, losses = run(tmp_path, AVERAGED[name](), resume=str(tmp_path / "checkpoint-12"), **options)

    assert losses.train == expected.train[12:]
    for actual, wanted in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(actual, wanted)
    resumed.optimizer.train()
    whole.optimizer.train()
    for actual, wanted in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize(("saved", "resumed"), [("ema", None), (None, "ema")])
def test_resuming_with_another_optimizer_is_refused(tmp_path, saved, resumed):
    made = {None: (torch.optim.AdamW, {"lr": 0.01}), "ema": (EMAAdamW, {"lr": 0.01})}
    run(tmp_path, made[saved])

    with pytest.raises(ValueError, match=r"`optimizer` was .*AdamW in .* and is .*AdamW now"):
        run(tmp_path, made[resumed], resume=str(tmp_path / "checkpoint-8"))


def test_evaluations_outside_training_trigger_nothing(tmp_path):
    trigger = NonMonotonicTrigger()
    optimizer = NTASGD([torch.nn.Parameter(torch.ones(3))])
    trigger.on_evaluate(None, None, None, metrics={"test_loss": 3.0}, optimizer=optimizer)
    trainer, _ = run(tmp_path, AVERAGED["nt_asgd"](), callbacks=[trigger], eval_strategy="steps", eval_steps=2)
    seen = list(trainer.optimizer.param_groups[0]["validation_losses"])
    trigger.on_evaluate(None, None, None, metrics={"test_loss": 3.0}, optimizer=trainer.optimizer)
    trigger.on_evaluate(None, None, None, metrics={"eval_loss": 3.0}, optimizer=trainer.optimizer)

    assert len(seen) == 9
    assert trainer.optimizer.param_groups[0]["validation_losses"] == seen


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: EMAAdamW([p], decay=1.0), r"`decay` \(1.0\) must be at least 0 and below 1"),
        (lambda p: NTASGD([p], patience=0), r"`patience` \(0\) must be at least 1"),
        (lambda p: NTASGD([torch.nn.Parameter(p.detach().bfloat16())]), "Weights of torch.bfloat16 are too coarse"),
        (lambda p: EMAAdamW([torch.nn.Parameter(p.detach().half())]), "Weights of torch.float16 are too coarse"),
    ],
)
def test_invalid_averaging_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.nn.Parameter(torch.ones(3)))


def test_a_trigger_without_losses_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"The optimizer \(SGD\) must be `NTASGD`"):
        run(tmp_path, None, callbacks=[NonMonotonicTrigger()])
    with pytest.raises(ValueError, match=r"`eval_strategy` \(no\) must be `steps` or `epoch`"):
        run(tmp_path, AVERAGED["nt_asgd"](), callbacks=[NonMonotonicTrigger()])


def test_metrics_are_added_to_the_logs(tmp_path):
    """The loss stays the cross-entropy, and the penalty is logged beside it."""
    penalties = {"activation_regularization": 2.0, "temporal_activation_regularization": 1.0}
    seen = []

    class Record(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    model = make_model(torch.float32, **penalties)
    twin = make_model(torch.float32, **penalties).train()
    trainer, _ = make_trainer(
        tmp_path,
        model,
        LANE_DATA,
        eval_dataset=LANE_DATA,
        callbacks=[MetricsCallback(), Record()],
        learning_rate=1e-12,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=6,
        gradient_accumulation_steps=2,
    )
    trainer.train()

    expected, cache = [], None
    for index in range(0, len(LANE_DATA), LANES):
        rows = [LANE_DATA[index + lane] for lane in range(LANES)]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        output = twin(**batch, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        expected.append((output.loss.item(), output.regularization_loss.item()))
    first = seen[0]
    assert first["loss"] == pytest.approx(sum(loss for loss, _ in expected[:4]) / 4, rel=1e-4)
    assert first["regularization_loss"] == pytest.approx(sum(penalty for _, penalty in expected[:4]) / 4, rel=1e-4)
    assert first["perplexity"] == pytest.approx(torch.tensor(first["loss"]).exp().item(), rel=1e-5)
    assert first["bits_per_token"] == pytest.approx(first["loss"] / 0.6931472, rel=1e-5)
    (evaluation,) = [logs for logs in seen if "eval_loss" in logs]
    assert evaluation["eval_perplexity"] == pytest.approx(torch.tensor(evaluation["eval_loss"]).exp().item(), rel=1e-5)
    assert "regularization_loss" not in evaluation
    assert trainer.state.log_history[0]["regularization_loss"] == first["regularization_loss"]
    assert not model._forward_hooks


@pytest.mark.parametrize("named", [None, "loss", "perplexity", "eval_bits_per_token"])
def test_added_metrics_are_not_part_of_the_search_objective(tmp_path, named):
    """A search for hyperparameters adds up what an evaluation returns beside its loss; what is named there is looked up."""
    best = {"metric_for_best_model": named, "greater_is_better": False, "load_best_model_at_end": True}
    seen = []

    class Record(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer, _ = make_trainer(
        tmp_path,
        make_model(torch.float32),
        LANE_DATA,
        callbacks=[MetricsCallback(), Record()],
        eval_dataset=[{"input_ids": ids, "labels": ids} for ids in make_ids(4, 9)],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        **(best if named else {}),
    )
    trainer.train()
    metrics = trainer.evaluate()

    if named in (None, "loss"):
        assert default_compute_objective(metrics) == metrics["eval_loss"]
        assert "eval_perplexity" not in metrics
    else:
        assert metrics.keys() & {"eval_perplexity", "eval_bits_per_token"} == {"eval_" + named.removeprefix("eval_")}
        assert trainer.state.best_metric == min(
            entry["eval_" + named.removeprefix("eval_")] for entry in trainer.state.log_history if "eval_loss" in entry
        )
    evaluations = [logs for logs in seen if "eval_loss" in logs]
    assert all(logs["eval_perplexity"] == pytest.approx(math.exp(logs["eval_loss"])) for logs in evaluations)
    assert [entry.get("eval_perplexity") for entry in trainer.state.log_history if "eval_loss" in entry] == [
        logs["eval_perplexity"] for logs in evaluations
    ]


def test_perplexities_from_compute_metrics_are_kept(tmp_path):
    trainer, _ = make_trainer(tmp_path, make_model(torch.float32), LANE_DATA, callbacks=[MetricsCallback()])
    metrics = {"eval_loss": 1.0, "eval_perplexity": 7.0}

    trainer.log(metrics)
    trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)

    assert {name: metrics[name] for name in ("eval_loss", "eval_perplexity")} == {
        "eval_loss": 1.0,
        "eval_perplexity": 7.0,
    }
    assert "eval_bits_per_token" not in metrics


def test_choosing_the_highest_perplexity_is_refused(tmp_path):
    """Trainer takes the greatest value of every metric but a loss, unless it is told otherwise."""
    trainer, _ = make_trainer(
        tmp_path,
        make_model(torch.float32),
        LANE_DATA,
        callbacks=[MetricsCallback()],
        eval_dataset=LANE_DATA,
        eval_strategy="steps",
        save_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="perplexity",
    )

    with pytest.raises(ValueError, match=r"`greater_is_better` \(True\) must be False with `metric_for_best_model`"):
        trainer.train()


def test_a_loss_of_nan_has_no_finite_perplexity(tmp_path):
    trainer, _ = make_trainer(tmp_path, make_model(torch.float32), LANE_DATA, callbacks=[MetricsCallback()])

    trainer.log({"loss": float("nan")})
    trainer.log({"loss": 800.0})

    assert [entry["perplexity"] for entry in trainer.state.log_history] == [
        pytest.approx(math.nan, nan_ok=True),
        math.inf,
    ]
