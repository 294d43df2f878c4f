"""Saved states, and stateful sessions: texts that a model reads and continues piece by piece."""

import contextlib
import copy
import hashlib
import math
import os
import uuid
import weakref
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    Cache,
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_lstm.decoding import StreamDecoder
from hf_lstm.model.cache_lstm import load_state_tensors, state_tensors
from hf_lstm.tokenizers import check_tokenizer, direction_of, encode, in_direction, start_ids

STATE, SESSION = "hf_lstm state", "hf_lstm session"
FORMAT, FORMATS = "2", ("1", "2")  # written; read
# Fields of the config that a file names, and their values where it does not: format 1 names neither.
FORMER_VALUES: dict[str, Any] = {
    "cell_type": "lstm",
    "direction": "forward",
    "attention_window": None,
    "num_attention_heads": None,
}
READ_AT_ONCE = 1024  # tokens
COLDEST = 1e-4  # temperature: nearer to 0 only the most probable token could be drawn, and scores would overflow


def save_state(model: PreTrainedModel, cache: Cache, path: str | Path) -> None:
    """
    Write the state of a model after all tokens read so far into a safetensors file, whose size does not depend on the
    number of tokens: h and, where the cell has it, c of each layer and row, or the window of a layer of attention. An
    existing file of that name is replaced once the new one is complete.

    Args:
        model (`LSTMForCausalLM` or `LSTMModel`): The model of the state; the file loads with this one only.
        cache (`Cache`): Its `past_key_values`, a `DynamicCache` or `StaticCache`.
        path (`str` or `Path`): The file.

    Raises:
        ValueError: if the cache belongs to another model or is empty, or `path` is not the name of a file.
        OSError: if the file cannot be written.
    """
    _write(path, STATE, model, _tensors_of(model, cache), cache.get_seq_length())


def load_state(model: PreTrainedModel, path: str | Path) -> DynamicCache:
    """
    Load a state that `save_state` wrote: pass it as `past_key_values` to continue. Repeat it with its
    `batch_repeat_interleave`, or copy it with `copy.deepcopy`, for several continuations.

    Raises:
        ValueError: if the file does not exist, is not a saved state, is truncated or was changed, or if it belongs to
            a model with other weights.
    """
    return _cache_of(model, *_read(path, STATE, model), path)


class _State(NamedTuple):
    """
    State of a session between two steps. It is read and replaced as one object, so that an interrupted step, or
    another thread, finds it either before or after a step.
    """

    cache: Cache  # state after the tokens read so far: a step works on a copy
    unread: tuple[int, ...] = ()  # the last token of the text, if any, from which the next one is predicted
    context: tuple[int, ...] = ()  # of the `StreamDecoder`
    untold: str = ""  # text of the last step, if it was interrupted before the text was returned


