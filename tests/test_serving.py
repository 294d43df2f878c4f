"""`scripts/serve.py` answers OpenAI's client with the text of `generate()` and refuses invalid requests."""

import asyncio
import importlib
import json
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPTS, make_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hf_lstm import bpe_tokenizer, byte_tokenizer, char_tokenizer, word_tokenizer

openai = pytest.importorskip("openai", reason="needs the extra `serve`")
uvicorn = pytest.importorskip("uvicorn")
testclient = pytest.importorskip("starlette.testclient")

TEXT = "the horse raced past the barn fell, and the old man the boat"
LETTERS = "".join(map(chr, range(32, 127)))
TOKENIZER = char_tokenizer([LETTERS])
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LIMIT = 100_000


@pytest.fixture(scope="module")
def scripts():
    """The modules of the server, removed again after the tests."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(SCRIPTS)
        modules = SimpleNamespace(
            **{name: importlib.import_module(name) for name in ("serve", "serve_writer", "serve_fields")}
        )
        yield modules
        for name in vars(modules):
            del sys.modules[name]


def make_chat_tokenizer():
    tokenizer = char_tokenizer([LETTERS])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save(folder, tokenizer, **config):
    model = make_model(torch.float32, vocab_size=len(tokenizer), **config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def model(folder):
    return save(folder, TOKENIZER)


@pytest.fixture(scope="module")
def app(scripts, model, folder):
    return scripts.serve.make_app(scripts.serve.Arguments(model=str(folder), limit=LIMIT, device="cpu"))


@pytest.fixture(scope="module")
def server(app):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        served = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=served.run, kwargs={"sockets": [listening]})
        thread.start()
        while not served.started:
            sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        served.should_exit = True
        thread.join()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def ask(client, folder):
    def ask(prompt=TEXT, **options):
        options = {"model": str(folder), "max_tokens": 20, "temperature": 0} | options
        return client.completions.create(prompt=prompt, **options)

    return ask


@pytest.fixture
def post(app):
    """Send an unchecked body, without a network."""
    client = testclient.TestClient(app, raise_server_exceptions=False)

    def post(body, path="/v1/completions", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return client.post(path, content=data, headers={"content-type": "application/json"} | headers)

    return post


@pytest.fixture
def serve_also(scripts, tmp_path):
    """Serve another tokenizer, with a model for it."""

    def serve_also(tokenizer, **defaults):
        model = save(tmp_path, tokenizer)
        model.generation_config.update(**defaults)
        model.generation_config.save_pretrained(tmp_path)
        app = scripts.serve.make_app(scripts.serve.Arguments(model=str(tmp_path), device="cpu"))
        return model, openai.OpenAI(
            base_url="http://testserver/v1", api_key="none", http_client=testclient.TestClient(app)
        )

    return serve_also


def generated(model, prompt=TEXT, tokens=20, tokenizer=TOKENIZER):
    """The text after the prompt, decoded together with it."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    before = tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert whole.startswith(before)
    return whole.removeprefix(before)


def streamed(parts, index=0):
    """The pieces of one answer and its finish reason."""
    choices = [choice for part in parts for choice in part.choices if choice.index == index]
    return [choice.text for choice in choices if choice.text], choices[-1].finish_reason


# ---- Completions ----


def test_a_completion_is_the_text_of_generate(ask, model):
    answer = ask()

    assert answer.choices[0].text == generated(model)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(TEXT), 20)


def test_a_streamed_completion_is_the_same_text(ask, model):
    parts = list(ask(stream=True, max_tokens=50, stream_options={"include_usage": True}))

    texts, reason = streamed(parts)
    assert ("".join(texts), reason) == (generated(model, tokens=50), "length")
    assert len(texts) > 1
    assert parts[-1].usage.completion_tokens == 50


def test_the_default_temperature_samples(ask):
    texts = {ask(seed=seed, temperature=None, max_tokens=30).choices[0].text for seed in (1, 2, 2)}

    assert len(texts) == 2


def test_a_seed_affects_only_its_own_request(ask):
    texts = set()
    for _ in range(2):
        ask(seed=1, temperature=1, max_tokens=1)
        texts.add(ask(temperature=1, max_tokens=30).choices[0].text)

    assert len(texts) == 2


def test_concurrent_clients_get_the_same_answers_as_alone(ask, model):
    prompts = [TEXT[:length] for length in range(1, 13)]

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, prompts))

    assert [answer.choices[0].text for answer in answers] == [generated(model, prompt) for prompt in prompts]


