"""A forward asks the device for data once at most: where a mask or positions are given, and never otherwise.

On a GPU the host would wait at each such point. Here every tensor counts as lying on a device unless it came from the
one permitted copy, or was made on the host from nothing but such tensors.
"""

import functools

import pytest
import torch
from conftest import make_ids, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import DynamicCache

from hf_lstm.model import modeling_lstm

WAITING = {
    torch.ops.aten._local_scalar_dense.default,  # item(), bool(), tolist()
    torch.ops.aten.nonzero.default,
    torch.ops.aten.bincount.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten._unique2.default,
}


class CountWaits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.copies, self.waits, self.host = 0, [], WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        tensors = [leaf for leaf in tree_leaves((arguments, options or {})) if isinstance(leaf, torch.Tensor)]
        on_host = all(tensor in self.host for tensor in tensors)
        mask_index = function is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in arguments[1]
        )
        if (function in WAITING or mask_index) and not on_host:
            self.waits.append(str(function))
        result = function(*arguments, **(options or {}))
        if on_host:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.host[leaf] = True
        return result


@pytest.fixture
def count(monkeypatch):
    mode = CountWaits()
    stay = torch.Tensor.cpu

    def copy_to_host(tensor):
        mode.copies += 1
        copied = stay(tensor).clone()
        mode.host[copied] = True
        return copied

    monkeypatch.setattr(torch.Tensor, "cpu", copy_to_host)
    monkeypatch.setattr(
        modeling_lstm, "reads_embeddings", lambda *arguments: False
    )  # it is for CPUs alone, and this test stands for a GPU
    return mode


IDS = make_ids(3, 8)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]).expand(3, 8).clone()
INPUTS = {
    "mask": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]] * 3)},
    "whole mask": {"attention_mask": torch.ones(3, 8)},
    "positions": {"position_ids": POSITIONS},
    "seq_idx": {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]] * 3)},
    "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 3, 8, 16, 24])},
}
INPUTS["all of them"] = {name: value for inputs in INPUTS.values() for name, value in inputs.items()}


@pytest.mark.parametrize("inputs", INPUTS)
def test_masks_and_positions_are_copied_once(kernel, count, inputs):
    model = make_model(num_hidden_layers=3)

    with count:
        model(IDS, **INPUTS[inputs], past_key_values=DynamicCache(config=model.config))

    assert (count.copies, count.waits) == (1, [])


def test_without_masks_and_positions_nothing_is_copied(kernel, count, cell):
    model, cache = make_model(**cell), DynamicCache()

    with count:
        for ids in IDS.split(3, dim=1):
            model(ids, past_key_values=cache, shift_labels=ids.contiguous()).loss.backward()
            for layer in cache.layers:
                layer.detach_()

    assert (count.copies, count.waits) == (0, [])


def test_decoding_copies_nothing(count, monkeypatch, cell):
    """Counted inside the forwards of `generate()` alone, which itself waits for the device too."""
    model, kept = make_model(**cell), []
    forward = type(model).forward

    @functools.wraps(forward)  # `generate()` reads its signature
    def counted(self, *arguments, **options):
        with count:
            result = forward(self, *arguments, **options)
        kept.append((count.copies, list(count.waits)))
        return result

    monkeypatch.setattr(type(model), "forward", counted)
    model.generate(IDS, attention_mask=INPUTS["mask"]["attention_mask"], max_new_tokens=6, eos_token_id=None)

    assert kept == [(1, [])] * 6
