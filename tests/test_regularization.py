"""Dropout and penalties: what is dropped, what a step's gradient holds, and nothing of it outside training."""

import pytest
import torch
from conftest import CONFIGS, make_ids, make_model, recompute_activations
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers import DynamicCache

from hf_lstm.model import modeling_lstm, training_lstm
from hf_lstm.model.training_lstm import locked_dropout, weight_dropout, word_dropout

IDS = make_ids(3, 8)
DROPOUTS = {
    "embedding_dropout": 0.2,
    "input_dropout": 0.3,
    "hidden_dropout": 0.4,
    "output_dropout": 0.25,
    "weight_dropout": 0.5,
}
PENALTIES = {"activation_regularization": 2.0, "temporal_activation_regularization": 1.0}


@pytest.fixture
def masks(monkeypatch):
    """What is kept in each dropout of a forward, in the order of their drawing."""
    drawn, draw = [], training_lstm._dropout_mask
    monkeypatch.setattr(
        training_lstm, "_dropout_mask", lambda *arguments: (drawn.append(draw(*arguments)), drawn[-1])[1]
    )
    return drawn


def test_a_dropped_word_is_dropped_everywhere():
    embeds, p = torch.ones(4, 50, 6), 0.4
    ids = make_ids(4, 50)

    dropped = word_dropout(embeds, ids, 31, p)

    for word in ids.unique():
        kept = dropped[ids == word]
        assert (kept == 0).all() or kept.sub(1 / 0.6).abs().max() < 1e-4
    assert 0 < (dropped == 0).float().mean() < 1


def test_a_locked_mask_is_the_same_at_all_tokens():
    dropped = locked_dropout(torch.ones(5, 7, 64), 0.3)

    assert (dropped == dropped[:, :1]).all()
    assert (dropped[0] != dropped[1]).any()
    assert ((dropped == 0) | (dropped.sub(1 / 0.7).abs() < 1e-4)).all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.65, 0.999999])
def test_what_is_dropped_has_the_given_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    linear = torch.nn.Linear(999, 1000, bias=False, dtype=torch.float64)  # no multiple of 4
    torch.nn.init.ones_(linear.weight)

    dropped = weight_dropout(linear, p).detach()

    assert (dropped == 0).double().mean() == pytest.approx(p, abs=0.002)
    if p < 0.9:
        assert dropped.mean() == pytest.approx(1, abs=0.01)
    assert dropped.isfinite().all()
    assert len(dropped.unique()) == 2 or p > 0.9


@pytest.mark.parametrize("name", CONFIGS)
def test_every_dropout_is_where_it_belongs(name, masks):
    """A training forward, and the same by hand with the masks that it drew."""
    model = make_model(**CONFIGS[name], **DROPOUTS).train()
    actual = model(IDS).logits
    model.eval()
    residual = model.config.block_type == "residual"
    words, embeds, *rest, output = masks
    by_weight = iter(mask for mask in rest if mask.ndim == 2)
    branches = iter(mask for mask in rest if mask.ndim == 3)

    base = model.model
    x = base.in_proj(base.embed_tokens(IDS) * words[IDS] * embeds)
    for index, layer in enumerate(base.layers):
        if index > 0 and not residual:
            x = x * next(branches)
        is_attention, zeros = hasattr(layer, "self_attn"), layer.zero_state(x)
        if not is_attention:
            with torch.no_grad():
                layer.hidden_gates.weight.mul_(next(by_weight))
        if residual:
            if is_attention:
                branch = layer.self_attn(layer.norm(x), *zeros)[0]
            else:
                branch = layer.o_proj(modeling_lstm.LSTMLayer.forward(layer, layer.norm(x), *zeros)[0])
            x = x + branch * next(branches)
            x = x if layer.mlp is None else x + layer.mlp(x) * next(branches)
        else:
            x = layer(x, *zeros)[0]
    expected = model.lm_head(base.out_proj(base.norm(x)) * output)

    assert next(branches, None) is None
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert all(0 < (mask == 0).double().mean() < 1 for mask in masks)


def test_dropped_weights_get_no_gradient_and_keep_their_names(kernel, masks):
    model, plain = make_model(weight_dropout=0.5).train(), make_model()
    model(IDS).logits.sum().backward()
    gates, expected = (one.model.layers[0].hidden_gates for one in (model, plain))
    with torch.no_grad():
        for layer, mask in zip(plain.model.layers, masks, strict=True):
            layer.hidden_gates.weight.mul_(mask)
    plain(IDS).logits.sum().backward()

    torch.testing.assert_close(gates.weight.grad, expected.weight.grad * masks[0], rtol=0, atol=1e-10)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(gates.weight, make_model().model.layers[0].hidden_gates.weight)


def test_nothing_is_dropped_outside_training(model, masks):
    expected = model(IDS).logits
    for name, value in (DROPOUTS | PENALTIES).items():
        setattr(model.config, name, value)

    output = model(IDS, labels=IDS)

    assert masks == []
    assert torch.equal(output.logits, expected)
    assert output.regularization_loss is None


