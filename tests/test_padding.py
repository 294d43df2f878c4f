"""Padding changes nothing: logits, states and gradients of a padded row are those of the row alone."""

import copy
import math

import pytest
import torch
from conftest import make_ids, make_model
from transformers import DynamicCache, StaticCache

from hf_lstm import load_state, save_state
from hf_lstm.model.cache_lstm import rows_that_read

MASKS = {
    "none": "111111111111",
    "left": "000011111111",
    "right": "111111110000",
    "both": "001111100000",
    "holes": "011011000110",
    "one": "000010000000",
    "all": "000000000000",
}
IDS = make_ids(len(MASKS), 12)
MASK = torch.tensor([[int(bit) for bit in bits] for bits in MASKS.values()])


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32, torch.uint8], ids=str)
def test_padded_row_equals_row_alone(model, kernel, dtype):
    together = model(IDS, attention_mask=MASK.to(dtype))

    for row, mask in enumerate(MASK.bool()):
        if not mask.any():
            continue
        alone = model(IDS[row : row + 1, mask])
        torch.testing.assert_close(together.logits[row, mask], alone.logits[0], rtol=0, atol=1e-10)
        for layer, expected in zip(together.past_key_values.layers, alone.past_key_values.layers, strict=True):
            state, wanted = ([part[index] for part in one.get_state()] for one, index in ((layer, row), (expected, 0)))
            torch.testing.assert_close(state, wanted, rtol=0, atol=1e-10)


def test_padding_repeats_the_last_output(model, kernel):
    logits = model(IDS, attention_mask=MASK).logits

    for row, mask in enumerate(MASK.bool()):
        for t in range(1, 12):
            if not mask[t]:
                torch.testing.assert_close(logits[row, t], logits[row, t - 1], rtol=0, atol=0)
    zero = torch.zeros(model.config.output_size, dtype=torch.float64)
    if model.config.output_projection_size is not None:
        zero = model.model.out_proj(torch.zeros(model.config.cell_sizes[-1], dtype=torch.float64))
    expected = model.lm_head(zero).expand(12, -1)  # of the zero state: 0 without biases
    torch.testing.assert_close(logits[list(MASKS).index("all")], expected, rtol=0, atol=1e-12)


def test_a_row_of_padding_keeps_its_state(model, kernel):
    cache = DynamicCache(config=model.config)
    model(IDS, past_key_values=cache)
    before = [layer.get_state() for layer in cache.layers]

    model(IDS[:, :5], attention_mask=torch.zeros(len(IDS), 5), past_key_values=cache)

    for layer, expected in zip(cache.layers, before, strict=True):
        torch.testing.assert_close(layer.get_state(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("width", ["new tokens", "all tokens"])
def test_a_padded_second_turn_continues_each_row(model, kernel, width):
    cache = DynamicCache(config=model.config)
    model(IDS, attention_mask=MASK, past_key_values=cache)
    ids, new = make_ids(len(MASKS), 6, seed=2), MASK[:, 3:9]

    mask = new if width == "new tokens" else torch.cat([MASK, new], dim=1)
    together = model(ids, attention_mask=mask, past_key_values=cache).logits

    for row in range(len(MASKS)):
        first, second = IDS[row : row + 1, MASK[row].bool()], ids[row : row + 1, new[row].bool()]
        if second.numel():
            whole = model(torch.cat([first, second], dim=1)).logits[0, first.shape[1] :]
            torch.testing.assert_close(together[row, new[row].bool()], whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_padding_repeats_the_last_output_of_an_earlier_call(model, length):
    whole = model(IDS, attention_mask=MASK).logits

    cache = DynamicCache(config=model.config)
    calls = zip(IDS.split(length, dim=1), MASK.split(length, dim=1), strict=True)
    parts = [model(ids, attention_mask=mask, past_key_values=cache).logits for ids, mask in calls]

    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-10)


LOSSES = {
    "plain": {"cell_type": "gru"},
    "chunked": {"loss_chunk_size": 4, "output_bias": True},
    "adaptive": {
        "cell_type": "mogrifier",
        "adaptive_softmax_cutoffs": [8, 20],
        "tie_word_embeddings": False,
        "hidden_size": 16,
    },
    "penalties": {
        "cell_type": "rnn_relu",
        "activation_regularization": 2.0,
        "temporal_activation_regularization": 1.0,
    },
    "residual": {"cell_type": "rnn_tanh", "block_type": "residual", "activation_regularization": 2.0},
}


@pytest.mark.parametrize("ignore_index", [-100, -1])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_the_loss_is_that_of_the_rows_alone(loss, side, ignore_index):
    model = make_model(**LOSSES[loss]).train()
    mask = torch.tensor([[1] * 12, [int(bit) for bit in MASKS[side]]])
    labels = IDS[:2].masked_fill(mask == 0, ignore_index)  # as collators write them
    alone, targets = [], 0
    for row, real in enumerate(mask.bool()):
        ids = IDS[row : row + 1, real]
        output = model(ids, labels=ids, num_items_in_batch=1)
        alone.append((output.loss, output.regularization_loss or 0))
        targets += ids.shape[1] - 1

    together = model(IDS[:2], attention_mask=mask, labels=labels, ignore_index=ignore_index)

    expected, penalty = (sum(values) / targets for values in zip(*alone, strict=True))
    torch.testing.assert_close(together.loss, expected, rtol=1e-6, atol=0)  # transformers' loss is in float32
    torch.testing.assert_close(together.regularization_loss or 0.0, penalty or 0.0, rtol=1e-10, atol=0)


def test_the_loss_of_a_padded_batch_is_the_sum_over_its_chunks(cell):
    model = make_model(**cell)
    labels = IDS.masked_fill(MASK == 0, -100)
    shift_labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    whole = model(IDS, attention_mask=MASK, labels=labels, num_items_in_batch=1).loss

    cache, total = DynamicCache(config=model.config), 0
    for part in torch.arange(12).split(3):
        batch = {"input_ids": IDS[:, part], "attention_mask": MASK[:, part], "shift_labels": shift_labels[:, part]}
        total += model(**batch, past_key_values=cache, num_items_in_batch=1).loss

    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)


def test_a_row_whose_state_is_zero_has_read_a_token(tmp_path):
    """A ReLU network may keep nothing: its state does not say whether the first token of the next chunk has a history."""
    model = make_model(cell_type="rnn_relu")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_gates.bias.fill_(-1e3)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:2, :3], attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]), past_key_values=cache)
    assert not any(layer.keys.any() for layer in cache.layers)

    for length in (1, 5):
        going_on = copy.deepcopy(cache)
        going_on.activate_past_recording()
        for recorded in (True, False):
            with torch.no_grad():
                model(IDS[:2, :length], past_key_values=going_on)
            assert rows_that_read(going_on).tolist() == [True, True]
            going_on.crop(-length if recorded else 0)
            assert rows_that_read(going_on).tolist() == [True, not recorded]
    save_state(model, cache, tmp_path / "state")
    assert rows_that_read(load_state(model, tmp_path / "state")).tolist() == [True, False]
    batch = {"labels": IDS[:2, 8:], "attention_mask": torch.tensor([[0, 0, 0, 1]] * 2), "past_key_values": cache}
    assert model(IDS[:2, 8:], **batch, num_items_in_batch=1).loss.item() == pytest.approx(3 * math.log(31))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert rows_that_read(cache).tolist() == [True, True]