def test_a_request_can_have_several_prompts_and_answers(ask, model):
    prompts = [TEXT, TOKENIZER("the boat")["input_ids"]]

    greedy = ask([TEXT, "the boat"], n=2)
    drawn = ask(prompts[1], n=3, temperature=1, seed=3)

    texts = [generated(model)] * 2 + [generated(model, "the boat")] * 2
    assert [choice.text for choice in greedy.choices] == texts
    assert [choice.index for choice in greedy.choices] == [0, 1, 2, 3]
    assert (greedy.usage.prompt_tokens, greedy.usage.completion_tokens) == (len(TEXT) + 8, 80)
    assert len({choice.text for choice in drawn.choices}) == 3


def test_several_answers_can_be_streamed(ask):
    options = {"n": 2, "temperature": 1, "seed": 5, "stop": ["e", "a"], "max_tokens": 200}

    whole = ask(**options)
    parts = list(ask(stream=True, **options))

    for choice in whole.choices:
        texts, reason = streamed(parts, choice.index)
        assert ("".join(texts), reason) == (choice.text, choice.finish_reason)


def test_echo_and_logprobs_return_log_probabilities_of_prompt_and_answer(ask, model):
    """The request of lm-evaluation-harness that scores a text."""
    ids = TOKENIZER(TEXT)["input_ids"]

    answer = ask(ids, max_tokens=1, echo=True, logprobs=2).choices[0]

    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    shown = answer.logprobs
    assert answer.text == TEXT + generated(model, tokens=1)
    assert shown.tokens[: len(TEXT)] == list(TEXT)
    assert shown.text_offset == list(range(len(TEXT) + 1))
    assert shown.token_logprobs[0] is None
    following = [expected[step, token].item() for step, token in enumerate(ids[1:])] + [expected[-1].max().item()]
    assert shown.token_logprobs[1:] == pytest.approx(following, abs=1e-4)
    assert shown.top_logprobs[0] is None
    assert [max(top.values()) for top in shown.top_logprobs[1:]] == pytest.approx(
        expected.max(-1).values.tolist(), abs=1e-4
    )


def test_tokens_have_names_of_their_own(scripts):
    tokenizer = char_tokenizer(["ab"], byte_fallback=True)
    tokenizer.add_tokens(["<|user|>", "<|end|>"], special_tokens=True)
    writer = scripts.serve_writer.Writer(make_model(vocab_size=len(tokenizer) + 2), tokenizer)

    names = [writer.name(index) for index in range(len(tokenizer) + 2)]

    assert names[:6] == ["<pad>", "<unk>", "<bos>", "<eos>", "a", "b"]
    assert names[6 + 0x61] == f"token_id:{6 + 0x61}"  # a letter of its own, and a byte
    assert names[6 + 0xFF] == "bytes:\\xff"
    assert names[-4:] == ["<|user|>", "<|end|>", "token_id:264", "token_id:265"]
    assert len(set(names)) == len(names)


def test_echo_without_new_tokens_returns_the_prompt(ask):
    answer = ask(max_tokens=0, echo=True)

    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (TEXT, "length")
    assert answer.usage.completion_tokens == 0


def test_an_eos_token_ends_an_answer(serve_also):
    model, client = serve_also(TOKENIZER)
    first = generated(model, "the", 3)[0]
    model, client = serve_also(
        TOKENIZER, eos_token_id=TOKENIZER.convert_tokens_to_ids(first), stop_strings="zz", num_beams=3
    )

    answer = client.completions.create(model=client_model(client), prompt="the", temperature=0)

    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.usage.completion_tokens == 1


def client_model(client):
    return client.models.list().data[0].id


# ---- Stop strings ----


def test_a_stop_string_is_not_part_of_the_answer(ask, model):
    text = generated(model)
    stop = text[7:10]
    expected = text[: text.index(stop)]

    for options in ({"stop": stop}, {"stop": ["never", stop]}):
        answer = ask(**options).choices[0]
        texts, reason = streamed(ask(stream=True, **options))

        assert (answer.text, answer.finish_reason) == (expected, "stop")
        assert ("".join(texts), reason) == (expected, "stop")


