"""Any two ways of computing the same thing agree, for whatever batches hypothesis thinks of."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import reference
import torch
from conftest import CONFIGS, choose_kernel, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

PRECISION = {torch.float64: 1e-10, torch.float32: 1e-5}  # of the largest element
ROUNDING = {"mogrifier": 10}  # its products amplify float32's: autograd itself is off by up to 5e-5

EXAMPLES = int(os.environ.get("EXAMPLES", "25"))
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=EXAMPLES)
settings.load_profile("repeatable")


@st.composite
def batches(draw):
    """Token ids, a mask and where documents start (in real tokens), each `(B, T)`; and how to cut the columns."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    table = [
        [
            draw(st.tuples(st.integers(4, 30), st.sampled_from((1, 1, 1, 0)), st.sampled_from((0, 0, 0, 1))))
            for _ in range(length)
        ]
        for _ in range(rows)
    ]
    ids, mask, starts = torch.tensor(table).unbind(-1)
    cuts = sorted(draw(st.sets(st.integers(1, length - 1)))) if length > 1 else []
    widths = [end - start for start, end in zip([0, *cuts], [*cuts, length], strict=True)]
    return ids, mask, starts * mask, widths


models = st.builds(
    lambda dtype, config: make_model(dtype, **config),
    st.sampled_from(list(PRECISION)),
    st.sampled_from(list(CONFIGS.values())),
)
fused = st.booleans()


@contextmanager
def with_kernel(is_fused):
    with pytest.MonkeyPatch.context() as patch:
        choose_kernel(patch, "fused" if is_fused else "explicit")
        yield


def documents_of(row, mask, starts):
    """The indices of each document's tokens, in one row."""
    documents = [[]]
    for index in mask[row].nonzero().flatten().tolist():
        if starts[row, index]:
            documents.append([])
        documents[-1].append(index)
    return [document for document in documents if document]


@given(models, batches(), fused)
def test_a_batch_in_chunks_equals_every_document_alone(model, batch, is_fused):
    """Masks, restarts and chunkings together, against one unpadded document at a time."""
    ids, mask, starts, widths = batch
    positions = (1 - starts).long()
    with with_kernel(is_fused):
        cache = DynamicCache(config=model.config)
        logits = torch.cat(
            [
                model(part, attention_mask=real, position_ids=position, past_key_values=cache).logits
                for part, real, position in zip(*(x.split(widths, dim=1) for x in (ids, mask, positions)), strict=True)
            ],
            dim=1,
        )
        (gradient,) = torch.autograd.grad(
            logits[mask.bool()].square().sum(), model.model.layers[0].hidden_gates.weight, materialize_grads=True
        )

        wanted, total = torch.zeros_like(logits), 0
        for row in range(len(ids)):
            last = None
            for document in documents_of(row, mask, starts):
                last = model(ids[row : row + 1, document])
                wanted[row, document] = last.logits[0].detach()
                total = total + last.logits.square().sum()
            for index, layer in enumerate(cache.layers):
                for name, part in zip(layer.STATE, layer.get_state(), strict=False):
                    alone = None if last is None else getattr(last.past_key_values.layers[index], name)[0]
                    assert_close(part[row], torch.zeros_like(part[row]) if alone is None else alone, model)
    assert_close(logits[mask.bool()], wanted[mask.bool()], model)
    if mask.any():
        (expected,) = torch.autograd.grad(total, model.model.layers[0].hidden_gates.weight)
        assert_close(gradient, expected, model)


@given(models, batches())
def test_both_kernels_agree(model, batch):
    """torch's fused kernels against the explicit steps, outputs, states and all gradients."""
    ids, mask, starts, _ = batch
    results = []
    for is_fused in (True, False):
        with with_kernel(is_fused):
            output = model(ids, attention_mask=mask, position_ids=1 - starts, use_cache=True)
        states = [state.double() for layer in output.past_key_values.layers for state in layer.get_state()]
        objective = output.logits.square().sum() + sum(state.sum() for state in states)
        results.append(
            [output.logits, *states, *torch.autograd.grad(objective, list(model.parameters()), materialize_grads=True)]
        )

    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, model)


@settings(max_examples=EXAMPLES // 5)  # a second each
@given(models, batches(), fused)
def test_a_batch_equals_the_equations(model, batch, is_fused):
    """Against tests/reference.py."""
    ids, mask, starts, _ = batch
    with with_kernel(is_fused):
        logits = model(ids, attention_mask=mask, position_ids=1 - starts).logits
    weights = reference.weights_of(model)

    for row in range(len(ids)):
        for document in documents_of(row, mask, starts):
            expected, _ = reference.language_model(ids[row, document].tolist(), weights, *reference.fields_of(model))
            assert_close(logits[row, document], torch.tensor(reference.values(expected), dtype=torch.float64), model)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(1, 4)),
        st.tuples(st.just("crop"), st.integers(0, 6)),
        st.tuples(st.just("reorder"), st.integers(0, 5)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("select"), st.integers(0, 5)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=8,
)


@given(models, OPERATIONS, fused)
@torch.no_grad()
def test_a_cache_equals_reading_the_text_again(model, operations, is_fused):
    """Whatever is done to a cache, it holds the state of the tokens that a plain list of texts says it has read."""
    generator = torch.Generator().manual_seed(0)
    cache, text, recorded = DynamicCache(config=model.config), torch.empty(2, 0, dtype=torch.long), 0
    cache.activate_past_recording()
    for name, number in operations:
        if name == "read":
            ids = torch.randint(4, 31, (len(text), number), generator=generator)
            model(ids, past_key_values=cache)
            text, recorded = torch.cat([text, ids], dim=1), recorded + number
        elif name == "crop":
            number = min(number, recorded)
            cache.crop(-number)
            text, recorded = text[:, : text.shape[1] - number], 0
        elif name == "reset":
            cache.reset()
            text, recorded = torch.empty(2, 0, dtype=torch.long), 0
        elif name == "repeat" and len(text) < 8:
            cache.batch_repeat_interleave(number)
            text = text.repeat_interleave(number, dim=0)
        elif name in ("reorder", "select"):
            rows = (torch.arange(len(text)) * (number + 1)) % len(text)
            rows = rows if name == "reorder" else rows[: max(1, len(text) - number)]
            (cache.reorder_cache if name == "reorder" else cache.batch_select_indices)(rows)
            text = text[rows]

    ids = torch.randint(4, 31, (len(text), 3), generator=generator)
    with with_kernel(is_fused):
        expected = model(torch.cat([text, ids], dim=1)).logits[:, -3:]
    assert_close(model(ids, past_key_values=cache).logits, expected, model)


def assert_close(actual, expected, model):
    """Within the type's precision of the largest element; flags too."""
    actual, expected = actual.double(), expected.double()
    precision = PRECISION[model.dtype] * ROUNDING.get(model.config.cell_type, 1)
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=precision * max(largest, 1e-3))


@pytest.mark.slow
def test_three_hundred_examples_of_each_agree():
    command = [sys.executable, "-m", "pytest", "-q", __file__]

    ran = subprocess.run(command, env=os.environ | {"EXAMPLES": "300"}, capture_output=True, text=True)

    assert ran.returncode == 0, ran.stdout
