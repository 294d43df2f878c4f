"""The loss in chunks is the loss, gradients included, without all logits; the adaptive softmax is a softmax in groups."""

import pytest
import torch
from conftest import make_ids, make_model
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from hf_lstm import evaluate_stream
from hf_lstm.model.training_lstm import loss_without_logits
from hf_lstm.training.arguments import check_penalties

IDS = make_ids(3, 8)
LABELS = IDS.masked_fill(torch.rand(3, 8, generator=torch.Generator().manual_seed(2)) < 0.3, -100)


def grads_of(model, **inputs):
    model.zero_grad()
    output = model(IDS, **inputs)
    output.loss.backward()
    return output.loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}, output


TARGETS = {
    "labels": {"labels": LABELS},
    "shift_labels": {"shift_labels": LABELS},
    "items": {"labels": LABELS, "num_items_in_batch": torch.tensor(29)},
    "number": {"labels": LABELS, "num_items_in_batch": 29},
}


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize(("tied", "bias"), [(True, True), (False, False)])
def test_loss_and_gradients_are_those_of_the_plain_loss(chunk_size, targets, tied, bias):
    model = make_model(tie_word_embeddings=tied, output_bias=bias, activation_regularization=0.5).train()
    loss, expected, plain = grads_of(model, **TARGETS[targets])
    model.config.loss_chunk_size = chunk_size

    found, grads, chunked = grads_of(model, **TARGETS[targets])

    torch.testing.assert_close(
        found, loss, rtol=1e-6, atol=0, check_dtype=False
    )  # transformers' own is in float32 in any case
    torch.testing.assert_close(grads, expected, rtol=0, atol=1e-6)
    assert chunked.logits is None
    assert plain.logits is not None
    torch.testing.assert_close(chunked.regularization_loss, plain.regularization_loss)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_it_is_the_cross_entropy_to_the_last_digit(chunk_size, bias):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 8, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(5, 31, bias=bias).double()
    expected = F.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
    inputs = [hidden, *head.parameters()]
    gradients = torch.autograd.grad(expected * 3, inputs)

    targets = F.pad(LABELS[:, 1:], (0, 1), value=-100)
    found = loss_without_logits(hidden, head, targets, chunk_size)

    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    for gradient, other in zip(torch.autograd.grad(found * 3, inputs), gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [None, "head", "hidden"])
def test_second_derivatives_are_those_of_the_cross_entropy(frozen, bias):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 8, 5, generator=generator, dtype=torch.float64, requires_grad=frozen != "hidden")
    head = nn.Linear(5, 31, bias=bias).double().requires_grad_(frozen != "head")
    targets, inputs = LABELS.clone(), [tensor for tensor in (hidden, *head.parameters()) if tensor.requires_grad]

    def second(loss):
        first = torch.autograd.grad(loss * 3, inputs, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)

    expected = second(F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten()))

    found = second(loss_without_logits(hidden, head, targets, 7))

    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sum_is_float32_whatever_the_weights_are(dtype):
    model = make_model(dtype).train()
    loss, expected, _ = grads_of(model, labels=LABELS)
    model.config.loss_chunk_size = 4

    found, grads, _ = grads_of(model, labels=LABELS)

    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-6
    assert found.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(found, loss, rtol=tolerance, atol=0)
    relative = 0 if dtype is torch.bfloat16 else 1e-6  # gradients of 4 have last bits of 5e-7
    torch.testing.assert_close(grads, expected, rtol=relative, atol=tolerance)


@pytest.mark.parametrize("block", ["stacked", "residual"])  # the second hands bfloat16 to the output layer
def test_under_autocast_it_is_the_loss_of_autocast(block):
    model = make_model(torch.float32, block_type=block, hidden_size=16, embedding_size=16).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, expected, _ = grads_of(model, labels=LABELS)
        model.config.loss_chunk_size = 4
        found, grads, _ = grads_of(model, labels=LABELS)

    torch.testing.assert_close(found, loss, rtol=2e-2, atol=0)
    torch.testing.assert_close(grads, expected, rtol=0, atol=2e-2)


