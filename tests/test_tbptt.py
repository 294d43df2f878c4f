"""The state runs on from step to step inside the stock Trainer, and nothing else touches it."""

import pytest
import torch
from conftest import CHECKPOINTING, CONFIGS, make_ids, make_model, standard_library
from transformers import DynamicCache, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_lstm import (
    LaneDataset,
    LSTMConfig,
    LSTMForCausalLM,
    TokenStream,
    char_tokenizer,
    evaluate_stream,
)
from hf_lstm.training import LSTMTrainingArguments, MetricsCallback, TruncatedBPTTCallback

LANES, BPTT = 3, 5
TOKENS = make_ids(1, LANES * BPTT * 6 + 1)[0]


class Losses(TrainerCallback):
    def __init__(self):
        self.train, self.eval = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.train += [logs["loss"]] if "loss" in logs else []
        self.eval += [logs["eval_loss"]] if "eval_loss" in logs else []


def make_trainer(folder, model, dataset, callbacks=(), eval_dataset=None, **options):
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": LANES,
        "per_device_eval_batch_size": LANES,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "num_train_epochs": 1,
    } | options
    losses = Losses()
    trainer = Trainer(
        model=model,
        args=LSTMTrainingArguments(**options),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=default_data_collator,
        callbacks=[TruncatedBPTTCallback(), losses, *callbacks],
    )
    return trainer, losses


