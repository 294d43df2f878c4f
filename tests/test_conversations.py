"""`scripts/generate.py --interactive true`: the user and the model write one text in turns."""

import io
import sys

import pytest
import torch
from conftest import make_model, run_script
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hf_lstm import Session, byte_tokenizer, char_tokenizer, word_tokenizer
from hf_lstm.tokenizers import SPECIAL_TOKENS

TEXT = "the horse raced past the barn fell, and the old man the boat"
TOKENIZER = char_tokenizer([TEXT])
GREEDY = ["--do_sample", "false", "--max_new_tokens", "12"]


@pytest.fixture
def model():
    model = make_model(torch.float32, vocab_size=len(TOKENIZER))
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def talk(model, tmp_path, monkeypatch, run):
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)

    def talk(*lines, options=GREEDY):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        printed = run("generate.py", "--model", "model", "--interactive", "true", *options)
        return printed.split("Ctrl-D ends.\n", 1)[1].split("> ")[1:]

    return talk


def answers(model, *pieces):
    session = Session(model, TOKENIZER)
    texts = []
    for piece in pieces:
        if piece:
            session.feed(piece)
        texts.append("".join(session.stream(max_new_tokens=12, do_sample=False)) + "\n")
    return texts


def test_user_and_model_continue_one_text(talk, model):
    assert talk("the horse", " fell", "")[:3] == answers(model, "the horse", " fell", "")


def test_the_text_starts_with_the_prompt(talk, model):
    session = Session(model, TOKENIZER)
    session.feed("the man")
    list(session.stream(max_new_tokens=12, do_sample=False))

    said = talk("", options=["--temperature", "0", "--max_new_tokens", "12", "--prompt", "the man"])  # as greedy

    assert said[0] == answers(model, "the man", "")[1]


def test_a_text_can_be_saved_reset_and_loaded(talk, model, tmp_path):
    first, second, third = answers(model, "the horse", " fell", " and")

    said = talk(
        "the horse", "/save a.session", " fell", "/reset", "the horse", "/load a.session", " fell", " and", "/quit"
    )

    assert said == [
        first,
        "saved to a.session\n",
        second,
        "",
        first,
        "20 tokens read so far\n",
        second,
        third,
        "",
    ]


def test_an_invalid_command_does_not_end_the_conversation(talk, model, capsys):
    said = talk("the horse", "/load missing", "/what", "", options=GREEDY)

    first, second = answers(model, "the horse", "")
    assert (said[0], said[3]) == (first, second)
    assert said[2].startswith("The model continues your text")


def test_ctrl_c_stops_only_the_current_answer(talk, model, monkeypatch):
    stream = Session.stream

    def interrupted(self, **options):
        for number, text in enumerate(stream(self, **options)):
            if number == 3:
                raise KeyboardInterrupt
            yield text

    monkeypatch.setattr(Session, "stream", interrupted)

    said = talk("the horse", "")

    assert len(said[0]) <= 5
    assert said[1].strip()


def test_invalid_utf_8_does_not_end_the_conversation(talk, model, monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"the horse\n\xff\xfe\n/save \n fell\n"), encoding="utf-8")
    monkeypatch.setattr(io, "StringIO", lambda _: typed)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), write_through=True))

    said = talk()

    first, second = answers(model, "the horse", " fell")
    assert (said[0], said[3]) == (first, second)
    complaints = sys.stderr.buffer.getvalue().decode().splitlines()
    assert [complaint.split(":")[0] for complaint in complaints] == [
        "The text holds '\\udcff' at character 0, half of a surrogate pair or a byte that is not UTF-8",
        "`path` ('') must be the name of a file",
    ]


def bytes_of_version_0_1_0():
    """A byte tokenizer with which one invalid byte turns all text up to the next special token into U+FFFD."""
    vocabulary = {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    names = {"<pad>": 0, "<unk>": 1, "<bos>": 2, "<eos>": 3}
    tokenizer = Tokenizer(models.BPE(vocab=names | vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


@pytest.mark.parametrize("make", [lambda: word_tokenizer([TEXT]), byte_tokenizer, bytes_of_version_0_1_0])
def test_prompt_and_answer_are_printed_as_decoded_together(tmp_path, run, make):
    tokenizer = make()
    model = make_model(torch.float32, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    prompt = tokenizer("the horse", return_tensors="pt")

    written = run("generate.py", "--model", tmp_path, "--prompt", "the horse", *GREEDY)

    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    text = (
        tokenizer.decode(ids) if len(tokenizer) < 200 else bytes(i - 4 for i in ids if i > 3).decode(errors="replace")
    )
    assert written == text + "\n"


@pytest.mark.parametrize("options", [["--prompt", "the horse"], ["--interactive", "true", "--prompt", "the horse"]])
def test_a_temperature_near_0_takes_the_most_probable_token(tmp_path, run, model, monkeypatch, options):
    for part in (model, TOKENIZER):
        part.save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))

    cold, greedy = (
        run("generate.py", "--model", tmp_path, "--max_new_tokens", "12", *options, *more)
        for more in (["--temperature", "1e-40"], ["--do_sample", "false"])
    )

    assert cold == greedy


@pytest.mark.parametrize("unk_token", ["[UNK]", None])
def test_a_prompt_that_the_model_does_not_know_is_told(tmp_path, capsys, unk_token):
    """The tokenizer's wrapper names no unknown token, and its model may have none either."""
    vocabulary = {letter: index for index, letter in enumerate(["[UNK]", *"the"])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[], unk_token=unk_token))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(tmp_path)
    make_model(torch.float32, vocab_size=5).save_pretrained(tmp_path)

    for prompt, told in (("the", False), ("they", True)):
        run_script("generate.py", "--model", tmp_path, "--max_new_tokens", "1", "--prompt", prompt)

        assert ("does not know some characters" in capsys.readouterr().err) == told


def test_a_prompt_of_invalid_utf_8_is_refused(tmp_path, run, model, monkeypatch):
    for part in (model, TOKENIZER):
        part.save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the \xff"), encoding="utf-8"))

    with pytest.raises(SystemExit, match=r"^generate.py: The text holds '\\udcff' at character 4, half of"):
        run("generate.py", "--model", tmp_path)


def test_interactive_refuses_flags_that_need_the_whole_text(run, tmp_path, talk):
    with pytest.raises(SystemExit, match=r"`num_beams` \(4\) needs the whole text"):
        talk(options=["--num_beams", "4"])
