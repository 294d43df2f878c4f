"""Language models of fastai and flair give the same probabilities and ids as in these libraries, and run nothing."""

import importlib.util
import json
import math
import pickle
import random
import sys
import types
from pathlib import Path

import pytest
import torch
from foreign_fastai_flair import (
    CHARACTERS,
    TOKENS,
    AWDLanguageModel,
    Dictionary,
    FlairModel,
    L,
    V,
    fastai_checkpoint,
    flair_checkpoint,
    pickled,
    randomised,
    save,
)
from test_convert_pickles import PLANTED
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lstm import surprisal
from hf_lstm.convert import convert_checkpoint
from hf_lstm.convert.folder import FORMATS
from hf_lstm.convert.torch_lstm import Options
from hf_lstm.tokenizers import encode

LENGTHS = [7, 1, 12, 4]  # of ragged rows
IDS = torch.randint(0, V, (4, 12), generator=torch.Generator().manual_seed(0))
LAYOUTS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before 1.6"])


def convert(format, path, **options):
    return convert_checkpoint(format, path, path.parent / "converted", Options(**options))


def assert_same_logits(model, module):
    """Of ragged rows, in one padded batch and each row alone in the module that was saved."""
    mask = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        found = model(IDS, attention_mask=mask.long()).logits
        for row, length in enumerate(LENGTHS):
            expected = module(IDS[row : row + 1, :length])[0]
            torch.testing.assert_close(found[row, :length], expected, atol=1e-5, rtol=0)


FASTAI_MODELS = {
    "tied": {},
    "an old version": {"is_old": True},
    "untied": {"tied": False, "widths": (8, 14, 10)},
    "without a bias": {"out_bias": False},
    "one layer": {"widths": (8, 8)},
}


@LAYOUTS
@pytest.mark.parametrize("with_optimizer", [False, True], ids=["bare", "with an optimizer"])
@pytest.mark.parametrize("fields", FASTAI_MODELS.values(), ids=FASTAI_MODELS)
def test_fastai_gives_the_same_logits(tmp_path, fields, with_optimizer, is_zip):
    module = randomised(AWDLanguageModel(**fields))
    state = module.state_dict()
    if with_optimizer:
        state = {"model": state, "opt": {"state": [{"step": 3}], "hypers": L([{"lr": 1e-3, "mom": L([0.9])}])}}
    path = save(state, tmp_path / "model.pth", is_zip)

    result = convert("fastai", path, vocabulary=pickled(L(TOKENS), tmp_path / "itos.pkl"))

    assert_same_logits(result.model, module)
    assert result.model.config.tie_word_embeddings == (fields.get("tied", True))


FLAIR_MODELS = {
    "LSTM": {},
    "GRU": {"kind": "GRU"},
    "two layers": {"nlayers": 2},
    "nout": {"nout": 9},
    "nout of the embedding": {"nout": 8, "kind": "GRU", "nlayers": 2},
}


@pytest.mark.parametrize("protocol", [2, 4])
@LAYOUTS
@pytest.mark.parametrize("fields", FLAIR_MODELS.values(), ids=FLAIR_MODELS)
def test_flair_gives_the_same_logits(tmp_path, fields, is_zip, protocol):
    module = randomised(FlairModel(**fields))
    path = save(module.content(), tmp_path / "best-lm.pt", is_zip, protocol)

    assert_same_logits(convert("flair", path).model, module)


def test_files_of_the_first_flair_are_read(tmp_path):
    """They have no delimiter, no kind of layer, and a dictionary that does not say whether it knows `<unk>`."""
    module, dictionary = randomised(FlairModel()), Dictionary(CHARACTERS)
    del dictionary.add_unk
    later = ("document_delimiter", "recurrent_type", "has_decoder")
    content = module.content(dictionary=dictionary, **dict.fromkeys(later, ...))

    assert_same_logits(convert("flair", save(content, tmp_path / "lm.pt")).model, module)
    assert AutoTokenizer.from_pretrained(tmp_path / "converted").unk_token_id == 0


def test_a_checkpoint_of_a_training_is_read(tmp_path):
    module = randomised(FlairModel())
    optimizer = torch.optim.AdamW(module.parameters())
    module(IDS).sum().backward()
    optimizer.step()
    content = module.content(optimizer_state_dict=optimizer.state_dict(), epoch=1, split=2, loss=3.4)
    result = convert("flair", save(content, tmp_path / "checkpoint.pt", protocol=4))

    assert_same_logits(result.model, module)
    assert "The state of the optimizer was left out." in result.notes
    assert any(r"'\n' (`document_delimiter`)" in note for note in result.notes)


