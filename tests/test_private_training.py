"""Private training: each document's gradient clipped alone, the noise and its accountant, and resumed runs."""

import copy
import json
import math

import numpy
import pytest
import torch
from conftest import CONFIGS, SMALL, make_model, run_script
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hf_lstm import DocumentDataset, LaneDataset, TokenStream
from hf_lstm.training import FinishedRunCallback, MetricsCallback, TruncatedBPTTCallback, private
from hf_lstm.training.private import PrivateTrainer

pytest.importorskip("opacus")

LENGTHS = [7, 20, 3, 12, 5, 2, 16, 9]


@pytest.fixture(autouse=True)
def few_orders(monkeypatch):
    """Whole orders of the accountant's bound: those between them take it seconds."""
    from opacus.accountants import RDPAccountant

    monkeypatch.setattr(RDPAccountant, "DEFAULT_ALPHAS", list(range(2, 64)))


def documents(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(4, 31, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": list(row)} for row in rows]


def make_trainer(folder, model=None, rows=None, **options):
    settings = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 2}
    settings |= {
        "max_grad_norm": 0.0,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }
    settings |= {name: options.pop(name) for name in list(options) if hasattr(TrainingArguments, name)}
    private = {"epsilon": 0.5, "delta": 1e-2, "noise_seed": 3} | options
    return PrivateTrainer(
        model=make_model() if model is None else model,
        args=TrainingArguments(str(folder), **settings),
        train_dataset=documents() if rows is None else rows,
        **private,
    )


def batch_of(rows):
    flat = {name: torch.tensor([token for row in rows for token in row[name]]) for name in ("input_ids", "labels")}
    return flat | {"lengths": [len(row["input_ids"]) for row in rows]}


def clipped_sum(model, rows, clip):
    """The loop over single documents, with the loss formed by hand in float64."""
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for row in rows:
        model.zero_grad()
        ids = torch.tensor(row["input_ids"])
        F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:]).backward()
        norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in model.parameters()))
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad * min(1, clip / norm)
    model.zero_grad()
    return total


@pytest.mark.parametrize("clip", [0.3, 1e6])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_gradient_is_that_of_a_loop_over_documents(config, clip, tmp_path):
    model = make_model(**CONFIGS[config], loss_chunk_size=5)  # in float64; transformers' own loss is in float32
    expected = clipped_sum(copy.deepcopy(model), documents(), clip)
    trainer = make_trainer(tmp_path, model, epsilon=math.inf, clip=clip)

    loss = trainer.training_step(model, batch_of(documents()))

    for name, parameter in model.named_parameters():
        error = (parameter.grad * 4 - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 1e-8, name
    assert loss > 0


def test_the_noise_is_that_of_the_step_and_as_wide_as_it_should_be(tmp_path):
    model = make_model(loss_chunk_size=5)
    plain, noisy = (make_trainer(tmp_path, copy.deepcopy(model), epsilon=e, clip=0.5) for e in (math.inf, 0.5))

    for trainer in (plain, noisy):
        trainer.training_step(trainer.model, batch_of(documents()))

    pairs = zip(noisy.model.parameters(), plain.model.parameters(), strict=True)
    noise = torch.cat([(a.grad - b.grad).flatten() for a, b in pairs]) * 4 / (noisy.noise_multiplier * 0.5)
    assert noise.mean().item() == pytest.approx(0, abs=4 / math.sqrt(len(noise)))
    assert noise.std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * len(noise)))
    first = [parameter.grad.clone() for parameter in noisy.model.parameters()]
    noisy.state.global_step = 1
    noisy.training_step(noisy.model, batch_of(documents()))
    assert all((a != b.grad).any() for a, b in zip(first, noisy.model.parameters(), strict=True))


