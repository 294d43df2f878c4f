"""Pickles are read without running anything, and what they name beyond tensors and inert objects is refused."""

import argparse
import builtins
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict, defaultdict
from contextlib import suppress

import foreign
import foreign_fastai_flair
import numpy
import pytest
import torch
from foreign import RNNModel, SplitCrossEntropyLoss, save
from torch import nn

from hf_lstm.convert import convert_checkpoint
from hf_lstm.convert.folder import FORMATS
from hf_lstm.convert.pickles import Damaged, StandIn, StoredTensor
from hf_lstm.convert.torch_lstm import Options
from hf_lstm.convert.torch_save import read_pickle

LAYOUTS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before 1.6"])


class Shell:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Eval(Shell):
    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


class State(Shell):
    """Hides what it runs in the state of another object."""

    def __reduce__(self):
        return OrderedDict, (), {"hidden": Shell(self.path)}


# `__reduce__` chooses GLOBAL or STACK_GLOBAL by the protocol; the nested ones lie where a converter would not look.
PLANTED = {
    "posix.system": Shell,
    "builtins.eval": Eval,
    "posix.system in a state": State,
    "posix.system in a list": lambda path: [{"optimizer": [Shell(path)]}],
}


def planted_file(format, content, path, is_zip, protocol):
    """A checkpoint of a format that would convert, but for what was planted in it."""
    module = RNNModel()
    if format == "torch-lstm":
        return save({"model": module.state_dict(), "other": content}, path, is_zip, protocol)
    if format == "awd-lstm-lm":
        return save([module, SplitCrossEntropyLoss(), content], path, is_zip, protocol)
    if format == "fastai":
        state = {"model": foreign_fastai_flair.AWDLanguageModel().state_dict(), "opt": content}
        return foreign_fastai_flair.save(state, path, is_zip, protocol)
    if format == "flair":
        state = foreign_fastai_flair.FlairModel().content(optimizer_state_dict=content)
        return foreign_fastai_flair.save(state, path, is_zip, protocol)
    module.extra = content
    return save(module, path, is_zip, protocol)


PICKLED = ["torch-lstm", "word-language-model", "awd-lstm-lm", "fastai", "flair"]


@LAYOUTS
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("format", PICKLED)
def test_a_planted_pickle_is_refused_and_nothing_runs(tmp_path, format, planted, protocol, is_zip):
    content = PLANTED[planted](tmp_path / "ran")
    path = planted_file(format, content, tmp_path / "model.pt", is_zip, protocol)

    with pytest.raises(ValueError, match=f"refused: its pickle names `{planted.split()[0]}`"):
        convert_checkpoint(format, path, tmp_path / "out", Options(vocabulary=foreign.word_file(tmp_path)))
    assert {entry.name for entry in tmp_path.iterdir()} == {"model.pt", "vocab.txt"}


def test_all_formats_with_pickles_are_tested():
    without_pickles = {"torch-rnn", "char-rnn", "keras"}  # but for that of Keras' Tokenizer: test_convert_keras.py
    assert set(PICKLED) == FORMATS.keys() - without_pickles


