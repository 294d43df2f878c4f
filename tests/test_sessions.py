"""A session reads everything once, writes what `generate()` writes, and disturbs no other."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
import torch
from conftest import make_model
from torch import nn

from hf_lstm import LSTMForCausalLM, Session, bpe_tokenizer, byte_tokenizer, char_tokenizer, save_state, word_tokenizer
from hf_lstm.generation import SESSION, _tensors_of
from hf_lstm.generation import _write as write_file
from hf_lstm.model.cells_lstm import CELLS
from hf_lstm.model.generation_lstm import PlainStep

TEXT = "the horse raced past the barn fell, and the old man the boat"
TOKENIZER = char_tokenizer([TEXT])


@pytest.fixture
def model(request):
    return make_model(vocab_size=len(TOKENIZER), **getattr(request, "param", {}))


EACH_CELL = pytest.mark.parametrize("model", [{"cell_type": name} for name in CELLS], ids=list(CELLS), indirect=True)


def session_of(model, text=TEXT, **options):
    session = Session(model, TOKENIZER, **options)
    session.feed(text)
    return session


def written(session, **options):
    return "".join(session.stream(**{"max_new_tokens": 30} | options))


@EACH_CELL
def test_it_writes_what_generate_writes(model):
    prompt = TOKENIZER(TEXT, return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=30, do_sample=False, eos_token_id=None)
    model.generation_config.eos_token_id = None

    text = written(session_of(model), do_sample=False)

    assert text == TOKENIZER.decode(expected[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@EACH_CELL
def test_sampling_is_that_of_generate(model):
    prompt = TOKENIZER(TEXT, return_tensors="pt")
    model.generation_config.eos_token_id = None
    options = {"temperature": 3.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01}
    torch.manual_seed(5)
    expected = model.generate(**prompt, max_new_tokens=30, do_sample=True, **options)

    text = written(session_of(model), seed=5, **options)

    assert text == TOKENIZER.decode(expected[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@EACH_CELL
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


@EACH_CELL
def test_a_fork_goes_its_own_way(model):
    session = session_of(model)
    expected = written(session_of(model), seed=2)

    fork = session.fork()
    fork.feed("barn")
    other = written(fork, seed=2)

    assert written(session, seed=2) == expected != other


@EACH_CELL
@pytest.mark.parametrize("text", ["t", TEXT])
def test_a_saved_session_goes_on(model, tmp_path, text):
    session = session_of(model, text)
    expected = written(session_of(model, text), seed=3, max_new_tokens=30)
    begun = written(session, seed=3, max_new_tokens=1) if len(text) > 1 else ""

    session.save(tmp_path / "talk")
    loaded = Session.load(model, TOKENIZER, tmp_path / "talk")

    if len(text) > 1:
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


class Interruption:
    """Ctrl-C at one instruction, counted through what a step runs of this package."""

    FILES = ("generation.py", "tokenizers.py", "generation_lstm.py", "cache_lstm.py", "modeling_lstm.py")

    def __init__(self, instruction):
        self.left, self.came = instruction, False

    def _trace(self, frame, event, argument):
        if not frame.f_code.co_filename.endswith(self.FILES):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and not self.came:
            self.left -= 1
            if self.left < 0:
                self.came = True
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self):
        sys.settrace(self._trace)
        return self

    def __exit__(self, kind, *_):
        sys.settrace(None)
        return kind is KeyboardInterrupt


@pytest.fixture
def plain():
    """Written by plain steps."""
    model = make_model(torch.float32, vocab_size=len(TOKENIZER))
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("steps", ["plain", "through modules"])
def test_an_interrupted_text_goes_on(plain, steps, tmp_path):
    """Every instruction in turn, thousands of them, passes too: here each 599th, another one in each step."""
    if steps != "plain":
        plain.register_forward_hook(lambda module, inputs, output: output)
    expected = written(session_of(plain, "the horse"), max_new_tokens=20, do_sample=False)
    for instruction in count(3, 599):
        session, pieces = session_of(plain, "the horse"), []
        with Interruption(instruction) as interruption:
            pieces.extend(session.stream(5, do_sample=False))
        if not interruption.came:
            break
        session.save(tmp_path / "talk")
        for other in (session.fork(), Session.load(plain, TOKENIZER, tmp_path / "talk"), session):
            rest = written(other, max_new_tokens=5, do_sample=False)
            assert len(rest) >= 5
            assert expected.startswith("".join(pieces) + rest)  # no token is lost, and none is told twice
    assert instruction > 2000


def test_an_interrupted_write_comes_whole_with_the_next(plain):
    """Every instruction in turn, some 6,000 of them, passes too."""
    expected = session_of(plain, "the horse").write(12, do_sample=False)
    for instruction in count(3, 599):
        session, text = session_of(plain, "the horse"), ""
        with Interruption(instruction) as interruption:
            text = session.write(2, do_sample=False)
        if not interruption.came:
            break
        assert expected.startswith(text + session.write(5, do_sample=False))
    assert instruction > 2000


def test_an_interrupted_text_is_read_wholly_or_not_at_all(plain, monkeypatch):
    monkeypatch.setattr("hf_lstm.generation.READ_AT_ONCE", 4)
    expected = written(session_of(plain, "the horse raced past"), do_sample=False, max_new_tokens=5)
    lengths = set()
    for instruction in count(3, 599):
        session = session_of(plain, "the horse")
        with Interruption(instruction) as interruption:
            session.feed(" raced past")
        if not interruption.came:
            break
        lengths.add(length := session.cache.get_seq_length())
        assert {layer.get_seq_length() for layer in session.cache.layers} == {length}
        if length == len("the hors"):
            session.feed(" raced past")
        assert written(session, do_sample=False, max_new_tokens=5) == expected
    assert len("the hors") in lengths <= {len("the hors"), len("the horse raced pas")}


def test_a_step_that_fails_changes_nothing(plain):
    session, expected = session_of(plain), written(session_of(plain), do_sample=False)
    failing = plain.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    before = [(layer.keys, layer.values) for layer in session.cache.layers]

    with pytest.raises(ZeroDivisionError):
        written(session, do_sample=False)
    with pytest.raises(ZeroDivisionError):
        session.feed("the boat")
    failing.remove()

    assert [(layer.keys, layer.values) for layer in session.cache.layers] == before
    assert written(session, do_sample=False) == expected


def test_a_session_seen_in_the_middle_of_a_step_is_whole(plain, tmp_path):
    """As from another thread, or from a signal handler."""
    expected, forks = written(session_of(plain), do_sample=False, max_new_tokens=12), []
    session = session_of(plain)

    def look(*_):
        session.save(tmp_path / str(len(forks)))
        forks.append(session.fork())

    looking = plain.model.layers[1].register_forward_hook(look)
    written(session, do_sample=False, max_new_tokens=4)
    looking.remove()

    for number, fork in enumerate(forks):
        for other in (fork, Session.load(plain, TOKENIZER, tmp_path / str(number))):
            assert written(other, do_sample=False, max_new_tokens=8) == expected[number : number + 8]
    assert len(forks) == 4


@pytest.fixture
def taken(monkeypatch):
    """The tokens of the plain steps."""
    tokens, take = [], PlainStep.take
    monkeypatch.setattr(PlainStep, "take", lambda *arguments: (tokens.append(arguments[1]), take(*arguments))[1])
    return tokens


def test_it_takes_plain_steps(model, taken):
    session, other = Session(model, TOKENIZER, start_token="<eos>"), session_of(model)
    other.cache.activate_past_recording()
    model.generation_config.eos_token_id = None

    written(session, max_new_tokens=15)
    assert len(taken) == 14  # the model itself begins, from no state
    written(other, max_new_tokens=15)
    assert len(taken) == 14


def test_whatever_a_model_does_besides_is_done():
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
        assert "".join(pieces) + session.waiting == expected


class Scripted(nn.Module):
    """A model that writes what it is told to."""

    def __init__(self, tokenizer, ids):
        super().__init__()
        self.inner, self.ids = make_model(torch.float32, vocab_size=len(tokenizer)), iter(ids)

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    def forward(self, input_ids, **options):
        output = self.inner(input_ids, **options)
        if self.writes:
            output.logits[:, -1, next(self.ids)] = torch.inf
        return output

    writes = True


def scripted(tokenizer, prompt, ids, start_token=None):
    model = Scripted(tokenizer, ids).eval()
    session = Session(model, tokenizer, start_token)
    model.writes = False
    if prompt:
        session.feed(prompt)
    model.writes = True
    return session


WORDS = word_tokenizer(["roses are red\nviolets are blue"])


def test_words_stand_apart():
    session = scripted(WORDS, "roses are", WORDS("red\nviolets are")["input_ids"])
    session.model.inner.generation_config.eos_token_id = None  # it is a line end

    text = "roses are" + written(session, max_new_tokens=3, do_sample=False)
    session.model.writes = False
    session.feed(" blue")
    session.model.writes = True
    text += " blue" + written(session, max_new_tokens=1, do_sample=False)

    assert text == "roses are red\nviolets blue are"


def test_a_text_of_words_begins_without_a_space():
    session = scripted(WORDS, "", WORDS("roses are")["input_ids"], start_token="<eos>")

    assert written(session, max_new_tokens=2, do_sample=False) == "roses are"


@pytest.mark.parametrize("way", ["on", "loaded", "forked"])
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_a_character_may_be_cut_between_two_streams(tmp_path, cut, way):
    tokenizer = byte_tokenizer()
    session = scripted(tokenizer, "a", tokenizer("床é前")["input_ids"])

    text = written(session, max_new_tokens=cut, do_sample=False)
    waiting = session.waiting
    if way == "loaded":
        session.save(tmp_path / "talk")
        session = Session.load(session.model, tokenizer, tmp_path / "talk")
    elif way == "forked":
        session = session.fork()
    text += written(session, max_new_tokens=8 - cut, do_sample=False)

    assert text == "床é前"
    assert waiting == ("" if cut == 3 else "\ufffd")


def test_bytes_that_are_no_character_are_told_at_once():
    data = b"a\xff" + "床".encode() + b"\xe5\xba" + b"bc\xe5"
    session = scripted(byte_tokenizer(), "x", [4 + byte for byte in data])

    pieces = list(session.stream(len(data), do_sample=False))

    assert "".join(pieces) + session.waiting == data.decode(errors="replace") == "a\ufffd床\ufffdbc\ufffd"
    assert pieces == ["a", "\ufffd", "床", "\ufffdb", "c"]


def test_half_a_character_is_told_where_its_document_ends():
    tokenizer = byte_tokenizer()
    session = scripted(tokenizer, "x", [4 + 0xE5, 4 + 0xBA, tokenizer.eos_token_id, 4 + 0x8A])
    session.model.inner.generation_config.eos_token_id = tokenizer.eos_token_id

    assert list(session.stream(9, do_sample=False)) == ["\ufffd"]
    assert list(session.stream(1, do_sample=False)) == ["\ufffd"]  # another document: it completes nothing


def test_what_is_fed_ends_a_character_that_waits():
    tokenizer = byte_tokenizer()
    session = scripted(tokenizer, "x", [4 + 0xE5, 4 + 0x8A])

    assert written(session, max_new_tokens=1, do_sample=False) == ""
    session.model.writes = False
    session.feed("y")
    session.model.writes = True

    assert session.waiting == ""
    assert written(session, max_new_tokens=1, do_sample=False) == "\ufffd"


def test_a_session_of_version_0_1_0_is_loaded(model, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_lstm.generation.FORMAT", "1")
    session = session_of(model)
    tensors = _tensors_of(model, session.cache) | {"unread": torch.tensor(session._state.unread)}
    write_file(tmp_path / "old", SESSION, model, tensors, session.cache.get_seq_length())

    assert written(Session.load(model, TOKENIZER, tmp_path / "old"), seed=1) == written(session, seed=1)


def test_what_is_fed_is_letters(model):
    tokenizer = byte_tokenizer()
    model = make_model(vocab_size=260)
    session = Session(model, tokenizer)

    session.feed("a<eos>b")

    assert session.cache.get_seq_length() == len("a<eos>b") - 1


def test_a_top_k_of_0_means_all(model):
    assert written(session_of(model), seed=1, top_k=0) == written(session_of(model), seed=1)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"temperature": None}, {"temperature": 1.0}),
        ({"temperature": 1e-40}, {"do_sample": False}),
        ({"temperature": 5e-324, "top_k": 3, "top_p": 0.5}, {"do_sample": False}),
        ({"temperature": 0, "top_p": -1.0, "do_sample": False}, {"do_sample": False}),
    ],
)
def test_options_are_taken_as_generate_takes_them(model, options, same):
    assert written(session_of(model), seed=1, **options) == written(session_of(model), seed=1, **same)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: Session(m.train(), TOKENIZER), "in training mode"),
        (lambda m: Session(m, TOKENIZER, start_token="<s>"), r"`start_token` \('<s>'\) is not a token"),
        (lambda m: Session(m, TOKENIZER).feed(""), "'' has no tokens to read"),
        (lambda m: Session(m, byte_tokenizer()), r"ids up to 259, and the model a vocabulary of \d+"),
        (lambda m: Session(m, TOKENIZER).stream(), "has not read a token: `feed` it"),
        (lambda m: Session(m, TOKENIZER).save("nowhere"), "has not read a token: `feed` it a text before saving"),
        (lambda m: session_of(m).save(""), r"`path` \(''\) must be the name of a file: give one"),
        (lambda m: session_of(m).save("/"), r"`path` \('/'\) must be the name of a file: give one"),
        (lambda m: save_state(m, session_of(m).cache, "."), r"`path` \('.'\) must be the name of a file"),
        (lambda m: session_of(m).feed("a\ud83d"), r"The text holds '\\ud83d' at character 1"),
        (lambda m: session_of(m).stream(max_new_tokens=0), r"`max_new_tokens` \(0\) must be at least 1"),
        (lambda m: session_of(m).stream(temperature=0.0), "temperature"),
        (lambda m: session_of(m).stream(top_p=2.0), "top_p"),
        (lambda m: session_of(m).stream(top_p=float("nan")), r"`top_p` \(nan\) must be a number from 0 to 1"),
        (lambda m: session_of(m).stream(min_p=float("nan")), "min_p"),
        (lambda m: session_of(m).stream(temperature=float("nan")), "temperature"),
        (lambda m: session_of(m).stream(seed=2**64), r"`seed` \(18446744073709551616\) must be a whole number from"),
        (lambda m: session_of(m).stream(seed=-(2**63) - 1), r"`seed` \(-9223372036854775809\) must be"),
        (lambda m: session_of(m).save("a\udcffb"), r"`path` \('a\\udcffb'\) holds a null character or is not UTF-8"),
        (lambda m: session_of(m).save("a\0b"), r"`path` \('a\\x00b'\) holds a null character"),
        (lambda m: Session.load(m, TOKENIZER, "a\udcffb"), r"`path` \('a\\udcffb'\) holds a null character or is not"),
        (lambda m: Session.load(m, TOKENIZER, "nowhere"), "The file nowhere does not exist"),
    ],
)
def test_what_cannot_be_is_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_a_state_is_no_session(model, tmp_path):
    from hf_lstm import load_state

    session = session_of(model)
    session.save(tmp_path / "session")
    save_state(model, session.cache, tmp_path / "state")

    with pytest.raises(ValueError, match="holds hf_lstm state 2: it must hold hf_lstm session 2"):
        Session.load(model, TOKENIZER, tmp_path / "state")
    with pytest.raises(ValueError, match="holds hf_lstm session 2: it must hold hf_lstm state 2"):
        load_state(model, tmp_path / "session")