def test_in_bfloat16_many_chunks_lose_no_more_than_one():
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(1, 2049, 16, generator=generator) + 1).bfloat16()
    targets = torch.randint(0, 50, (1, 2049), generator=generator)
    head, errors = nn.Linear(16, 50, bias=False).bfloat16(), []
    exact = nn.Linear(16, 50, bias=False).double()
    exact.weight.data.copy_(head.weight)
    loss_without_logits(hidden.double(), exact, targets, 4096).backward()
    for chunk_size in (4096, 8):
        head.weight.grad = None
        loss_without_logits(hidden, head, targets, chunk_size).backward()
        errors.append((head.weight.grad.double() - exact.weight.grad).norm() / exact.weight.grad.norm())

    assert errors[1] < 2 * errors[0] < 0.02


def test_second_derivatives_of_a_tied_weight_are_those_of_the_whole_loss():
    """The embedding reaches the loss twice: through the model, and as the output layer."""
    found = []
    for size in (None, 4):
        model = make_model(loss_chunk_size=size).train()
        weights = list(model.parameters())
        first = torch.autograd.grad(model(IDS, labels=LABELS).loss, weights, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(gradient.square().sum() for gradient in first), weights)])

    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)  # transformers computes its loss in float32


def test_evaluation_and_generation_are_unchanged():
    model, plain = make_model(loss_chunk_size=4), make_model()

    assert torch.equal(model(IDS, labels=LABELS).loss, plain(IDS, labels=LABELS).loss)
    assert torch.equal(model(IDS, labels=LABELS).logits, plain(IDS).logits)
    assert torch.equal(model.generate(IDS, max_new_tokens=4), plain.generate(IDS, max_new_tokens=4))
    assert model.train()(IDS).logits.shape == (3, 8, model.config.vocab_size)


def test_frozen_weights_get_no_gradient():
    model = make_model(loss_chunk_size=4, tie_word_embeddings=False).train()
    model.lm_head.requires_grad_(False)

    _, grads, _ = grads_of(model, labels=LABELS)

    assert grads["lm_head.weight"] is None
    assert grads["model.embed_tokens.weight"].abs().sum() > 0


def test_no_target_at_all_is_no_loss():
    model = make_model(loss_chunk_size=4).train()

    loss, grads, _ = grads_of(model, labels=torch.full_like(IDS, -100), num_items_in_batch=5)

    assert loss == 0
    assert all(grad.abs().sum() == 0 for grad in grads.values())


def test_never_more_than_a_chunk_of_logits():
    hidden = torch.randn(4, 50, 8, requires_grad=True)
    head = nn.Linear(8, 3001, bias=False)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        loss_without_logits(hidden, head, torch.randint(0, 3001, (4, 50)), 10).backward()

    assert largest <= 10 * 3001


def test_trainer_learns_with_it(tmp_path):
    losses = []
    for chunk_size in (None, 5):
        model = make_model(torch.float32, loss_chunk_size=chunk_size)
        rows = [{"input_ids": row, "labels": row} for row in IDS] * 8
        arguments = TrainingArguments(
            tmp_path, max_steps=6, logging_steps=6, use_cpu=True, report_to="none", save_strategy="no", eval_steps=6
        )
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        losses.append((trainer.train().training_loss, trainer.evaluate()["eval_loss"]))

    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def with_hook(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: output)


def with_another_layer(model):
    model.lm_head = nn.Sequential(model.lm_head)


@pytest.mark.parametrize("change", [with_hook, with_another_layer])
def test_an_output_layer_that_is_more_than_weights_is_refused(change):
    model = make_model(loss_chunk_size=4).train()
    change(model)

    with pytest.raises(ValueError, match=r"`loss_chunk_size` \(4\) reads the weights of a plain"):
        model(IDS, labels=LABELS)


def test_label_smoothing_is_refused(tmp_path):
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to="none")

    with pytest.raises(ValueError, match=r"must be 0 with `loss_chunk_size` \(8\)"):
        check_penalties(arguments, make_model(loss_chunk_size=8).config)
    with pytest.raises(ValueError, match=r"or `adaptive_softmax_cutoffs` \(\[8, 20\]\)"):
        check_penalties(arguments, make_model(**ADAPTIVE).config)


ADAPTIVE = {"adaptive_softmax_cutoffs": [8, 20], "tie_word_embeddings": False, "vocab_size": 31, "hidden_size": 32}