class Session:
    """
    A text that a model reads and continues, piece by piece. The state holds the text read so far, which is never read
    again, and the session does not grow. Any number of sessions may use one model at once, each in its own thread.

    A step happens wholly or not at all. After Ctrl-C, an exception in the model or a `stream` that was left early, the
    session has read and written up to some token and can be continued, forked and saved, also from another thread
    meanwhile.

    For a model that reads backward (`config.direction`) the text grows at its beginning: what is fed or written later
    stands before what was there.

    Args:
        model (`LSTMForCausalLM`): The model, in evaluation mode.
        tokenizer (`PreTrainedTokenizerFast`): The model's own tokenizer, a fast one.
        start_token (`str`, *optional*): Token read before the text, such as `"<eos>"`, which separates documents.

    Raises:
        ValueError: if the model is in training mode, or the tokenizer is slow, not the model's or lacks the token.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, start_token: str | None = None):
        if model.training:
            raise ValueError("The model is in training mode, where dropout is on: call `model.eval()` first.")
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} does not decode piece by piece: use a fast tokenizer.")
        check_tokenizer(model, tokenizer)
        self.model, self.tokenizer, self.direction = model, tokenizer, direction_of(model)
        unread = tuple(start_ids(start_token, tokenizer))
        self._state = _State(DynamicCache(config=model.config), unread, StreamDecoder(tokenizer, unread).context)

    @property
    def cache(self) -> Cache:
        """State after all but the last token of the text. Each step replaces it by a new cache."""
        return self._state.cache

    @property
    def waiting(self) -> str:
        """
        Text that was written but not yet returned. The pieces of the text and this together equal the decoding of the
        whole. It is U+FFFD while a character lacks bytes that the next `stream` or `write` may write, and text held back by
        an interruption, which the next one returns first. A `feed` drops both.
        """
        text = self._state.untold + StreamDecoder(self.tokenizer, self._state.context).waiting
        return in_direction(text, self.direction, self.tokenizer)

    def feed(self, text: str) -> None:
        """
        Let the model read more text. Special tokens in it are read as ordinary text: see [`~tokenizers.encode`].

        Raises:
            ValueError: if the text has no tokens, or contains half of a surrogate pair.
        """
        state = self._state
        ids: list[int] = encode([text], self.tokenizer, direction=self.direction)[0].tolist()
        if not ids:
            raise ValueError(f"{text!r} has no tokens to read: give a text that the tokenizer does not drop.")
        *read, last = (*state.unread, *ids)
        cache = _apart(state.cache)
        if read:
            self._read(read, cache)
        self._state = _State(cache, (last,), StreamDecoder(self.tokenizer, [*state.context, *ids]).context)

    def stream(
        self,
        max_new_tokens: int = 200,
        do_sample: bool = True,
        temperature: float | None = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """
        Let the model continue the text: yields pieces as they are generated, whole characters at a time, until
        `max_new_tokens` or the end of the document. If the iterator is closed early, the session keeps what was
        generated. The text that was fed and the pieces of all streams together equal the decoding of the whole, so
        that a character which `max_new_tokens` cuts is returned by the next stream, once complete; see `waiting`. On a
        CPU a long text is generated with a copy of the layers' weights, made again when they change: writes into
        weights through `.data` or numpy are not detected.

        Args:
            max_new_tokens (`int`, defaults to 200): Maximum number of tokens to generate.
            do_sample, temperature, top_k, top_p, min_p:
                See `generate()`; a `top_k` of 0 means all tokens, a temperature below 1e-4 takes the most probable one.
            seed (`int`, *optional*): Seed of the samples; by default they come from torch's global generator.

        Raises:
            ValueError: if nothing was read yet, a number is not valid for `generate()`, or the model reads backward, so
                that each piece stands before the one that was returned: see [`write`].
        """
        if self.direction == "backward":
            raise ValueError(
                "`stream` returns a text from its beginning, and this model (`config.direction` is 'backward') writes it "
                "from its end: call `write`, which returns the new text whole."
            )
        return _Stream(self, self._steps(max_new_tokens, do_sample, temperature, top_k, top_p, min_p, seed))

    def write(
        self,
        max_new_tokens: int = 200,
        do_sample: bool = True,
        temperature: float | None = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
    ) -> str:
        """
        Let the model continue the text, and return the new text whole. It stands behind the text so far, or before it if
        the model reads backward. If it is interrupted, the next `write` returns what was written too; see `waiting`.

        Args:
            max_new_tokens, do_sample, temperature, top_k, top_p, min_p, seed: See [`stream`].

        Raises:
            ValueError: if nothing was read yet, or a number is not valid for `generate()`.
        """
        for _ in self._steps(max_new_tokens, do_sample, temperature, top_k, top_p, min_p, seed):
            pass  # the text gathers in `untold`
        state = self._state
        try:
            self._state = state._replace(untold="")
            return in_direction(state.untold, self.direction, self.tokenizer)
        except BaseException:
            self._state = state
            raise

    def _steps(self, max_new_tokens, do_sample, temperature, top_k, top_p, min_p, seed) -> Generator[None, None, None]:
        """Check the arguments of `stream`, and return the steps."""
        if not self._state.unread:
            raise ValueError("The session has not read a token: `feed` it a text first, or give it a `start_token`.")
        if max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` ({max_new_tokens}) must be at least 1.")
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise ValueError(f"`seed` ({seed}) must be a whole number from -2**63 to 2**64 - 1.")
        if do_sample and top_p is not None and math.isnan(top_p):
            raise ValueError(f"`top_p` ({top_p}) must be a number from 0 to 1.")
        warpers = LogitsProcessorList()
        if do_sample and temperature not in (None, 1):
            warpers.append(TemperatureLogitsWarper(temperature))
        if do_sample and top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if do_sample and top_p is not None:
            warpers.append(TopPLogitsWarper(top_p))
        if do_sample and min_p is not None:
            warpers.append(MinPLogitsWarper(min_p))
        do_sample = do_sample and (temperature is None or temperature >= COLDEST)
        generator = None if seed is None else torch.Generator(self.model.device).manual_seed(seed)
        return self._generate(max_new_tokens, warpers if do_sample else None, generator)

    def _generate(
        self, max_new_tokens: int, warpers: LogitsProcessorList | None, generator: torch.Generator | None
    ) -> Generator[None, None, None]:
        """Generate tokens, and yield whenever a piece of text is in `untold`."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        decoder = StreamDecoder(self.tokenizer)
        for _ in range(max_new_tokens):
            state = self._state
            cache, decoder.context = _apart(state.cache), state.context
            scores = self._read(state.unread, cache)
            if warpers is None:
                token = int(scores.argmax())
            else:
                # The warpers do not look at the ids before.
                probabilities = warpers(None, scores.float()).softmax(dim=-1)  # type: ignore[arg-type]
                token = int(torch.multinomial(probabilities, 1, generator=generator))
            text = state.untold + (decoder.end() if token in ends else decoder.step(token))
            self._state = _State(cache, (token,), decoder.context, text)
            if text:
                yield
            if token in ends:
                return

    @torch.no_grad()
    def _read(self, ids: Sequence[int], cache: Cache) -> torch.Tensor:
        """Read tokens, update the cache and return the logits of the next one, `(1, V)`."""
        quick = getattr(type(self.model), "next_logits", None)  # a wrapper has only its forward, which may do more
        for start in range(0, len(ids), READ_AT_ONCE):
            chunk = torch.tensor([ids[start : start + READ_AT_ONCE]])
            if quick is not None:
                logits = quick(self.model, chunk, cache)
            else:
                logits = self.model(chunk.to(self.model.device), past_key_values=cache, logits_to_keep=1).logits[:, -1]
        return logits

    def fork(self) -> "Session":
        """Return an independent copy of the session."""
        other = copy.copy(self)
        state = other._state
        other._state = state._replace(cache=copy.deepcopy(state.cache))
        return other

    def save(self, path: str | Path) -> None:
        """
        Write the session into a safetensors file of some kilobytes, without the text except its last few tokens.
        Raises `ValueError` if nothing was read yet, or if `path` is not the name of a file.
        """
        state = self._state
        if not state.unread:
            raise ValueError("The session has not read a token: `feed` it a text before saving it.")
        length = state.cache.get_seq_length()
        tensors = _tensors_of(self.model, state.cache) if length else {}
        tensors |= {"unread": torch.tensor(state.unread), "context": torch.tensor(state.context, dtype=torch.long)}
        tensors["untold"] = torch.tensor(list(state.untold.encode()), dtype=torch.uint8)
        _write(path, SESSION, self.model, tensors, length)

    @classmethod
    def load(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: str | Path) -> "Session":
        """Load a session that `save` wrote. Raises the errors of [`load_state`]."""
        session = cls(model, tokenizer)
        tensors, length = _read(path, SESSION, model)
        unread = tensors.pop("unread")
        context = tensors.pop("context", unread).tolist()  # files of version 0.1.0 have neither this nor `untold`
        untold = bytes(tensors.pop("untold", torch.empty(0)).tolist()).decode()
        cache = _cache_of(model, tensors, length, path) if tensors else session.cache
        session._state = _State(cache, tuple(unread.tolist()), StreamDecoder(tokenizer, context).context, untold)
        return session


