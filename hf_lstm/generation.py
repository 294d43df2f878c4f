"""What `generate()` lacks: a state that can be kept in a file and taken up again, and texts that grow with it."""

import contextlib
import copy
import hashlib
import math
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    Cache,
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_lstm.data.streams import encode
from hf_lstm.evaluation import check_tokenizer, start_ids
from hf_lstm.model.decoding_lstm import BareCells
from hf_lstm.model.kernels_lstm import is_plain
from hf_lstm.tokenizers import StreamDecoder

STATE, SESSION = "hf_lstm state 1", "hf_lstm session 1"
REMEMBERED = ("held", "document")  # by the first layer of a cache; files of version 0.1.0 lack them
READ_AT_ONCE = 1024  # tokens
COLDEST = 1e-4  # temperature: nearer to 0 only the most probable token could be drawn, and scores would overflow


def save_state(model, cache: Cache, path: str | Path) -> None:
    """
    Write what a model remembers of all it has read into a safetensors file: `2 B` numbers for each cell, however many
    tokens there were. A file of that name is replaced once the new one is complete.

    Args:
        model (`LSTMForCausalLM` or `LSTMModel`): The model that read; the file is for this one alone.
        cache (`Cache`): Its `past_key_values`, a `DynamicCache` or `StaticCache`.
        path (`str` or `Path`): The file.

    Raises:
        ValueError: if the cache is not the model's, or has read nothing, or `path` names no file.
        OSError: if the file cannot be written.
    """
    _write(path, STATE, model, _tensors_of(model, cache), cache.get_seq_length())


def load_state(model, path: str | Path) -> DynamicCache:
    """
    The state that `save_state` wrote, to go on from: pass it as `past_key_values`. Repeated by its
    `batch_repeat_interleave`, or copied by `copy.deepcopy`, it goes on in many ways.

    Raises:
        ValueError: if there is no such file, it is no state or was cut off or changed, or it is that of a model with
            other weights.
    """
    return _cache_of(model, *_read(path, STATE, model), path)


class _State(NamedTuple):
    """
    A session between two steps: read and replaced as one object, so that whatever interrupts a step, and whoever looks on
    from another thread, finds it before the step or behind it.
    """

    cache: Cache  # what has been read: a step works on a copy
    unread: tuple[int, ...] = ()  # the last token of the text, if there is one: it says what comes next
    context: tuple[int, ...] = ()  # what a `StreamDecoder` goes on from
    untold: str = ""  # text of the last step that was interrupted before it was handed out