def test_a_backward_model_of_flair_reads_backward(tmp_path):
    module, text = randomised(FlairModel(nout=9)), "some text, unknown signs\nand é"
    path = save(module.content(is_forward_lm=False), tmp_path / "backward.pt", protocol=4)
    (tmp_path / "text.txt").write_text(text)

    result = convert_checkpoint("flair", path, tmp_path / "converted", text=tmp_path / "text.txt")
    model, tokenizer = result.model, AutoTokenizer.from_pretrained(tmp_path / "converted")

    ids = torch.tensor([Dictionary(CHARACTERS).ids(text[::-1])])
    with torch.no_grad():
        nats = F.cross_entropy(module(ids)[0, :-1], ids[0, 1:], reduction="none").tolist()
    assert result.source_loss == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    rows = surprisal(model, tokenizer, [text], base=math.e)
    assert rows["surprisal"].tolist()[:-1] == pytest.approx(nats[::-1], rel=1e-5)

    assert model.config.direction == "backward"
    assert_same_logits(model, module)
    assert "from its last character to its first" in (tmp_path / "converted" / "README.md").read_text()


# Tokens.


def test_ids_are_those_of_fastais_word_list(tmp_path):
    path, options = fastai_checkpoint(tmp_path)
    convert("fastai", path, vocabulary=options.vocabulary)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    ids = {token: index for index, token in enumerate(TOKENS) if token != "xxfake"}  # as Numericalize has it
    rng = random.Random(0)
    strange = ["The", "xxfake", "xxbos.", "a\nb", "é", "\t", "\u00a0", "-1", "xxunk,", "<unk>", "xxmajthe"]
    lines = [" ".join(rng.choices([*TOKENS, *strange], k=rng.randrange(1, 20))) for _ in range(1000)]
    expected = [[ids.get(token, 0) for token in line.split(" ")] for line in lines]

    assert [tokenizer(line).input_ids for line in lines] == expected
    without_padding = [line for line in lines if "xxpad" not in line]
    found = [row.tolist() for row in encode(without_padding, tokenizer)]
    assert found == [ids for line, ids in zip(lines, expected, strict=True) if "xxpad" not in line]
    assert tokenizer("xxbos  the  .  ").input_ids == tokenizer("xxbos the .").input_ids
    known = "xxbos xxmaj the \n word0 xxfld 山"
    assert tokenizer.decode(tokenizer(known).input_ids) == known
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 2, 2)
    assert tokenizer.padding_side == "left"


def test_the_fillers_keep_their_ids(tmp_path):
    path, options = fastai_checkpoint(tmp_path)
    convert("fastai", path, vocabulary=options.vocabulary)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")

    assert len(tokenizer) == V
    assert tokenizer.convert_ids_to_tokens([28, 29, 30]) == ["xxfake 28", "xxfake 29", "xxfake 30"]


def test_the_first_lines_of_fastais_card_say_how_text_is_made(tmp_path):
    path, options = fastai_checkpoint(tmp_path)
    convert("fastai", path, vocabulary=options.vocabulary)
    card = (tmp_path / "converted" / "README.md").read_text()

    assert 'text = " ".join(tokenize1("Raw text.", WordTokenizer()))' in card.split("## Where")[0]
    assert "Tokens with a space between them." in card


@pytest.mark.parametrize("name", ["itos.pkl", "itos.json"])
@pytest.mark.parametrize("kind", [list, L])
@pytest.mark.parametrize("protocol", [2, 4])
def test_vocabularies_are_read(tmp_path, name, kind, protocol):
    path, _ = fastai_checkpoint(tmp_path)
    if name.endswith(".json"):
        (tmp_path / name).write_text(json.dumps(TOKENS))
    else:
        pickled(kind(TOKENS), tmp_path / name, protocol)
    convert("fastai", path, vocabulary=str(tmp_path / name))

    assert AutoTokenizer.from_pretrained(tmp_path / "converted")("the").input_ids == [9]


def test_ids_are_those_of_flairs_dictionary(tmp_path):
    convert("flair", flair_checkpoint(tmp_path)[0])
    tokenizer, dictionary = AutoTokenizer.from_pretrained(tmp_path / "converted"), Dictionary(CHARACTERS)
    rng = random.Random(0)
    pieces = [*CHARACTERS, "Ä", "e\u0301", "\r\n", "<unk>", "😀", "\u200b", "  ", "[UNK]", "\x00"]
    lines = ["".join(rng.choices(pieces, k=rng.randrange(30))) for _ in range(1000)]
    expected = [dictionary.ids(line) for line in lines]

    assert [tokenizer(line).input_ids for line in lines] == expected
    assert [[*row] for row in encode([line for line in lines if "<unk>" not in line], tokenizer)] == [
        ids for line, ids in zip(lines, expected, strict=True) if "<unk>" not in line
    ]
    text = "a line\nand another é"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (None, None, None)