def test_the_carried_state_is_not_dropped(masks):
    """What the next layer and the next chunk read differ: only the former is dropped."""
    model = make_model(hidden_dropout=0.5, output_dropout=0.5).train()
    cache = DynamicCache(config=model.config)
    output = model(IDS, past_key_values=cache, output_hidden_states=True)

    assert all((layer.keys != 0).all() for layer in cache.layers)
    assert torch.equal(cache.layers[-1].keys, output.hidden_states[-1][:, -1])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputed_activations_drop_the_same(name, reentrant):
    models = [make_model(**CONFIGS[name], **DROPOUTS, **PENALTIES).train() for _ in range(2)]
    recompute_activations(models[1], reentrant)
    for model in models:
        torch.manual_seed(3)
        model(IDS, labels=IDS).loss.backward()

    for actual, expected in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=0, atol=1e-10)


def test_weights_are_not_dropped_behind_the_back_of_an_adapter():
    model = make_model(weight_dropout=0.5).train()
    model.model.layers[0].hidden_gates.register_forward_hook(lambda module, inputs, output: output)

    with pytest.raises(ValueError, match=r"`weight_dropout` \(0.5\) drops weights of a plain `nn.Linear`"):
        model(IDS)


def penalties_by_hand(model, documents):
    """(cross-entropy, penalty), both summed over the targets, of documents that are read one by one."""
    nats = penalty = 0
    for document in documents:
        output = model(document[None], output_hidden_states=True)
        hidden = model.model(document[None]).last_hidden_state[0]
        nats = nats + F.cross_entropy(output.logits[0, :-1], document[1:], reduction="sum")
        penalty = penalty + 2.0 * hidden[:-1].square().mean(dim=-1).sum()
        penalty = penalty + 1.0 * (hidden[1:-1] - hidden[:-2]).square().mean(dim=-1).sum()
    return nats, penalty


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.fixture(params=CONFIGS)
def penalized(request):
    return make_model(**CONFIGS[request.param], **PENALTIES).train()


@pytest.mark.parametrize("batch", ["padded", "packed", "accumulated"])
def test_penalties_are_those_of_each_document_alone(penalized, batch):
    documents = [IDS[0], IDS[1, :5], IDS[2, :3]]
    targets = sum(len(document) - 1 for document in documents)
    nats, penalty = penalties_by_hand(penalized, documents)
    ((nats + penalty) / targets).backward()
    expected = gradients(penalized)
    penalized.zero_grad()

    if batch == "padded":
        ids, labels = torch.zeros(3, 10, dtype=torch.long), torch.full((3, 10), -100)
        for row, document in enumerate(documents):
            ids[row, 2 : 2 + len(document)] = labels[row, 2 : 2 + len(document)] = document
        labels[:, 2] = -100  # or transformers predicts the first token too, from padding
        outputs = [penalized(ids, attention_mask=(labels != -100) | (torch.arange(10) == 2), labels=labels)]
    elif batch == "packed":
        ids = torch.cat(documents)[None]
        positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
        outputs = [penalized(ids, position_ids=positions, labels=ids.masked_fill(positions == 0, -100))]
    else:
        outputs = [
            penalized(document[None], labels=document[None], num_items_in_batch=torch.tensor(targets))
            for document in documents
        ]
    sum(output.loss for output in outputs).backward()

    assert sum(output.loss for output in outputs).item() == pytest.approx(nats.item() / targets, rel=1e-5)
    regularization_loss = sum(output.regularization_loss for output in outputs)
    assert regularization_loss.item() == pytest.approx(penalty.item() / targets, rel=1e-5)
    for actual, wanted in zip(gradients(penalized), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("name", PENALTIES)
def test_each_penalty_alone(name):
    model = make_model(**{name: 3.0}).train()
    hidden = model.model(IDS).last_hidden_state
    of_tokens = hidden[:, :-1] if name == "activation_regularization" else hidden[:, 1:-1] - hidden[:, :-2]
    expected = 3.0 * of_tokens.square().sum() / (3 * 7 * hidden.shape[-1])

    assert model(IDS, labels=IDS).regularization_loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_only_kept_positions_are_penalized():
    model = make_model(**PENALTIES).train()
    targets = IDS.roll(-1, dims=1)
    ignored = targets.clone()
    ignored[:, :-3] = -100

    kept = model(IDS, labels=IDS[:, -3:], shift_labels=targets[:, -3:].contiguous(), logits_to_keep=3)

    expected = model(IDS, labels=IDS, shift_labels=ignored)
    assert kept.regularization_loss.item() == pytest.approx(expected.regularization_loss.item(), rel=1e-6)
    assert kept.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at one
def test_dropout_under_autocast_and_compiled():
    torch._dynamo.reset()
    model = make_model(torch.float32, **DROPOUTS, **PENALTIES).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    eager = make_model(torch.float32, **DROPOUTS).train()
    compiled = torch.compile(make_model(torch.float32, **DROPOUTS, **PENALTIES).train(), backend="aot_eager")
    losses = []
    for one in (eager, compiled):
        torch.manual_seed(5)
        losses.append(one(IDS, labels=IDS).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", DROPOUTS)
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_dropouts_are_probabilities(name, value):
    with pytest.raises(StrictDataclassError, match=rf"`{name}` \({value}\) is a probability: at least 0 and below 1"):
        make_model(**{name: value})


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_penalties_are_not_negative(name, value):
    with pytest.raises(
        StrictDataclassError, match=rf"`{name}` \({value}\) is the weight of a penalty: it must be at least 0"
    ):
        make_model(**{name: value})