def test_the_epsilon_spent_is_the_accountants(tmp_path):
    from opacus.accountants import RDPAccountant

    trainer = make_trainer(tmp_path)
    assert trainer.epsilon == 0

    trainer.train()

    accountant = RDPAccountant()
    spent = []
    for _ in range(8):
        accountant.step(noise_multiplier=trainer.noise_multiplier, sample_rate=0.5)
        spent.append(accountant.get_epsilon(1e-2))
    assert trainer.epsilon == spent[-1]
    assert 0.48 < trainer.epsilon <= 0.5
    logged = [entry["epsilon"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == spent[1::2]


def test_the_penalty_is_logged_as_its_mean_over_documents(tmp_path):
    model, penalties = make_model(activation_regularization=2.0), []
    trainer = make_trainer(tmp_path, model, max_steps=1, logging_steps=1, callbacks=[MetricsCallback()])
    model.register_forward_hook(lambda module, inputs, output: penalties.append(output.regularization_loss.item()))

    trainer.train()

    assert len(penalties) > 1
    mean = sum(penalties) / len(penalties)
    assert trainer.state.log_history[0]["regularization_loss"] == pytest.approx(mean, rel=1e-5)


def test_an_infinite_epsilon_adds_no_noise(tmp_path):
    trainer = make_trainer(tmp_path, epsilon=math.inf, max_steps=1)

    trainer.train()

    assert (trainer.noise_multiplier, trainer.epsilon) == (0, math.inf)


def test_steps_of_epochs_are_counted_as_trainer_does(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=2.5)

    trainer.train()

    assert trainer.state.global_step == sum(entry[2] for entry in trainer.accountant.history) == 5
    assert 0.48 < trainer.epsilon <= 0.5


def test_documents_are_drawn_independently(tmp_path):
    rows = documents([3] * 100)
    trainer = make_trainer(tmp_path, rows=rows, per_device_train_batch_size=20, delta=1e-3)
    batches = private._PoissonBatches(trainer)

    sizes = []
    for epoch in range(60):
        batches.set_epoch(epoch)
        sizes += [len(batches[index]["lengths"]) for index in range(len(batches))]

    assert len(batches) == 5
    assert numpy.mean(sizes) == pytest.approx(20, abs=4 * math.sqrt(16 / len(sizes)))
    assert numpy.var(sizes) == pytest.approx(100 * 0.2 * 0.8, rel=0.4)  # binomial, not a fixed number


def test_a_step_without_documents_is_noise_alone(tmp_path):
    model = make_model(torch.float32)
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(tmp_path, model, per_device_train_batch_size=1, max_steps=12, logging_steps=1)
    batches = private._PoissonBatches(trainer)
    steps = [divmod(step, len(batches)) for step in range(12)]
    sizes = []
    for epoch, index in steps:
        batches.set_epoch(epoch)
        sizes.append(len(batches[index]["lengths"]))

    trainer.train()

    assert 0 in sizes
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [loss == 0 for loss in losses] == [size == 0 for size in sizes]
    assert trainer.epsilon > 0.48
    assert all((model.state_dict()[name] != value).any() for name, value in before.items())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_document_without_a_target_counts_for_nothing(tmp_path):
    rows = [*documents([4, 6]), {"input_ids": [9], "labels": [9]}]
    trainer = make_trainer(tmp_path, rows=rows, per_device_train_batch_size=3, epsilon=math.inf)

    assert private._PoissonBatches(trainer)[0]["lengths"] == [4, 6]


def test_dropout_is_drawn_for_each_document(tmp_path):
    dropouts = dict.fromkeys(["embedding_dropout", "hidden_dropout", "weight_dropout"], 0.3)
    model, losses = make_model(**dropouts), []
    rows = documents([12]) * 5
    trainer = make_trainer(tmp_path, model, rows, per_device_train_batch_size=5)
    model.register_forward_hook(lambda module, inputs, output: losses.append(output.loss.item()))

    trainer.training_step(model, batch_of(rows))

    assert len(set(losses)) == 5


@pytest.mark.parametrize("stopped", [4, 6])  # at the end of an epoch, and within one
def test_a_resumed_run_equals_an_uninterrupted_one(stopped, tmp_path):
    def run(folder, **options):
        settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
        model = make_model(torch.float32, hidden_dropout=0.3)
        trainer = make_trainer(tmp_path / folder, model, **settings | options)
        trainer.add_callback(FinishedRunCallback())
        return trainer

    whole = run("run")
    whole.train()

    resumed = run("run", noise_seed=99)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{stopped}"))

    assert resumed.noise_seed == 3
    assert resumed.epsilon == whole.epsilon
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    losses = [
        [entry.get("loss") for entry in trainer.state.log_history if "loss" in entry] for trainer in (whole, resumed)
    ]
    assert losses[0] == losses[1]


def test_a_second_run_of_one_trainer_is_refused(tmp_path):
    """It would go on from the trained weights with the same noise, and count its own steps alone."""
    trainer = make_trainer(tmp_path)
    trainer.train()

    with pytest.raises(ValueError, match="`train` was called a second time"):
        trainer.train()


def test_a_run_without_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`num_train_epochs` \(0\) make no step"):
        make_trainer(tmp_path, max_steps=-1, num_train_epochs=0)


def test_a_finished_run_takes_no_more_steps(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=8).train()
    again = make_trainer(tmp_path)
    again.add_callback(FinishedRunCallback())

    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))

    assert sum(entry[2] for entry in again.accountant.history) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [({"epsilon": 0.7}, "`noise_multiplier` was"), ({"per_device_train_batch_size": 2}, "was .* and would be")],
)
def test_a_run_is_resumed_with_its_own_noise(options, message, tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=4).train()

    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("change", ["token", "label", "order"])
