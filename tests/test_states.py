"""A state is a value: saved, loaded, copied and repeated, it goes on to the bit; and no other model takes it."""

import copy
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import CONFIGS, make_ids, make_model
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, StaticCache

from hf_lstm import generation, load_state, save_state

IDS = make_ids(2, 12)


def read(model, ids=IDS[:, :7], cache=None):
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_state_goes_on_to_the_bit(tmp_path, name, dtype):
    model = make_model(dtype, **CONFIGS[name])
    cache = read(model)

    save_state(model, cache, tmp_path / "a.state")
    loaded = load_state(model, tmp_path / "a.state")

    assert loaded.get_seq_length() == 7
    assert [path.name for path in tmp_path.iterdir()] == ["a.state"]
    with torch.no_grad():
        assert torch.equal(
            model(IDS[:, 7:], past_key_values=loaded).logits, model(IDS[:, 7:], past_key_values=cache).logits
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_and_documents_go_on_after_loading(tmp_path, name):
    """What padding repeats and the number of the last document are saved too; a file without them still loads."""
    model, seq_idx = make_model(**CONFIGS[name]), torch.tensor([[1] * 7 + [2] * 5, [1] * 12])
    mask = torch.tensor([[1] * 12, [1] * 6 + [0] * 6])
    with torch.no_grad():
        expected = model(IDS, seq_idx=seq_idx, attention_mask=mask).logits[:, 7:]
        cache = model(IDS[:, :7], seq_idx=seq_idx[:, :7], attention_mask=mask[:, :7]).past_key_values

    save_state(model, cache, tmp_path / "a.state")
    loaded = load_state(model, tmp_path / "a.state")

    with torch.no_grad():
        batch = {"seq_idx": seq_idx[:, 7:], "attention_mask": mask[:, 7:], "past_key_values": loaded}
        actual = model(IDS[:, 7:], **batch).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)

    cache.layers[0].held = cache.layers[0].document = None  # as version 0.1.0 wrote it
    save_state(model, cache, tmp_path / "old.state")
    assert load_state(model, tmp_path / "old.state").layers[0].document is None


def test_a_file_of_the_first_format_is_loaded(tmp_path):
    """It names no cell, since there was one."""
    model, path = make_model(), tmp_path / "state"
    save_state(model, read(model), path)
    metadata = metadata_of(path) | {"format": "hf_lstm state 1"}
    del metadata["cell_type"]
    save_file(load_file(path), path, metadata=metadata)

    layers = load_state(model, path).layers

    for layer, expected in zip(layers, read(model).layers, strict=True):
        assert torch.equal(torch.stack(layer.get_state()), torch.stack(expected.get_state()))


def test_generation_goes_on_from_it(tmp_path, cell):
    model = make_model(**cell)
    options = {"do_sample": False, "eos_token_id": None, "attention_mask": torch.ones(2, 12)}
    expected = model.generate(IDS, max_new_tokens=9, **options)
    save_state(model, read(model), tmp_path / "state")

    written = model.generate(IDS, max_new_tokens=9, past_key_values=load_state(model, tmp_path / "state"), **options)

    assert written.tolist() == expected.tolist()


def test_one_state_goes_on_in_many_ways(tmp_path, cell):
    model, endings = make_model(**cell), make_ids(5, 4, seed=3)
    save_state(model, read(model, IDS[:1]), tmp_path / "state")
    state = load_state(model, tmp_path / "state")

    branches = copy.deepcopy(state)
    branches.batch_repeat_interleave(5)

    logits = model(endings, past_key_values=branches).logits
    expected = model(torch.cat([IDS[:1].expand(5, -1), endings], dim=1)).logits[:, 12:]
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(model(endings[:1], past_key_values=state).logits, expected[:1])  # itself as it was


def test_a_static_cache_is_saved_too(tmp_path, cell):
    model = make_model(**cell)

    save_state(model, read(model, cache=StaticCache(model.config, max_cache_len=20)), tmp_path / "state")

    dynamic = read(model)
    for layer, expected in zip(load_state(model, tmp_path / "state").layers, dynamic.layers, strict=True):
        torch.testing.assert_close(layer.get_state(), expected.get_state(), rtol=0, atol=0)


def test_its_size_is_that_of_the_cells(tmp_path):
    model = make_model(torch.float32)
    for length in (1, 12):
        save_state(model, read(model, IDS[:, :length]), tmp_path / f"{length}")

    sizes = {path.stat().st_size for path in tmp_path.iterdir()}

    assert max(sizes) < 2 * 2 * 2 * 12 * 4 + 1000  # layers, h and c, rows, width, bytes; and who wrote it
    assert max(sizes) - min(sizes) <= 8


def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path, monkeypatch):
    model = make_model()
    save_state(model, read(model), tmp_path / "state")
    before = (tmp_path / "state").read_bytes()

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_lstm.generation.save_file", interrupted)
    with pytest.raises(OSError, match="No space left"):
        save_state(model, read(model, IDS), tmp_path / "state")

    assert (tmp_path / "state").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    monkeypatch.undo()
    with pytest.raises(OSError, match=r"nowhere/state cannot be written: .*No such file"):
        save_state(model, read(model), tmp_path / "nowhere" / "state")


