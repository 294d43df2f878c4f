"""generate() with the state equals generate() without it, and a padded batch equals each row alone."""

from itertools import product

import pytest
import torch
from conftest import CONFIGS, make_ids, make_model
from transformers import DynamicCache, StaticCache

IDS = make_ids(3, 6)
MASK = torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 10, "temperature": 0.7},
    "beam": {"num_beams": 4, "do_sample": False},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "several": {"num_return_sequences": 3, "do_sample": True},
    "several beams": {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
}


def generate(model, ids, mask=None, **options):
    torch.manual_seed(0)
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, eos_token_id=None, **options)


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
}
# Each pair of a config, a strategy, a mask and a cache occurs at least once.
CACHED = [
    (config, strategy, masked, list(CACHES)[(c + s + masked) % len(CACHES)])
    for (c, config), (s, strategy), masked in product(enumerate(CONFIGS), enumerate(STRATEGIES), (False, True))
]


@pytest.mark.parametrize(("config", "strategy", "masked", "cache"), CACHED)
def test_cached_equals_uncached(config, strategy, masked, cache):
    model, mask, cache = make_model(**CONFIGS[config]), MASK if masked else None, CACHES[cache]
    expected = generate(model, IDS, mask, use_cache=False, **STRATEGIES[strategy])

    actual = generate(model, IDS, mask, **STRATEGIES[strategy], **cache)

    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_each_row_alone(model, strategy, side):
    mask = MASK if side == "left" else MASK.flip(1)
    together = generate(model, IDS, mask, **STRATEGIES[strategy])

    for row in range(len(IDS)):
        alone = generate(model, IDS[row : row + 1, mask[row].bool()], **STRATEGIES[strategy])
        assert together[row, -12:].tolist() == alone[0, -12:].tolist()


def test_labels_are_no_matter_of_generation(model):
    ids = make_ids(2, 5)

    assert torch.equal(model.generate(ids, labels=ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))


def test_greedy_takes_the_most_probable_token(model):
    written = generate(model, IDS, **STRATEGIES["greedy"])

    for end in range(6, 18):
        assert model(written[:, :end]).logits[:, -1].argmax(dim=-1).tolist() == written[:, end].tolist()


def test_prompt_in_chunks_equals_prompt_at_once(model):
    expected = generate(model, IDS, MASK, **STRATEGIES["greedy"])

    assert generate(model, IDS, MASK, prefill_chunk_size=4, **STRATEGIES["greedy"]).tolist() == expected.tolist()


@pytest.mark.parametrize("ids", ["all tokens", "new tokens"])
def test_generation_continues_from_a_state(model, ids):
    cache = DynamicCache(config=model.config)
    first = generate(model, IDS, past_key_values=cache, **STRATEGIES["greedy"])
    both = torch.cat([first, make_ids(3, 4, seed=3)], dim=1)
    expected = generate(model, both, **STRATEGIES["greedy"])[:, -12:]

    # the last generated token has not been read yet: it belongs to the new ones
    given = both if ids == "all tokens" else both[:, cache.get_seq_length() :]
    actual = generate(model, given, torch.ones_like(both), past_key_values=cache, **STRATEGIES["greedy"])[:, -12:]

    assert actual.tolist() == expected.tolist()


def test_a_state_that_has_read_more_than_the_input_is_refused():
    model = make_model()
    cache = DynamicCache(config=model.config)
    model(IDS, past_key_values=cache)

    with pytest.raises(ValueError, match="`past_key_values` has read 6 tokens and `input_ids` has 4"):
        generate(model, IDS[:, :4], past_key_values=cache)


def test_generation_from_embeddings_equals_generation_from_tokens(model):
    expected = generate(model, IDS, **STRATEGIES["greedy"])[:, -12:]

    embeddings = model.get_input_embeddings()(IDS)
    actual = model.generate(inputs_embeds=embeddings, max_new_tokens=12, eos_token_id=None, do_sample=False)

    assert actual.tolist() == expected.tolist()


def test_generation_stops_at_the_end_of_a_text(model):
    written = generate(model, IDS, **STRATEGIES["greedy"])
    end = written[0, 9].item()

    stopped = model.generate(IDS[:1], max_new_tokens=12, eos_token_id=end, do_sample=False)

    assert stopped[0].tolist() == written[0, : written[0, 6:].tolist().index(end) + 7].tolist()


@pytest.mark.parametrize("pad", [0, "end"], ids=str)
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=str)
def test_the_state_of_a_row_stays_where_the_row_ended(model, cache, pad):
    """Text, mask and returned state agree, though `generate()` goes on writing padding into rows that have ended."""
    free = generate(model, IDS, **STRATEGIES["greedy"])
    end = free[0, 7].item()  # the second token that the first row writes
    options = {"eos_token_id": end, "pad_token_id": end if pad == "end" else pad, "max_new_tokens": 12}
    whole = torch.ones_like(IDS)
    written = model.generate(
        IDS, attention_mask=whole, do_sample=False, return_dict_in_generate=True, **options, **cache
    )
    text, past = written.sequences, written.past_key_values
    behind_end = (text[:, 6:] == end).cumsum(1).cumsum(1) > 1
    mask = torch.cat([whole, (~behind_end).long()], dim=1)
    assert not mask.all()
    new = make_ids(3, 3, seed=5)
    text, mask = torch.cat([text, new], dim=1), torch.cat([mask, torch.ones_like(new)], dim=1)

    together = model(text[:, past.get_seq_length() :], attention_mask=mask, past_key_values=past).logits[:, -1]

    for row, real in enumerate(mask.bool()):
        alone = model(text[row : row + 1, real]).logits[0, -1]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cell_type", ["gru", "mogrifier"])
def test_compiled_steps_hold_rows_that_have_ended(cell_type):
    model = make_model(cell_type=cell_type)
    mask = torch.tensor([[1], [0], [1]])
    states = []
    for call in (model, torch.compile(model, backend="eager", fullgraph=True)):
        past = StaticCache(config=model.config, max_cache_len=8)
        with torch.no_grad():
            model(IDS, past_key_values=past)
            call(IDS[:, :1], attention_mask=mask, past_key_values=past)
        states.append([layer.get_state() for layer in past.layers])

    torch.testing.assert_close(states[1], states[0])


def test_a_right_padded_prompt_in_chunks_equals_the_prompt_at_once(model):
    mask = MASK.flip(1)
    options = {"output_logits": True, "return_dict_in_generate": True, **STRATEGIES["greedy"]}
    expected = generate(model, IDS, mask, **options)

    actual = generate(model, IDS, mask, prefill_chunk_size=2, **options)

    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-10)


def test_token_types_say_nothing(model):
    """BERT's kind of tokenizer gives them with each text."""
    expected = generate(model, IDS, **STRATEGIES["greedy"])

    assert torch.equal(generate(model, IDS, token_type_ids=torch.ones_like(IDS), **STRATEGIES["greedy"]), expected)


def test_class_names_keep_the_cache():
    """`generate()` chooses the kind of cache by parts of class names."""
    from hf_lstm import LSTMForCausalLM

    assert LSTMForCausalLM._supports_default_dynamic_cache()
