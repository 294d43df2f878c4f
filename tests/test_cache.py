"""The state is a transformers cache: it continues, moves between rows, rolls back and never grows."""

import copy
import pickle

import pytest
import torch
from conftest import make_ids, make_model
from transformers import DynamicCache, StaticCache

from hf_lstm.model.cache_lstm import MAX_HISTORY

IDS = make_ids(3, 12)


def new_cache(kind, config):
    return {
        "dynamic": lambda: DynamicCache(config=config),
        "without config": DynamicCache,
        "offloaded": lambda: DynamicCache(config=config, offloading=True),
        "static": lambda: StaticCache(config=config, max_cache_len=4),
    }[kind]()


KINDS = ["dynamic", "without config", "offloaded", "static"]


@pytest.mark.parametrize("chunks", [(12,), (1,) * 12, (5, 1, 6)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_state_carries_across_any_chunking(model, kernel, kind, chunks):
    expected = model(IDS, use_cache=False).logits

    cache = new_cache(kind, model.config)
    actual = torch.cat([model(ids, past_key_values=cache).logits for ids in IDS.split(chunks, dim=1)], dim=1)

    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert cache.get_seq_length() == 12


@torch.no_grad()
def test_the_state_does_not_grow():
    model = make_model()
    cache = DynamicCache(config=model.config)
    sizes = set()
    for ids in make_ids(2, 300).split(10, dim=1):
        model(ids, past_key_values=cache)
        sizes.add(sum(layer.nbytes for layer in cache.layers))

    assert sizes == {2 * 2 * 2 * 12 * 8}  # h and c, layers, rows, cell width, bytes of a float64


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_can_be_reordered(kind, cell):
    model, order = make_model(**cell), torch.tensor([2, 2, 0])
    cache = new_cache(kind, model.config)
    model(IDS[:, :5], past_key_values=cache)

    cache.reorder_cache(order)

    assert_continues(model, cache, IDS[order])


@torch.no_grad()
def test_rows_can_be_repeated_and_selected(cell):
    model = make_model(**cell)
    cache = DynamicCache(config=model.config)
    model(IDS[:, :5], past_key_values=cache)

    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 5]))

    assert_continues(model, cache, IDS[[0, 1, 2]])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    "mask", [None, torch.tensor([[0] * 3 + [1] * 9, [1] * 12, [1, 1, 0] * 4])], ids=["", "padded"]
)
@torch.no_grad()
def test_tokens_can_be_taken_back(kind, mask, cell):
    model = make_model(**cell)
    cache, expected = new_cache(kind, model.config), new_cache(kind, model.config)
    parts = [(IDS[:, a:b], None if mask is None else mask[:, a:b]) for a, b in ((0, 5), (5, 6), (6, 10), (10, 12))]
    model(parts[0][0], attention_mask=parts[0][1], past_key_values=expected)
    model(parts[1][0], attention_mask=parts[1][1], past_key_values=expected)

    model(parts[0][0], attention_mask=parts[0][1], past_key_values=cache)
    cache.activate_past_recording()
    for ids, part in parts[1:]:
        model(ids, attention_mask=part, past_key_values=cache)
    cache.crop(-6)

    assert cache.get_seq_length() == 6
    for layer, wanted in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.get_state(), wanted.get_state(), rtol=0, atol=1e-10)


@torch.no_grad()
def test_everything_can_be_taken_back(cell):
    model = make_model(**cell)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(IDS, past_key_values=cache)

    cache.crop(-12)

    assert cache.get_seq_length() == 0
    assert cache.layers[0].keys.untyped_storage().nbytes() == cache.layers[0].keys.nbytes
    assert_continues(model, cache, IDS, read=0)


@torch.no_grad()
def test_recorded_states_are_bounded_and_forgotten():
    model = make_model(num_hidden_layers=1)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    for ids in make_ids(1, MAX_HISTORY + 100).split(50, dim=1):
        model(ids, past_key_values=cache)

    assert cache.layers[0].past_keys.shape[1] == MAX_HISTORY + 1
    with pytest.raises(
        ValueError, match=rf"`tokens_to_remove` \(-{MAX_HISTORY + 1}\) must lie in \[-{MAX_HISTORY}, 0\]"
    ):
        cache.crop(-MAX_HISTORY - 1)
    cache.crop(0)
    assert cache.layers[0].past_keys is None


def test_tokens_that_were_not_recorded_cannot_be_taken_back():
    model = make_model()
    cache = model(IDS).past_key_values

    with pytest.raises(ValueError, match=r"`tokens_to_remove` \(-1\) must lie in \[-0, 0\].*activate_past_recording"):
        cache.crop(-1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_reset_forgets(kind, cell):
    model = make_model(**cell)
    cache = new_cache(kind, model.config)
    model(make_ids(3, 7, seed=5), past_key_values=cache)

    cache.reset()

    assert cache.get_seq_length() == 0
    assert_continues(model, cache, IDS, read=0)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_state_can_be_pickled_and_copied(kind, gradients, cell):
    model = make_model(**cell)
    cache = new_cache(kind, model.config)
    with torch.set_grad_enabled(gradients and kind == "dynamic"):
        model(IDS[:, :5], past_key_values=cache)

    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(copy.deepcopy(cache)))]
    model(IDS[:, :3], past_key_values=cache)  # the copies have a state of their own

    with torch.no_grad():
        for copied in copies:
            assert copied.get_seq_length() == 5
            assert_continues(model, copied, IDS)