def train_by_hand(model, tokens, epochs=1, accumulate=1):
    """The loop that everyone writes: one batch after the other, the state carried and detached."""
    length = (len(tokens) - 1) // (LANES * BPTT) * BPTT
    inputs, targets = tokens[: LANES * length].view(LANES, -1), tokens[1 : LANES * length + 1].view(LANES, -1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    losses = []
    for _ in range(epochs):
        cache = DynamicCache(config=model.config)
        for step, (x, y) in enumerate(zip(inputs.split(BPTT, dim=1), targets.split(BPTT, dim=1), strict=True)):
            logits = model(x, past_key_values=cache).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()) / accumulate
            loss.backward()
            losses.append(loss.item())
            for layer in cache.layers:
                layer.detach_()
            if (step + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return [sum(losses[i : i + accumulate]) for i in range(0, len(losses), accumulate)]


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, {}),
        ({}, {"cell_type": "rnn_tanh"}),
        ({"gradient_accumulation_steps": 2}, {"cell_type": "gru"}),
        ({CHECKPOINTING: True}, {"cell_type": "mogrifier"}),
        ({}, CONFIGS["hybrid"]),
        ({CHECKPOINTING: True}, CONFIGS["hybrid"] | {"attention_window": 9}),
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "aot_eager"}, {"cell_type": "gru"}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "aot_eager"}, CONFIGS["hybrid"], marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at one
def test_training_equals_a_loop_by_hand(tmp_path, options, config):
    expected_model, model = make_model(**config), make_model(**config)
    accumulate = options.get("gradient_accumulation_steps", 1)
    expected = train_by_hand(expected_model, TOKENS, epochs=2, accumulate=accumulate)

    trainer, losses = make_trainer(tmp_path, model, LaneDataset(TOKENS, LANES, BPTT), num_train_epochs=2, **options)
    trainer.train()

    assert losses.train == pytest.approx(expected, rel=1e-5)
    for actual, wanted in zip(model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_bfloat16_on_a_cpu_learns_the_same_within_its_precision(tmp_path):
    expected = train_by_hand(make_model(torch.float32), TOKENS)

    trainer, losses = make_trainer(tmp_path, make_model(torch.float32), LaneDataset(TOKENS, LANES, BPTT), bf16=True)
    trainer.train()

    assert losses.train == pytest.approx(expected, rel=0.03)
    assert losses.train != pytest.approx(expected, rel=1e-6)


def test_without_the_callback_the_state_is_not_carried(tmp_path):
    """The carried state does change the losses, or the tests above would compare too little."""
    model, carried = make_model(), make_model()
    trainer, losses = make_trainer(tmp_path, model, LaneDataset(TOKENS, LANES, BPTT))
    trainer.remove_callback(TruncatedBPTTCallback)
    trainer.train()

    expected = train_by_hand(carried, TOKENS)

    assert losses.train[0] == pytest.approx(expected[0], rel=1e-5)
    assert all(abs(a - b) > 1e-3 for a, b in zip(losses.train[1:], expected[1:], strict=True))


def test_documents_begin_from_a_zero_state(tmp_path):
    """Documents of one chunk each, reset: as if nothing were carried."""
    tokens = make_ids(1, LANES * BPTT * 6 + 1)[0].int()
    starts = torch.arange(0, LANES * BPTT * 6, BPTT)
    stream = TokenStream(tokens, starts, num_bytes=0)
    alone = make_model()
    trainer, expected = make_trainer(tmp_path, alone, LaneDataset(tokens, LANES, BPTT))
    trainer.remove_callback(TruncatedBPTTCallback)
    trainer.train()

    trainer, losses = make_trainer(tmp_path, make_model(), LaneDataset(stream, LANES, BPTT, reset_at_documents=True))
    trainer.train()

    assert losses.train == pytest.approx(expected.train, rel=1e-6)


def test_evaluation_carries_its_own_state(tmp_path):
    model, other = make_model(), make_ids(1, LANES * BPTT * 4 + 1, seed=7)[0]
    uninterrupted, expected = make_trainer(tmp_path, make_model(), LaneDataset(TOKENS, LANES, BPTT))
    uninterrupted.train()

    trainer, losses = make_trainer(
        tmp_path,
        model,
        LaneDataset(TOKENS, LANES, BPTT),
        eval_dataset=LaneDataset(other, LANES, BPTT),
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()

    assert losses.train == expected.train
    lanes = [other[start : start + BPTT * 4 + 1] for start in range(0, LANES * BPTT * 4, BPTT * 4)]
    wanted = sum(evaluate_stream(model, lane)["loss"] for lane in lanes) / LANES
    assert losses.eval[-1] == pytest.approx(wanted, rel=1e-6)


def test_other_forwards_during_training_are_untouched(tmp_path):
    text = make_ids(LANES, BPTT, seed=9)

    class Score(TrainerCallback):
        scores, written = [], []

        @torch.no_grad()
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for _ in range(2):
                self.scores.append([model(text, labels=text).loss.item(), evaluate_stream(model, text[0])["loss"]])
                self.written.append(model.generate(text, do_sample=False, max_new_tokens=3).tolist())

    undisturbed, expected = make_trainer(tmp_path, make_model(), LaneDataset(TOKENS, LANES, BPTT))
    undisturbed.train()
    trainer, losses = make_trainer(tmp_path, make_model(), LaneDataset(TOKENS, LANES, BPTT), callbacks=[Score()])
    trainer.train()

    assert Score.scores[::2] == Score.scores[1::2]
    assert Score.written[::2] == Score.written[1::2]
    assert Score.scores[0] != Score.scores[2]
    assert losses.train == expected.train


def test_the_model_is_left_without_hooks(tmp_path):
    model = make_model()
    trainer, _ = make_trainer(tmp_path, model, LaneDataset(TOKENS, LANES, BPTT))
    trainer.train()

    batch = default_data_collator([LaneDataset(TOKENS, LANES, BPTT)[index] for index in range(LANES)])
    assert model(**batch).loss.item() == model(**batch).loss.item()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_callbacks_declare_their_attributes_when_they_are_made(tmp_path):
    trainer, _ = make_trainer(
        tmp_path, make_model(), LaneDataset(TOKENS, LANES, BPTT), [MetricsCallback()], max_steps=2
    )
    callbacks = [item for item in trainer.callback_handler.callbacks if type(item).__module__.startswith("hf_lstm")]
    declared = [set(vars(callback)) for callback in callbacks]

    trainer.train()

    assert len(callbacks) == 2
    assert [set(vars(callback)) for callback in callbacks] == declared


def test_lstm_training_arguments_change_five_defaults():
    ours, stock = LSTMTrainingArguments(use_cpu=True), TrainingArguments(use_cpu=True)

    changed = {name for name, value in ours.to_dict().items() if stock.to_dict()[name] != value}

    assert changed - {"logging_dir"} == {
        "train_sampling_strategy",
        "dataloader_drop_last",
        "remove_unused_columns",
        "use_cache",
        "accelerator_config",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_sampling_strategy": "random"}, r"`train_sampling_strategy` \(random\) must be `sequential`"),
        ({"dataloader_drop_last": False}, r"`dataloader_drop_last` \(False\) must be True"),
        ({"remove_unused_columns": True}, r"`remove_unused_columns` \(True\) must be False"),
        ({"label_smoothing_factor": 0.1}, r"`label_smoothing_factor` \(0.1\) must be 0 with lanes"),
        ({"fp16": True}, r"`fp16` \(True\) needs a GPU"),
        ({"auto_find_batch_size": True}, r"`auto_find_batch_size` \(True\) must be False"),
        ({"per_device_train_batch_size": 2}, "has 3 lanes, and a batch has 2 rows on each of 1 processes"),
        ({"save_strategy": "steps", "save_total_limit": 1}, r"`save_total_limit` \(1\) must be at least 2"),
    ],
)
def test_training_that_cannot_carry_the_state_is_refused(tmp_path, options, message):
    trainer, losses = make_trainer(tmp_path, make_model(), LaneDataset(TOKENS, LANES, BPTT), **options)

    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert losses.train == []


def test_batches_without_position_ids_are_refused(tmp_path):
    trainer, losses = make_trainer(tmp_path, make_model(), LaneDataset(TOKENS, LANES, BPTT))
    collate = trainer.data_collator
    trainer.data_collator = lambda items: {name: collate(items)[name] for name in ("input_ids", "labels")}

    with pytest.raises(ValueError, match=r"No state was carried: the model saw no batch .* of \(3, 5\)"):
        trainer.train()
    assert losses.train == []


def test_a_run_after_an_interrupted_one_trains_as_usual(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model = make_model()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer, _ = make_trainer(tmp_path, model, LaneDataset(TOKENS, LANES, BPTT), callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    model.load_state_dict(weights)
    model.zero_grad()

    trainer, losses = make_trainer(tmp_path, model, LaneDataset(TOKENS, LANES, BPTT))
    trainer.train()

    assert losses.train == pytest.approx(train_by_hand(make_model(), TOKENS), rel=1e-5)


def test_data_without_lanes_is_refused(tmp_path):
    ids = make_ids(6, BPTT)
    trainer, _ = make_trainer(tmp_path, make_model(), [{"input_ids": row, "labels": row} for row in ids])

    with pytest.raises(ValueError, match=r"The training data \(list\) must be a `LaneDataset`"):
        trainer.train()


def test_evaluation_lanes_that_do_not_fit_are_refused(tmp_path):
    trainer, _ = make_trainer(
        tmp_path,
        make_model(),
        LaneDataset(TOKENS, LANES, BPTT),
        eval_dataset=LaneDataset(TOKENS, 2 * LANES, BPTT),
        eval_strategy="steps",
        eval_on_start=True,
    )

    with pytest.raises(ValueError, match="The evaluation data has 6 lanes, and a batch has 3 rows"):
        trainer.train()


def test_lanes_are_not_evaluated_outside_training(tmp_path):
    lanes = LaneDataset(TOKENS, LANES, BPTT)
    trainer, _ = make_trainer(tmp_path, make_model(), lanes, eval_dataset=lanes)

    with pytest.raises(ValueError, match=r"outside training: use `hf_lstm.evaluate_stream\(model, stream\)`"):
        trainer.evaluate()


@pytest.mark.slow
def test_it_learns_to_use_a_memory_longer_than_a_chunk(tmp_path):
    """Python's own source, 32 characters a step: what was read longer ago than that still helps to predict."""
    corpus = standard_library()
    tokenizer = char_tokenizer(corpus["train"]["text"])
    train, validation = (TokenStream.from_documents(corpus[split], tokenizer) for split in ("train", "validation"))
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=len(tokenizer), hidden_size=192, num_hidden_layers=1))
    trainer, _ = make_trainer(
        tmp_path,
        model,
        LaneDataset(train, 32, 32),
        per_device_train_batch_size=32,
        optim="adamw_torch",
        learning_rate=5e-3,
        max_grad_norm=1.0,
        max_steps=1500,
        logging_steps=100,
    )
    trainer.train()

    carried, reset = evaluate_stream(model, validation), evaluate_stream(model, validation, reset_every=32)
    frequencies = torch.bincount(validation[:], minlength=len(tokenizer)) / len(validation)
    knows_frequencies_only = torch.special.entr(frequencies).sum().item()
    assert carried["loss"] < 0.55 * knows_frequencies_only
    assert carried["loss"] < reset["loss"] - 0.1
