"""A session reads everything once, writes what `generate()` writes, and disturbs no other."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_model
from torch import nn

from hf_lstm import LSTMForCausalLM, Session, bpe_tokenizer, byte_tokenizer, char_tokenizer
from hf_lstm.model.decoding_lstm import BareCells

TEXT = "the horse raced past the barn fell, and the old man the boat"
TOKENIZER = char_tokenizer([TEXT])


@pytest.fixture
def model():
    return make_model(vocab_size=len(TOKENIZER))


def session_of(model, text=TEXT, **options):
    session = Session(model, TOKENIZER, **options)
    session.feed(text)
    return session


def written(session, **options):
    return "".join(session.stream(**{"max_new_tokens": 30} | options))


def test_it_writes_what_generate_writes(model):
    prompt = TOKENIZER(TEXT, return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=30, do_sample=False, eos_token_id=None)
    model.generation_config.eos_token_id = None

    text = written(session_of(model), do_sample=False)

    assert text == TOKENIZER.decode(expected[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_sampling_is_that_of_generate(model):
    prompt = TOKENIZER(TEXT, return_tensors="pt")
    model.generation_config.eos_token_id = None
    options = {"temperature": 3.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01}
    torch.manual_seed(5)
    expected = model.generate(**prompt, max_new_tokens=30, do_sample=True, **options)

    text = written(session_of(model), seed=5, **options)

    assert text == TOKENIZER.decode(expected[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("pieces", [[TEXT], [TEXT[:1], TEXT[1:]], list(TEXT), [TEXT[:20], TEXT[20:21], TEXT[21:]]])
def test_a_text_may_come_in_pieces(model, pieces, monkeypatch):
    monkeypatch.setattr("hf_lstm.generation.READ_AT_ONCE", 7)
    session = Session(model, TOKENIZER, start_token="<eos>")
    expected = written(session_of(model, start_token="<eos>"), seed=1)

    for piece in pieces:
        session.feed(piece)

    assert written(session, seed=1) == expected


def test_nothing_is_read_twice(model):
    read = []
    model.register_forward_pre_hook(
        lambda module, arguments, options: read.append(arguments[0].shape[1]), with_kwargs=True
    )
    session = session_of(model)
    written(session, max_new_tokens=10)
    session.feed("the boat")
    written(session, max_new_tokens=10)

    assert sum(read) == len(TEXT) + 10 + len("the boat") + 10 - 1  # the last one is not read yet
    assert session.cache.get_seq_length() == sum(read)


def test_a_fork_goes_its_own_way(model):
    session = session_of(model)
    expected = written(session_of(model), seed=2)

    fork = session.fork()
    fork.feed("barn")
    other = written(fork, seed=2)

    assert written(session, seed=2) == expected != other


@pytest.mark.parametrize("text", ["t", TEXT])
def test_a_saved_session_goes_on(model, tmp_path, text):
    session = session_of(model, text)
    expected = written(session_of(model, text), seed=3, max_new_tokens=30)
    begun = written(session, seed=3, max_new_tokens=1) if len(text) > 1 else ""

    session.save(tmp_path / "talk")
    loaded = Session.load(model, TOKENIZER, tmp_path / "talk")

    if begun:
        assert written(loaded, do_sample=False) == written(session, do_sample=False)
        assert expected.startswith(begun)
    else:
        assert written(loaded, seed=3) == expected
    assert (tmp_path / "talk").stat().st_size < 4_000


def test_whoever_stops_reading_has_what_was_written(model):
    session, whole = session_of(model), session_of(model)
    stream = session.stream(max_new_tokens=30, do_sample=False)
    text = next(stream) + next(stream) + next(stream)
    stream.close()

    text += written(session, do_sample=False, max_new_tokens=27)

    assert text == written(whole, do_sample=False)


@pytest.fixture
def taken(monkeypatch):
    """What the bare cells read."""
    tokens, read = [], BareCells.read
    monkeypatch.setattr(BareCells, "read", lambda *arguments: (tokens.append(arguments[1]), read(*arguments))[1])
    return tokens


def test_it_writes_with_the_bare_cells(model, taken):
    session, other = Session(model, TOKENIZER, start_token="<eos>"), session_of(model)
    other.cache.activate_past_recording()
    model.generation_config.eos_token_id = None

    written(session, max_new_tokens=15)
    assert len(taken) == 14  # the model itself begins, from no state
    written(other, max_new_tokens=15)
    assert len(taken) == 14


def test_whatever_a_model_does_besides_is_done(taken):
    """A subclass, a wrapper that hands everything on, a hook, another forward: all turn the scores around."""

    class Subclass(LSTMForCausalLM):
        def forward(self, *args, **kwargs):
            return turned(super().forward(*args, **kwargs))

    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

        def forward(self, *args, **kwargs):
            return turned(self.inner(*args, **kwargs))

    def turned(output):
        output.logits = -output.logits
        return output

    plain = make_model(vocab_size=len(TOKENIZER))
    plain.generation_config.eos_token_id = None
    subclass, hooked, patched = copy.deepcopy(plain), copy.deepcopy(plain), copy.deepcopy(plain)
    subclass.__class__ = Subclass
    hooked.register_forward_hook(lambda module, inputs, output: turned(output))
    forward = patched.forward
    patched.forward = lambda *args, **kwargs: turned(forward(*args, **kwargs))

    texts = [
        written(session_of(model), do_sample=False) for model in (subclass, Wrapper(plain).eval(), hooked, patched)
    ]

    assert not taken
    assert len(set(texts)) == 1
    assert texts[0] != written(session_of(plain), do_sample=False)


def test_what_was_read_in_another_type_is_gone_on_from(taken):
    model = make_model(torch.float32, vocab_size=len(TOKENIZER))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        session = session_of(model)

    assert written(session)
    assert len(taken) > 20  # what comes after the first token is of the model's type


def test_many_threads_write_what_each_writes_alone(model):
    def talk(seed):
        session = session_of(model, TEXT[seed % 7 :])
        text = written(session, seed=seed)
        session.feed(TEXT[: seed + 1])
        return text + written(session, seed=seed)

    expected = [talk(seed) for seed in range(32)]
    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(talk, range(32)))

    assert texts == expected
    assert len(set(texts)) > 20


def test_the_end_of_a_document_ends_the_text(model):
    model.generation_config.eos_token_id = TOKENIZER("e")["input_ids"]
    session = session_of(model)

    texts = [written(session, seed=seed, max_new_tokens=500, temperature=5.0) for seed in range(3)]

    assert "e" not in "".join(texts)
    assert len("".join(texts)) > 0


def test_characters_are_whole():
    text = "床前明月光，疑是地上霜。" * 3
    for tokenizer in (byte_tokenizer(), bpe_tokenizer([text], vocab_size=262)):
        model = make_model(vocab_size=len(tokenizer))
        model.generation_config.eos_token_id = None
        session = Session(model, tokenizer)
        session.feed(text)
        ids = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=40, do_sample=False)

        pieces = list(session.stream(40, do_sample=False))

        expected = tokenizer.decode(ids[0], skip_special_tokens=True).removeprefix(text)
        assert expected.startswith("".join(pieces).rstrip("\ufffd"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: Session(m.train(), TOKENIZER), "in training mode"),
        (lambda m: Session(m, TOKENIZER, start_token="<s>"), r"`start_token` \('<s>'\) is no token"),
        (lambda m: Session(m, TOKENIZER).feed(""), "'' becomes no token"),
        (lambda m: Session(m, byte_tokenizer()), r"ids up to 259, and the model a vocabulary of \d+"),
        (lambda m: Session(m, TOKENIZER).stream(), "has read nothing: `feed` it"),
        (lambda m: Session(m, TOKENIZER).save("nowhere"), "has read nothing: there is nothing to save"),
        (lambda m: session_of(m).stream(max_new_tokens=0), r"`max_new_tokens` \(0\) must be at least 1"),
        (lambda m: session_of(m).stream(temperature=0.0), "temperature"),
        (lambda m: session_of(m).stream(top_p=2.0), "top_p"),
        (lambda m: Session.load(m, TOKENIZER, "nowhere"), "The file nowhere does not exist"),
    ],
)
def test_what_cannot_be_is_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_a_state_is_no_session(model, tmp_path):
    from hf_lstm import load_state, save_state

    session = session_of(model)
    session.save(tmp_path / "session")
    save_state(model, session.cache, tmp_path / "state")

    with pytest.raises(ValueError, match="holds hf_lstm state 1: it must hold hf_lstm session 1"):
        Session.load(model, TOKENIZER, tmp_path / "state")
    with pytest.raises(ValueError, match="holds hf_lstm session 1: it must hold hf_lstm state 1"):
        load_state(model, tmp_path / "session")