def test_a_stop_string_in_the_last_token_gives_the_reason_stop(ask, model):
    text = generated(model)
    length = text.index(text[0:2]) + 2

    assert ask(stop=text[0:2], max_tokens=length).choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "reason"),
    [
        (["a", "b", "c"], ["bc"], ["a", ""], "stop"),
        (["a", "b", "d"], ["bc"], ["a", "bd"], None),
        (["ab", "ab", "c"], ["abc"], ["ab", ""], "stop"),
        (["x", "abcd"], ["abc", "b"], ["x", "a"], "stop"),
        (["one two", " three"], ["o t"], ["one tw", ""], "stop"),
        (["一", "二三"], ["二"], ["一", ""], "stop"),
    ],
    ids=lambda value: "".join(value) if value else "None",
)
def test_text_that_may_become_a_stop_string_is_held_back(scripts, pieces, stops, shown, reason):
    decoder = SimpleNamespace(step=lambda token: pieces[token], end=lambda: "")
    answer = scripts.serve_writer.Answer(0, decoder, stops, "", [])

    sent = [piece for token in range(len(pieces)) if (piece := answer.add(scripts.serve_writer.Token(token), False))]

    assert [piece.text for piece in sent] == shown
    assert sent[-1].reason == reason


def test_held_back_text_is_sent_at_the_end(scripts):
    answer = scripts.serve_writer.Answer(
        0, SimpleNamespace(step=lambda token: "ab", end=lambda: "\ufffd"), ["abc"], "", []
    )

    assert answer.add(scripts.serve_writer.Token(0), False) is None
    assert answer.finish("length").text == "ab\ufffd"


# ---- Tokenizers ----


def make_byte_fallback():
    """The byte tokenizer of version 0.1.0, whose decoder drops a whole run for one invalid byte."""
    names = ["<pad>", "<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={name: id for id, name in enumerate(names)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    specials = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), names, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials, clean_up_tokenization_spaces=False)


def as_bytes(ids):
    return bytes(id - 4 for id in ids if id >= 4).decode(errors="replace")


WORDS = ["roses are red violets are blue\nsugar is sweet"]


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "decode"),
    [
        (word_tokenizer(WORDS), "roses are", None),
        (word_tokenizer(WORDS, split="unicode"), "roses are", None),
        (bpe_tokenizer(["roses are red, naïve café 你好 " * 5], 290), "naïve", None),
        (char_tokenizer(["床前明月光，疑是地上霜。"]), "床前", None),
        (byte_tokenizer(), "naïve 你", as_bytes),
        (make_byte_fallback(), "naïve 你", as_bytes),
    ],
    ids=["words", "unicode words", "bpe", "Chinese", "bytes", "bytes of 0.1.0"],
)
def test_prompt_and_answer_are_the_text_decoded_together(serve_also, tokenizer, prompt, decode):
    model, client = serve_also(tokenizer)
    inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(0)
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=0)[0].tolist()
    options = {"model": client_model(client), "prompt": prompt, "max_tokens": 40, "seed": 0}

    answer = client.completions.create(**options)
    texts, reason = streamed(client.completions.create(stream=True, **options))
    stop = answer.choices[0].text[4:7]
    stopped = client.completions.create(stop=stop, **options).choices[0]

    whole = decode(ids) if decode else tokenizer.decode(ids, skip_special_tokens=tokenizer("\n")["input_ids"] != [3])
    assert prompt + answer.choices[0].text == whole
    assert ("".join(texts), reason) == (answer.choices[0].text, "length")
    assert (stopped.text, stopped.finish_reason) == (answer.choices[0].text.partition(stop)[0], "stop")


# ---- Invalid requests ----


@pytest.mark.parametrize("stream", [False, True])
def test_an_invalid_request_does_not_disturb_others(ask, stream):
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(ask, max_tokens=200)

        with pytest.raises(openai.BadRequestError, match="`n` \\(0\\) must be") as refused:
            ask(n=0, stream=stream)

    assert refused.value.param == "n"
    assert len(other.result().choices[0].text) == 200


