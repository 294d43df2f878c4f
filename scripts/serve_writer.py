"""Text generation for scripts/serve.py: encodes prompts and continues them in one thread, one after the other.

Log probabilities are in nats, before the temperature. Shapes: V vocabulary.
"""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import NamedTuple

import torch
from serve_fields import Refused
from transformers import (
    AddedToken,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_lstm.decoding import StreamDecoder, bytes_of_tokens
from hf_lstm.generation import COLDEST
from hf_lstm.tokenizers import letter_reader

READ_AT_ONCE = 512  # tokens per forward pass over a prompt whose log probabilities are returned


def encode_chat(tokenizer, messages: list[dict]) -> list[int]:
    """
    Encode a conversation with the tokenizer's chat template. Special tokens of the template become tokens; text in the
    messages that looks like a special token stays text. To tell them apart, the template is rendered a second time,
    with the letters of special tokens replaced in the messages: those still found belong to the template. Where the
    messages contain none, the ids are those of `apply_chat_template`; otherwise the tokenizer reads the whole text with an
    unused character in place of each special token of the template.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): A tokenizer with a `chat_template`.
        messages (`list[dict]`): Messages with the texts `role`, `content` and, optionally, `name`.

    Raises:
        Refused: if the template raises an error, or changes a message that looks like a special token.
    """
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace()}
    if tokenizer.split_special_tokens:  # as version 0.1.0 saved it: the template's markers are letters too
        added = {name: token for name, token in added.items() if not token.special}
    letters = sorted({letter for name in added for letter in name if not letter.isspace()})  # templates strip space
    said = {letter for message in messages for value in message.values() for letter in value}
    symbols = chain(range(0x1D000, 0x1D0F6), range(0xF0000, 0xFFFFE))  # a notation of music, a plane for private use
    unused = (chr(code) for code in symbols if chr(code) not in said)
    twins = dict(zip(letters, unused, strict=False))
    hide, show = str.maketrans(twins), str.maketrans({twin: letter for letter, twin in twins.items()})
    hidden = [
        {key: value if key == "role" else value.translate(hide) for key, value in message.items()}
        for message in messages
    ]
    render = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    try:
        text, marked = render(messages), render(hidden)
    except Exception as error:  # of any class: a template is a program
        reason = str(error) or type(error).__name__
        raise Refused(f"The model's chat template refuses the messages: {reason}.", "messages") from error
    normalizer = tokenizer.backend_tokenizer.normalizer
    normalize = normalizer.normalize_str if normalizer else str
    pattern = any_of(added)
    patterns = [pattern, any_of(normalize(name) for name, token in added.items() if token.normalized)]
    if all(
        one.findall(change(text)) == one.findall(change(marked))
        for one, change in zip(patterns, (str, normalize), strict=True)
    ):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if marked.translate(show) != text:
        raise Refused("The chat template changes a message that looks like a special token: leave it out.", "messages")
    signs = dict(zip(sorted(set(pattern.findall(marked))), unused, strict=False))
    reader = letter_reader(tokenizer, signs)
    flags = {name: {flag: getattr(added[name], flag) for flag in ("lstrip", "rstrip", "normalized")} for name in signs}
    reader.add_tokens([AddedToken(sign, **flags[name]) for name, sign in signs.items()])

    def sign(match):
        around = text[max(0, match.start() - 1) : match.start()] + text[match.end() : match.end() + 1]
        return match[0] if added[match[0]].single_word and re.search(r"\w", around) else signs[match[0]]

    ids = reader(
        pattern.sub(sign, marked).translate(show), add_special_tokens=False, split_special_tokens=True, verbose=False
    )["input_ids"]
    names = [reader.convert_tokens_to_ids(sign) for sign in signs.values()]
    own = dict(zip(names, tokenizer.convert_tokens_to_ids(list(signs)), strict=True))
    return [own.get(index, index) for index in ids]


def any_of(names: Iterable[str]) -> re.Pattern:
    """Return a pattern that matches any of the names, the longest first."""
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")


@dataclass
class Token:
    """A token of an answer, with the offset of its text and, if requested, log probabilities in nats."""

    id: int
    start: int = 0
    logprob: float | None = None
    largest: dict[int, float] = field(default_factory=dict)


class Piece(NamedTuple):
    """New text of one of the answers to a request, and the reason if the answer is complete."""

    index: int
    text: str = ""
    tokens: list[Token] = []
    reason: str | None = None


