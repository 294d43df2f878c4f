"""train.py trains on from a saved model, with its tokenizer, config and generation config."""

import json
import re

import pytest
import torch
from conftest import SCRIPTS, SMALL, TEXT, run_script
from safetensors.torch import load_file
from transformers import GPT2Config, Trainer

from hf_lstm import LSTMConfig, LSTMForCausalLM, char_tokenizer
from hf_lstm.training import last_complete_checkpoint
from hf_lstm.training.report import prompt_ids


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A saved model that knows the letters of the song, and neither its digits nor its commas."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = char_tokenizer(["".join(set(TEXT) - set("0123456789,"))])
    torch.manual_seed(0)
    model = LSTMForCausalLM(
        LSTMConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, output_dropout=0.25, forget_gate_bias=0.5)
    )
    model.generation_config.update(temperature=0.55, do_sample=True, eos_token_id=None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


STREAMED = ["--streaming", "true", "--validation_file", "song.jsonl", "--batching", "lanes"]
WAYS = [
    pytest.param(["--batching", "lanes"], id="lanes"),
    pytest.param(["--batching", "packed"], id="packed", marks=pytest.mark.slow),
    pytest.param(["--batching", "padded"], id="padded", marks=pytest.mark.slow),
    pytest.param(STREAMED, id="streaming", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("way", WAYS)
def test_training_goes_on_from_a_saved_model(base, tmp_path, monkeypatch, capsys, way):
    """At a learning rate of 0, so that what is saved is what was loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "song.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines()))
    flags = ["--train_file", "song.jsonl", "--model_name_or_path", base, "--max_steps", 2, *SMALL, *way]
    flags += ["--learning_rate", 0, "--data_description", "a song about bottles"]

    run_script("train.py", *flags, "--output_dir", "run")

    warned = capsys.readouterr().err
    assert re.search(r"[\d,]+ of [\d,]+ tokens of .*the train data are unknown to the tokenizer of .*base", warned)
    assert "the validation data are unknown" in warned
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((base / name).read_text()) == json.loads((tmp_path / "run" / name).read_text())
    card = (tmp_path / "run" / "README.md").read_text()
    assert "; begun with the weights of base; seed 42." in card
    assert "trained on a song about bottles." in card
    assert "than\na song about bottles it predicts badly" in card
    assert str(base.parent) not in card


@pytest.mark.slow
def test_a_run_from_a_saved_model_resumes_to_the_same_bits(base, tmp_path, text_file):
    flags = ["--train_file", text_file, "--model_name_or_path", base, "--max_steps", 8, *SMALL]
    folders = [tmp_path / "whole", tmp_path / "broken"]
    for folder in folders:
        run_script("train.py", *flags, "--output_dir", folder)
    (folders[1] / "checkpoint-8" / "lstm_state_rank0.safetensors").unlink()
    assert last_complete_checkpoint(folders[1]).name == "checkpoint-4"

    run_script("train.py", *flags, "--output_dir", folders[1], "--resume_from_checkpoint", "true")

    whole, resumed = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Parses flags as train.py does."""
    monkeypatch.syspath_prepend(SCRIPTS)
    from train_arguments import parse

    return lambda *flags: parse(["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", *map(str, flags)])


def test_flags_of_the_model_are_taken_from_the_saved_config(base, parse):
    model_args, *_ = parse("--model_name_or_path", base, "--hidden_size", 16)

    assert (model_args.hidden_size, model_args.num_hidden_layers, model_args.output_dropout) == (16, 2, 0.25)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden_size", "384"], "`--hidden_size` 384 contradicts the config of .*base, where it is 16"),
        (["--output_dropout", "0"], "`--output_dropout` 0.0 contradicts the config of .*base, where it is 0.25"),
        (["--no_tie_word_embeddings"], "`--tie_word_embeddings` False contradicts"),
        (["--recipe", "wide.args"], "`--hidden_size` 384 contradicts"),
        (["--tokenizer", "char"], "`--tokenizer` and `--model_name_or_path` exclude each other"),
        (["--nfc", "true"], "`--nfc` and `--model_name_or_path` exclude each other"),
        (["--model_name_or_path", "empty"], "`--model_name_or_path` empty contains no config.json: name"),
        (["--model_name_or_path", "gpt2"], "`--model_name_or_path` gpt2 is a model of the type gpt2"),
        (["--model_name_or_path", "broken"], "`--model_name_or_path` broken cannot be loaded: .*`hidden_size`"),
        (["--model_name_or_path", ""], "`--model_name_or_path` is empty"),
        (["--data_description", "two\nlines"], "`--data_description` 'two.nlines' must be one line"),
        (["--data_description", " "], "`--data_description` ' ' must be one line"),
        (["--data_license", "\udcff"], "`--data_license` '.udcff' is not UTF-8"),
    ],
    ids=str,
)
def test_flags_that_contradict_the_saved_model_are_refused(base, parse, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "wide.args").write_text("--hidden_size 384\n")
    GPT2Config(n_layer=1).save_pretrained("gpt2")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "hf_lstm", "hidden_size": 0}')

    with pytest.raises(ValueError, match=message) as refused:
        parse("--model_name_or_path", base, *flags)

    assert "\n" not in str(refused.value)


def test_any_invalid_value_in_training_ends_in_one_sentence(tmp_path, text_file, monkeypatch):
    def fail(self, **options):
        raise ValueError("the data has ended")

    monkeypatch.setattr(Trainer, "train", fail)

    with pytest.raises(SystemExit, match=r"^train\.py: the data has ended$"):
        run_script("train.py", "--train_file", text_file, "--output_dir", tmp_path / "run", "--max_steps", 2, *SMALL)


def test_a_prompt_without_a_token_is_refused():
    tokenizer = char_tokenizer(["ab"])
    assert prompt_ids("", tokenizer) == [tokenizer.eos_token_id]

    tokenizer.eos_token = None

    with pytest.raises(ValueError, match=r"`prompt` \(''\) has no token in the tokenizer's vocabulary"):
        prompt_ids("", tokenizer)