@pytest.mark.parametrize(
    "program",
    [
        b"cposix\nsystem\n(S'touch ran'\ntR.",  # GLOBAL and REDUCE
        b"(S'touch ran'\niposix\nsystem\n.",  # INST
        b"(cposix\nsystem\nS'touch ran'\no.",  # OBJ
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x09touch ran\x85R.",  # STACK_GLOBAL
        b"\x80\x02cposix\nsystem\nU\x09touch ran\x85\x81.",  # NEWOBJ
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93)}\x92.",  # NEWOBJ_EX
        b"\x80\x04\x8c\x08builtins\x8c\x0eeval.__class__\x93.",  # a dotted name
    ],
)
def test_each_way_to_name_a_function_is_refused(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(program)

    with pytest.raises(ValueError, match=r"names `(posix\.system|builtins\.eval\.__class__)`"):
        read_pickle("model.pt")
    assert os.listdir() == ["model.pt"]


@pytest.mark.parametrize(
    "name",
    [
        "torch.nn.parameter\nParameter",
        "torch._utils\n_rebuild_tensor_v2",
        "builtins\ngetattr",
        "torch\nFloatStorage",
        "torch.nn\nLSTM",
    ],
)
@pytest.mark.parametrize("state", [b"(N}S'__defaults__'\nNst", b"}S'function'\nNs", b"}S'fields'\nNs"])
def test_a_pickle_cannot_change_the_reader(tmp_path, name, state):
    """The state that a pickle gives to a class or function is never set on those that this package uses."""
    (tmp_path / "changing.pt").write_bytes(f"c{name}\n".encode() + state + b"b.")
    module = nn.LSTM(3, 4)

    with pytest.raises(ValueError, match=r"changing.pt"):
        read_pickle(tmp_path / "changing.pt")

    path = save(module.state_dict(), tmp_path / "model.pt")
    assert torch.equal(read_pickle(path)["weight_hh_l0"].read(), module.weight_hh_l0)


def test_the_source_text_of_a_module_is_dropped(tmp_path):
    path = save(RNNModel(), tmp_path / "model.pt", is_zip=False)
    assert b"class RNNModel(nn.Module)" in path.read_bytes()

    read = read_pickle(path)

    assert (read.name, read.fields["nhid"]) == ("model.RNNModel", 12)
    assert isinstance(read.fields["_modules"]["rnn"], StandIn)


@LAYOUTS
@pytest.mark.parametrize("protocol", [2, 5])
def test_everything_that_programs_save_beside_weights_is_read(tmp_path, is_zip, protocol):
    tensor = torch.arange(24, dtype=torch.float32).view(4, 6)
    content = {
        "view": tensor[1:3, 2:].t(),
        "whole": tensor,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "half": tensor.to(torch.bfloat16),
        "unsigned": torch.tensor([1, 2], dtype=torch.uint8),
        "parameter": nn.Parameter(tensor),
        "best": numpy.float64(3.5),
        "array": numpy.arange(3),
        "args": argparse.Namespace(lr=20, device=torch.device("cpu")),
        "ordered": OrderedDict([("a", 1)]),
        "lists": defaultdict(list, {"a": [1]}),
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "size": tensor.shape,
        "dtype": torch.float16,
    }
    path = save(content, tmp_path / "model.pt", is_zip, protocol)

    read = read_pickle(path)

    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(read[name].read(), value.detach()), name
            assert read[name].read().dtype == value.dtype
    plain = ("ordered", "lists", "set", "bytes", "dtype")
    assert {name: read[name] for name in plain} == {name: content[name] for name in plain}
    assert read["args"].fields["lr"] == 20


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.float8_e4m3fn], ids=str)
@LAYOUTS
def test_numbers_of_a_type_that_no_weight_has_are_refused_by_name(tmp_path, dtype, is_zip):
    path = save({"a": torch.zeros(6, dtype=torch.float32).to(dtype)}, tmp_path / "model.pt", is_zip)

    with pytest.raises(ValueError, match=r"names `torch\."):
        read_pickle(path)


def test_a_tensor_that_repeats_numbers_is_refused_with_the_remedy(tmp_path):
    path = save({"a": torch.zeros(1).expand(5)}, tmp_path / "model.pt")

    with pytest.raises(ValueError, match=r"save a copy, `tensor\.contiguous\(\)`"):
        read_pickle(path)


def hostile(path, shape, strides, offset):
    """A file whose tensor of 4 numbers claims another shape, strides or offset."""
    tensor = torch.arange(4.0)

    class Claim:
        def __reduce__(self):
            rebuild, arguments, *_ = tensor.__reduce_ex__(2)
            return rebuild, (arguments[0], offset, shape, strides, *arguments[4:])

    torch.save({"a": Claim()}, path)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((4,), (1,), 1),  # behind the end
        ((2, 2), (3, 1), 0),
        ((2,), (-1,), 3),
        ((-1,), (1,), 0),
        ((2,), (1,), -1),
        ((1 << 70,), (1,), 0),
        ((2,), (1 << 62,), 0),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, shape, strides, offset):
    hostile(tmp_path / "model.pt", shape, strides, offset)

    with pytest.raises(Damaged, match="A tensor"):
        read_pickle(tmp_path / "model.pt")


@LAYOUTS
@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.9, -1])
def test_part_of_a_file_is_refused(tmp_path, is_zip, kept):
    path = save(RNNModel(), tmp_path / "model.pt", is_zip)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])

    with pytest.raises(Damaged, match=r"model.pt"):
        read_pickle(path)


@LAYOUTS
def test_a_file_with_any_byte_changed_reads_or_is_refused_in_words(tmp_path, is_zip):
    """Nothing but `ValueError` escapes, however a file is damaged."""
    path = save({"model": nn.LSTM(2, 3).state_dict(), "epoch": 3}, tmp_path / "model.pt", is_zip)
    content = path.read_bytes()
    generator = numpy.random.RandomState(0)
    for _ in range(300):
        changed = bytearray(content)
        for place in generator.randint(0, len(content), 3):
            changed[place] = generator.randint(256)
        path.write_bytes(changed)
        with suppress(ValueError):
            root = read_pickle(path)
            tensors = root["model"].values() if isinstance(root, dict) and isinstance(root.get("model"), dict) else ()
            for tensor in tensors:
                if isinstance(tensor, StoredTensor):
                    tensor.read()


def rewritten(path, target, change=lambda name, data: data, compression=zipfile.ZIP_STORED, extra=()):
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, data in extra:
            new.writestr(name, data)
    return target