def test_gradients_run_through_a_carried_state_until_it_is_detached(kernel, cell):
    whole, carried, cut = (make_model(**cell) for _ in range(3))
    whole(IDS).logits[:, 5:].square().sum().backward()

    cache = DynamicCache(config=carried.config)
    carried(IDS[:, :5], past_key_values=cache)
    carried(IDS[:, 5:], past_key_values=cache).logits.square().sum().backward()

    cache = DynamicCache(config=cut.config)
    cut(IDS[:, :5], past_key_values=cache)
    for layer in cache.layers:
        layer.detach_()
    cut(IDS[:, 5:], past_key_values=cache).logits.square().sum().backward()

    gradients = [model.model.layers[0].input_gates.weight.grad for model in (whole, carried, cut)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)
    assert (gradients[2] - gradients[0]).abs().max() > 1e-3


def test_a_state_of_other_rows_is_refused():
    """torch's fused LSTM does not check this and reads memory that is not its own."""
    model = make_model()
    cache = model(IDS).past_key_values

    with pytest.raises(ValueError, match=r"`past_key_values` holds the state of 3 rows and the input has 1"):
        model(IDS[:1], past_key_values=cache)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 16}, "holds a state of 16 numbers a row and the model's has 12"),
        ({"hidden_size": 12, "embedding_size": 8}, "holds a state of 8 numbers a row and the model's has 12"),
        ({"num_hidden_layers": 1}, "has 1 layers and the model 2"),
        ({"num_hidden_layers": 3}, "has 3 layers and the model 2"),
    ],
    ids=str,
)
def test_a_state_of_another_model_is_refused(other, message):
    """torch's fused LSTM does not check widths in float32 either."""
    cache = make_model(torch.float32, **other)(IDS).past_key_values

    with pytest.raises(ValueError, match=message):
        make_model(torch.float32)(IDS, past_key_values=cache)


@pytest.mark.parametrize("width", [4, 11, 13, 512])
def test_embeddings_of_another_width_are_refused(width):
    with pytest.raises(
        ValueError, match=rf"`inputs_embeds` \({width} wide\) must be as wide as `embedding_size` \(12\)"
    ):
        make_model(torch.float32)(inputs_embeds=torch.randn(2, 20, width))


def test_a_cache_of_another_kind_is_refused():
    model, keys = make_model(), torch.zeros(3, 1, 4, 8)
    attention = DynamicCache(ddp_cache_data=[(keys, keys)] * 2)

    with pytest.raises(ValueError, match="`past_key_values` holds a DynamicLayer, not the state of an LSTM"):
        model(IDS, past_key_values=attention)
    with pytest.raises(ValueError, match=r"`past_key_values` \(tuple\) must be a transformers `Cache`"):
        model(IDS, past_key_values=((keys, keys),))


def assert_continues(model, cache, ids, read=5):
    """`cache` has read the first tokens of `ids`."""
    actual = model(ids[:, read:], past_key_values=cache).logits
    torch.testing.assert_close(actual, model(ids).logits[:, read:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("change", ["crop", "reorder", "copy", "reset"])
def test_the_last_output_and_document_go_wherever_the_state_goes(kind, change, cell):
    model = make_model(block_type="residual", initializer_range=0.2, **cell)
    seq_idx, padding = torch.tensor([[1] * 6, [1] * 3 + [2] * 3, [4] * 6]), torch.zeros(3, 2)
    cache = new_cache(kind, model.config)
    layer = cache.layers[0]
    model(IDS[:, :4], seq_idx=seq_idx[:, :4], past_key_values=cache)
    rows, length = torch.arange(3), 4
    if change == "crop":
        cache.activate_past_recording()
    model(IDS[:, 4:6], seq_idx=seq_idx[:, 4:6], past_key_values=cache)
    model(IDS[:, 6:7], past_key_values=cache)
    if change == "crop":
        cache.crop(-2)
        length = 5
    elif change == "reorder":
        rows, length = torch.tensor([2, 0, 0]), 7
        cache.reorder_cache(rows)
    elif change == "copy":
        length, cache = 7, copy.deepcopy(cache)
        layer.held.zero_()
    else:
        cache.reset()

    actual = model(IDS[:, :2], attention_mask=padding, past_key_values=cache).logits[:, 0]

    if change == "reset":
        assert not actual.any()
        assert torch.equal(
            model(IDS, seq_idx=seq_idx.repeat(1, 2), past_key_values=cache).logits,
            model(IDS, seq_idx=seq_idx.repeat(1, 2)).logits,
        )
        return
    expected = model(IDS[:, :length], seq_idx=torch.cat([seq_idx, seq_idx[:, -1:]], dim=1)[:, :length]).logits[:, -1]
    torch.testing.assert_close(actual, expected[rows], rtol=0, atol=1e-10)
    assert cache.layers[0].document.tolist() == seq_idx[rows, min(length, 6) - 1].tolist()


def test_recording_needs_the_states_after_each_token(cell):
    cache = make_model(**cell)(make_ids(2, 3), use_cache=True).past_key_values
    cache.activate_past_recording()

    with pytest.raises(ValueError, match=r"`past` \(0 tensors\) must hold the state after each token"):
        cache.layers[0].update(*cache.layers[0].get_state())
