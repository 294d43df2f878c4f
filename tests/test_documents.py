"""Documents in one row are independent: packed equals separate, in logits, loss, states and gradients."""

import pytest
import torch
from conftest import make_ids, make_model
from transformers import DataCollatorWithFlattening, DynamicCache

LENGTHS = (3, 1, 1, 5, 2)
IDS = make_ids(1, sum(LENGTHS))
DOCUMENTS = IDS.split(LENGTHS, dim=1)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
SEQ_IDX = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
CU_SEQ_LENS = torch.tensor([0, *LENGTHS]).cumsum(0).int()

WAYS = {
    "position_ids": {"position_ids": POSITIONS},
    "seq_idx": {"seq_idx": SEQ_IDX.int()},
    "cu_seq_lens_q": {"cu_seq_lens_q": CU_SEQ_LENS},
    "all three": {"position_ids": POSITIONS, "seq_idx": SEQ_IDX, "cu_seq_lens_q": CU_SEQ_LENS},
}


@pytest.mark.parametrize("way", WAYS)
def test_packed_documents_equal_separate_ones(model, kernel, way):
    packed = model(IDS, **WAYS[way])

    separate = [model(document) for document in DOCUMENTS]
    expected = torch.cat([output.logits for output in separate], dim=1)
    torch.testing.assert_close(packed.logits, expected, rtol=0, atol=1e-10)
    for layer, last in zip(packed.past_key_values.layers, separate[-1].past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.get_state(), last.get_state(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("flags", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}], ids=str)
def test_the_flattening_collator_works_as_it_comes(kernel, flags, cell):
    packed, separate = make_model(**cell), make_model(**cell)
    batch = DataCollatorWithFlattening(**flags)([{"input_ids": document[0].tolist()} for document in DOCUMENTS])

    packed(**batch).loss.backward()
    targets = sum(length - 1 for length in LENGTHS)
    for document in DOCUMENTS:
        if document.shape[1] > 1:
            (separate(document, labels=document).loss * (document.shape[1] - 1) / targets).backward()

    for (name, parameter), expected in zip(packed.named_parameters(), separate.parameters(), strict=True):
        # transformers computes the loss in float32
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=0, atol=1e-6, msg=name)


def test_a_document_continues_from_a_carried_state(model, kernel):
    first, rest = DOCUMENTS[3][:, :2], torch.cat([DOCUMENTS[3][:, 2:], DOCUMENTS[4]], dim=1)
    cache = DynamicCache(config=model.config)
    model(first, past_key_values=cache)

    actual = model(rest, position_ids=torch.tensor([[2, 3, 4, 0, 1]]), past_key_values=cache).logits

    expected = torch.cat([model(DOCUMENTS[3]).logits[:, 2:], model(DOCUMENTS[4]).logits], dim=1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_a_single_token_may_start_a_document(model, kernel):
    cache = DynamicCache(config=model.config)
    model(IDS, past_key_values=cache)

    actual = model(DOCUMENTS[1], position_ids=torch.tensor([[0]]), past_key_values=cache).logits

    torch.testing.assert_close(actual, model(DOCUMENTS[1]).logits, rtol=0, atol=1e-10)


def test_documents_and_padding_together(model, kernel):
    """Pads between documents carry positions of 0, as HF's collators give them, and start nothing."""
    ids = torch.cat([IDS[:, :3], torch.zeros(1, 2, dtype=torch.long), IDS[:, 3:]], dim=1)
    mask = torch.tensor([[1, 1, 1, 0, 0] + [1] * 9])
    positions = torch.tensor([[0, 1, 2, 0, 0, 3, 0, 1, 2, 3, 4, 5, 6, 7]])

    actual = model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]

    expected = torch.cat([model(IDS[:, :4]).logits, model(IDS[:, 4:]).logits], dim=1)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_seq_idx_changes_across_padding(model, kernel):
    ids = torch.cat([IDS[:, :3], torch.zeros(1, 1, dtype=torch.long), IDS[:, 3:]], dim=1)
    mask, seq_idx = torch.ones_like(ids), torch.tensor([[0] * 3 + [1] * 10])
    mask[0, 3] = 0

    actual = model(ids, attention_mask=mask, seq_idx=seq_idx).logits[mask.bool()]

    expected = torch.cat([model(IDS[:, :3]).logits, model(IDS[:, 3:]).logits], dim=1)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["position_ids", "seq_idx"])
def test_a_tensor_that_does_not_fit_is_refused(name):
    with pytest.raises(ValueError, match=rf"`{name}` of shape \(1, 11\) must be \(1, 12\)"):
        make_model()(IDS, **{name: POSITIONS[:, :11]})


@pytest.mark.parametrize("cut", range(1, 9))
def test_documents_given_in_chunks_start_where_their_number_changes(model, cut):
    """A change between the last token of one call and the first of the next is seen, whatever padding lies between."""
    ids, mask = make_ids(2, 9), torch.tensor([[1, 1, 1, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1, 0]])
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2], [5, 5, 5, 6, 6, 6, 6, 6, 7]])
    whole = model(ids, seq_idx=seq_idx, attention_mask=mask).logits

    cache, parts = DynamicCache(config=model.config), []
    for part in (slice(cut), slice(cut, None)):
        batch = {"seq_idx": seq_idx[:, part], "attention_mask": mask[:, part], "past_key_values": cache}
        parts.append(model(ids[:, part], **batch).logits)

    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-10)


def test_a_document_goes_on_where_no_number_is_told(model):
    ids, seq_idx = make_ids(2, 9), torch.tensor([[3] * 6 + [4] * 3] * 2)
    expected = model(ids, seq_idx=seq_idx).logits[:, 6:]

    cache = DynamicCache(config=model.config)
    model(ids[:, :3], seq_idx=seq_idx[:, :3], past_key_values=cache)
    model(ids[:, 3:6], past_key_values=cache)
    actual = model(ids[:, 6:], seq_idx=seq_idx[:, 6:], past_key_values=cache).logits

    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("places", [[0, 4, 13], [0, 4, 99], [-1, 12], [0, 8], [4, 12], [0, 7, 3, 12], []], ids=str)
def test_document_starts_that_do_not_ascend_over_the_batch_are_refused(places):
    with pytest.raises(ValueError, match=r"`cu_seq_lens_q` \(\[.*\]\) must ascend from 0 to 12, the number of tokens"):
        make_model()(IDS, cu_seq_lens_q=torch.tensor(places))


def test_document_starts_of_one_prompt_are_refused_for_beams():
    options = {"max_new_tokens": 2, "do_sample": False}

    with pytest.raises(ValueError, match=r"For beams, .* give `position_ids` instead"):
        make_model().generate(IDS, cu_seq_lens_q=CU_SEQ_LENS, num_beams=2, **options)


@pytest.mark.parametrize("way", [{"prefill_chunk_size": 5}, {"num_beams": 2}, {"continued": 7}], ids=str)
def test_generate_knows_the_documents_of_a_prompt(model, way):
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options["attention_mask"] = torch.ones_like(IDS)
    beams = {"num_beams": 2} if "num_beams" in way else {}
    expected = model.generate(IDS, position_ids=POSITIONS, **options, **beams).logits
    if read := way.get("continued"):
        past = model(IDS[:, :read], seq_idx=SEQ_IDX[:, :read]).past_key_values
        way = {"past_key_values": past}

    actual = model.generate(IDS, seq_idx=SEQ_IDX, **options, **way).logits

    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
