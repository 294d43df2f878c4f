"""Serve a model to OpenAI clients: `transformers serve`, and what our models need for it.

python scripts/serve.py --model runs/first --port 8000
curl localhost:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "def main(", "max_tokens": 100}'
"""

import sys
from dataclasses import dataclass, field

import transformers
from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from transformers import HfArgumentParser
from transformers.cli.serve import Serve
from transformers.cli.serving import chat_completion, completion, response

from hf_lstm import LSTMForCausalLM


@dataclass
class Arguments:
    """What to serve, and where."""

    model: str = field(metadata={"help": "A model's folder, or its name on the Hub."})
    host: str = field(default="localhost", metadata={"help": "Address to listen at."})
    port: int = field(default=8000, metadata={"help": "Port to listen at."})
    limit: int = field(default=4096, metadata={"help": "Most tokens that a request may have, prompt and answer."})
    device: str = field(default="auto", metadata={"help": "Where the model computes."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code that comes with the model."})


def refuse(why: str) -> None:
    raise HTTPException(status_code=400, detail=why)


class Stream(StreamingResponse):
    """A stream that ends with its client: left where it waits to be sent, it would be written on until it is collected."""

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # which stops `generate()`


class Answers:
    """What is wrong with a request is said to its client, in the words that OpenAI's own show."""

    async def handle_request(self, body: dict, request_id: str):
        try:
            answer = await super().handle_request(body, request_id)
        except HTTPException as error:
            content = {"message": error.detail, "type": "invalid_request_error"}
            return JSONResponse({"error": content}, status_code=error.status_code)
        if isinstance(answer, StreamingResponse):
            return Stream(answer.body_iterator, media_type=answer.media_type)
        return answer


class CheckedCompletions(completion.CompletionHandler):
    """As transformers', with OpenAI's sampling, and every refusal said before anything is generated."""

    limit = Arguments.limit

    async def handle_request(self, body: dict, request_id: str):
        self._validate_request(body)
        if not isinstance(body.get("prompt"), str):
            refuse(f"`prompt` ({body.get('prompt')!r}) must be one text.")
        for name, kinds, least in (
            ("max_tokens", int, 1),
            ("temperature", (int, float), 0),
            ("top_p", (int, float), 0),
            ("seed", int, 0),
        ):
            value = body.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds) or value < least):
                refuse(f"`{name}` ({value!r}) must be a number of at least {least}.")
        if (body.get("top_p") or 0) > 1:
            refuse(f"`top_p` ({body['top_p']}) must be at most 1.")
        _, model, tokenizer = self._resolve_model(body)
        ids = tokenizer(body["prompt"])["input_ids"]
        if not ids:
            refuse(f"`prompt` ({body['prompt']!r}) becomes no token: there is nothing to continue.")
        if max(ids) >= model.config.vocab_size:
            refuse(
                f"`prompt` has a token {max(ids)}, and the model's vocabulary ends at {model.config.vocab_size - 1}."
            )
        tokens = self._build_generation_config(body, model.generation_config).max_new_tokens
        if len(ids) + tokens > self.limit:
            refuse(
                f"The prompt has {len(ids)} tokens and `max_tokens` is {tokens}: the limit is {self.limit} together."
            )
        return await super().handle_request(body, request_id)

    def _build_generation_config(self, body: dict, model_generation_config, use_cb: bool = False):
        """Tokens are drawn, among all, unless the temperature is 0; `generate()` would take the most probable."""
        body = {"max_tokens": min(256, self.limit // 2), "temperature": 1.0} | {
            name: value for name, value in body.items() if value is not None
        }
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        config.do_sample = body["temperature"] > 0
        if config.do_sample:
            config.top_k = 0
        else:
            config.temperature = config.top_k = config.top_p = None
        return config


class Completions(Answers, CheckedCompletions):
    pass


class NoChat(Answers):
    """A language model continues a text: it answers no messages, unless its tokenizer says how they become a text."""

    def _resolve_model(self, body: dict):
        model_id, model, tokenizer = super()._resolve_model(body)
        if tokenizer.chat_template is None:
            refuse("The model's tokenizer has no chat template: ask /v1/completions, which continues a text.")
        return model_id, model, tokenizer


class ChatCompletions(NoChat, chat_completion.ChatCompletionHandler):
    pass


class Responses(NoChat, response.ResponseHandler):
    pass


def main(arguments: Arguments, **options) -> Serve:
    if arguments.limit < 2:
        raise ValueError(
            f"`limit` ({arguments.limit}) must be at least 2, a token of the prompt and one of the answer."
        )
    transformers.LSTMForCausalLM = LSTMForCausalLM  # where transformers' ModelManager looks up config.architectures[0]
    # Serve imports its handlers when it is made; tests/test_serving.py fails if it no longer takes them from there.
    Completions.limit = arguments.limit
    completion.CompletionHandler = Completions
    chat_completion.ChatCompletionHandler = ChatCompletions
    response.ResponseHandler = Responses
    print(f"{arguments.model} answers at http://{arguments.host}:{arguments.port}/v1, Ctrl-C stops it.", flush=True)
    return Serve(
        force_model=arguments.model,
        host=arguments.host,
        port=arguments.port,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
        **options,
    )


if __name__ == "__main__":
    try:
        main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
    except (ValueError, OSError) as error:
        sys.exit(f"serve.py: {error}")