def test_a_run_is_resumed_on_its_own_documents(change, tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    rows = documents()
    if change == "order":
        rows.reverse()
    else:
        rows[-1]["input_ids" if change == "token" else "labels"][3] += 1

    with pytest.raises(ValueError, match="The documents are not those of the checkpoint, or in another order"):
        make_trainer(tmp_path, rows=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_run_that_was_not_private_is_not_resumed_as_one(tmp_path):
    args = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=4, report_to="none", disable_tqdm=True, use_cpu=True
    )
    rows = documents([5] * 8)
    Trainer(model=make_model(torch.float32), args=args, train_dataset=rows).train()

    with pytest.raises(ValueError, match="holds no privacy accountant"):
        make_trainer(tmp_path, make_model(torch.float32)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_delta_of_more_than_one_by_the_documents_is_warned_of(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(private.logger, "warning", said.append)

    make_trainer(tmp_path, delta=0.2)

    assert said == [
        message for message in said if "`delta` (0.2) is more than one divided by the 8 documents" in message
    ]
    assert len(said) == 1


STREAM = TokenStream(torch.arange(4, 30).repeat(4), torch.tensor([0, 20, 60]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0}, r"`epsilon` \(0\) must be above 0"),
        ({"epsilon": math.nan}, r"`epsilon` \(nan\) must be above 0"),
        ({"delta": 0}, r"`delta` \(0\) must be above 0 and below 1"),
        ({"clip": 0}, r"`clip` \(0\) is the largest norm"),
        ({"max_grad_norm": 1.0}, r"`max_grad_norm` \(1.0\) must be 0"),
        ({"gradient_accumulation_steps": 2}, r"`gradient_accumulation_steps` \(2\) must be 1"),
        ({"label_smoothing_factor": 0.1}, r"`label_smoothing_factor` \(0.1\) must be 0"),
        ({"per_device_train_batch_size": 9}, r"\(9\) must be at most the number of documents, 8"),
        ({"rows": []}, "at least one document"),
        ({"rows": LaneDataset(STREAM, 2, 4)}, "Truncated backpropagation with a carried state"),
        ({"callbacks": [TruncatedBPTTCallback()]}, "Truncated backpropagation with a carried state"),
        ({"data_collator": DataCollatorWithFlattening()}, "Packed documents"),
        ({"rows": DocumentDataset(STREAM, 16)}, r"`max_length` \(16\) cuts documents"),
    ],
)
def test_what_cannot_be_private_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_a_truncated_document_is_one_item():
    dataset = DocumentDataset(STREAM, 16, truncate=True)

    assert len(dataset) == 3
    assert [row["input_ids"] for row in (dataset[0], dataset[1], dataset[2])] == [
        STREAM[0:17].tolist(),
        STREAM[20:37].tolist(),
        STREAM[60:77].tolist(),
    ]


def test_without_opacus_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opacus.accountants", None)

    with pytest.raises(ValueError, match=r"hf-lstm\[privacy\]"):
        make_trainer(tmp_path)


LINES = [f"{number} bottles of beer on the wall" for number in range(60)]
COMMAND = [
    "--batching",
    "padded",
    "--tokenizer",
    "byte",
    "--max_steps",
    4,
    "--prompt",
    "",
    *SMALL,
    "--bptt_length",
    24,
]
COMMAND += ["--dp_epsilon", 2, "--dp_delta", 0.01]


@pytest.fixture
def lines_file(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return path


def test_train_py_trains_and_its_card_says_so(run, lines_file, tmp_path, capsys):
    folder = tmp_path / "run"

    printed = run("train.py", "--train_file", lines_file, "--output_dir", folder, *COMMAND)

    described = json.loads((folder / "run.json").read_text())["differential_privacy"]
    assert 1.98 < described["epsilon"] <= 2
    assert (described["documents"], described["tokenizer_learnt"], described["chosen"]) == (54, False, True)
    card = (folder / "README.md").read_text()
    assert f"ε = {described['epsilon']:.2f} at δ = 0.01, for any one of the 54 training documents" in card
    assert "The validation text, which is not protected, chose the checkpoint." in card
    assert "learnt from the training text" not in card
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    logged = [entry["epsilon"] for entry in state["log_history"] if "epsilon" in entry]
    assert logged[-1] == described["epsilon"]
    assert f", epsilon {logged[-1]:.2f}, " in printed
    assert state["num_input_tokens_seen"] > 0


def test_train_py_warns_of_a_tokenizer_of_the_private_text(lines_file, tmp_path, capsys):
    options = ["--tokenizer", "char", "--dp_epsilon", "inf"]

    run_script("train.py", "--train_file", lines_file, "--output_dir", tmp_path / "run", *COMMAND, *options)

    assert "`--tokenizer` char is learnt from the private text" in capsys.readouterr().err
    card = (tmp_path / "run" / "README.md").read_text()
    assert "The tokenizer was learnt from the training text" in card
    assert "nothing is guaranteed of its privacy" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batching", "lanes"], "carries a state from document to document"),
        (["--batching", "packed"], "mixes documents in a row"),
        (["--dp_epsilon", 0], "`epsilon` (0.0) must be above 0"),
    ],
)
def test_train_py_refuses_what_cannot_be_private(options, message, lines_file, tmp_path):
    command = ["--train_file", lines_file, "--output_dir", tmp_path / "run", *COMMAND]

    with pytest.raises(SystemExit) as ended:
        run_script("train.py", *command, *options)

    assert message in str(ended.value)