def test_the_loss_of_some_positions_is_theirs():
    model = make_model()
    expected = model(IDS[:, -5:], labels=IDS[:, -5:], past_key_values=model(IDS[:, :-5]).past_key_values).loss

    actual = model(IDS, labels=IDS, logits_to_keep=5).loss

    torch.testing.assert_close(actual, expected)


def test_padding_has_no_part_in_gradients(kernel, cell):
    padded, alone = make_model(**cell), make_model(**cell)

    logits = padded(IDS, attention_mask=MASK).logits
    logits[MASK.bool()].square().sum().backward()
    for row, mask in enumerate(MASK.bool()):
        if mask.any():
            alone(IDS[row : row + 1, mask]).logits.square().sum().backward()

    for (name, parameter), expected in zip(padded.named_parameters(), alone.parameters(), strict=True):
        largest = expected.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=0, atol=1e-10 * largest, msg=name)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(7, 11), torch.ones(7, 13), torch.ones(6, 12), torch.ones(7, 1, 12, 12), torch.ones(12)],
    ids=lambda mask: str(mask.shape),
)
def test_a_mask_that_does_not_fit_is_refused(mask):
    with pytest.raises(ValueError, match=r"`attention_mask` of shape .* must be \(7, 12\), a column for each token"):
        make_model()(IDS, attention_mask=mask)


@pytest.mark.parametrize("cache_of", [DynamicCache, lambda config: StaticCache(config, max_cache_len=64)])
def test_masks_of_more_tokens_than_were_read_are_refused(cache_of):
    model = make_model()
    cache = cache_of(config=model.config)
    model(IDS[:, :5], past_key_values=cache)
    expected = model(IDS[:, 5:8], past_key_values=copy.deepcopy(cache)).logits

    for width in (3, 6, 8):
        logits = model(IDS[:, 5:8], attention_mask=torch.ones(7, width), past_key_values=copy.deepcopy(cache)).logits
        assert torch.equal(logits, expected)
    for width in (9, 12):
        with pytest.raises(
            ValueError,
            match=rf"`attention_mask` of shape \(7, {width}\) begins with {width - 3} columns for tokens read before, and "
            r"`past_key_values` has read 5: leave out",
        ):
            model(IDS[:, 5:8], attention_mask=torch.ones(7, width), past_key_values=copy.deepcopy(cache))