def test_a_zip_bomb_is_refused_before_it_is_read(tmp_path):
    path = save({"model": nn.LSTM(2, 3).state_dict()}, tmp_path / "model.pt")

    def bomb(name, data):
        return bytes(50_000_000) if name.endswith("/data/0") else data

    packed = rewritten(path, tmp_path / "packed.pt", bomb, zipfile.ZIP_DEFLATED)

    assert packed.stat().st_size < 100_000
    with pytest.raises(Damaged, match=r"would unpack to 50,0.* bytes from"):
        read_pickle(packed)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([("archive/constants.pkl", b"x")], "TorchScript"),
        ([("other/data.pkl", b"x")], "without the one data.pkl"),
        ([("archive/byteorder", b"big")], "big-endian"),
    ],
)
def test_other_archives_are_refused_by_name(tmp_path, extra, message):
    path = save({"model": nn.LSTM(2, 3).state_dict()}, tmp_path / "archive.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new.pt", "w") as new:
        for name in set(old.namelist()) - {name for name, _ in extra}:
            new.writestr(name, old.read(name))
        for name, data in extra:
            new.writestr(name, data)

    with pytest.raises(ValueError, match=message):
        read_pickle(tmp_path / "new.pt")


def test_the_tar_files_of_torch_0_1_are_refused_by_name(tmp_path):
    (tmp_path / "pickle").write_bytes(pickle.dumps({}))
    with tarfile.open(tmp_path / "model.pt", "w") as archive:
        archive.add(tmp_path / "pickle", "pickle")

    with pytest.raises(ValueError, match=r"tar file of torch 0\.1"):
        read_pickle(tmp_path / "model.pt")


def test_a_qrnn_is_refused_by_name(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"ctorchqrnn.qrnn\nQRNNLayer\n)\x81.")

    with pytest.raises(ValueError, match=r"`torchqrnn\.qrnn\.QRNNLayer`, and a QRNN is a convolution"):
        read_pickle(tmp_path / "model.pt")


def test_a_number_of_objects_beyond_their_count_takes_no_memory(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"\x80\x02Nr" + struct.pack("<I", 1 << 31) + b".")

    with pytest.raises(Damaged, match="object 2,147,483,648 after"):
        read_pickle(tmp_path / "model.pt")


NESTED = b"\x80\x04)\x94" + b"".join(b"h%ch%c\x86\x94" % (n, n) for n in range(60))


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x04}h" + b"\x00.",  # a number that nothing has
        NESTED + b"}h\x3cK\x01s.",  # the key of a dict, hashed for hours
        NESTED + b"Q.",  # a reference outside the pickle, shown for hours
        b"\x80\x04}" + b")" + b"\x85" * 3_000_000 + b"K\x01s.",  # hashed until the stack of C ends
        b"\x80\x02c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.",  # 2 GB of zeros
    ],
)
def test_a_small_file_takes_neither_hours_nor_all_memory(tmp_path, program):
    (tmp_path / "model.pt").write_bytes(program)

    with pytest.raises(Damaged, match=r"model\.pt"):
        read_pickle(tmp_path / "model.pt")


def test_a_lazy_negative_is_refused_with_the_remedy(tmp_path):
    negative = torch.complex(torch.zeros(3), torch.ones(3)).conj().imag

    with pytest.raises(ValueError, match=r"names `torch\.ComplexFloatStorage`|resolve_neg"):
        read_pickle(save({"a": negative}, tmp_path / "model.pt"))


@pytest.mark.parametrize("keys", [b"K\x03.", b"N.", b"]]K\x01aa."])
def test_a_list_of_storages_that_is_none_is_refused(tmp_path, keys):
    program = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + b"\x80\x02M\xe9\x03." + b"\x80\x02}." + b"\x80\x02}."
    (tmp_path / "model.pt").write_bytes(program + b"\x80\x02" + keys)

    with pytest.raises(Damaged, match="has no list of its storages"):
        read_pickle(tmp_path / "model.pt")


def test_names_that_would_control_a_terminal_are_shown_as_they_are_written(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"cos\x1b[2J\nfoo\n.")

    with pytest.raises(ValueError, match=r"'os\\x1b\[2J\.foo'"):
        read_pickle(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04", b"just text", b"\x80\x02}.", b"\x80\x02K\x05.", b"\x80\x04\x95\xff.", b""]
)
def test_other_files_are_refused_in_words(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)

    with pytest.raises(Damaged, match=r"model.pt"):
        read_pickle(tmp_path / "model.pt")


def test_reading_needs_no_torch_load(tmp_path, monkeypatch):
    path = save(RNNModel(), tmp_path / "model.pt")
    for place in (torch, pickle):
        monkeypatch.setattr(place, "load", lambda *_, **__: pytest.fail("another reader was used"))
    monkeypatch.setattr(pickle, "loads", torch.load)
    for name in ("exec", "eval", "compile", "__import__"):
        monkeypatch.setattr(builtins, name, lambda *_, **__: pytest.fail("code was run"))

    tensor = read_pickle(path).fields["_modules"]["encoder"].fields["_parameters"]["weight"]

    monkeypatch.undo()
    assert isinstance(tensor, StoredTensor)
    assert tensor.read().shape == (foreign.V, 8)
