"""Checkpoints of other programs become model folders that give the same probabilities and work like any other."""

import json
import re

import foreign
import numpy
import pytest
import torch
from foreign import AWDModel, Rnnlm, RNNModel, SplitCrossEntropyLoss, randomised, save
from foreign_fastai_flair import fastai_checkpoint, flair_checkpoint
from foreign_torch7 import char_rnn_checkpoint, torch_rnn_checkpoint
from processes import run_program
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    default_data_collator,
    pipeline,
)

from hf_lstm import LSTMConfig, LSTMForCausalLM, Session, TokenStream, evaluate_stream
from hf_lstm.convert import convert_checkpoint, to_torch_lstm
from hf_lstm.convert.torch_lstm import Options

LENGTHS = [7, 1, 12, 4]  # of ragged rows
IDS = torch.randint(0, foreign.V, (4, 12), generator=torch.Generator().manual_seed(0))


def assert_same_logits(folder, module):
    """Of ragged rows, in one padded batch and each row alone in the module that was saved."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    mask = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        found = model(IDS, attention_mask=mask.long()).logits
        for row, length in enumerate(LENGTHS):
            expected = module(IDS[row : row + 1, :length])[0]
            torch.testing.assert_close(found[row, :length], expected.to(found.dtype), atol=1e-5, rtol=0)


def convert(format, path, folder, **options):
    return convert_checkpoint(format, path, folder / "converted", Options(**options))


WORD_MODELS = {
    "LSTM": {},
    "GRU": {"rnn_type": "GRU"},
    "tanh": {"rnn_type": "RNN_TANH"},
    "relu": {"rnn_type": "RNN_RELU"},
    "tied": {"ninp": 12, "tied": True},
    "one layer": {"nlayers": 1, "dropout": 0},
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("fields", WORD_MODELS.values(), ids=WORD_MODELS)
def test_word_language_model_gives_the_same_logits(tmp_path, fields, is_zip):
    module = randomised(RNNModel(**fields))
    path = save(module, tmp_path / "model.pt", is_zip)

    result = convert("word-language-model", path, tmp_path, vocabulary=foreign.word_file(tmp_path))

    assert_same_logits(tmp_path / "converted", module)
    assert result.loss == pytest.approx(result.source_loss, rel=1e-5)
    assert ("dropout" in " ".join(result.notes)) == ("dropout" not in fields)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before 1.6"])
def test_all_protocols_are_read(tmp_path, protocol, is_zip):
    module = nn.DataParallel(randomised(RNNModel(dropout=0)))
    path = save(module, tmp_path / "model.pt", is_zip, protocol)

    convert("word-language-model", path, tmp_path, vocabulary=foreign.word_file(tmp_path))

    assert_same_logits(tmp_path / "converted", module.module)


AWD_MODELS = {
    "as in the paper": {},
    "untied": {"widths": (8, 14, 14, 12), "tied": False},
    "one layer": {"widths": (8, 8)},
    "GRU": {"rnn_type": "GRU"},
    "no weight dropout": {"wdrop": 0},
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("fields", AWD_MODELS.values(), ids=AWD_MODELS)
def test_awd_lstm_lm_gives_the_same_logits(tmp_path, fields, is_zip):
    module = randomised(AWDModel(**fields))
    optimizer = torch.optim.ASGD(module.parameters())
    path = save([module, SplitCrossEntropyLoss(), optimizer], tmp_path / "model.pt", is_zip)

    result = convert("awd-lstm-lm", path, tmp_path, vocabulary=foreign.word_file(tmp_path))

    assert_same_logits(tmp_path / "converted", module)
    config = result.model.config
    assert (config.embedding_dropout, config.input_dropout, config.hidden_dropout) == (0.1, 0.65, 0.2)
    assert (config.output_dropout, config.weight_dropout) == (0.4, fields.get("wdrop", 0.5))
    assert config.cell_sizes == list(fields.get("widths", (8, 14, 14, 8)))[1:]
    assert "optimizer" in result.notes[0]


def test_the_state_dict_of_awd_lstm_lm_is_read(tmp_path):
    module = randomised(AWDModel())
    stale = {"rnns.0.module.weight_hh_l0": torch.zeros_like(module.rnns[0].weight_hh_l0_raw)}
    path = save(module.state_dict() | stale, tmp_path / "model.pt")

    convert("awd-lstm-lm", path, tmp_path, vocabulary=foreign.word_file(tmp_path))

    assert_same_logits(tmp_path / "converted", module)


def test_a_softmax_in_several_parts_is_refused(tmp_path):
    criterion = SplitCrossEntropyLoss(splits=[10, 20])
    path = save([AWDModel(), criterion, None], tmp_path / "model.pt")

    with pytest.raises(ValueError, match=r"splitcross\.SplitCrossEntropyLoss has weights of its own \(tail_vectors\)"):
        convert("awd-lstm-lm", path, tmp_path, vocabulary=foreign.word_file(tmp_path))


def write_bare(module, folder):
    return save(module.state_dict(), folder / "model.pt")


def write_under_a_key(module, folder):
    return save({"epoch": 3, "args": None, "model": module.state_dict(), "optimizer": {}}, folder / "model.pt")


def write_with_prefix(module, folder):
    return save({f"module.{name}": tensor for name, tensor in module.state_dict().items()}, folder / "model.pt")


def write_safetensors(module, folder):
    save_file({name: tensor.clone() for name, tensor in module.state_dict().items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def write_as_espnet2(module, folder):
    return save({f"lm.{name}": tensor for name, tensor in module.state_dict().items()}, folder / "model.pt")


WRITERS = [write_bare, write_under_a_key, write_with_prefix, write_safetensors, write_as_espnet2]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kind", [RNNModel, Rnnlm])
def test_state_dicts_give_the_same_logits(tmp_path, write, kind):
    module = randomised(kind())

    result = convert("torch-lstm", write(module, tmp_path), tmp_path, vocabulary=foreign.word_file(tmp_path))

    assert_same_logits(tmp_path / "converted", module)
    left = ["Beside the weights the file held epoch, args, optimizer, which was left out."]
    assert result.notes == (left if write is write_under_a_key else [])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_modules_without_biases_are_read(tmp_path, kind):
    module = randomised(RNNModel(dropout=0))
    module.rnn = randomised(kind(8, 12, 2, bias=False))

    convert("torch-lstm", write_bare(module, tmp_path), tmp_path, vocabulary=foreign.word_file(tmp_path))

    assert_same_logits(tmp_path / "converted", module)


def test_a_module_with_two_names_is_read_once(tmp_path):
    module = randomised(RNNModel(dropout=0))
    module.again = module.drop

    convert(
        "word-language-model", save(module, tmp_path / "model.pt"), tmp_path, vocabulary=foreign.word_file(tmp_path)
    )

    assert_same_logits(tmp_path / "converted", module)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_cells_of_espnet_are_read_in_their_order(tmp_path, layers):
    """DefaultRNNLM, a list of nn.LSTMCell: their weights have no number of a layer."""
    module = randomised(RNNModel(nlayers=layers, dropout=0))
    names = {"encoder": "predictor.embed", "decoder": "predictor.lo"}
    tensors = {}
    for name, tensor in module.state_dict().items():
        part, rest = name.split(".")
        layer = rest.rpartition("_l")
        tensors[f"predictor.rnn.{layer[2]}.{layer[0]}" if part == "rnn" else f"{names[part]}.{rest}"] = tensor
    path = save(dict(reversed(tensors.items())), tmp_path / "model.pt")

    result = convert("torch-lstm", path, tmp_path, vocabulary=foreign.word_file(tmp_path))

    assert_same_logits(tmp_path / "converted", module)
    assert ("predictor.rnn.0, predictor.rnn.1, predictor.rnn.2" in " ".join(result.notes)) == (layers == 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_are_read_exactly(tmp_path, dtype):
    module = randomised(RNNModel(dropout=0)).to(dtype)

    result = convert("torch-lstm", write_bare(module, tmp_path), tmp_path, vocabulary=foreign.word_file(tmp_path))

    assert result.model.dtype == torch.promote_types(dtype, torch.float32)
    assert_same_logits(tmp_path / "converted", module.to(result.model.dtype))


@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU", "RNN_TANH"])
def test_a_model_whose_rounding_grows_is_converted(tmp_path, rnn_type):
    """Each step of the check starts from one state, so that a chaotic model does not fail it."""
    module = randomised(RNNModel(rnn_type, nhid=64, dropout=0))
    with torch.no_grad():
        for layer in range(2):
            getattr(module.rnn, f"weight_hh_l{layer}").mul_(8)
    path = save(module, tmp_path / "model.pt")

    result = convert("word-language-model", path, tmp_path, vocabulary=foreign.word_file(tmp_path))

    assert result.loss == pytest.approx(result.source_loss, rel=1e-5)


def test_states_without_bound_are_named(tmp_path):
    module = randomised(RNNModel("RNN_RELU", nhid=64))
    with torch.no_grad():
        module.rnn.weight_hh_l0.abs_().mul_(9)
    path = save(module, tmp_path / "model.pt")

    with pytest.raises(ValueError, match="grow without bound"):
        convert("word-language-model", path, tmp_path, vocabulary=foreign.word_file(tmp_path))


class Unusual(nn.Module):
    """Names that tell nothing, no biases, and a decoder as wide as the embedding."""

    def __init__(self):
        super().__init__()
        self.z = nn.Linear(12, foreign.V, bias=False)
        self.a = nn.Embedding(foreign.V, 12)
        self.first = nn.RNN(12, 12, nonlinearity="relu", bias=False)
        self.second = nn.RNN(12, 12, nonlinearity="relu", bias=False)

    def forward(self, ids):
        return self.z(self.second(self.first(self.a(ids.t()))[0])[0]).transpose(0, 1)


def test_flags_name_the_parts(tmp_path):
    module = randomised(Unusual())
    path, words = write_bare(module, tmp_path), foreign.word_file(tmp_path)

    with pytest.raises(ValueError, match=r"several recurrent modules, first, second: .* `--recurrent`"):
        convert("torch-lstm", path, tmp_path, vocabulary=words)
    named = {"vocabulary": words, "recurrent": ["first", "second"]}
    with pytest.raises(ValueError, match=r"2 modules with a weight of shape .*, z, a: name one with `--embedding`"):
        convert("torch-lstm", path, tmp_path, **named)
    with pytest.raises(ValueError, match=r"`--embedding` \(rnn\) must be one of the modules of .* z, a"):
        convert("torch-lstm", path, tmp_path, embedding="rnn", **named)
    with pytest.raises(ValueError, match=r"`--recurrent` \(third\) is not .* which has first, second"):
        convert("torch-lstm", path, tmp_path, vocabulary=words, recurrent=["third"])

    convert("torch-lstm", path, tmp_path, embedding="a", decoder="z", cell_type="rnn_relu", **named)

    assert_same_logits(tmp_path / "converted", module)


def test_parts_that_were_not_chosen_are_left_out_aloud(tmp_path):
    module, other = randomised(Unusual()), randomised(RNNModel())
    path = save(module.state_dict() | other.state_dict(), tmp_path / "model.pt")

    chosen = {"embedding": "encoder", "recurrent": ["rnn"], "decoder": "decoder"}
    result = convert("torch-lstm", path, tmp_path, vocabulary=foreign.word_file(tmp_path), **chosen)

    assert_same_logits(tmp_path / "converted", other)
    assert "first.weight_ih_l0" in result.notes[0]
    assert "first.weight_ih_l0" in (tmp_path / "converted" / "README.md").read_text()


def test_an_rnn_is_read_as_tanh_aloud(tmp_path):
    module = randomised(RNNModel("RNN_TANH"))

    result = convert("torch-lstm", write_bare(module, tmp_path), tmp_path, vocabulary=foreign.word_file(tmp_path))

    assert "tanh was taken" in result.notes[0]
    assert_same_logits(tmp_path / "converted", module)


def test_a_matrix_that_is_stored_once_is_tied(tmp_path):
    module = randomised(RNNModel(ninp=12, tied=True))
    tensors = module.state_dict()
    del tensors["decoder.weight"]
    save_file(tensors, tmp_path / "model.safetensors")

    result = convert("torch-lstm", tmp_path / "model.safetensors", tmp_path, vocabulary=foreign.word_file(tmp_path))

    assert_same_logits(tmp_path / "converted", module)
    assert "stored once for both" in result.notes[0]


@pytest.mark.parametrize("cell_type", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_way_back_loads_into_torch(cell_type, tied):
    config = {"vocab_size": foreign.V, "hidden_size": 12, "cell_type": cell_type, "num_hidden_layers": 3}
    model = randomised(LSTMForCausalLM(LSTMConfig(tie_word_embeddings=tied, output_bias=not tied, **config)))
    kind = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN_TANH", "rnn_relu": "RNN_RELU"}[cell_type]
    module = RNNModel(kind, ninp=12, nlayers=3).eval()
    if tied:
        module.decoder = nn.Linear(12, foreign.V, bias=False)

    module.load_state_dict(to_torch_lstm(model))

    with torch.no_grad():
        torch.testing.assert_close(module(IDS), model(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"block_type": "residual"}, "residual"),
        ({"cell_type": "mogrifier"}, "mogrifier"),
        ({"embedding_size": 8}, "widths 12, 8"),
        ({"output_projection_size": 12}, "output_projection_size"),
        ({"adaptive_softmax_cutoffs": [2], "tie_word_embeddings": False}, "adaptive_softmax_cutoffs"),
    ],
)
def test_models_that_torch_cannot_hold_are_refused(fields, reason):
    model = LSTMForCausalLM(LSTMConfig(vocab_size=9, hidden_size=12, **fields))

    with pytest.raises(ValueError, match=reason):
        to_torch_lstm(model)


# A folder of each format, which goes through everything that a folder of our own goes through.


def torch_lstm_checkpoint(folder):
    (folder / "characters.json").write_text(json.dumps(foreign.CHARACTERS))
    return write_bare(randomised(RNNModel()), folder), Options(vocabulary=str(folder / "characters.json"))


def word_language_model_checkpoint(folder):
    return save(randomised(RNNModel()), folder / "model.pt"), Options(vocabulary=foreign.word_file(folder))


def awd_lstm_lm_checkpoint(folder):
    path = save([randomised(AWDModel()), SplitCrossEntropyLoss(), None], folder / "model.pt")
    return path, Options(vocabulary=foreign.word_file(folder))


def keras_checkpoint(folder):
    files = pytest.importorskip("keras_files", reason="needs the extra `convert`", exc_type=ImportError)
    (folder / "characters.json").write_text(json.dumps(foreign.CHARACTERS))
    layers = [files.embedding(foreign.V), files.cell("LSTM"), files.dense(units=foreign.V)]
    path = files.write(folder / "model.keras", files.sequential(layers), layers)
    return path, Options(vocabulary=str(folder / "characters.json"))


CHECKPOINTS = {
    "torch-lstm": torch_lstm_checkpoint,
    "word-language-model": word_language_model_checkpoint,
    "awd-lstm-lm": awd_lstm_lm_checkpoint,
    "fastai": fastai_checkpoint,
    "flair": flair_checkpoint,
    "torch-rnn": torch_rnn_checkpoint,
    "char-rnn": char_rnn_checkpoint,
    "keras": keras_checkpoint,
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    path, options = CHECKPOINTS[request.param](folder)
    convert_checkpoint(request.param, path, folder / "converted", options)
    return folder / "converted"


def test_every_format_is_tested():
    from hf_lstm.convert.folder import FORMATS

    assert CHECKPOINTS.keys() == FORMATS.keys()


def some_ids(tokenizer):
    """Ids of known tokens, 0 among them unless that stands for unknown ones."""
    first = 9 if tokenizer.unk_token_id == 0 else 0
    return [first, 4, 5, 6, first, 7, 8]


def some_text(tokenizer):
    return tokenizer.decode(some_ids(tokenizer))


def test_a_text_with_id_0_is_encoded_decoded_and_collated(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = some_text(tokenizer)
    ids = tokenizer(text).input_ids

    assert ids == some_ids(tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.pad_token_id != 0
    batch = default_data_collator([{"input_ids": ids, "labels": ids}])
    assert batch["labels"].tolist() == [ids]


@pytest.mark.parametrize("token", ["<pad>", "<eos>"])
def test_padding_of_the_source_is_left_out_of_the_loss_and_nothing_else(tmp_path, token):
    (tmp_path / "list.json").write_text(json.dumps([*foreign.CHARACTERS[:-1], token]))
    path = write_bare(randomised(RNNModel()), tmp_path)
    convert("torch-lstm", path, tmp_path, vocabulary=str(tmp_path / "list.json"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")

    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collate([tokenizer("\na\n"), tokenizer("\n")])

    assert tokenizer.pad_token == token
    assert batch["labels"].tolist() == [[0, 2, 0], [-100, -100, 0]]


def test_the_ids_of_special_tokens_are_the_sources(folder):
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).config

    assert len(tokenizer) == config.vocab_size == foreign.V
    for role in ("pad", "bos", "eos"):
        assert getattr(config, f"{role}_token_id") == getattr(tokenizer, f"{role}_token_id")
    if "xxbos" in tokenizer.get_vocab():
        expected = ("xxbos", "xxbos", "xxpad")
    else:
        expected = ("<eos>" if "<eos>" in tokenizer.get_vocab() else None, None, None)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == expected


def test_text_is_generated_scored_and_continued(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = some_text(tokenizer)
    ids = torch.tensor([tokenizer(text).input_ids])

    written = model.generate(ids, max_new_tokens=9, min_new_tokens=9, do_sample=False)  # without a mask: 0 is a token
    session = Session(model, tokenizer)
    session.feed(text)
    assert "".join(session.stream(max_new_tokens=3, do_sample=False))
    assert written.shape == (1, 16)
    stepwise = ids
    with torch.no_grad():
        for _ in range(9):
            logits = model(stepwise).logits[:, -1]
            if model.config.eos_token_id is not None:
                logits[:, model.config.eos_token_id] = -torch.inf
            stepwise = torch.cat([stepwise, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(written, stepwise)
    stream = TokenStream.from_documents([text * 20], tokenizer)
    assert evaluate_stream(model, stream)["loss"] > 0
    assert pipeline("text-generation", model=str(folder))(text, max_new_tokens=2)[0]["generated_text"]


def test_the_lines_of_the_card_pad_a_batch(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [some_text(tokenizer), tokenizer.decode([5])]
    card = (folder / "README.md").read_text(encoding="utf-8")
    if tokenizer.pad_token is not None:
        assert "pad_sequence" not in card
        return
    (lines,) = re.findall(r"```python\n(import torch\n\nrows = .*?)```", card, flags=re.DOTALL)
    names = {"tokenizer": tokenizer, "texts": texts}

    exec(lines, names)  # noqa: S102 (the card's own lines)

    with torch.no_grad():
        logits = model(names["input_ids"], attention_mask=names["attention_mask"]).logits[:, -1]
        for row, text in zip(logits, texts, strict=True):
            alone = model(torch.tensor([tokenizer(text).input_ids])).logits[0, -1]
            torch.testing.assert_close(row, alone, atol=1e-6, rtol=0)


def test_the_folder_is_exported_verified_and_published(folder, tmp_path, run):
    run("convert.py", "--to", "onnx", "--model", folder, "--output_dir", tmp_path)

    assert "All code is that of hf-lstm" in run("verify.py", "--model", folder)
    assert "Nothing was uploaded." in run("push.py", "--model", folder, "--repo", "me/old", "--dry_run", "true")


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["hf_lstm"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = AutoTokenizer.from_pretrained(sys.argv[1]).decode([0, 4, 5])
print(type(model).__name__, model.lm_head.bias is not None)
"""


