"""Adversarial softmax: the inner maximum, its gradient, every kernel of the loss, and nothing of it outside training."""

import pytest
import torch
from conftest import CONFIGS, make_ids, make_model
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers import TrainingArguments

from hf_lstm import LSTMConfig
from hf_lstm.model.training_lstm import adversarial_loss, adversarial_margins
from hf_lstm.training.arguments import check_penalties

IDS, EPSILON = make_ids(3, 8), 0.05


def gradients_of(model, **options):
    loss = model(IDS, **{"labels": IDS} | options).loss
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("target", range(5))
def test_the_lowered_logit_is_the_inner_maximum_that_autograd_finds(target):
    """Gradient ascent on the shift of the target's row, within its ball."""
    generator = torch.Generator().manual_seed(target)
    h, weight = torch.randn(6, generator=generator).double(), torch.randn(5, 6, generator=generator).double()
    radius = EPSILON * weight[target].norm()
    shift = torch.zeros(6, dtype=torch.float64, requires_grad=True)

    def loss_of(shift):
        scores = (weight @ h).index_add(0, torch.tensor([target]), (shift @ h)[None])
        return F.cross_entropy(scores, torch.tensor(target))

    for _ in range(20):
        (slope,) = torch.autograd.grad(loss_of(shift), shift)
        shift = (shift + slope).detach()
        shift = (shift * radius / shift.norm()).requires_grad_()

    margin = adversarial_margins(h[None], weight, torch.tensor([target]), EPSILON)[0]
    shift = shift.detach()
    assert ((weight[target] + shift) @ h).item() == pytest.approx((weight[target] @ h - margin).item(), abs=1e-6)
    args = (h[None, None], weight, (weight @ h)[None, None], torch.tensor([[target]]), EPSILON)
    assert adversarial_loss(*args).item() == pytest.approx(loss_of(shift).item(), abs=1e-6)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_gradient_takes_the_shift_for_a_constant(config):
    """That of the loss with each target's row moved by a constant, formed by hand, in chunks and whole."""
    model = make_model(**CONFIGS[config], adversarial_softmax=EPSILON, loss_chunk_size=5).train()
    hidden = []
    model.model.register_forward_hook(lambda module, inputs, output: hidden.append(output.last_hidden_state))
    loss, found = gradients_of(model)

    model.config.loss_chunk_size = None
    logits, weight = model(IDS).logits[:, :-1], model.lm_head.weight
    h = hidden[-1][:, :-1]
    row = weight[IDS[:, 1:]].detach()
    shift = EPSILON * row.norm(dim=-1, keepdim=True) * F.normalize(h.detach(), dim=-1)
    lowered = logits.scatter_add(2, IDS[:, 1:, None], -(shift * h).sum(dim=-1, keepdim=True))
    expected = F.cross_entropy(lowered.flatten(0, 1), IDS[:, 1:].flatten())
    wanted = torch.autograd.grad(expected, list(model.parameters()))

    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    _, whole = gradients_of(model)
    for one, other in zip(whole, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 5])
def test_padding_and_accumulation_change_nothing(chunk):
    model = make_model(adversarial_softmax=EPSILON, loss_chunk_size=chunk).train()
    labels = IDS.clone()
    labels[0, 4:] = -100

    loss, found = gradients_of(model, labels=labels)
    total, summed = gradients_of(model, labels=labels, num_items_in_batch=torch.tensor(34))

    assert total * 2 == pytest.approx(loss.item(), rel=1e-9)  # 17 targets
    torch.testing.assert_close(summed[0] * 2, found[0])


@pytest.mark.parametrize("chunk", [None, 5])
def test_0_is_the_plain_loss_to_the_bit_and_so_is_evaluation(chunk):
    plain, off = (make_model(loss_chunk_size=chunk, **other).train() for other in ({}, {"adversarial_softmax": 0.0}))
    on = make_model(loss_chunk_size=chunk, adversarial_softmax=EPSILON)

    (loss, expected), (same, found) = gradients_of(plain), gradients_of(off)

    assert loss == same
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert on(IDS, labels=IDS).loss == plain.eval()(IDS, labels=IDS).loss
    assert gradients_of(on.train())[0] > loss


def test_second_derivatives_of_the_chunked_loss():
    chunked, whole = (make_model(adversarial_softmax=EPSILON, loss_chunk_size=chunk).train() for chunk in (5, None))
    norms = []
    for model in (chunked, whole):
        loss = model(IDS, labels=IDS).loss
        weight = model.model.embed_tokens.weight
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        norms.append(torch.autograd.grad(gradient.square().sum(), weight)[0])

    torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_a_share_outside_its_range_is_refused(value):
    with pytest.raises(StrictDataclassError) as raised:
        LSTMConfig(adversarial_softmax=value)

    assert "`adversarial_softmax`" in str(raised.value.__cause__)


def test_what_it_cannot_be_combined_with_is_refused(tmp_path):
    with pytest.raises(StrictDataclassError) as raised:
        LSTMConfig(adversarial_softmax=0.01, adaptive_softmax_cutoffs=[20], tie_word_embeddings=False)
    assert "needs one output layer for all words" in str(raised.value.__cause__)
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True)
    with pytest.raises(ValueError, match="with `adversarial_softmax`"):
        check_penalties(args, LSTMConfig(adversarial_softmax=0.01))