class _Stream(Iterator[str]):
    """
    Iterator over the pieces of text in a session's `untold`. It returns each from `__next__` instead of yielding it
    from a generator: an interruption before the `return` keeps the piece in `untold`, and a later one cannot
    repeat it.
    """

    def __init__(self, session: Session, steps: Generator[None, None, None]):
        self.session, self.steps = session, steps

    def __next__(self) -> str:
        next(self.steps)
        state = self.session._state
        try:
            self.session._state = state._replace(untold="")
            return state.untold
        except BaseException:
            self.session._state = state
            raise

    def close(self) -> None:
        """End the stream: the session keeps what was generated."""
        self.steps.close()


def _apart(cache: Cache) -> Cache:
    """Return a cache for one step to update: its layers replace the tensors that they share with the old one."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def _tensors_of(model, cache: Cache) -> dict[str, torch.Tensor]:
    """Return the tensors of the state in `cache` on the CPU, after checking that it belongs to the model."""
    states = [layer.get_state() if hasattr(layer, "get_state") else None for layer in cache.layers]
    if len(states) != model.config.num_hidden_layers or None in states:
        raise ValueError(
            f"`cache` holds a state in {sum(state is not None for state in states)} of {len(states)} layers, and the model "
            f"has {model.config.num_hidden_layers}: pass the `past_key_values` of a forward of this model."
        )
    tensors = {name: tensor.cpu() for name, tensor in state_tensors(cache).items()}
    _check_shapes(tensors, model.config, "`cache`")
    return tensors


def _cache_of(model, tensors: dict[str, torch.Tensor], length: int, path: str | Path) -> DynamicCache:
    """Return a cache of the tensors of a file, after checking their shapes."""
    _check_shapes(tensors, model.config, str(path))
    cache = DynamicCache(config=model.config)
    load_state_tensors(cache, tensors, length, model.device)
    return cache


def _write(path: str | Path, kind: str, model, tensors: dict[str, torch.Tensor], length: int) -> None:
    """Write the tensors of a state or session of a model, after `length` tokens."""
    if not Path(path).name or Path(path).is_dir():
        raise ValueError(f"`path` ({str(path)!r}) must be the name of a file: give one, such as `talk.session`.")
    path = _checked(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"`path` ({str(path)!r}) is a device or a pipe, which would be replaced: name a file.")
    metadata = {"format": f"{kind} {FORMAT}", "model": _fingerprint(model), "tokens": str(int(length))}
    metadata |= {name: str(getattr(model.config, name)) for name in FORMER_VALUES}
    try:
        write_tensors(tensors, path, metadata | {"digest": _digest(tensors)})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def write_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file wholly or not at all, whoever else writes to `path` at the same time."""
    unfinished = path.with_name(f"{path.name[:100]}.{uuid.uuid4().hex}.unfinished")
    try:
        save_file(tensors, unfinished, metadata=metadata)
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _read(path: str | Path, kind: str, model) -> tuple[dict[str, torch.Tensor], int]:
    """Return the tensors of a file and the number of tokens read, after checking that it is whole and fits the model."""
    path = _checked(path)
    if not path.is_file():
        raise ValueError(f"The file {path} does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid {kind} file, or truncated ({error}): save it again.") from error
    if metadata.get("format") not in [f"{kind} {number}" for number in FORMATS]:
        raise ValueError(f"{path} holds {metadata.get('format', 'something else')}: it must hold {kind} {FORMAT}.")
    for name, former in FORMER_VALUES.items():
        if (found := metadata.get(name, str(former))) != (own := str(getattr(model.config, name))):
            raise ValueError(
                f"{path} belongs to a model with `{name}` {found!r}, and this one has {own!r}: load it with the model that "
                "wrote it."
            )
    if metadata.get("model") != _fingerprint(model):
        raise ValueError(f"{path} belongs to a model with other weights: load it with the model that wrote it.")
    if metadata.get("digest") != _digest(tensors) or not metadata.get("tokens", "").isdecimal():
        raise ValueError(f"{path} was changed after it was saved: save it again.")
    return tensors, int(metadata["tokens"])


