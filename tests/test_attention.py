"""Hybrid models: attention over a window among LSTM layers, exact in every mode. Many other tests run on one too (conftest.py)."""

import copy

import pytest
import torch
from conftest import make_ids, make_model, recompute_activations
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache, StaticCache

from hf_lstm import LSTMConfig, LSTMForSequenceClassification, LSTMForTokenClassification, load_state, save_state
from hf_lstm.model import attention_lstm
from hf_lstm.model.cache_lstm import MAX_HISTORY

IDS = make_ids(3, 24)
WINDOW = 5
LSTM, ATTENTION = "hf_lstm", "hf_lstm_window"
PATTERNS = {"between": [LSTM, ATTENTION, LSTM], "first": [ATTENTION, LSTM], "twice": [LSTM, ATTENTION, ATTENTION]}


def fields(pattern="between", window=WINDOW, **config):
    types = PATTERNS[pattern]
    residual = {"block_type": "residual", "initializer_range": 0.2, "num_hidden_layers": len(types)}
    return residual | {"layer_types": types, "attention_window": window, "num_attention_heads": 3} | config


def hybrid(pattern="between", window=WINDOW, **config):
    return make_model(**fields(pattern, window, **config))


def in_chunks(model, ids, sizes, cache=None, **limits):
    """Logits of chunks with a carried cache; `limits` are cut in the same way."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    cuts = {name: value.split(sizes, dim=1) for name, value in limits.items()}
    parts = [
        model(part, past_key_values=cache, **{name: cut[index] for name, cut in cuts.items()}).logits
        for index, part in enumerate(ids.split(sizes, dim=1))
    ]
    return torch.cat(parts, dim=1)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


SIZES = [[1] * 24, [WINDOW - 1, 24 - WINDOW + 1], [WINDOW, 24 - WINDOW], [WINDOW + 1, 24 - WINDOW - 1], [1, 9, 2, 12]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "without config", "static"])
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_cached_equals_uncached(pattern, kind, sizes):
    model = hybrid(pattern)
    caches = {"dynamic": DynamicCache(config=model.config), "without config": DynamicCache()}
    caches["static"] = StaticCache(config=model.config, max_cache_len=4)

    assert_close(in_chunks(model, IDS, sizes, caches[kind]), model(IDS, use_cache=False).logits)


@pytest.mark.parametrize("window", [1, 2, 24, 40])
@torch.no_grad()
def test_any_window_and_cell(window, cell):
    model = hybrid(window=window, **cell)

    assert_close(in_chunks(model, IDS, [9, 1, 1, 13]), model(IDS, use_cache=False).logits)


@pytest.mark.parametrize("window", [1, 2, 24, 40])
@torch.no_grad()
def test_a_token_sees_itself_and_so_many_before_it(window):
    """Without LSTM layers above or below, a token further away changes nothing, and the last of the window does."""
    layer = hybrid("first", window).model.layers[0]
    x = torch.randn(1, 24, 12, dtype=torch.float64)
    expected = layer(x, *layer.zero_state(x))[0]

    for place in range(24):
        changed = x.clone()
        changed[0, place] += 1
        difference = (layer(changed, *layer.zero_state(x))[0] - expected)[0].abs().amax(dim=-1) > 0
        assert difference.nonzero().flatten().tolist() == list(range(place, min(24, place + window)))


MASKS = torch.tensor([[0] * 9 + [1] * 15, [1] * 24, [1] * 7 + [0] * 17, [1, 0, 0] * 8, [0] * 24])


@pytest.mark.parametrize("sizes", [[24], *SIZES], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_padded_equals_alone(pattern, sizes):
    model, ids = hybrid(pattern), make_ids(5, 24)

    cache = DynamicCache(config=model.config)
    together = in_chunks(model, ids, sizes, cache, attention_mask=MASKS)

    for row, mask in enumerate(MASKS[:4].bool()):
        alone = model(ids[row : row + 1, mask])
        assert_close(together[row, mask], alone.logits[0])
        for layer, other in zip(cache.layers, alone.past_key_values.layers, strict=True):
            for part, expected in zip(layer.get_state(), other.get_state(), strict=True):
                torch.testing.assert_close(part[row], expected[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("width", ["new", "all"])
@torch.no_grad()
def test_a_padded_prompt_goes_on(width):
    """What transformers' own window gets wrong: keys of padding stay in it."""
    model, ids, new = hybrid(), make_ids(5, 24), make_ids(5, 6, seed=2)
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=MASKS, past_key_values=cache)
    mask = None if width == "new" else torch.cat([MASKS, torch.ones(5, 6, dtype=torch.long)], dim=1)

    actual = model(new, past_key_values=cache, attention_mask=mask).logits

    for row, real in enumerate(MASKS.bool()):
        text = torch.cat([ids[row, real], new[row]])[None]
        assert_close(actual[row], model(text).logits[0, -6:])


