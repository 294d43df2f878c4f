"""`scripts/serve.py` answers OpenAI's client with what `generate()` writes, and says what is wrong to whom it concerns."""

import asyncio
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep

import pytest
import torch
import transformers
from conftest import SCRIPTS, make_model

from hf_lstm import char_tokenizer

openai = pytest.importorskip("openai", reason="needs the extra `serve`")
pytest.importorskip("fastapi")

TEXT = "the horse raced past the barn fell, and the old man the boat"
TOKENIZER = char_tokenizer([TEXT])
LIMIT = 100_000


@pytest.fixture(scope="module")
def model():
    model = make_model(torch.float32, vocab_size=len(TOKENIZER))
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    from transformers.cli.serving import chat_completion, completion, response

    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    with socket.socket() as free, pytest.MonkeyPatch.context() as monkeypatch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        monkeypatch.syspath_prepend(SCRIPTS)
        for module, name in (
            (completion, "CompletionHandler"),
            (chat_completion, "ChatCompletionHandler"),
            (response, "ResponseHandler"),
        ):
            monkeypatch.setattr(module, name, getattr(module, name))  # to be put back
        import serve

        monkeypatch.delitem(sys.modules, "serve")
        free.close()
        arguments = serve.Arguments(model=str(folder), host="127.0.0.1", port=port, limit=LIMIT, device="cpu")
        served = serve.main(arguments, non_blocking=True)
        while not served.server.started:
            sleep(0.01)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
        served.kill_server()
        del transformers.LSTMForCausalLM


@pytest.fixture
def ask(server):
    address, name = server
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)

    def ask(prompt=TEXT, **options):
        options = {"model": name, "max_tokens": 20, "temperature": 0} | options
        return client.completions.create(prompt=prompt, **options)

    yield ask
    client.close()


def generated(model, prompt=TEXT, tokens=20):
    inputs = TOKENIZER(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def test_it_answers_what_generate_writes(ask, model):
    answer = ask()

    assert answer.choices[0].text == generated(model)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(TEXT), 20)


def test_it_streams(ask, model):
    parts = [part.choices[0].text for part in ask(stream=True, max_tokens=50)]

    assert "".join(parts) == generated(model, tokens=50)
    assert len(parts) > 1


def test_it_draws_unless_the_temperature_is_0(ask):
    texts = {ask(seed=seed, temperature=None, max_tokens=30).choices[0].text for seed in (1, 2, 2)}

    assert len(texts) == 2


def test_clients_at_once_get_what_each_gets_alone(ask, model):
    prompts = [TEXT[:length] for length in range(1, 13)]

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, prompts))

    assert [answer.choices[0].text for answer in answers] == [generated(model, prompt) for prompt in prompts]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": ""}, "becomes no token"),
        ({"prompt": ["a", "b"]}, "must be one text"),
        ({"max_tokens": LIMIT}, f"the limit is {LIMIT} together"),
        ({"max_tokens": 0}, "`max_tokens` (0) must be"),
        ({"max_tokens": True}, "`max_tokens` (True) must be"),
        ({"temperature": -1}, "`temperature` (-1) must be"),
        ({"top_p": 5}, "`top_p` (5) must be at most 1"),
        ({"seed": "x"}, "`seed` ('x') must be"),
        ({"model": "another"}, "Server is pinned to"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said_to_whom_it_concerns(ask, wrong, message, stream):
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(ask, max_tokens=200)

        with pytest.raises(openai.BadRequestError) as refused:
            ask(**{"stream": stream} | wrong)

    assert message in str(refused.value)
    assert len(other.result().choices[0].text) > 100


def test_a_client_that_leaves_stops_the_writing(ask):
    stream = ask(stream=True, max_tokens=LIMIT - 1000)
    next(iter(stream))
    stream.close()
    start = monotonic()

    ask(max_tokens=5)

    assert monotonic() - start < 10  # all of it takes minutes


def test_a_stream_that_waits_to_be_sent_ends_with_its_client(monkeypatch):
    """Nobody is told of the end there: the writing would go on until the garbage is collected."""
    monkeypatch.syspath_prepend(SCRIPTS)
    from serve import Stream

    monkeypatch.delitem(sys.modules, "serve")

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
        await Stream(stream)({"type": "http"}, receive, send)
        return list(ended)  # before the loop ends, which closes all that is open

    assert asyncio.run(answer()) == [True]


def test_messages_need_a_template(server):
    address, name = server
    with (
        openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="no chat template: ask /v1/completions"),
    ):
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "the horse"}])


def test_a_tokenizer_that_does_not_fit(ask, server, monkeypatch):
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "__call__", lambda *_, **__: {"input_ids": [10**6]})

    with pytest.raises(openai.BadRequestError, match="vocabulary ends at"):
        ask()


def test_a_limit_that_holds_nothing(run):
    with pytest.raises(SystemExit, match="`limit` \\(1\\) must be at least 2"):
        run("serve.py", "--model", "any", "--limit", "1")