def _checked(path: str | Path) -> Path:
    """A path that safetensors can open, whose names are UTF-8."""
    if "\0" in str(path) or str(path).encode(errors="ignore").decode() != str(path):
        raise ValueError(f"`path` ({str(path)!r}) holds a null character or is not UTF-8: give the file another name.")
    return Path(path)


def _check_shapes(tensors: dict[str, torch.Tensor], config, source: str) -> None:
    """Raise `ValueError` unless the tensors are a state of one or more rows of the config's model."""
    rows = len(next(iter(tensors.values()))) if tensors else 0
    layers: list[Any] = DynamicCache(config=config).layers
    expected: dict[str, tuple[int, ...]] = {
        f"layers.{index}.{name}": (rows, *shape)
        for index, layer in enumerate(layers)
        for name, shape in layer.shapes_of(config, index).items()
    }
    # Files of version 0.1.0 lack these.
    optional = {"layers.0.held": (rows, config.output_size), "layers.0.document": (rows,), "layers.0.read": (rows,)}
    expected |= {name: shape for name, shape in optional.items() if name in tensors}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected or rows == 0:
        raise ValueError(
            f"{source} holds states of the shapes {found}, and the model's are {expected}: it belongs to another model."
        )


def _fingerprint(model) -> str:
    """
    Return the SHA-256 of a model's weights. It is computed once per process, and again if a weight was replaced or
    changed; always for weights made under `torch.inference_mode`, which do not record changes. Writes through `.data`
    or numpy are not detected.
    """
    weights = dict(model.named_parameters())
    if any(weight.is_inference() for weight in weights.values()):
        return _digest(weights)
    key = [(name, weight.data_ptr(), weight._version) for name, weight in weights.items()]
    refs, known, digest = _FINGERPRINTS.get(model, ((), None, ""))
    if key != known or any(ref() is not weight for ref, weight in zip(refs, weights.values(), strict=True)):
        digest = _digest(weights)
        _FINGERPRINTS[model] = [weakref.ref(weight) for weight in weights.values()], key, digest
    return digest


_FINGERPRINTS: weakref.WeakKeyDictionary[PreTrainedModel, tuple[list, list, str]] = weakref.WeakKeyDictionary()


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of tensors, their names, shapes and types."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