def test_a_dictionary_without_unknown_refuses_what_it_lacks(tmp_path):
    dictionary = Dictionary(CHARACTERS + "0", add_unk=False)
    convert("flair", save(randomised(FlairModel()).content(dictionary=dictionary), tmp_path / "lm.pt"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")

    assert tokenizer("\n a0").input_ids == [0, 1, 2, 30]
    with pytest.raises(Exception, match="UNK"):
        tokenizer("a1")


# A planted pickle; those in the models themselves are in test_convert_pickles.py.


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_vocabulary_is_refused_and_nothing_runs(tmp_path, planted, protocol):
    path, _ = fastai_checkpoint(tmp_path)
    file = pickled(L([*TOKENS, PLANTED[planted](tmp_path / "ran")]), tmp_path / "itos.pkl", protocol)

    with pytest.raises(ValueError, match=rf"itos\.pkl is refused: its pickle names `{planted.split()[0]}`.* as JSON"):
        convert("fastai", path, vocabulary=file)
    assert {entry.name for entry in tmp_path.iterdir()} == {"model.pth", "itos.pkl"}


# Files that are not as they should be.


def fastai_state():
    return randomised(AWDLanguageModel()).state_dict()


def renamed(state, old, new):
    return {name.replace(old, new): value for name, value in state.items()}


BIDIRECTIONAL = {f"0.rnns.0.module.{name}_reverse": torch.zeros(3, 3) for name in ("weight_ih_l0", "bias_ih_l0")}
QRNN = {"0.rnns.0.layers.0.linear.weight_raw": torch.zeros(3, 3), "0.encoder.weight": torch.zeros(V, 3)}
OTHER = torch.full((V, 8), torch.nan)

BAD_FASTAI = {
    "reads in both directions": lambda: fastai_state() | BIDIRECTIONAL,
    "is a QRNN": lambda: QRNN,
    "is an encoder alone": lambda: randomised(AWDLanguageModel())[0].state_dict(),
    "holds layers.0.attention.weight": lambda: {"layers.0.attention.weight": torch.zeros(3, 3)},
    "Try `--from awd-lstm-lm`": lambda: {"encoder.weight": OTHER, "decoder.weight": OTHER},
    r"lacks 1\.decoder\.weight": lambda: {k: v for k, v in fastai_state().items() if not k.startswith("1.")},
    "lacks weight_hh_l0_raw of layer 0": lambda: renamed(fastai_state(), "_raw", ""),
    r"holds 1\.layers\.0\.weight": lambda: fastai_state() | {"1.layers.0.weight": OTHER},
    "is the same in fastai": lambda: fastai_state() | {"0.encoder_dp.emb.weight": torch.zeros(V, 8)},
    "do not fit each other": lambda: fastai_state() | {"0.rnns.1.module.weight_ih_l0": torch.zeros(3, 3)},
    "248 numbers that are NaN": lambda: fastai_state() | {"1.decoder.weight": OTHER},
    "holds list": lambda: [1, 2],
}


@pytest.mark.parametrize("message", BAD_FASTAI)
def test_other_models_are_not_read_as_fastais(tmp_path, message):
    path = save(BAD_FASTAI[message](), tmp_path / "bad.pth")
    vocabulary = pickled(TOKENS, tmp_path / "itos.pkl")

    with pytest.raises(ValueError, match=rf"bad\.pth.*{message}"):
        convert("fastai", path, vocabulary=vocabulary)
    assert {entry.name for entry in tmp_path.iterdir()} == {"bad.pth", "itos.pkl"}


BAD_TOKENS = {
    r"itos\.pkl holds 30 tokens, and the model 31": TOKENS[:-1],
    r"itos\.pkl holds 'the' twice, as entries 9 and 31": [*TOKENS, "the"],
    "must hold a list of tokens": [L(TOKENS), L(["neg", "pos"])],
    "begins with 'the'": TOKENS[9:] + TOKENS[:9],
    "begins with 'nothing'": [],
}


@pytest.mark.parametrize("message", BAD_TOKENS)
def test_bad_vocabularies_are_refused_in_words(tmp_path, message):
    path, _ = fastai_checkpoint(tmp_path)

    with pytest.raises(ValueError, match=message):
        convert("fastai", path, vocabulary=pickled(BAD_TOKENS[message], tmp_path / "itos.pkl"))
    assert not (tmp_path / "converted").exists()


def test_a_missing_or_damaged_vocabulary_is_refused(tmp_path):
    path, options = fastai_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="31 tokens, and its file does not say which"):
        convert("fastai", path)
    data = (tmp_path / "itos.pkl").read_bytes()
    for wrong in (data[:-30], b"", b"the\ncat\n", data + data):
        (tmp_path / "itos.pkl").write_bytes(wrong)
        with pytest.raises(ValueError, match=r"itos\.pkl"):
            convert("fastai", path, vocabulary=options.vocabulary)
    # A tuple ("storage", float32, "0", "cpu", 3) as a persistent id, as within a file of torch.save.
    storage = b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x03tQ."
    (tmp_path / "itos.pkl").write_bytes(storage)
    with pytest.raises(ValueError, match="holds tensors"):
        convert("fastai", path, vocabulary=options.vocabulary)


def damaged(**fields):
    """A dictionary with other fields."""
    dictionary = Dictionary(CHARACTERS)
    vars(dictionary).update(fields)
    return FlairModel().content(dictionary=dictionary)


def two_way():
    return FlairModel().content(state_dict=FlairModel().state_dict() | {"rnn.weight_ih_l0_reverse": torch.zeros(3, 3)})


TWICE = [item.encode() for item in ["<unk>", *CHARACTERS[:-1], "a"]]
BAD_FLAIR = {
    "holds layers, and a character": lambda: {"layers": torch.zeros(3, 3)},
    "holds list": lambda: [1, 2],
    "without an output layer": lambda: FlairModel().content(
        state_dict={k: v for k, v in FlairModel().state_dict().items() if not k.startswith("decoder")}
    ),
    "rnn is bidirectional": two_way,
    "holds attention.weight": lambda: FlairModel().content(
        state_dict=FlairModel().state_dict() | {"attention.weight": torch.zeros(3)}
    ),
    "says that its cell is gru": lambda: FlairModel().content(recurrent_type="GRU"),
    "do not fit each other": lambda: FlairModel().content(
        state_dict=FlairModel().state_dict() | {"decoder.weight": torch.zeros(V, 13)}
    ),
    "must hold bytes": lambda: damaged(idx2item=["a"] * V),
    "contradicts itself about b'a', whose id in `item2idx` is 3": lambda: damaged(
        idx2item=[b"<unk>", b"\n", *(c.encode() for c in CHARACTERS[2:])]
    ),
    "contradicts itself about b'a', whose id in `item2idx` is 30": lambda: damaged(
        idx2item=TWICE, item2idx={item: index for index, item in enumerate(TWICE)}
    ),
    "is not UTF-8": lambda: damaged(idx2item=[b"\xff"], item2idx={b"\xff": 0}),
    "they would be taken for": lambda: damaged(idx2item=[b"a", b"<unk>"], item2idx={b"a": 0, b"<unk>": 1}),
    "holds 30 tokens, and the model 31": lambda: FlairModel().content(dictionary=Dictionary(CHARACTERS[:-1])),
}


@pytest.mark.parametrize("message", BAD_FLAIR)
def test_other_models_are_not_read_as_flairs(tmp_path, message):
    path = save(BAD_FLAIR[message](), tmp_path / "bad.pt")

    with pytest.raises(ValueError, match=rf"bad\.pt.*{message}"):
        convert("flair", path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.pt"]


@pytest.mark.parametrize("format", ["fastai", "flair"])
def test_a_state_dict_of_other_things_is_refused(tmp_path, format):
    state = fastai_state() | {"0.rnns.0.module.bias_ih_l0": 3} if format == "fastai" else None
    content = state or FlairModel().content(state_dict=FlairModel().state_dict() | {"decoder.bias": [1.0]})
    path = save(content, tmp_path / "bad.pt")

    with pytest.raises(ValueError, match=r"bad\.pt holds .*bias.* among its tensors"):
        convert(format, path)


def test_a_vocabulary_for_flair_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leave it out"):
        convert("flair", flair_checkpoint(tmp_path)[0], vocabulary="characters.json")


@pytest.mark.parametrize("format", ["fastai", "flair", "torch-rnn", "char-rnn"])
@pytest.mark.parametrize("name", ["cell_type", "embedding", "recurrent", "decoder"])
def test_names_of_parts_are_refused(tmp_path, format, name):
    (tmp_path / "model").touch()

    with pytest.raises(ValueError, match=rf"`--{name}` \(lstm\) has no meaning"):
        convert(format, tmp_path / "model", **{name: "lstm"})


@LAYOUTS
@pytest.mark.parametrize("format", ["fastai", "flair"])
def test_half_a_file_is_refused(tmp_path, format, is_zip):
    state = AWDLanguageModel().state_dict() if format == "fastai" else FlairModel().content()
    path = save(state, tmp_path / "model.pt", is_zip)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    with pytest.raises(ValueError, match=r"model\.pt"):
        convert(format, path, **({"vocabulary": pickled(TOKENS, tmp_path / "itos.pkl")} if format == "fastai" else {}))


@pytest.mark.parametrize("format", FORMATS)
def test_an_elmo_is_refused_by_name(tmp_path, format):
    (tmp_path / "elmo.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(5000) + b"RNN_0\0RNN\0MultiRNNCell\0")
    (tmp_path / "options.json").write_text('{"lstm": {"use_skip_connections": true}, "char_cnn": {}}')

    for name in ("elmo.hdf5", "options.json"):
        with pytest.raises(ValueError, match=f"{name} is an ELMo"):
            convert(format, tmp_path / name)


# The libraries themselves, where they are installed.


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "fields", [{}, {"n_layers": 1}, {"tie_weights": False, "n_layers": 2}, {"out_bias": False}], ids=str
)
def test_fastai_itself_agrees(tmp_path, fields):
    learner = pytest.importorskip("fastai.learner")
    core, awd = pytest.importorskip("fastai.text.models.core"), pytest.importorskip("fastai.text.models.awdlstm")
    text, numericalize = pytest.importorskip("fastai.text.core"), pytest.importorskip("fastai.text.data").Numericalize
    optimizer = pytest.importorskip("fastai.optimizer")
    config = awd.awd_lstm_lm_config | {"emb_sz": 10, "n_hid": 14, "n_layers": 3} | fields
    module = randomised(core.get_language_model(awd.AWD_LSTM, V, config=config)).train()
    adam = optimizer.Adam(module.parameters(), lr=1e-3)
    module(IDS)[0].sum().backward()
    adam.step()
    learner.save_model(tmp_path / "model.pth", module, adam)
    texts = [
        text.tokenize1(raw, text.BaseTokenizer()) for raw in ("The cat SAT on it, aaaa!", "A cat ; sat sat sat sat on")
    ]
    numbers = numericalize(min_freq=1)
    numbers.setup(texts)
    tokens = [*numbers.vocab[: numbers.vocab.index("xxfake")], *["xxfake"] * V][:V]
    (tmp_path / "itos.pkl").write_bytes(pickle.dumps(type(texts[0])(tokens)))

    model = convert("fastai", tmp_path / "model.pth", vocabulary=str(tmp_path / "itos.pkl")).model

    def logits(ids):
        module.eval().reset()
        return module(ids)[0]

    assert_same_logits(model, logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    for tokenized in texts:
        assert tokenizer(" ".join(tokenized)).input_ids == numbers(tokenized).tolist()


@pytest.fixture
def flair(monkeypatch):
    """flair's module of language models, without the rest of flair, which new versions of transformers break."""
    spec = importlib.util.find_spec("flair")
    if spec is None:
        pytest.skip("needs flair, which no extra installs: its other parts do not import beside this transformers")
    for name in ("flair", "flair.models", "flair.nn"):
        module = types.ModuleType(name)
        module.__path__ = [str(Path(spec.origin).parent.joinpath(*name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["flair"].device = torch.device("cpu")
    return pytest.importorskip("flair.models.language_model", exc_type=ImportError)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "fields", [{}, {"nlayers": 2}, {"nout": 9}, {"recurrent_type": "GRU"}, {"is_forward_lm": False}], ids=str
)
def test_flair_itself_agrees(tmp_path, fields, flair):
    dictionary = flair.Dictionary()
    for character in CHARACTERS:
        dictionary.add_item(character)
    module = randomised(
        flair.LanguageModel(dictionary, **{"is_forward_lm": True, "hidden_size": 12, "nlayers": 1} | fields)
    )
    module.save(tmp_path / "lm.pt")

    model = convert("flair", tmp_path / "lm.pt").model

    assert_same_logits(model, lambda ids: module(ids.t(), module.init_hidden(1))[0].transpose(0, 1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    line = "A line, with é and Ä.\n"
    assert tokenizer(line).input_ids == dictionary.get_idx_for_items(list(line))
    ids = torch.from_numpy(encode([line], tokenizer, direction=model.config.direction)[0])[None].long()
    with torch.no_grad():
        loss = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    assert module.calculate_perplexity(line) == pytest.approx(loss.exp().item(), rel=1e-5)