LENGTHS = [5, 1, 9, 2, 7]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
SEQ_IDX = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]


@pytest.mark.parametrize("limits", [{"position_ids": POSITIONS}, {"seq_idx": SEQ_IDX}], ids=["positions", "seq_idx"])
@pytest.mark.parametrize("sizes", [[24], *SIZES], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_packed_equals_separate(pattern, sizes, limits):
    """In chunks with a carried cache too, where transformers' mask functions let documents see each other."""
    model = hybrid(pattern)

    actual = in_chunks(model, IDS[:1], sizes, **limits)

    assert_close(actual, torch.cat([model(document).logits for document in IDS[:1].split(LENGTHS, dim=1)], dim=1))
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    assert_close(model(IDS[:1], cu_seq_lens_q=starts, use_cache=False).logits, actual)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("limits", [{}, {"attention_mask": MASKS[:3]}, {"position_ids": POSITIONS}], ids=str)
@pytest.mark.parametrize(
    ("before", "after", "back"),
    [(0, 4, 4), (0, 9, 3), (WINDOW - 1, 3, 2), (WINDOW, 3, 3), (WINDOW + 1, 8, 8), (12, 7, 0), (12, 9, 6)],
)
@torch.no_grad()
def test_rolled_back_equals_never_read(before, after, back, limits, kind):
    model = hybrid()
    cache, expected = (
        StaticCache(config=model.config, max_cache_len=4) if kind == "static" else DynamicCache(config=model.config)
        for _ in range(2)
    )
    kept = before + after - back

    def read(cache, start, stop):
        cut = {name: value[:, start:stop] for name, value in limits.items()}
        return model(IDS[:, start:stop], past_key_values=cache, **cut).logits if stop > start else None

    read(cache, 0, before)
    cache.activate_past_recording()
    read(cache, before, before + 2)
    read(cache, before + 2, before + after)
    cache.crop(-back)
    read(expected, 0, kept)

    assert cache.get_seq_length() == kept
    for layer, wanted in zip(cache.layers, expected.layers, strict=True):
        for part, other in zip(layer.get_state(), wanted.get_state() or layer.get_state(), strict=True):
            torch.testing.assert_close(part, other, rtol=0, atol=1e-10)
        assert layer.recorded == 0
    assert_close(read(cache, kept, 24), read(expected, kept, 24))


@torch.no_grad()
def test_the_record_is_bounded():
    model = hybrid("first", hidden_size=6)
    cache, ids = DynamicCache(config=model.config), make_ids(1, MAX_HISTORY + 130)
    model(ids[:, :7], past_key_values=cache)
    cache.activate_past_recording()
    for part in ids[:, 7:].split(60, dim=1):
        model(part, past_key_values=cache)

    assert cache.layers[0].recorded == MAX_HISTORY
    assert cache.layers[0].past_keys.shape[2] == MAX_HISTORY + WINDOW
    with pytest.raises(ValueError, match=rf"must lie in \[-{MAX_HISTORY}, 0\]"):
        cache.crop(-MAX_HISTORY - 1)
    cache.crop(-MAX_HISTORY)
    assert cache.layers[0].past_keys is None
    assert_close(model(ids[:, 130:150], past_key_values=cache).logits, model(ids[:, :150]).logits[:, 130:])


@torch.no_grad()
def test_the_window_has_the_bytes_of_the_config():
    model = hybrid("twice")
    cache, sizes = DynamicCache(config=model.config), set()
    for ids in make_ids(2, 40).split([1, 3, 9, 27], dim=1):
        model(ids, past_key_values=cache)
        sizes.add(sum(layer.nbytes for layer in cache.layers))
        for layer in cache.layers:
            assert all(part.untyped_storage().nbytes() == part.nbytes for part in layer.get_state())

    assert model.config.state_size == 2 * 12 + 2 * 2 * WINDOW * 12  # h and c; keys and values of two layers
    # rows, numbers of 8 bytes, among them the output that padding repeats, and flags
    assert sizes == {2 * ((model.config.state_size + 12) * 8 + 2 * WINDOW)}


@pytest.mark.parametrize("training", [True, False])
def test_tokens_are_read_in_blocks(training, monkeypatch):
    model, shapes = hybrid().train(training), []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def recorded(query, key, value, **options):
        shapes.append((query.shape[2], key.shape[2]))
        return sdpa(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    model(make_ids(1, 300))

    assert shapes == [(WINDOW, WINDOW)] + [(WINDOW, 2 * WINDOW - 1)] * 59


@pytest.mark.parametrize("maps", [True, False])
def test_eager_attention_reads_the_whole_call_for_maps_alone(maps, monkeypatch):
    model, shapes, eager = hybrid(), [], attention_lstm.eager_attention
    model.set_attn_implementation("eager")

    def recorded(module, query, key, *rest, **options):
        shapes.append((query.shape[2], key.shape[2]))
        return eager(module, query, key, *rest, **options)

    monkeypatch.setattr(attention_lstm, "eager_attention", recorded)
    model(make_ids(1, 30), output_attentions=maps)

    assert shapes == ([(30, 30)] if maps else [(WINDOW, WINDOW)] + [(WINDOW, 2 * WINDOW - 1)] * 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_padding_that_is_not_finite_reaches_no_token(value):
    model = hybrid("twice")
    mask = torch.ones_like(IDS)
    mask[0, 3:6] = 0
    x = model.model.embed_tokens(IDS).detach()
    expected = model(inputs_embeds=x, attention_mask=mask).logits[mask.bool()]

    found = model(inputs_embeds=x.masked_fill(mask[..., None] == 0, value), attention_mask=mask).logits[mask.bool()]

    assert torch.equal(found, expected)


@pytest.mark.parametrize("head", [LSTMForSequenceClassification, LSTMForTokenClassification])
def test_classifiers_return_the_maps(head):
    model = head(LSTMConfig(vocab_size=31, hidden_size=12, **fields("twice"))).eval()
    model.set_attn_implementation("eager")

    maps = model(IDS, output_attentions=True).attentions

    assert [part.shape for part in maps] == [(3, 3, 24, 24)] * 2


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_model_that_was_made_shallower_loads(depth, tmp_path):
    config = LSTMConfig(hidden_size=12, **fields() | {"layer_types": [LSTM, LSTM, ATTENTION]})

    config.num_hidden_layers = depth
    config.save_pretrained(tmp_path)

    loaded = LSTMConfig.from_pretrained(tmp_path)
    assert loaded.layer_types == [LSTM, LSTM, ATTENTION][:depth]
    assert loaded.attention_window == (WINDOW if depth == 3 else None)
    assert LSTMConfig(**config.to_dict()).to_dict() == loaded.to_dict()


def test_a_list_of_layers_is_the_config_s_own():
    types = [LSTM, ATTENTION, LSTM]
    config = LSTMConfig(hidden_size=12, **fields() | {"layer_types": types})

    types.append(LSTM)
    config.num_hidden_layers = 2

    assert config.layer_types == [LSTM, ATTENTION]
    with pytest.raises(StrictDataclassError, match=r"must be at least 1"):
        config.num_hidden_layers = -1


def test_a_state_belongs_to_its_window(tmp_path):
    model = hybrid()
    cache = model(IDS, use_cache=True).past_key_values
    save_state(model, cache, tmp_path / "state")

    with pytest.raises(ValueError, match="with `attention_window` '5', and this one has '7'"):
        load_state(hybrid(window=7), tmp_path / "state")


def by_hand(model, ids, targets, length):
    """Losses of the chunks of a text, and gradients: each reads the states, keys and values of earlier ones as constants."""
    kept, losses, heads = [None] * len(model.model.layers), [], model.config.num_attention_heads
    for x, y in zip(ids.split(length, dim=1), targets.split(length, dim=1), strict=True):
        x = model.model.embed_tokens(x)
        for index, layer in enumerate(model.model.layers):
            if model.config.layer_types[index] == LSTM:
                x, *state = layer(x, *(kept[index] or layer.zero_state(x)))
                kept[index] = [part.detach() for part in state]
                continue
            attention, read = layer.self_attn, layer.norm(x)
            query, key, value = (
                project(read).unflatten(-1, (heads, -1)).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if kept[index] is not None:
                key, value = (torch.cat(pair, dim=2) for pair in zip(kept[index], (key, value), strict=True))
            kept[index] = (key.detach(), value.detach())
            scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
            distance = torch.arange(key.shape[2])[-query.shape[2] :, None] - torch.arange(key.shape[2])
            scores = scores.masked_fill((distance < 0) | (distance >= model.config.attention_window), -torch.inf)
            x = x + attention.o_proj((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))
            x = x if layer.mlp is None else x + layer.mlp(x)
        logits = model.lm_head(model.model.norm(x))
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()))
        losses[-1].backward()
    return [loss.item() for loss in losses]


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["", "reentrant", "checkpointing"])
@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW + 3, 12])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_truncated_backpropagation_equals_a_loop_by_hand(pattern, length, checkpointing):
    model, expected = (hybrid(pattern, intermediate_size=9).train() for _ in range(2))
    targets = make_ids(3, 24, seed=2)
    wanted = by_hand(expected, IDS, targets, length)
    if checkpointing is not None:
        recompute_activations(model, checkpointing)

    cache, losses = DynamicCache(config=model.config), []
    for x, y in zip(IDS.split(length, dim=1), targets.split(length, dim=1), strict=True):
        logits = model(x, past_key_values=cache).logits
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()))
        losses[-1].backward()
        for layer in cache.layers:
            layer.detach_()

    assert [loss.item() for loss in losses] == pytest.approx(wanted, rel=1e-12)
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("masked", [False, True], ids=["", "padded"])
def test_eager_attention_is_the_oracle(masked):
    """Whole maps in place of blocks: the same logits and gradients, and shares that sum to 1 inside the window."""
    model, eager = hybrid("twice"), hybrid("twice")
    eager.set_attn_implementation("eager")
    mask = MASKS[:3] if masked else None
    cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)

    for part in (slice(0, 7), slice(7, 24)):
        cut = None if mask is None else mask[:, part]
        logits = model(IDS[:, part], attention_mask=cut, past_key_values=cache).logits
        output = eager(IDS[:, part], attention_mask=cut, past_key_values=other, output_attentions=True)
        assert_close(output.logits, logits)

    assert model.config._attn_implementation == "sdpa"
    assert [shares.shape for shares in output.attentions] == [(3, 3, 17, WINDOW + 17)] * 2
    for shares in output.attentions:
        torch.testing.assert_close(shares.sum(dim=-1), torch.ones(3, 3, 17, dtype=torch.float64))
        if not masked:
            distance = torch.arange(17)[:, None] + WINDOW - torch.arange(WINDOW + 17)
            assert torch.equal(shares > 0, ((distance >= 0) & (distance < WINDOW)).expand_as(shares))
    logits.square().sum().backward()
    output.logits.square().sum().backward()
    for parameter, expected in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-10, atol=1e-10)


