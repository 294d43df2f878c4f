"""Torch7's files are read without Torch; models of torch-rnn and char-rnn give the probabilities of their equations."""

import contextlib
import json
import random
import struct

import numpy
import pytest
import torch
from foreign_torch7 import (
    CHARACTERS,
    Function,
    Object,
    Table,
    V,
    Writer,
    char_rnn,
    char_rnn_checkpoint,
    char_rnn_content,
    char_rnn_logits,
    flatten,
    random_weights,
    save,
    torch_rnn_checkpoint,
    torch_rnn_logits,
    torch_rnn_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lstm.convert import convert_checkpoint
from hf_lstm.convert.folder import FORMATS
from hf_lstm.convert.torch7 import Item, read_t7
from hf_lstm.convert.torch_lstm import Options
from hf_lstm.tokenizers import encode

LENGTHS = [7, 1, 12, 4]  # of ragged rows
IDS = torch.randint(0, V, (4, 12), generator=torch.Generator().manual_seed(0))


def convert(format, path, **options):
    return convert_checkpoint(format, path, path.parent / "converted", Options(**options)).model


def assert_same_logits(model, logits):
    """Of ragged rows, in one padded batch and each row alone by the equations."""
    mask = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        found = model(IDS, attention_mask=mask.long()).logits
    for row, length in enumerate(LENGTHS):
        expected = logits(IDS[row, :length]).float()
        torch.testing.assert_close(found[row, :length].float(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["torch.", "torch.Cuda"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"layers": 1, "D": 12}, {"dropout": 0.3, "layers": 3}, {"model_type": "rnn"}],
    ids=["LSTM", "one layer", "dropout", "tanh"],
)
def test_torch_rnn_gives_the_logits_of_its_equations(tmp_path, fields, prefix):
    model = torch_rnn_model(**fields)
    path = save(Table(model=model), tmp_path / "model.t7", prefix)

    assert_same_logits(convert("torch-rnn", path), lambda ids: torch_rnn_logits(model, ids))


CHAR_RNNS = {
    "LSTM": {},
    "as wide as the vocabulary": {"H": V},
    "without a bias of h": {"hidden_bias": False},
    "an old version": {"old": True},
    "dropout, three layers": {"dropout": 0.4, "layers": 3},
    "tanh": {"model": "rnn", "H": V},
    "one layer": {"layers": 1},
}


@pytest.mark.parametrize("fields", CHAR_RNNS.values(), ids=CHAR_RNNS)
def test_char_rnn_gives_the_logits_of_its_equations(tmp_path, fields):
    module, weights, decoder = char_rnn(**fields)
    flatten([*(part for pair in weights for part in pair), decoder])
    path = save(char_rnn_content(module, model=fields.get("model", "lstm")), tmp_path / "lm.t7")

    assert_same_logits(convert("char-rnn", path), lambda ids: char_rnn_logits(weights, decoder, ids))


def test_an_lstm_of_another_precision_is_read_exactly(tmp_path):
    model = torch_rnn_model(layers=1)
    for module in model.fields["net"].fields["modules"]:
        for name in module.fields.keys() & {"weight", "bias"}:
            module.fields[name] = module.fields[name].double() + 1e-12
    converted = convert("torch-rnn", save(Table(model=model), tmp_path / "model.t7"))

    assert torch.equal(converted.lm_head.bias, model.fields["net"].fields["modules"][-2].fields["bias"])


# Tokens.


def awkward_lines(characters):
    rng = random.Random(0)
    return ["".join(rng.choices(characters, k=rng.randrange(30))) for _ in range(1000)]


@pytest.mark.parametrize("format", ["torch-rnn", "char-rnn"])
def test_ids_are_those_of_the_list(tmp_path, format):
    checkpoint = torch_rnn_checkpoint if format == "torch-rnn" else char_rnn_checkpoint
    convert(format, checkpoint(tmp_path)[0])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    lines = awkward_lines(CHARACTERS)
    expected = [[CHARACTERS.index(character) for character in line] for line in lines]

    assert [tokenizer(line).input_ids for line in lines] == expected
    assert [ids.tolist() for ids in encode(lines, tokenizer)] == expected
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected] == lines
    for unknown in ("B", "é", "<unk>", "\r"):
        with pytest.raises(Exception, match="UNK"):
            tokenizer(f"a{unknown}b")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (None, None, None)