class Prompt(NamedTuple):
    """A prompt: its token ids and, if it was given as text, the text and the offset of each token in it."""

    ids: list[int]
    text: str | None = None
    starts: list[int] = []


@dataclass
class Job:
    """A request: prompts to continue, each `n` times."""

    prompts: list[Prompt]
    max_tokens: int
    n: int
    stops: list[str]
    temperature: float
    top_p: float
    seed: int | None
    logprobs: int | None = None
    echo: bool = False
    written: int = 0

    @property
    def read(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)


class Answer:
    """
    An answer that grows token by token, after an `echo` of the prompt if any. Text that may be the beginning of a stop
    string is held back. `cut` is the offset of the stop string found, `reason` OpenAI's `finish_reason` once the text
    is complete.
    """

    def __init__(self, index: int, decoder, stops: list[str], echo: str, tokens: list[Token]):
        self.index, self.decoder, self.stops = index, decoder, stops
        self.text, self.tokens = echo, list(tokens)
        self.begin, self.shown, self.cut, self.reason = len(echo), 0, None, None

    def add(self, token: Token, ends: bool) -> Piece | None:
        token.start = len(self.text)
        self.tokens.append(token)
        if ends:
            return self.finish("stop")
        self._grow(self.decoder.step(token.id))
        return self._piece()

    def finish(self, reason: str) -> Piece:
        self._grow(self.decoder.end())
        self.reason = self.reason or reason
        return self._piece()

    def _grow(self, text: str) -> None:
        before = len(self.text)
        self.text += text
        starts = [(self.text.find(stop, max(self.begin, before - len(stop) + 1)), stop) for stop in self.stops]
        found = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if found and self.cut is None:
            self.cut, self.reason = min(found)[1], "stop"  # the first that is complete, independent of the tokens

    def _piece(self) -> Piece | None:
        end = len(self.text) if self.cut is None else self.cut
        if self.reason is None:
            tail = self.text[self.begin :]
            lengths = [(stop, n) for stop in self.stops for n in range(1, min(len(stop), len(tail) + 1))]
            end -= max((n for stop, n in lengths if tail.endswith(stop[:n])), default=0)
            if end <= self.shown:
                return None
        tokens = [token for token in self.tokens if token.start < end or end == len(self.text)]
        self.tokens = self.tokens[len(tokens) :]
        text, self.shown = self.text[self.shown : end], end
        return Piece(self.index, text, tokens, self.reason)


class Scores(LogitsProcessor):
    """Logits processor that keeps the log probabilities of each step."""

    def __call__(self, input_ids, scores):
        self.logprobs = scores.log_softmax(dim=-1)
        return scores


class Growth(StoppingCriteria):
    """Stopping criterion that passes all tokens to a function, which returns the rows that are complete."""

    def __init__(self, function):
        self.function = function

    def __call__(self, input_ids, scores, **kwargs):
        return self.function(input_ids)