def test_maps_are_refused_where_there_are_none():
    with pytest.raises(
        ValueError, match=r'by the attention \'sdpa\', .* call `model.set_attn_implementation\("eager"\)`'
    ):
        hybrid()(IDS, output_attentions=True)
    with pytest.raises(ValueError, match="an LSTM has no attention"):
        make_model()(IDS, output_attentions=True)


MASK = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}, {"do_sample": True}], ids=str
)
@pytest.mark.parametrize(
    "cache", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=["", "static"]
)
def test_generation_is_that_without_a_cache(options, cache):
    model, options = hybrid(), {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None} | options
    written = []
    for way in (cache, {"use_cache": False}):
        torch.manual_seed(0)
        written.append(model.generate(IDS[:2, :8], attention_mask=MASK, **options, **way).tolist())

    assert written[0] == written[1]


@pytest.mark.parametrize("assistant", ["hybrid", "lstm", "early exit", "prompt lookup"])
def test_drafts_are_taken_back(assistant):
    model, options = hybrid(), {"max_new_tokens": 25, "do_sample": False, "eos_token_id": None}
    drafts = {
        "hybrid": {"assistant_model": hybrid("first", 3)},
        "lstm": {"assistant_model": make_model()},
        "early exit": {"assistant_early_exit": 2},
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
    }[assistant]
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 9, 5, 6]])
    expected = model.generate(ids, **options)

    assert model.generate(ids, **options, **drafts).tolist() == expected.tolist()
    assert model.config.layer_types == PATTERNS["between"]