LETTERS = sorted({bytes([byte]) for byte in "aeé山\n ".encode()})


@pytest.mark.parametrize("format", ["torch-rnn", "char-rnn"])
def test_a_vocabulary_of_bytes_reads_bytes(tmp_path, format):
    """char-rnn reads a text byte by byte; so does torch-rnn on request, which then names those above 127 by their number."""
    size = len(LETTERS)
    path = tmp_path / "model.t7"
    if format == "char-rnn":
        save(char_rnn_content(char_rnn(layers=1, size=size)[0], LETTERS), path)
    else:
        names = [letter.decode() if letter < b"\x80" else f"[{letter[0]}]" for letter in LETTERS]
        model = torch_rnn_model(layers=1, idx_to_token=names)
        modules = model.fields["net"].fields["modules"]
        modules[0].fields["weight"], modules[-2].fields["weight"] = random_weights(size, 8), random_weights(size, 12)
        modules[-2].fields["bias"] = random_weights(size)
        save(Table(model=model), path)
    convert(format, path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")

    for line in awkward_lines("aeé山\n "):
        ids = [LETTERS.index(bytes([byte])) for byte in line.encode()]
        assert tokenizer(line).input_ids == ids
        assert tokenizer.decode(ids) == line
    with pytest.raises(Exception, match="UNK"):
        tokenizer("è")


def test_torch_rnn_takes_its_json_file(tmp_path):
    numbered = {str(index): character for index, character in enumerate(CHARACTERS, 1)}
    (tmp_path / "own.json").write_text(json.dumps({"idx_to_token": numbered}))
    (tmp_path / "other.json").write_text(json.dumps({"idx_to_token": numbered | {"1": "ß"}}))
    bare = save(torch_rnn_model(idx_to_token=None), tmp_path / "bare.t7")

    with pytest.raises(ValueError, match="31 tokens and does not say which"):
        convert("torch-rnn", bare)
    convert("torch-rnn", bare, vocabulary=str(tmp_path / "own.json"))
    assert AutoTokenizer.from_pretrained(tmp_path / "converted")("\n a").input_ids == [0, 1, 2]
    path, _ = torch_rnn_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"other\.json.*another list of tokens"):
        convert_checkpoint("torch-rnn", path, tmp_path / "new", Options(vocabulary=str(tmp_path / "other.json")))


# Files that are not as they should be.


def raw(*parts):
    return b"".join(struct.pack("<i", part) if isinstance(part, int) else part for part in parts)


def test_a_circle_and_a_deep_file_are_read(tmp_path):
    circle = Table()
    circle["self"] = circle
    item = read_t7(save([circle, Function(), True, None, 0.5], tmp_path / "circle.t7")).fields
    deep = b"".join(raw(3, number, 1, 2, 5, b"inner") for number in range(10_000))
    (tmp_path / "deep.t7").write_bytes(deep + raw(5, 1))
    inner = read_t7(tmp_path / "deep.t7")
    while isinstance(inner, Item):
        inner = inner.fields["inner"]

    assert item[1].fields["self"] is item[1]
    assert (item[2].name, item[3], item[4], item[5], inner) == ("function", True, None, 0.5, True)


@pytest.mark.parametrize("checkpoint", [torch_rnn_checkpoint, char_rnn_checkpoint])
def test_a_part_of_a_file_is_refused(tmp_path, checkpoint):
    path, _ = checkpoint(tmp_path)
    data = path.read_bytes()
    for end in [*range(0, 200, 7), *range(200, len(data), 997), len(data) - 1]:
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"t7"):
            read_t7(path)


