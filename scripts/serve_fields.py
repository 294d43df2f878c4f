"""Fields of requests to scripts/serve.py and their checks. A field that is not listed is refused."""

import json
import reprlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from starlette.requests import Request

BODY = 1 << 22  # maximum bytes of a request, about a second of encoding
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class Refused(Exception):
    """An invalid request, with the message for its client and the field it refers to."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


class Rule(NamedTuple):
    """The valid values of a field, as a description and a predicate."""

    words: str
    holds: Callable[[object], bool]


def number(least, most, kinds=(int, float)) -> Rule:
    kind = "whole number" if kinds == (int,) else "number"
    return Rule(f"a {kind} from {least} to {most}", lambda value: type(value) in kinds and least <= value <= most)


def only(*values) -> Rule:
    """Allow only these values, for a field whose other values are not supported."""
    words = f"{' or '.join(map(json.dumps, values))}: this server supports nothing else"
    return Rule(words, lambda value: any(value == one and isinstance(value, type(one)) for one in values))


def is_list(value, kind: type) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)


whole = partial(number, kinds=(int,))
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("a text", lambda value: isinstance(value, str))
LABEL = Rule("a text or an object of texts", lambda value: isinstance(value, str | dict))  # without effect
ZERO = Rule("0: this server supports nothing else", lambda value: type(value) in (int, float) and value == 0)
STOP = Rule(
    "a non-empty text or a list of up to 4 non-empty texts",
    lambda value: value != "" and (isinstance(value, str) or (is_list(value, str) and len(value) <= 4 and all(value))),
)
PROMPT = Rule(
    "a text, a list of texts, a list of token ids or a list of such lists",
    lambda value: (
        isinstance(value, str)
        or (value != [] and (is_list(value, str) or is_list(value, int)))
        or (value != [] and is_list(value, list) and all(is_list(one, int) for one in value))
    ),
)
MESSAGES = Rule("a list of messages", lambda value: is_list(value, dict) and value != [])
STREAM_OPTIONS = Rule(
    "an object of `include_usage` and `include_obfuscation`, true or false",
    lambda value: (
        isinstance(value, dict)
        and value.keys() <= {"include_usage", "include_obfuscation"}
        and is_list(list(value.values()), bool)
    ),
)

SAMPLING = {
    "model": TEXT,
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "seed": whole(-(2**63), 2**64 - 1),  # the range of torch's seeds
    "stream": FLAG,
    "store": only(False),
    "service_tier": only("auto", "default"),
    **dict.fromkeys(("user", "metadata", "safety_identifier", "prompt_cache_key"), LABEL),
}
CHOICES = SAMPLING | {
    "n": whole(1, 128),
    "stop": STOP,
    "stream_options": STREAM_OPTIONS,
    "presence_penalty": ZERO,
    "frequency_penalty": ZERO,
    "logit_bias": only({}),
}
COMPLETION = CHOICES | {
    "prompt": PROMPT,
    "max_tokens": whole(0, 2**31),
    "logprobs": whole(0, 5),
    "echo": FLAG,
    "best_of": whole(1, 128),
    "suffix": only(""),
}
NO_TOOLS = {"tools": only([]), "tool_choice": only("auto", "none"), "parallel_tool_calls": FLAG}
CHAT_COMPLETION = (
    CHOICES
    | NO_TOOLS
    | {
        "messages": MESSAGES,
        "max_tokens": whole(1, 2**31),
        "max_completion_tokens": whole(1, 2**31),
        "logprobs": only(False),
        "top_logprobs": ZERO,
        "response_format": only({"type": "text"}),
        "modalities": only(["text"]),
        "functions": only([]),
        "function_call": only("auto", "none"),
    }
)
RESPONSE = SAMPLING | NO_TOOLS | {
    "input": Rule("a text or a list of messages", lambda value: isinstance(value, str) or MESSAGES.holds(value)),
    "instructions": TEXT,
    "max_output_tokens": whole(1, 2**31),
    "top_logprobs": ZERO,
    "text": only({"format": {"type": "text"}}, {}),
    "truncation": only("disabled"),
    "background": only(False),
    "include": only([]),
}  # fmt: skip


async def read_body(request: Request, rules: dict[str, Rule]) -> dict:
    """Read the fields of a request that are not null. Raises `Refused` if one breaks its rule."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise Refused(f"The header Content-Type ({kind!r}) must be application/json.")
    coding = request.headers.get("content-encoding", "")
    if coding.strip().lower() not in ("", "identity"):
        raise Refused(f"The header Content-Encoding ({coding!r}) must be left out: the body is read as it is.")
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > BODY:
            raise Refused(f"The body must have at most {BODY:,} bytes.")

    def refuse_constant(name):
        raise ValueError(f"{name} is not a number in JSON")  # though Python's reader accepts it

    try:
        body = json.loads(data, parse_constant=refuse_constant)
        if not isinstance(body, dict):
            raise ValueError(f"it is {reprlib.repr(body)}")
        for name, value in body.items():
            json.dumps([name, value], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refused(
            f"{reprlib.repr(name)} contains half a surrogate pair, which is not valid text: leave it out."
        ) from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"The body must be a JSON object: {error}.") from None
    body = {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        if name not in rules:
            raise Refused(f"{reprlib.repr(name)} is not a field that this address supports: leave it out.", name)
        if not rules[name].holds(value):
            raise Refused(f"`{name}` ({reprlib.repr(value)}) must be {rules[name].words}.", name)
    if "stream_options" in body and not body.get("stream"):
        raise Refused("`stream_options` is only valid with `stream`: leave it out.", "stream_options")
    return body


def read_messages(messages: list[dict], field: str) -> list[dict]:
    """Convert messages to the form of chat templates: `role`, `content` as one text, and `name` if there is one."""
    plain = []
    for message in messages:
        message = {key: value for key, value in message.items() if value not in (None, [], {})}
        content = message.get("content", "")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        kinds = ("text", "input_text", "output_text")
        if not all(isinstance(part, dict) and part.get("type") in kinds for part in parts):
            raise Refused(f"`{field}` has {reprlib.repr(message)}: the parts of a message must be text.", field)
        said = [part.get("text") for part in parts]
        name = {"name": message["name"]} if "name" in message else {}
        unknown = sorted(message.keys() - {"role", "content", "name", "type", "id", "status"})
        if (
            message.get("role") not in ROLES
            or not is_list([*said, *name.values()], str)
            or message.get("type", "message") != "message"
        ):
            raise Refused(
                f"`{field}` has {reprlib.repr(message)}: a message has a `role` ({', '.join(ROLES)}), a `content` of "
                "text and, optionally, a `name` of text.",
                field,
            )
        if unknown:
            raise Refused(
                f"`{field}` has a message with {reprlib.repr(unknown[0])}, which is not supported: leave it out.",
                field,
            )
        plain.append({"role": message["role"], "content": "".join(said)} | name)
    return plain