class Session:
    """
    A text that a model reads and continues, piece by piece. What was read is in the state: it is never read again, and
    the session stays as small as it was. Any number of sessions may use one model at once, each in a thread of its own.

    A step happens wholly or not at all. After Ctrl-C, an exception in the model or a `stream` that was left, the session has
    read and written up to some token, can be gone on with, forked and saved; so it can from another thread meanwhile.

    Args:
        model (`LSTMForCausalLM`): In evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): The model's own, a fast one.
        start_token (`str`, *optional*): What the text begins after, such as `"<eos>"`, which documents follow.

    Raises:
        ValueError: if the model is in training mode, the tokenizer is slow, not the model's or has no such token.
    """

    def __init__(self, model, tokenizer: PreTrainedTokenizerBase, start_token: str | None = None):
        if model.training:
            raise ValueError("The model is in training mode, where dropout is on: call `model.eval()` first.")
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} does not decode piece by piece: a fast tokenizer is needed.")
        check_tokenizer(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        unread = tuple(start_ids(start_token, tokenizer))
        self._state = _State(DynamicCache(config=model.config), unread, StreamDecoder(tokenizer, unread).context)

    @property
    def cache(self) -> Cache:
        """The state after what has been read, all but the last token of the text. Each step puts another in its place."""
        return self._state.cache

    @property
    def waiting(self) -> str:
        """
        What was written and not yet told. The text's pieces and this are together what decoding the whole gives: U+FFFD
        while a character lacks bytes that the next `stream` may write, and what an interruption kept from being told,
        which the next `stream` begins with. A `feed` lets go of both.
        """
        return self._state.untold + StreamDecoder(self.tokenizer, self._state.context).waiting

    def feed(self, text: str) -> None:
        """
        Let the model read on. Text is letters, whatever it looks like: see [`~tokenizers.encode_raw`].

        Raises:
            ValueError: if the text becomes no token, or holds half of a surrogate pair.
        """
        state, ids = self._state, encode([text], self.tokenizer)[0].tolist()
        if not ids:
            raise ValueError(f"{text!r} becomes no token: there is nothing to read.")
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
        Let the model write on: yields the text as it comes, whole characters at a time, until `max_new_tokens` or the
        end of the document. Whoever stops earlier has a session that has written so far. The text that was fed and the
        pieces of all streams are what decoding the whole gives, so that a character which `max_new_tokens` cuts is told by
        the next stream, when it is complete; see `waiting`. On a CPU a long text is written with a copy of the layers'
        weights, made once and dropped when it ends: change no weights in the middle of one.

        Args:
            max_new_tokens (`int`, defaults to 200): Tokens to write at most.
            do_sample, temperature, top_k, top_p, min_p:
                As `generate()` has them; a `top_k` of 0 means all tokens, a temperature below 1e-4 the most probable one.
            seed (`int`, *optional*): The same one writes the same text; without it torch's own generator is asked.

        Raises:
            ValueError: if nothing was read yet, or a number is not what `generate()` takes.
        """
        if not self._state.unread:
            raise ValueError("The session has read nothing: `feed` it a text first, or begin it with a `start_token`.")
        if max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` ({max_new_tokens}) must be at least 1.")
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise ValueError(f"`seed` ({seed}) must be a whole number from -2**63 to 2**64 - 1.")
        if do_sample and top_p is not None and math.isnan(top_p):
            raise ValueError(f"`top_p` ({top_p}) must be a number from 0 to 1.")
        warpers = LogitsProcessorList()
        for warper, value in (
            (TemperatureLogitsWarper, None if temperature == 1 else temperature),
            *((TopKLogitsWarper, top_k or None), (TopPLogitsWarper, top_p), (MinPLogitsWarper, min_p)),
        ):
            if do_sample and value is not None:
                warpers.append(warper(value))
        do_sample = do_sample and (temperature is None or temperature >= COLDEST)
        generator = None if seed is None else torch.Generator(self.model.device).manual_seed(seed)
        return _Stream(self, self._write(max_new_tokens, warpers if do_sample else None, generator))

    def _write(self, max_new_tokens, warpers, generator) -> Iterator[None]:
        """Step by step: `untold` is not empty whenever it yields."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        decoder = StreamDecoder(self.tokenizer)
        owned = vars(type(self.model)).keys()  # no wrapper's and no subclass's, which may do more
        cells = self.model.bare_cells() if {"forward", "bare_cells"} <= owned else None
        for _ in range(max_new_tokens):
            state = self._state
            cache, decoder.context = _apart(state.cache), state.context
            scores = self._read(state.unread, cache, cells)
            if warpers is None:
                token = int(scores.argmax())
            else:
                shares = warpers(None, scores.float()).softmax(dim=-1)
                token = int(torch.multinomial(shares, 1, generator=generator))
            text = state.untold + (decoder.end() if token in ends else decoder.step(token))
            self._state = _State(cache, (token,), decoder.context, text)
            if text:
                yield
            if token in ends:
                return

    @torch.no_grad()
    def _read(self, ids: Sequence[int], cache: Cache, cells: BareCells | None = None) -> torch.Tensor:
        """What comes next, `(1, V)`; the cache is brought up to the ids."""
        if cells is not None and is_plain(self.model, type(self.model)):
            token = torch.tensor([ids], device="cpu")
            if cells.can_read(token, cache):
                return self.model.lm_head(cells.read(token[0], cache))
        for chunk in torch.tensor([ids], device=self.model.device).split(READ_AT_ONCE, dim=1):
            logits = self.model(chunk, past_key_values=cache, logits_to_keep=1).logits
        return logits[:, -1]

    def fork(self) -> "Session":
        """Another session that has read the same."""
        other = copy.copy(self)
        state = other._state
        other._state = state._replace(cache=copy.deepcopy(state.cache))
        return other

    def save(self, path: str | Path) -> None:
        """
        Write the session into a safetensors file of some kilobytes; the text itself is not in it, but for the last few
        tokens. Raises `ValueError` if nothing was read yet, or `path` names no file.
        """
        state = self._state
        if not state.unread:
            raise ValueError("The session has read nothing: there is nothing to save.")
        length = state.cache.get_seq_length()
        tensors = _tensors_of(self.model, state.cache) if length else {}
        tensors |= {"unread": torch.tensor(state.unread), "context": torch.tensor(state.context, dtype=torch.long)}
        tensors["untold"] = torch.tensor(list(state.untold.encode()), dtype=torch.uint8)
        _write(path, SESSION, self.model, tensors, length)

    @classmethod
    def load(cls, model, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> "Session":
        """The session that `save` wrote. Raises `ValueError` as [`load_state`] does."""
        session = cls(model, tokenizer)
        tensors, length = _read(path, SESSION, model)
        unread = tensors.pop("unread")
        context = tensors.pop("context", unread).tolist()  # version 0.1.0 wrote neither this nor what was untold
        untold = bytes(tensors.pop("untold", torch.empty(0)).tolist()).decode()
        cache = _cache_of(model, tensors, length, path) if tensors else session.cache
        session._state = _State(cache, tuple(unread.tolist()), StreamDecoder(tokenizer, context).context, untold)
        return session


class _Stream(Iterator[str]):
    """
    The pieces that a session's steps leave untold. Each is told by a `return`, not by the `yield` of a generator: what
    interrupts it before that keeps it untold, and nothing that comes after can.
    """

    def __init__(self, session: Session, steps: Iterator[None]):
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
        """End the stream: the session has written so far."""
        self.steps.close()


def _apart(cache: Cache) -> Cache:
    """A cache for one step to write into: its layers put other tensors in the place of theirs and change none."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def _tensors_of(model, cache: Cache) -> dict[str, torch.Tensor]:
    states = [layer.get_state() if hasattr(layer, "get_state") else None for layer in cache.layers]
    sizes = model.config.cell_sizes
    if len(states) != len(sizes) or None in states:
        raise ValueError(
            f"`cache` holds a state in {sum(state is not None for state in states)} of {len(states)} layers, and the model "
            f"has {len(sizes)}: pass the `past_key_values` that the model has read with."
        )
    tensors = {
        f"layers.{index}.{name}": tensor.detach().cpu().contiguous()
        for index, state in enumerate(states)
        for name, tensor in zip("hc", state, strict=True)
    }
    for name in REMEMBERED:
        if (tensor := getattr(cache.layers[0], name)) is not None:
            tensors[f"layers.0.{name}"] = tensor.detach().cpu().contiguous()
    _check_shapes(tensors, model.config, "`cache`")
    return tensors


def _cache_of(model, tensors: dict[str, torch.Tensor], length: int, path: str | Path) -> DynamicCache:
    _check_shapes(tensors, model.config, str(path))
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        h, c = (tensors[f"layers.{index}.{name}"].to(model.device) for name in "hc")
        layer.update(h, c, num_tokens=length)
    for name in REMEMBERED:
        if (tensor := tensors.get(f"layers.0.{name}")) is not None:
            setattr(cache.layers[0], name, tensor.to(model.device))
    return cache


def _write(path: str | Path, kind: str, model, tensors: dict[str, torch.Tensor], length: int) -> None:
    """Beside the old file first, under a name of its own, so that there is always a whole one, whoever else saves there."""
    if not Path(path).name or Path(path).is_dir():
        raise ValueError(f"`path` ({str(path)!r}) names no file: give it a name, such as `talk.session`.")
    path = _checked(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"`path` ({str(path)!r}) is a device or a pipe, which would be replaced: name a file.")
    unfinished = path.with_name(f"{uuid.uuid4().hex}.unfinished")
    metadata = {"format": kind, "model": _digest(dict(model.named_parameters())), "tokens": str(int(length))}
    try:
        save_file(tensors, unfinished, metadata=metadata | {"digest": _digest(tensors)})
        os.replace(unfinished, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _read(path: str | Path, kind: str, model) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors, and how many tokens were read."""
    path = _checked(path)
    if not path.is_file():
        raise ValueError(f"The file {path} does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no {kind}, or was cut off ({error}): save it again.") from error
    if metadata.get("format") != kind:
        raise ValueError(f"{path} holds {metadata.get('format', 'something else')}: it must hold {kind}.")
    if metadata.get("model") != _digest(dict(model.named_parameters())):
        raise ValueError(f"{path} is of a model with other weights: load it with the model that read.")
    if metadata.get("digest") != _digest(tensors) or not metadata.get("tokens", "").isdecimal():
        raise ValueError(f"{path} was changed after it was saved: save it again.")
    return tensors, int(metadata["tokens"])


def _checked(path: str | Path) -> Path:
    """A path that safetensors can open, whose names are UTF-8."""
    if "\0" in str(path) or str(path).encode(errors="ignore").decode() != str(path):
        raise ValueError(f"`path` ({str(path)!r}) holds a null character or is not UTF-8: give the file another name.")
    return Path(path)


def _check_shapes(tensors: dict[str, torch.Tensor], config, source: str) -> None:
    rows = len(next(iter(tensors.values()), ()))
    expected = {
        f"layers.{index}.{name}": (rows, size) for index, size in enumerate(config.cell_sizes) for name in "hc"
    }
    optional = {"layers.0.held": (rows, config.output_size), "layers.0.document": (rows,)}
    expected |= {name: shape for name, shape in optional.items() if name in tensors}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected or rows == 0:
        raise ValueError(
            f"{source} holds states of the shapes {found}, and the model's are {expected}: it is another's."
        )


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """What tells these tensors from any others, to the last bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