class Writer:
    """
    Generation with one model in one thread.

    Raises:
        ValueError: if the tokenizer is not a fast one.
    """

    def __init__(self, model, tokenizer):
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} cannot decode incrementally: use a fast tokenizer.")
        self.model, self.tokenizer = model, tokenizer
        self.thread = ThreadPoolExecutor(1)
        # Keep the generation config of the model, except for what cannot be streamed and what each request sets
        # itself.
        defaults = model.generation_config
        stops, ends = defaults.stop_strings or [], defaults.eos_token_id
        self.stops = [stops] if isinstance(stops, str) else list(stops)
        self.ends = set(ends) if isinstance(ends, list) else {ends}
        defaults.update(stop_strings=None, num_beams=1, num_return_sequences=1)
        defaults.update(temperature=None, top_k=None, top_p=None)

    def encode(self, text: str) -> Prompt:
        """Encode a prompt, with special tokens in the text as tokens."""
        encoded = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        return Prompt(encoded["input_ids"], text, [start for start, _ in encoded["offset_mapping"]])

    def name(self, token: int) -> str:
        """Return a token's name in OpenAI's format: its text, its bytes if not UTF-8, or its id if the name is taken."""
        return self._names[token]

    @cached_property
    def _names(self) -> list[str]:
        special = {
            index: token.content for index, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        names = {}
        for index, spelt in enumerate(bytes_of_tokens(self.tokenizer, self.model.config.vocab_size)):
            try:
                name = special.get(index) or spelt.decode()
            except UnicodeDecodeError:
                name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)
            names.setdefault(name or f"token_id:{index}", index)
        by_id = {index: name for name, index in names.items()}
        return [by_id.get(index, f"token_id:{index}") for index in range(self.model.config.vocab_size)]

    async def pieces(self, job: Job) -> AsyncIterator[Piece]:
        """Yield the pieces of the answers as they are generated. Closing the generator stops generation."""
        loop, queue, left = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

        def send(piece):
            loop.call_soon_threadsafe(queue.put_nowait, piece)

        writing = self.thread.submit(self._write, job, send, left)
        writing.add_done_callback(send)
        try:
            while (piece := await queue.get()) is not writing:
                yield piece
            writing.result()  # raises the error if there was one
        finally:
            left.set()
            writing.cancel()

    def _write(self, job: Job, send, left: threading.Event) -> None:
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=job.seed is not None):  # a seed affects its own request only
            if job.seed is not None:
                torch.manual_seed(job.seed)
            for number, prompt in enumerate(job.prompts):
                if left.is_set():
                    return
                echo, tokens = self._read(prompt, job) if job.echo else ("", [])
                answers = [
                    Answer(index, StreamDecoder(self.tokenizer, prompt.ids), job.stops + self.stops, echo, tokens)
                    for index in range(number * job.n, (number + 1) * job.n)
                ]
                if job.max_tokens > 0:
                    self._continue(prompt.ids, answers, job, send, left)
                for answer in answers:
                    if answer.reason is None:
                        send(answer.finish("length"))

    def _continue(self, ids: list[int], answers: list[Answer], job: Job, send, left: threading.Event) -> None:
        scores, length = Scores(), len(ids)

        def grow(input_ids):
            nonlocal length
            for row, answer in enumerate(answers):
                for token in input_ids[row, length:].tolist():
                    if answer.reason is None:
                        job.written += 1
                        token = (
                            Token(token) if job.logprobs is None else scored(token, scores.logprobs[row], job.logprobs)
                        )
                        if piece := answer.add(token, token.id in self.ends):
                            send(piece)
            length = input_ids.shape[1]
            done = [answer.reason is not None or left.is_set() for answer in answers]
            return torch.tensor(done, device=input_ids.device)

        inputs = torch.tensor([ids] * len(answers), device=self.model.device)
        drawn = {"do_sample": True, "temperature": float(job.temperature), "top_k": 0, "top_p": job.top_p}
        self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=job.max_tokens,
            logits_processor=LogitsProcessorList([] if job.logprobs is None else [scores]),
            stopping_criteria=StoppingCriteriaList([Growth(grow)]),
            **(drawn if job.temperature >= COLDEST else {"do_sample": False}),
        )

    @torch.no_grad()
    def _read(self, prompt: Prompt, job: Job) -> tuple[str, list[Token]]:
        """Return the text of a prompt and its tokens, with log probabilities of all but the first."""
        ids, text, starts = prompt.ids, prompt.text, prompt.starts
        if text is None:
            text, starts, decoder = "", [], StreamDecoder(self.tokenizer)
            for token in ids:
                starts.append(len(text))
                text += decoder.step(token)
        tokens = [Token(token) for token in ids]
        if job.logprobs is not None and len(ids) > 1:
            cache, following = DynamicCache(config=self.model.config), iter(ids[1:])
            inputs = torch.tensor([ids[:-1]], device=self.model.device)
            for chunk in inputs.split(READ_AT_ONCE, dim=1):
                logprobs = self.model(chunk, past_key_values=cache).logits[0].float().log_softmax(dim=-1)
                tokens += [scored(next(following), step, job.logprobs) for step in logprobs]
            tokens[1 : len(ids)] = []  # replaced by those with log probabilities
        for token, start in zip(tokens, starts, strict=True):
            token.start = start
        return text, tokens


def scored(token: int, logprobs: torch.Tensor, count: int) -> Token:
    """Return a token with its log probability and the `count` largest of `logprobs`, `(V,)`."""
    logprobs = logprobs.clamp(min=-9999.0)  # JSON has no infinity
    values, indices = logprobs.topk(min(count, len(logprobs)))
    own = logprobs[token].item()
    return Token(token, logprob=own, largest=dict(zip(indices.tolist(), values.tolist(), strict=True)) | {token: own})
