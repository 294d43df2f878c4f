"""Serve a model to OpenAI clients at /v1/completions, /v1/chat/completions and /v1/responses.

python scripts/serve.py --model runs/first --port 8000
curl localhost:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "def main(", "max_tokens": 100}'

serve_fields.py defines the fields of a request, and serve_writer.py generates the text.
"""

import itertools
import json
import logging
import reprlib
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

import uvicorn
from command_line import Parser
from saved_models import load_model
from screen import prepare_screen
from serve_fields import CHAT_COMPLETION, COMPLETION, PROMPT, RESPONSE, Refused, read_body, read_messages
from serve_writer import Job, Piece, Prompt, Writer, encode_chat
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hf_lstm.tokenizers import check_tokenizer, direction_of


@dataclass
class Arguments:
    """Arguments of the server."""

    model: str | None = field(
        default=None, metadata={"help": "A model folder, an adapter's folder (LoRA) or a model on the Hub."}
    )
    host: str = field(default="localhost", metadata={"help": "Address to listen on."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    limit: int = field(default=4096, metadata={"help": "Maximum tokens of a request, prompt and answer together."})
    device: str = field(default="auto", metadata={"help": "Device of the model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run the Python files of the model."})


class Stream(StreamingResponse):
    """A response that stops generation when its client disconnects, not only when it is garbage-collected."""

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # stops `generate()`


class Endpoint:
    """One address: reads its requests, generates the answers and formats them."""

    last = ""  # the last line of a stream

    def __init__(self, writer: Writer, model: str, limit: int):
        self.writer, self.model, self.limit = writer, model, limit

    async def answer(self, request: Request) -> Response:
        body = await read_body(request, self.rules)
        if body.get("model", self.model) != self.model:
            raise Refused(
                f"`model` ({reprlib.repr(body['model'])}) must be {self.model!r}, the model of this server.", "model"
            )
        job = self.read(body)
        head = {"id": f"{self.prefix}{uuid.uuid4().hex}", "model": self.model}
        if body.get("stream"):
            return Stream(self.stream(job, head, body), media_type="text/event-stream")
        answers = [Piece(index) for index in range(len(job.prompts) * job.n)]
        async with aclosing(self.writer.pieces(job)) as pieces:
            async for piece in pieces:
                if await request.is_disconnected():
                    return Response(status_code=499)  # nginx's code for a client that closed the connection
                so_far = answers[piece.index]
                answers[piece.index] = Piece(
                    piece.index, so_far.text + piece.text, so_far.tokens + piece.tokens, piece.reason
                )
        return JSONResponse(self.whole(answers, job, head))

    async def stream(self, job: Job, head: dict, body: dict) -> AsyncIterator[str]:
        try:
            async with aclosing(self.writer.pieces(job)) as pieces:
                async for event in self.events(pieces, job, head, body):
                    kind = f"event: {event['type']}\n" if "type" in event else ""
                    yield f"{kind}data: {json.dumps(event)}\n\n"
        except Exception as error:
            logging.getLogger("uvicorn.error").exception("Generation failed.")
            yield f"data: {json.dumps(error_object(f'Generation failed: {error}', 500))}\n\n"
        yield self.last

    def plan(self, body: dict, prompts: list[Prompt], max_tokens: int | None, default: int, **options) -> Job:
        """Create a job, after checking that the token ids are valid and prompts and answers are within the limit."""
        last = self.writer.model.config.vocab_size - 1
        for ids, *_ in prompts:
            if not ids:
                raise Refused("The prompt has no tokens: there is nothing to continue.")
            if not 0 <= min(ids) <= max(ids) <= last:
                raise Refused(f"The prompt has an id that is not in the vocabulary: ids must be from 0 to {last}.")
        read, n = sum(len(prompt.ids) for prompt in prompts), body.get("n", 1)
        room = (self.limit // n - read) // len(prompts)  # tokens of each answer
        if max_tokens is None:
            max_tokens = max(1, min(default, room))
        if max_tokens > room:
            raise Refused(
                f"The prompt has {read} tokens, an answer {max_tokens} and `n` is {n}: the limit is {self.limit} "
                "in total."
            )
        stop = body.get("stop", [])
        return Job(
            prompts,
            max_tokens,
            n=n,
            stops=[stop] if isinstance(stop, str) else stop,
            temperature=body.get("temperature", 1.0),
            top_p=float(body.get("top_p", 1)),
            seed=body.get("seed"),
            **options,
        )

    def read_chat(self, messages: list[dict], field: str) -> Prompt:
        if self.writer.tokenizer.chat_template is None:
            raise Refused("The model's tokenizer has no chat template: use /v1/completions, which continues a text.")
        return Prompt(encode_chat(self.writer.tokenizer, read_messages(messages, field)))


class Choices(Endpoint):
    """The format of OpenAI's completions and chat completions, with a list of `choices`."""

    last = "data: [DONE]\n\n"

    def whole(self, answers: list[Piece], job: Job, head: dict) -> dict:
        choices = [self.choice(answer, job) for answer in answers]
        return self.head(head, self.kind) | {"choices": choices, "usage": self.usage(job)}

    async def events(self, pieces, job: Job, head: dict, body: dict) -> AsyncIterator[dict]:
        head = self.head(head, self.chunk_kind)
        counted = body.get("stream_options", {}).get("include_usage", False)
        head |= {"usage": None} if counted else {}
        for choice in self.first_deltas(job):
            yield head | {"choices": [choice]}
        async for piece in pieces:
            yield head | {"choices": [self.delta(piece, job)]}
        if counted:
            yield head | {"choices": [], "usage": self.usage(job)}

    def head(self, head: dict, kind: str) -> dict:
        return head | {"object": kind, "created": int(time.time())}

    def usage(self, job: Job) -> dict:
        return {
            "prompt_tokens": job.read,
            "completion_tokens": job.written,
            "total_tokens": job.read + job.written,
        }


class Completions(Choices):
    rules, prefix, kind, chunk_kind = COMPLETION, "cmpl-", "text_completion", "text_completion"

    def read(self, body: dict) -> Job:
        if "prompt" not in body:
            raise Refused(f"`prompt` is missing: it must be {PROMPT.words}.", "prompt")
        prompts, n, echo = body["prompt"], body.get("n", 1), body.get("echo", False)
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        if body.get("best_of", n) != n:
            raise Refused(f"`best_of` ({body['best_of']}) must be `n` ({n}): all answers are returned.", "best_of")
        if body.get("max_tokens") == 0 and not echo:
            raise Refused(
                "`max_tokens` (0) must be at least 1 without `echo`: the answer would be empty.", "max_tokens"
            )
        prompts = [self.writer.encode(prompt) if isinstance(prompt, str) else Prompt(prompt) for prompt in prompts]
        return self.plan(body, prompts, body.get("max_tokens"), 256, echo=echo, logprobs=body.get("logprobs"))

    def choice(self, piece: Piece, job: Job) -> dict:
        logprobs = None
        if job.logprobs is not None:
            name = self.writer.name
            logprobs = {
                "tokens": [name(token.id) for token in piece.tokens],
                "token_logprobs": [token.logprob for token in piece.tokens],
                "top_logprobs": [
                    None if token.logprob is None else {name(id): value for id, value in token.largest.items()}
                    for token in piece.tokens
                ],
                "text_offset": [token.start for token in piece.tokens],
            }
        return {"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.reason}

    delta = choice

    def first_deltas(self, job: Job) -> list[dict]:
        return []


class ChatCompletions(Choices):
    rules, prefix, kind, chunk_kind = CHAT_COMPLETION, "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def read(self, body: dict) -> Job:
        if "messages" not in body:
            raise Refused("`messages` is missing: it must be a list of messages.", "messages")
        limits = {body[name] for name in ("max_tokens", "max_completion_tokens") if name in body}
        if len(limits) > 1:
            raise Refused("`max_tokens` and `max_completion_tokens` differ: leave one out.", "max_tokens")
        prompt = self.read_chat(body["messages"], "messages")
        return self.plan(body, [prompt], next(iter(limits), None), self.limit)

    def choice(self, piece: Piece, job: Job) -> dict:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": piece.index, "message": message, "logprobs": None, "finish_reason": piece.reason}

    def delta(self, piece: Piece, job: Job, **more) -> dict:
        delta = {"content": piece.text} | more
        return {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": piece.reason}

    def first_deltas(self, job: Job) -> list[dict]:
        return [self.delta(Piece(index), job, role="assistant") for index in range(job.n)]


class Responses(Endpoint):
    rules, prefix = RESPONSE, "resp_"

    def read(self, body: dict) -> Job:
        if "input" not in body:
            raise Refused("`input` is missing: it must be a text or a list of messages.", "input")
        messages = body["input"]
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        if "instructions" in body:
            messages = [{"role": "system", "content": body["instructions"]}, *messages]
        return self.plan(body, [self.read_chat(messages, "input")], body.get("max_output_tokens"), self.limit)

    def whole(self, answers: list[Piece], job: Job, head: dict) -> dict:
        (answer,) = answers
        status = "incomplete" if answer.reason == "length" else "completed"
        usage = {
            "input_tokens": job.read,
            "output_tokens": job.written,
            "total_tokens": job.read + job.written,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }
        return self.response(head, status) | {"output": [self.item(head, answer.text, status)], "usage": usage}

    async def events(self, pieces, job: Job, head: dict, body: dict) -> AsyncIterator[dict]:
        numbers = itertools.count()

        def event(kind, **values):
            return {"type": f"response.{kind}", "sequence_number": next(numbers)} | values

        item = self.item(head, "", "in_progress") | {"content": []}
        place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        yield event("created", response=self.response(head, "in_progress"))
        yield event("in_progress", response=self.response(head, "in_progress"))
        yield event("output_item.added", output_index=0, item=item)
        yield event("content_part.added", **place, part=self.part(""))
        text = ""
        async for piece in pieces:
            text += piece.text
            yield event("output_text.delta", **place, delta=piece.text, logprobs=[])
        yield event("output_text.done", **place, text=text, logprobs=[])
        yield event("content_part.done", **place, part=self.part(text))
        response = self.whole([Piece(0, text, [], piece.reason)], job, head)
        yield event("output_item.done", output_index=0, item=response["output"][0])
        yield event(response["status"], response=response)

    def response(self, head: dict, status: str) -> dict:
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return head | {
            "object": "response",
            "created_at": int(time.time()),
            "status": status,
            "incomplete_details": details,
            "error": None,
            "output": [],
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": False,
        }

    def item(self, head: dict, text: str, status: str) -> dict:
        name = head["id"].replace(self.prefix, "msg_", 1)
        return {"id": name, "type": "message", "role": "assistant", "status": status, "content": [self.part(text)]}

    def part(self, text: str) -> dict:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def error_object(message: str, status: int, field: str | None = None) -> dict:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": field, "code": None}}


async def on_refused(request: Request, error: Refused) -> Response:
    return JSONResponse(error_object(str(error), 400, error.field), status_code=400)


async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it


async def on_http_error(request: Request, error: HTTPException) -> Response:
    message = f"{error.detail}: this server answers POST to {', '.join(ADDRESSES)} and GET to /v1/models and /health."
    return JSONResponse(error_object(message, error.status_code), status_code=error.status_code, headers=error.headers)


async def on_failure(request: Request, error: Exception) -> Response:  # starlette logs the error
    return JSONResponse(error_object(f"Generation failed: {error}", 500), status_code=500)


ADDRESSES = {
    "/v1/completions": Completions,
    "/v1/chat/completions": ChatCompletions,
    "/v1/responses": Responses,
}


def make_app(arguments: Arguments) -> Starlette:
    """Load the model and return the ASGI application."""
    if arguments.limit < 2:
        raise ValueError(
            f"`limit` ({arguments.limit}) must be at least 2: one token of the prompt and one of the answer."
        )
    model, tokenizer = load_model(arguments.model, arguments.trust_remote_code, arguments.device)
    check_tokenizer(model, tokenizer)
    if direction_of(model) == "backward":
        raise ValueError(
            f"{arguments.model} reads backward (`direction` in its config.json), and answers are sent from their beginning on: "
            "write with scripts/generate.py, or serve a model that reads forward."
        )
    writer = Writer(model, tokenizer)
    began = int(time.time())

    async def models(request):
        served = {"id": arguments.model, "object": "model", "created": began, "owned_by": "local"}
        return JSONResponse({"object": "list", "data": [served]})

    async def health(request):
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/health", health),
            *(
                Route(address, endpoint(writer, arguments.model, arguments.limit).answer, methods=["POST"])
                for address, endpoint in ADDRESSES.items()
            ),
        ],
        exception_handlers={
            Refused: on_refused,
            ClientDisconnect: on_disconnect,
            HTTPException: on_http_error,
            Exception: on_failure,
        },
    )


def main(arguments: Arguments) -> None:
    app = make_app(arguments)
    print(f"Serving {arguments.model} at http://{arguments.host}:{arguments.port}/v1 (Ctrl-C to stop)", flush=True)
    # Answers in progress stop with the server.
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning", timeout_graceful_shutdown=1)


if __name__ == "__main__":
    prepare_screen()
    try:
        main(*Parser(Arguments, __doc__).parse_args_into_dataclasses())
    except (ValueError, OSError) as error:
        sys.exit(f"serve.py: {error}")