def test_an_adaptive_softmax_is_a_distribution_and_its_loss_is_its_logits():
    model = make_model(**ADAPTIVE)
    logits = model(IDS).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())

    torch.testing.assert_close(logits.exp().sum(dim=-1), torch.ones(3, 8, dtype=torch.float64))
    torch.testing.assert_close(model(IDS, labels=LABELS).loss.double(), expected, rtol=1e-6, atol=0)
    model.train()
    for targets in TARGETS.values():
        loss, grads, output = grads_of(model, **targets)
        items = targets.get("num_items_in_batch", None)
        wanted = targets.get("shift_labels", F.pad(LABELS, (0, 1), value=-100)[:, 1:])
        sums = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
        torch.testing.assert_close(loss, sums / ((wanted != -100).sum() if items is None else items))
        assert output.logits is None
        assert all(grad is not None for grad in grads.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adaptive_softmax_learns_under_autocast_and_in_bfloat16(dtype):
    model = make_model(dtype, **ADAPTIVE).train()
    expected = grads_of(model.float(), labels=LABELS)[0]
    model.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.float32):
        loss, grads, _ = grads_of(model, labels=LABELS)

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())


def test_groups_without_a_target_get_a_gradient_of_zero():
    """DDP waits for each weight's."""
    model = make_model(**ADAPTIVE).train()

    _, grads, _ = grads_of(model, labels=IDS.clamp(max=7))

    tails = [grad for name, grad in grads.items() if "tail" in name]
    assert len(tails) == 4
    assert all(grad.abs().sum() == 0 for grad in tails)


def test_an_adaptive_softmax_agrees_with_its_equations():
    """p(w) of a frequent word is its share in the head; of another, the group's share times its own in the group."""
    model = make_model(**ADAPTIVE)
    head = model.lm_head
    hidden = model.model(IDS).last_hidden_state

    shares = head.head(hidden).softmax(dim=-1)
    expected = [shares[..., :8]]
    for group, tail in enumerate(head.tail):
        expected.append(shares[..., 8 + group, None] * tail(hidden).softmax(dim=-1))

    torch.testing.assert_close(model(IDS).logits.exp(), torch.cat(expected, dim=-1), rtol=0, atol=1e-12)


def test_an_adaptive_softmax_writes_and_is_saved(tmp_path):
    model = make_model(torch.float32, **ADAPTIVE)
    model.save_pretrained(tmp_path)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert torch.equal(
        loaded.generate(IDS, num_beams=3, max_new_tokens=5), model.generate(IDS, num_beams=3, max_new_tokens=5)
    )
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    with pytest.raises(ValueError, match="cannot be resized"):
        loaded.resize_token_embeddings(40)


def test_a_corpus_is_scored_with_an_adaptive_softmax():
    model, tokens = make_model(**ADAPTIVE), torch.arange(100) % 31

    whole = evaluate_stream(model, tokens, batch_size=1, bptt_length=99)

    logits = model(tokens[None, :-1]).logits[0]
    assert whole["loss"] == pytest.approx(F.cross_entropy(logits, tokens[1:]).item(), rel=1e-6)


def test_an_adaptive_softmax_learns(tmp_path):
    model = make_model(torch.float32, **ADAPTIVE)
    rows = [{"input_ids": row, "labels": row} for row in IDS] * 8
    arguments = TrainingArguments(
        tmp_path, num_train_epochs=20, learning_rate=0.02, use_cpu=True, report_to="none", save_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()

    assert trainer.evaluate()["eval_loss"] < before / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptive_softmax_cutoffs": [8, 31]}, r"must increase, from at least 1 to below `vocab_size` \(31\)"),
        ({"adaptive_softmax_cutoffs": [8, 8]}, "must increase"),
        ({"adaptive_softmax_cutoffs": [0, 8]}, "must increase"),
        ({"adaptive_softmax_cutoffs": []}, "must increase"),
        (
            {"hidden_size": 15, "embedding_size": 32},
            "makes 2 groups.*too many for an output layer's input of width 15: .* at least 16",
        ),
        ({"tie_word_embeddings": True}, "excludes tied embeddings"),
        ({"loss_chunk_size": 4}, "excludes tied embeddings, `loss_chunk_size` and `output_bias`"),
    ],
)
def test_what_an_adaptive_softmax_cannot_be_is_refused(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        make_model(**ADAPTIVE | options)


@pytest.mark.parametrize("value", [0, -3])
def test_a_chunk_is_at_least_one_token(value):
    with pytest.raises(Exception, match=rf"`loss_chunk_size` \({value}\) must be at least 1 token"):
        make_model(loss_chunk_size=value)
