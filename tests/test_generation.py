"""generate() with the state equals generate() without it, and a padded batch equals each row alone."""

import pytest
import torch
from conftest import make_ids, make_model
from transformers import DynamicCache

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


@pytest.mark.parametrize(
    "cache", [{}, {"cache_implementation": "static"}, {"cache_implementation": "offloaded"}], ids=str
)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cached_equals_uncached(model, strategy, mask, cache):
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


def test_class_names_keep_the_cache():
    """`generate()` chooses the kind of cache by parts of class names."""
    from hf_lstm import LSTMForCausalLM

    assert LSTMForCausalLM._supports_default_dynamic_cache()