def test_a_damaged_file_raises_nothing_but_a_sentence(tmp_path):
    path = save(Table(model=torch_rnn_model(layers=1, D=2, H=2)), tmp_path / "model.t7")
    data, rng = path.read_bytes(), random.Random(0)
    formats = ("torch-rnn", "char-rnn")
    for number in range(150):
        changed = bytearray(data)
        for place in rng.sample(range(len(data)), 3):
            changed[place] = rng.choice([0, 1, 4, 8, 127, 255, rng.randrange(256)])
        path.write_bytes(changed)
        with contextlib.suppress(
            ValueError
        ):  # what raises anything else is a fault; many changes are just other numbers
            FORMATS[formats[number % 2]](path, Options())


RAW = {
    "is empty": b"",
    "damaged at byte 0": raw(99),
    "in letters": b"4\n1\n3\nV 1\n",
    "announces": raw(2, 2**31 - 1, b"abc"),
    "1,073,741,824 times 8 bytes that byte 12 announces": raw(3, 1, 2**30),
    "the -5 times": raw(2, -5),
    "of 1000000 dimensions": raw(4, 1, 3, b"V 1", 17, b"torch.FloatTensor", 1_000_000),
    "4,611,686,018,427,387,904 times 4": raw(4, 1, 3, b"V 1", 18, b"torch.FloatStorage", struct.pack("<q", 2**62)),
    "holds a torch.ClTensor": raw(4, 1, 3, b"V 1", 14, b"torch.ClTensor", 0),
    "holds a tds.Hash": raw(4, 1, 3, b"V 1", 8, b"tds.Hash", 0),
}


@pytest.mark.parametrize("message", RAW)
def test_a_file_that_announces_what_it_lacks_is_refused(tmp_path, message):
    (tmp_path / "bad.t7").write_bytes(RAW[message])

    with pytest.raises(ValueError, match=rf"bad\.t7.*{message}"):
        convert("torch-rnn", tmp_path / "bad.t7")
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.t7"]


@pytest.mark.parametrize("shape", [(10, 10), (3, 2**40), (2**62, 2**62), (-1, 4)])
def test_a_tensor_outside_its_storage_is_refused(tmp_path, shape):
    writer = Writer()
    writer.put(torch_rnn_model(layers=1))
    own = struct.pack("<4q", V, 8, 8, 1)
    assert bytes(own) in writer.written
    (tmp_path / "bad.t7").write_bytes(writer.written.replace(own, struct.pack("<4q", *shape, 8, 1000)))

    with pytest.raises(ValueError, match=r"bad\.t7: `weight` of a nn\.LookupTable: A tensor"):
        convert("torch-rnn", tmp_path / "bad.t7")


def changed_torch_rnn(change):
    model = torch_rnn_model(layers=1)
    change(model.fields["net"].fields["modules"], model.fields)
    return "torch-rnn", Table(model=model)


def with_nan(modules, _):
    modules[0].fields["weight"][3, 1] = torch.nan


def changed_char_rnn(replaced=None, **fields):
    module = char_rnn(layers=1)[0]
    for node in module.fields["forwardnodes"]:
        part = node.fields["data"].get("module")
        if replaced and part is not None and part.name == replaced[0]:
            node.fields["data"]["module"] = Object(replaced[1], p=0.5)
    return "char-rnn", char_rnn_content(module, **fields)