WRONG = {
    "prompt": [
        None,
        "",
        [],
        [[]],
        [""],
        5,
        True,
        {},
        ["a", 5],
        [5, True],
        [[5], "a"],
        [10**6],
        [-1],
        [[5], []],
        "\ud800",
    ],
    "max_tokens": [0, -1, True, 1.5, "5", [], LIMIT, 10**30],
    "temperature": [-1, True, "1", 1e30, float("nan"), float("inf"), [1]],
    "top_p": [-0.1, 5, False, "1"],
    "seed": ["x", 1.0, True, 2**64, -(2**64)],
    "n": [0, -1, 1.0, True, "2", 129, 10**9],
    "stop": ["", [""], 5, True, {}, ["a", 5], ["a"] * 5, "\udfff"],
    "logprobs": [6, -1, True, "1"],
    "echo": [1, "true", []],
    "stream": [1, "true"],
    "stream_options": [{}, {"include_usage": 1}, {"more": True}, True],
    "best_of": [0, 2, True],
    "presence_penalty": [0.5, True, "0", float("nan")],
    "frequency_penalty": [1, -2],
    "logit_bias": [{"5": 10}, [], 5],
    "suffix": [" end", 5],
    "model": ["another", 5, "\ud800", "../" + "x" * 10_000],
    "user": [5, ["a"]],
    "top_k": [5],
    "num_beams": [10**9],
    "generation_config": ['{"num_beams": 1000000}'],
    "\ud800": [1],
    "messages": [[]],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in WRONG.items() for value in values],
    ids=lambda value: ascii(value)[:20],
)
def test_invalid_fields_are_refused_with_a_message(post, field, value):
    answer = post({"prompt": "the", "max_tokens": 2} | {field: value})

    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["message"].endswith(".")
    assert len(error["message"]) < 400
    if field != "prompt" and field.isascii() and value != LIMIT and "not a number" not in error["message"]:
        assert field in error["message"]


def test_neutral_values_are_accepted(post, model):
    neutral = {"n": 1, "best_of": 1, "echo": False, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}}
    neutral |= {"suffix": None, "stop": None, "logprobs": None, "user": "me", "metadata": {"a": "b"}, "stream": False}

    answer = post({"prompt": TEXT, "max_tokens": 20, "temperature": 0} | neutral).json()

    assert answer["choices"][0]["text"] == generated(model)
    assert post({"prompt": TEXT, "max_tokens": 5, "temperature": 1e-300, "top_p": 0}).status_code == 200
    assert (
        post({"prompt": TEXT, "max_tokens": 5, "temperature": 2, "top_p": 1e-300, "seed": -(2**63)}).status_code == 200
    )


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[]", "it is []"),
        (b'"the"', "it is 'the'"),
        (b"null", "it is None"),
        (b"\xff\xfe\xff", "must be a JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is not a number"),
        (b'{"prompt": "a", "temperature": -Infinity}', "-Infinity is not a number"),
        (b'{"prompt": "a", "temperature": 1e999}', "(inf) must be"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "must be a JSON object"),
        (b'{"prompt": ' + b"[" * 100_000, "recursion"),
        (b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", "`prompt`"),
        (b'{"prompt": "\xed\xa0\x80"}', "half a surrogate"),
        (b" " * (1 << 22) + b"{}", "at most"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_malformed_body_is_refused_with_a_message(post, body, says):
    answer = post(body)

    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_content_type_is_refused(post, kind):
    answer = post({"prompt": "the"}, **{"content-type": kind})

    assert answer.status_code == 400
    assert "must be application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize("coding", ["gzip", "br", "gzip, identity"])
def test_a_packed_body_is_refused(post, coding):
    answer = post({"prompt": "the"}, **{"content-encoding": coding})

    assert answer.status_code == 400
    assert f"Content-Encoding ('{coding}') must be left out" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/v1/audio/transcriptions", "/load_model", "/reset", "/docs", "/%ff"]
)
def test_other_addresses_return_404(post, path):
    answer = post({"model": "another/model"}, path)

    assert answer.status_code == 404
    assert "POST to /v1/completions" in answer.json()["error"]["message"]


def test_a_failure_is_reported_in_the_answer_and_in_the_stream(post, app, monkeypatch, caplog):
    monkeypatch.setattr("hf_lstm.LSTMForCausalLM.generate", lambda *_, **__: 1 / 0)

    whole = post({"prompt": "the"})
    stream = post({"prompt": "the", "stream": True})

    assert (whole.status_code, whole.json()["error"]["message"]) == (500, "Generation failed: division by zero")
    assert '"message": "Generation failed: division by zero"' in stream.text


# ---- Clients that disconnect ----


def test_generation_stops_when_the_client_of_a_stream_disconnects(ask):
    stream = ask(stream=True, max_tokens=LIMIT - 1000)
    next(iter(stream))
    stream.close()
    start = monotonic()

    ask(max_tokens=5)

    assert monotonic() - start < 10  # all of it takes minutes


def test_generation_stops_when_the_client_of_an_answer_disconnects(client, folder, ask):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(model=str(folder), prompt=TEXT, max_tokens=LIMIT - 1000)
    start = monotonic()

    ask(max_tokens=5)

    assert monotonic() - start < 10


def test_a_stream_waiting_to_be_sent_ends_when_its_client_disconnects(scripts):
    """Otherwise generation would go on until the generator is garbage-collected."""
    ended = []

    async def written():
        try:
            while True:
                yield "a"
        finally:
            ended.append(True)

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    async def receive():
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def answer():
        stream = written()
        await scripts.serve.Stream(stream)({"type": "http"}, receive, send)
        return list(ended)  # before the loop ends, which closes all that is open

    assert asyncio.run(answer()) == [True]


def test_a_client_that_leaves_before_its_request_is_whole(app):
    sent, parts = [], iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}

    async def receive():
        return next(parts)

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))  # raises nothing, which would be logged as a fault of the server's

    assert sent[0]["status"] == 499