def test_the_folder_loads_without_the_package(folder):
    ran = run_program(WITHOUT_THE_PACKAGE, str(folder))

    assert ran.stdout.split()[-2:] == ["LSTMForCausalLM", "True"], ran.stderr


# The script.


def test_the_script_converts_and_says_what_it_did(tmp_path, run):
    path, options = word_language_model_checkpoint(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat , the cat sat\n" * 3)
    target = tmp_path / "new" / "model"

    printed = run(
        *("convert.py", "--from", "word-language-model", path, "--output_dir", target),
        *("--vocabulary", options.vocabulary, "--text", tmp_path / "text.txt"),
    )

    losses = re.findall(r"nats per token: ([\d.]+) by .* numpy, ([\d.]+) by", printed)[0]
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=2e-6)
    assert "loss of 23 tokens" in printed
    assert f"written to {target}" in printed
    assert str(tmp_path) not in (target / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either `--from FORMAT SOURCE`"),
        (["--from", "torch-lstm", "x.pt", "--to", "onnx"], "give either `--from FORMAT SOURCE`"),
        (["--from", "torch-lstm"], "needs the file to convert"),
        (["--from", "keras1", "x"], "must be one of torch-lstm"),
        (["--from", "torch-lstm", "x.pt", "--model", "m"], "`--model` has no meaning with `--from`"),
        (["--to", "onnx", "--model", "m", "x.pt"], "`x.pt` has no meaning with `--to`"),
        (["--to", "onnx", "--model", "m", "--text", "t"], "`--text` has no meaning with `--to`"),
        (["--to", "onnx"], "needs `--model`"),
        (["--from", "torch-lstm", "missing.pt"], "missing.pt is not a file"),
    ],
)
def test_the_script_refuses_arguments_in_words(tmp_path, run, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run("convert.py", "--output_dir", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


# Bad input: nothing is written unless all of it is.


def without(name):
    return {key: tensor for key, tensor in RNNModel().state_dict().items() if key != name}


def changed(**tensors):
    return RNNModel().state_dict() | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


class Bidirectional(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.encoder, self.rnn, self.decoder = nn.Embedding(31, 8), nn.LSTM(8, 6, **options), nn.Linear(12, 31)


BAD = {
    "rnn is bidirectional": lambda: Bidirectional(bidirectional=True).state_dict(),
    "projects its output (`proj_size`)": lambda: Bidirectional(proj_size=3).state_dict(),
    "it has attention on top": lambda: changed(attention__weight=torch.zeros(12, 12)),
    "it has peephole connections": lambda: changed(rnn__peephole=torch.zeros(12)),
    "it has normalisation layers": lambda: changed(norm__weight=torch.zeros(12)),
    "it has several inputs": lambda: changed(position_embedding__table=torch.zeros(9, 8)),
    "it is another kind of model": lambda: changed(gate__weight=torch.zeros(3, 3)),
    "rnn.weight_hh_l0 holds 1 numbers that are NaN": lambda: changed(
        rnn__weight_hh_l0=torch.full((48, 12), 1.0).index_put(
            (torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan)
        )
    ),
    "quantised weights": lambda: changed(rnn__weight_hh_l0=torch.zeros(48, 12, dtype=torch.int8)),
    "rnn lacks weight_ih_l0 or weight_hh_l0": lambda: without("rnn.weight_hh_l0"),
    "do not fit each other": lambda: changed(rnn__bias_ih_l0=torch.zeros(47)),
    "4, 3 or 1 times as many rows": lambda: changed(
        rnn__weight_hh_l0=torch.zeros(24, 12),
        rnn__weight_ih_l0=torch.zeros(24, 8),
        rnn__bias_ih_l0=torch.zeros(24),
        rnn__bias_hh_l0=torch.zeros(24),
    ),
    "holds no embedding, a weight of shape (V, 8)": lambda: without("encoder.weight"),
    "cannot follow one that writes 12": lambda: changed(rnn__weight_ih_l1=torch.zeros(48, 9)),
    "holds no decoder, a weight of shape (31, 12)": lambda: without("decoder.weight"),
    "holds encoder.weight, and no weights of an nn.LSTM": lambda: {"encoder.weight": torch.zeros(31, 8)},
    "holds nothing, and no": dict,
    "holds list, and no": lambda: [RNNModel().state_dict()],
    "holds several models, 'a', 'b'": lambda: {"a": RNNModel().state_dict(), "b": RNNModel().state_dict()},
    "among its tensors": lambda: changed(encoder__bias=3),
    "holds int among its tensors": lambda: {**RNNModel().state_dict(), 0: torch.zeros(3)},
    "holds str among its tensors": lambda: {**RNNModel().state_dict(), "# Licence\n": torch.zeros(3)},
    "holds no embedding": lambda: changed(encoder__weight=torch.zeros(0, 8)),
}


# Whole modules, of which the code is not read.
BAD |= {
    "its activation is a torch.nn.modules.activation.ReLU": lambda: with_part(activation=nn.ReLU()),
    "its rnn is a model.RNNModel": lambda: with_part(rnn=RNNModel()),
    "rescales embeddings": lambda: with_part(encoder=nn.Embedding(foreign.V, 8, max_norm=1)),
    "holds no decoder": lambda: with_part(ninp=12, tied=True, decoder=None),
}


def with_part(ninp=8, tied=False, **parts):
    module = RNNModel(ninp=ninp, tied=tied)
    for name, part in parts.items():
        setattr(module, name, part)
    return module


@pytest.mark.parametrize("message", BAD)
def test_bad_models_are_refused_in_words(tmp_path, message):
    path = save(BAD[message](), tmp_path / "model.pt")

    with pytest.raises(ValueError, match=re.escape(message)):
        convert("torch-lstm", path, tmp_path, vocabulary=foreign.word_file(tmp_path))
    assert [name for name in tmp_path.iterdir() if name.name not in ("model.pt", "vocab.txt")] == []


@pytest.mark.parametrize("chosen", [True, False])
def test_a_part_of_the_chosen_modules_is_never_left_out(tmp_path, chosen):
    path = save(changed(rnn__peephole=torch.zeros(12)), tmp_path / "model.pt")
    names = {"embedding": "encoder", "recurrent": ["rnn"], "decoder": "decoder"} if chosen else {}

    with pytest.raises(ValueError, match=r"holds rnn\.peephole"):
        convert("torch-lstm", path, tmp_path, vocabulary=foreign.word_file(tmp_path), **names)


def test_a_qrnn_is_refused_by_name(tmp_path):
    tensors = {"encoder.weight": torch.zeros(31, 8), "rnns.0.linear.weight_raw": torch.zeros(36, 8)}

    with pytest.raises(ValueError, match="its layers are QRNNs"):
        convert("awd-lstm-lm", save(tensors, tmp_path / "model.pt"), tmp_path)


def test_a_cell_that_contradicts_the_file_is_refused(tmp_path):
    path = write_bare(RNNModel(), tmp_path)

    with pytest.raises(ValueError, match=r"`--cell_type` \(gru\) contradicts .* whose cell is lstm"):
        convert("torch-lstm", path, tmp_path, vocabulary=foreign.word_file(tmp_path), cell_type="gru")


@pytest.mark.parametrize("format", CHECKPOINTS)
def test_a_model_of_another_program_is_refused(tmp_path, format):
    path = save({"layers.0.attention.weight": torch.zeros(3, 3)}, tmp_path / "model.pt")

    with pytest.raises(ValueError, match=re.escape(str(path))):
        convert(format, path, tmp_path, vocabulary=foreign.word_file(tmp_path))


def test_awd_lstm_lm_is_not_read_as_another(tmp_path):
    path = save(AWDModel().state_dict(), tmp_path / "model.pt")

    with pytest.raises(ValueError, match="use `--from awd-lstm-lm`"):
        convert("torch-lstm", path, tmp_path, vocabulary=foreign.word_file(tmp_path))
    with pytest.raises(ValueError, match="try `--from torch-lstm`"):
        convert("awd-lstm-lm", write_bare(RNNModel(), tmp_path), tmp_path, vocabulary=foreign.word_file(tmp_path))


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    path, options = word_language_model_checkpoint(tmp_path)
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "mine").touch()

    with pytest.raises(FileExistsError, match="is not empty"):
        convert_checkpoint("word-language-model", path, tmp_path / "converted", options)
    assert [name.name for name in (tmp_path / "converted").iterdir()] == ["mine"]


def test_a_conversion_that_does_not_agree_writes_nothing(tmp_path, monkeypatch):
    path, options = word_language_model_checkpoint(tmp_path)
    uniform = numpy.zeros(foreign.V, dtype=numpy.float32)
    monkeypatch.setattr("hf_lstm.convert.folder.source_logits", lambda *_: uniform)

    with pytest.raises(ValueError, match=r"3\.433987 nats by its own weights"):
        convert_checkpoint("word-language-model", path, tmp_path / "converted", options)
    assert {name.name for name in tmp_path.iterdir()} == {"model.pt", "vocab.txt"}