BAD = {
    r"holds a nn\.Sequential, and torch-rnn saves": lambda: ("torch-rnn", Table(model=Object("nn.Sequential"))),
    "try `--from char-rnn`": lambda: ("torch-rnn", char_rnn_content(char_rnn(layers=1)[0])),
    r"holds model, and char-rnn saves .* try `--from torch-rnn`": lambda: ("char-rnn", changed_torch_rnn(id_)[1]),
    r"module nn\.BatchNormalization, which": lambda: changed_torch_rnn(
        lambda m, _: m.insert(2, Object("nn.BatchNormalization"))
    ),
    r"module nn\.GRU, which": lambda: changed_torch_rnn(lambda m, _: m.insert(2, Object("nn.GRU"))),
    r"`maxNorm`": lambda: changed_torch_rnn(lambda m, _: m[0].fields.update(maxNorm=1)),
    r"`v2` is not true": lambda: changed_torch_rnn(lambda m, _: m.insert(2, Object("nn.Dropout", p=0.5))),
    r"is a row of nn\.LookupTable, nn\.View": lambda: changed_torch_rnn(lambda m, _: m.pop(1)),
    r"do not fit each other": lambda: changed_torch_rnn(lambda m, _: m[1].fields.update(weight=random_weights(9, 48))),
    r"lacks the matrix 0\.weight": lambda: changed_torch_rnn(lambda m, _: m[1].fields.pop("weight")),
    r"holds 1 numbers that are NaN": lambda: changed_torch_rnn(with_nan),
    r"holds 30 tokens, and the model 31": lambda: changed_torch_rnn(lambda _, own: own["idx_to_token"].pop()),
    r"holds '\\n' twice, as entries 0 and 30": lambda: changed_torch_rnn(
        lambda _, own: own.update(idx_to_token=[*CHARACTERS[:-1], "\n"])
    ),
    r"holds 'the', and the tokens of this program": lambda: changed_torch_rnn(
        lambda _, own: own.update(idx_to_token=[*CHARACTERS[:-1], "the"])
    ),
    r"must be a table with the keys 1 to n": lambda: changed_torch_rnn(
        lambda _, own: own.update(idx_to_token=Table({2: "a"}))
    ),
    "is a GRU of char-rnn": lambda: changed_char_rnn(model="gru"),
    r"nn\.BatchNormalization, batch normalisation": lambda: changed_char_rnn(
        ("nn.SplitTable", "nn.BatchNormalization")
    ),
    r"module nn\.AddConstant": lambda: changed_char_rnn(("nn.SplitTable", "nn.AddConstant")),
    r"no nn\.Linear before an nn\.LogSoftMax": lambda: changed_char_rnn(("nn.LogSoftMax", "nn.Tanh")),
    r"which nn\.Linear of a layer reads h": lambda: changed_char_rnn(("OneHot", "nn.Identity")),
    r"neither an LSTM nor a layer of tanh": lambda: changed_char_rnn(("nn.Sigmoid", "nn.Tanh")),
    "lacks `vocab`": lambda: changed_char_rnn(vocab=None),
    "31 characters the ids 1 to 31": lambda: changed_char_rnn(vocab=Table((character, 1) for character in CHARACTERS)),
}


def id_(*_):
    """Change nothing."""


@pytest.mark.parametrize("message", BAD)
def test_other_models_are_refused_in_words(tmp_path, message):
    format, content = BAD[message]()
    path = save(content, tmp_path / "bad.t7")

    with pytest.raises(ValueError, match=rf"bad\.t7.*{message}|{message}.*bad\.t7"):
        convert(format, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.t7"]


def test_a_vocabulary_for_char_rnn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leave it out"):
        convert("char-rnn", char_rnn_checkpoint(tmp_path)[0], vocabulary="characters.json")


def test_torchfile_reads_the_same(tmp_path):
    """A reader that other people wrote."""
    torchfile = pytest.importorskip("torchfile")
    path, _ = torch_rnn_checkpoint(tmp_path)
    other = torchfile.load(str(path))[b"model"]._obj[b"net"]._obj[b"modules"]
    mine = read_t7(path).fields["model"].fields["net"].fields["modules"].fields

    assert [module._typename.decode() for module in other] == [module.name for module in mine.values()]
    assert isinstance(mine[1], Item)
    weight = mine[2].fields["weight"]
    numpy.testing.assert_array_equal(other[1]._obj[b"weight"], weight.parts[0].read().view(weight.shape).numpy())