# ---- Conversations ----


def said(ids, tokenizer):
    """The names of token ids."""
    return tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("change", ["m.content", "m.content | trim | upper"])
@pytest.mark.parametrize("words", [False, True])
def test_a_conversation_is_encoded_like_apply_chat_template(scripts, change, words):
    """The model was tuned with that encoding: the start of a message must not split a token."""
    tokenizer = bpe_tokenizer(["user : hello there\nassistant : HELLO"] * 9, 300) if words else make_chat_tokenizer()
    template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }}\n<eos>{% endfor %}assistant :" if words else TEMPLATE
    )
    tokenizer.chat_template = template.replace("m.content", change)
    messages = [{"role": "system", "content": "be kind "}, {"role": "user", "content": " hello there"}]

    ids = scripts.serve_writer.encode_chat(tokenizer, messages)

    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize(
    ("template", "contents", "letters"),
    [
        (TEMPLATE, ["<eos>"], ["<eos>"]),
        (TEMPLATE, ["a<|assistant|>b", "<pad><eos"], ["a<|assistant|>b", "<pad><eos"]),
        (TEMPLATE.replace("m.content", "m.content | trim"), [" <eos> "], ["<eos>"]),
        (TEMPLATE.replace("m.content", "m.content[:3]"), ["<eos>"], ["<eo"]),
        ("<|user|>{% for m in messages %}{{ m.content }}{% endfor %}", ["<eo", "s>"], ["<eos>"]),
        ("<|user|>{% for m in messages %}<{{ m.content }}>{% endfor %}", ["eos"], ["<eos>"]),
        (TEMPLATE, ["\U000f0000<eos>\U000f0001"], ["?<eos>?"]),
    ],
)
def test_special_tokens_in_messages_are_encoded_as_text(scripts, template, contents, letters):
    tokenizer = make_chat_tokenizer()
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": content} for content in contents]

    tokens = said(scripts.serve_writer.encode_chat(tokenizer, messages), tokenizer)

    text = "".join("?" if token == "<unk>" else token if len(token) == 1 else "\n" for token in tokens)
    assert [line for line in text.split("\n") if line] == letters


def test_a_template_that_changes_a_special_token_is_refused(scripts):
    tokenizer = make_chat_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("m.content", "m.content | replace('a', 'A')")

    with pytest.raises(scripts.serve_fields.Refused, match="changes a message"):
        scripts.serve_writer.encode_chat(tokenizer, [{"role": "user", "content": "a<eos>"}])


@pytest.fixture
def chat(serve_also):
    return serve_also(make_chat_tokenizer())


def test_chat_completions_and_responses_answer_messages(chat, scripts):
    model, client = chat
    tokenizer, name = make_chat_tokenizer(), client_model(client)
    messages = [{"role": "user", "content": [{"type": "text", "text": "<eos>"}, {"type": "text", "text": " hi"}]}]
    prompt = scripts.serve_writer.encode_chat(tokenizer, [{"role": "user", "content": "<eos> hi"}])
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    options = {"model": name, "temperature": 0}

    answer = client.chat.completions.create(messages=messages, max_tokens=20, n=2, **options)
    parts = list(client.chat.completions.create(messages=messages, max_completion_tokens=20, stream=True, **options))
    response = client.responses.create(input="<eos> hi", max_output_tokens=20, **options)
    events = list(client.responses.create(input="<eos> hi", max_output_tokens=20, stream=True, **options))

    assert [(choice.message.content, choice.finish_reason) for choice in answer.choices] == [(text, "length")] * 2
    assert answer.usage.prompt_tokens == len(prompt)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].choices[0].finish_reason == "length"
    assert (response.output_text, response.status) == (text, "incomplete")
    assert (response.usage.input_tokens, response.usage.output_tokens) == (len(prompt), 20)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert events[-1].response.output_text == text