@torch.no_grad()
def test_rows_are_forgotten():
    model = hybrid("twice")
    cache = DynamicCache(config=model.config)
    model(IDS[:, :9], past_key_values=cache)

    for layer in cache.layers:
        layer.forget(torch.tensor([False, True, False]))

    actual = model(IDS[:, 9:], past_key_values=cache).logits
    assert_close(actual[1:2], model(IDS[1:2, 9:]).logits)
    assert_close(actual[::2], model(IDS[::2]).logits[:, 9:])


@torch.no_grad()
def test_a_copy_is_independent():
    model = hybrid()
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(IDS[:, :9], past_key_values=cache)
    copied = copy.deepcopy(cache)
    copied.crop(-3)
    copied.batch_select_indices(torch.tensor([2, 0]))

    assert_close(model(IDS[[2, 0], 6:], past_key_values=copied).logits, model(IDS[[2, 0]]).logits[:, 6:])
    assert_close(model(IDS[:, 9:], past_key_values=cache).logits, model(IDS).logits[:, 9:])


def test_a_cache_of_another_kind_is_refused():
    model, lstm = hybrid(), make_model(num_hidden_layers=3, block_type="residual")

    with pytest.raises(ValueError, match="has layer 1 of type 'hf_lstm' and the model's is 'hf_lstm_window'"):
        model(IDS, past_key_values=DynamicCache(config=lstm.config))
    with pytest.raises(
        ValueError, match="has layer 1 of type 'hf_lstm_window' and the model's is 'hf_lstm': it belongs"
    ):
        lstm(IDS, past_key_values=model(IDS).past_key_values)
    with pytest.raises(
        ValueError, match=r"a state of 3 x 6 x 4 numbers a row and the model's has 3 x 5 x 4: it belongs"
    ):
        model(IDS, past_key_values=hybrid(window=6)(IDS).past_key_values)
    cache = model(IDS).past_key_values
    cache.activate_past_recording()
    with pytest.raises(ValueError, match=r"`past` \(0 tensors\) must hold the keys and values of each token"):
        cache.layers[1].update(*cache.layers[1].get_state())
    with pytest.raises(ValueError, match=r"`attention_mask` of shape \(3, 30\) must be \(3, 24\)"):
        model(IDS, attention_mask=torch.ones(3, 30))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 2}, r"`layer_types` \(3 entries\) must have one for each of `num_hidden_layers` \(2\)"),
        ({"num_hidden_layers": 4}, r"`layer_types` \(3 entries\) must have one for each of `num_hidden_layers` \(4\)"),
        ({"layer_types": []}, r"`layer_types` \(0 entries\) must have one for each of `num_hidden_layers` \(3\)"),
        ({"layer_types": [LSTM, "full_attention", LSTM]}, r"`layer_types` \('full_attention' in it\) must hold"),
        ({"block_type": "stacked"}, r'has attention, which adds to a stream .* set `block_type="residual"`'),
        ({"layer_types": [ATTENTION] * 3}, r"must hold at least one 'hf_lstm', since attention alone"),
        ({"attention_window": 0}, r"`attention_window` \(0\) must be at least 1 and at most 1,048,576 tokens"),
        ({"attention_window": 10**9}, r"`attention_window` \(1000000000\) must be at least 1 and at most"),
        ({"num_attention_heads": 5}, r"`num_attention_heads` \(5\) must divide `hidden_size` \(12\)"),
        ({"num_attention_heads": 0}, r"`num_attention_heads` \(0\) must divide `hidden_size` \(12\)"),
        ({"layer_types": None}, r"`attention_window` \(5\) needs a layer of attention, which the model lacks"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(config, message):
    with pytest.raises(StrictDataclassError, match=message):
        LSTMConfig(**fields(hidden_size=12) | config)


def test_any_attention_function_of_transformers_runs():
    functions, called = attention_lstm.ALL_ATTENTION_FUNCTIONS, []

    def counted(*arguments, **options):
        called.append(1)
        return functions["sdpa"](*arguments, **options)

    functions.register("counted", counted)
    model = hybrid()
    model.set_attn_implementation("counted")

    assert_close(model(IDS).logits, hybrid()(IDS).logits)
    assert len(called) == 5