def test_a_pipe_is_not_replaced(tmp_path):
    model, path, link = make_model(), tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(path)
    link.symlink_to(path)

    for name in (path, link):
        with pytest.raises(
            ValueError, match=r"`path` \('.*'\) is a device or a pipe, which would be replaced: name a file"
        ):
            save_state(model, read(model), name)

    assert path.is_fifo()
    assert sorted(tmp_path.iterdir()) == [link, path]


def test_many_may_save_to_one_path(tmp_path, monkeypatch):
    model, paths = make_model(), []
    caches = [read(model, IDS[:, :length]) for length in range(1, 9)]
    monkeypatch.setattr(
        "hf_lstm.generation.save_file",
        lambda tensors, path, metadata: (paths.append(path), save_file(tensors, path, metadata)),
    )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda cache: save_state(model, cache, tmp_path / "state"), caches * 5))

    assert len(set(paths)) == 40  # each its own until it is whole
    assert 1 <= load_state(model, tmp_path / "state").get_seq_length() <= 8
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_the_weights_are_hashed_once_until_they_change(tmp_path, monkeypatch):
    model, hashed, digest = make_model(), [], generation._digest
    monkeypatch.setattr(generation, "_digest", lambda tensors: (hashed.append(len(tensors)), digest(tensors))[1])
    weights = len(dict(model.named_parameters()))
    cache = read(model)
    for _ in range(3):
        save_state(model, cache, tmp_path / "a.state")
        load_state(model, tmp_path / "a.state")
    assert hashed.count(weights) == 1

    for change in (
        lambda weight: weight.data.copy_(weight.data),  # cannot be seen
        lambda weight: weight.mul_(2),
        lambda weight: setattr(weight, "data", weight.data * 2),
        lambda weight: setattr(model.model.layers[0].input_gates, "bias", torch.nn.Parameter(weight.detach() * 2)),
    ):
        with torch.no_grad():
            change(model.model.layers[0].input_gates.bias)
        save_state(model, cache, tmp_path / "b.state")
    assert hashed.count(weights) == 4
    with pytest.raises(ValueError, match="to a model with other weights"):
        load_state(model, tmp_path / "a.state")


def test_weights_made_in_inference_mode_are_hashed_each_time(tmp_path):
    with torch.inference_mode():
        model = make_model()
        save_state(model, read(model), tmp_path / "a.state")
        model.model.layers[0].input_gates.bias.mul_(2)

        with pytest.raises(ValueError, match="to a model with other weights"):
            load_state(model, tmp_path / "a.state")


def test_a_cache_that_has_read_nothing_is_refused(tmp_path):
    model = make_model()

    with pytest.raises(ValueError, match="a state in 0 of 2 layers, and the model has 2"):
        save_state(model, DynamicCache(config=model.config), tmp_path / "state")
    with pytest.raises(ValueError, match="a state in 0 of 0 layers, and the model has 2"):
        save_state(model, DynamicCache(), tmp_path / "state")
    with pytest.raises(ValueError, match="`cache` holds states of the shapes"):
        save_state(model, read(make_model(hidden_size=6)), tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-9])


def changed(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def shortened(path):
    tensors, metadata = load_file(path), metadata_of(path)
    save_file({name: tensor[:, :6].contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def metadata_of(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def without_metadata(path):
    save_file(load_file(path), path)


def of_later_format(path):
    save_file(load_file(path), path, metadata=metadata_of(path) | {"format": "hf_lstm state 3"})


def of_another_cell(path):
    save_file(load_file(path), path, metadata=metadata_of(path) | {"cell_type": "gru"})


def with_other_count(path):
    save_file(load_file(path), path, metadata=metadata_of(path) | {"tokens": "-3"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_text("not a state"), "is not a valid hf_lstm state file, or truncated"),
        (lambda path: path.write_bytes(b""), "is not a valid hf_lstm state file, or truncated"),
        (cut_off, "is not a valid hf_lstm state file, or truncated"),
        (changed, "was changed after it was saved"),
        (shortened, "was changed after it was saved"),
        (without_metadata, "holds something else: it must hold hf_lstm state 2"),
        (of_later_format, "holds hf_lstm state 3: it must hold hf_lstm state 2"),
        (of_another_cell, "belongs to a model with `cell_type` 'gru', and this one has 'lstm'"),
        (with_other_count, "was changed after it was saved"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, message):
    model = make_model()
    save_state(model, read(model), tmp_path / "state")
    damage(tmp_path / "state")

    with pytest.raises(ValueError, match=message):
        load_state(model, tmp_path / "state")


def test_the_state_of_another_model_is_refused(tmp_path):
    model = make_model()
    save_state(model, read(model), tmp_path / "state")
    with torch.no_grad():
        model.model.layers[0].input_gates.bias[0] += 1e-12

    with pytest.raises(ValueError, match="a model with other weights"):
        load_state(model, tmp_path / "state")