def test_instructions_become_the_system_message(chat, scripts):
    _, client = chat
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]

    response = client.responses.create(
        model=client_model(client), instructions="be kind", input=[messages[1]], max_output_tokens=1
    )

    assert response.usage.input_tokens == len(scripts.serve_writer.encode_chat(make_chat_tokenizer(), messages))


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *(
            ("chat/completions", {"messages": messages})
            for messages in (
                *(None, [], "hi", [[]], ["hi"], [{}], [{"content": "hi"}], [{"role": "user", "content": 5}]),
                *([{"role": "<eos>", "content": "a"}], [{"role": ["user"], "content": "a"}]),
                *([USER | {"name": 5}], [USER | {"tool_calls": [{"id": "1"}]}], [USER | {"content": "\ud800"}]),
                [USER | {"content": [{"type": "image_url", "image_url": {"url": "a"}}]}],
                *(
                    [USER | {"content": [{"type": "text"}]}],
                    [USER | {"content": ["a"]}],
                    [USER | {"content": {"a": "b"}}],
                ),
            )
        ),
        *(
            ("chat/completions", {"messages": [USER]} | more)
            for more in (
                *({"max_tokens": 0}, {"max_tokens": 5, "max_completion_tokens": 6}, {"logprobs": True}, {"n": 10**6}),
                *({"tools": [{"type": "function"}]}, {"response_format": {"type": "json_object"}}, {"echo": True}),
                *({"presence_penalty": 1}, {"reasoning_effort": "high"}, {"stop": 5}, {"stream": True, "n": 0}),
                *({"chat_template_kwargs": {"a": 1}}, {"max_completion_tokens": 10**6}),
            )
        ),
        *(
            ("responses", body)
            for body in (
                *({}, {"input": ""[:0] or []}, {"input": 5}, {"input": [{"type": "function_call"}]}, {"input": [5]}),
                *({"input": "a", "stop": "b"}, {"input": "a", "instructions": 5}, {"input": "a", "store": True}),
                *(
                    {"input": "a", "previous_response_id": "b"},
                    {"input": "a", "text": {"format": {"type": "json_object"}}},
                ),
                *({"input": "a", "max_output_tokens": True}, {"input": "\udc00"}, {"input": "a", "tools": [{}]}),
            )
        ),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_unsupported_messages_are_refused_with_a_message(chat_post, path, body):
    answer = chat_post(path, body)

    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.fixture(scope="module")
def chat_post(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    save(folder, make_chat_tokenizer())
    app = scripts.serve.make_app(scripts.serve.Arguments(model=str(folder), device="cpu"))
    client = testclient.TestClient(app, raise_server_exceptions=False)
    headers = {"content-type": "application/json"}
    return lambda path, body: client.post(f"/v1/{path}", content=json.dumps(body).encode(), headers=headers)


def test_an_error_of_the_chat_template_is_reported(scripts):
    tokenizer = make_chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"

    with pytest.raises(scripts.serve_fields.Refused, match="refuses the messages: only one turn"):
        scripts.serve_writer.encode_chat(tokenizer, [USER])


@pytest.mark.parametrize(
    ("path", "body"), [("chat/completions", {"messages": [USER]}), ("responses", {"input": "hi"})]
)
def test_messages_without_a_chat_template_are_refused(post, path, body):
    answer = post(body, f"/v1/{path}")

    assert answer.status_code == 400
    assert "no chat template: use /v1/completions" in answer.json()["error"]["message"]


# ---- The model ----


def test_special_tokens_in_a_prompt_are_tokens(ask):
    assert ask("<bos>the", max_tokens=1).usage.prompt_tokens == 4


def test_a_tokenizer_of_another_model_is_refused(scripts, tmp_path):
    save(tmp_path, TOKENIZER)
    byte_tokenizer().save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="give the tokenizer that the model was trained with"):
        scripts.serve.make_app(scripts.serve.Arguments(model=str(tmp_path), device="cpu"))


def test_a_limit_below_two_tokens_is_refused(run):
    with pytest.raises(SystemExit, match="`limit` \\(1\\) must be at least 2"):
        run("serve.py", "--model", "any", "--limit", "1")
