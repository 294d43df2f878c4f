"""What `generate()` lacks: a state that can be kept in a file and taken up again, and texts that grow with it."""

import copy
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers.decoders import DecodeStream
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

from hf_lstm.evaluation import check_tokenizer, start_ids
from hf_lstm.model.decoding_lstm import BareCells
from hf_lstm.model.kernels_lstm import is_plain
from hf_lstm.tokenizers import ends_lines, pieces_of

STATE, SESSION = "hf_lstm state 1", "hf_lstm session 1"
READ_AT_ONCE = 1024  # tokens


def save_state(model, cache: Cache, path: str | Path) -> None:
    """
    Write what a model remembers of all it has read into a safetensors file: `2 B` numbers for each cell, however many
    tokens there were. A file of that name is replaced once the new one is complete.

    Args:
        model (`LSTMForCausalLM` or `LSTMModel`): The model that read; the file is for this one alone.
        cache (`Cache`): Its `past_key_values`, a `DynamicCache` or `StaticCache`.
        path (`str` or `Path`): The file.

    Raises:
        ValueError: if the cache is not the model's, or has read nothing.
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


class Session:
    """
    A text that a model reads and continues, piece by piece. What was read is in the state: it is never read again, and
    the session stays as small as it was. Any number of sessions may use one model at once, each in a thread of its own.

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
        self.cache = DynamicCache(config=model.config)
        self._unread = start_ids(start_token, tokenizer)  # the last ones of the text

    def feed(self, text: str) -> None:
        """
        Let the model read on.

        Raises:
            ValueError: if the text becomes no token.
        """
        ids = []
        for piece in pieces_of(text):
            ids += self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise ValueError(f"{text!r} becomes no token: there is nothing to read.")
        self._unread += ids
        if len(self._unread) > 1:
            self._unread, ids = self._unread[-1:], self._unread[:-1]  # the last one says what comes next: later
            self._read(ids)

    def stream(
        self,
        max_new_tokens: int = 200,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """
        Let the model write on: yields the text as it comes, whole characters at a time, until `max_new_tokens` or the
        end of the document. Whoever stops earlier has a session that has written so far. On a CPU a long text is written
        with a copy of the layers' weights, made once and dropped when it ends: change no weights in the middle of one.

        Args:
            max_new_tokens (`int`, defaults to 200): Tokens to write at most.
            do_sample, temperature, top_k, top_p, min_p: As `generate()` has them.
            seed (`int`, *optional*): The same one writes the same text; without it torch's own generator is asked.

        Raises:
            ValueError: if nothing was read yet, or a number is not what `generate()` takes.
        """
        if not self._unread:
            raise ValueError("The session has read nothing: `feed` it a text first, or begin it with a `start_token`.")
        if max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` ({max_new_tokens}) must be at least 1.")
        warpers = LogitsProcessorList()
        if temperature != 1:
            warpers.append(TemperatureLogitsWarper(temperature))
        for warper, value in ((TopKLogitsWarper, top_k), (TopPLogitsWarper, top_p), (MinPLogitsWarper, min_p)):
            if value is not None:
                warpers.append(warper(value))
        generator = None if seed is None else torch.Generator(self.model.device).manual_seed(seed)
        return self._stream(max_new_tokens, warpers if do_sample else None, generator)

    def _stream(self, max_new_tokens, warpers, generator):
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        decoder = DecodeStream(skip_special_tokens=not ends_lines(self.tokenizer))  # there <eos> is a line end
        owned = vars(type(self.model)).keys()  # no wrapper's and no subclass's, which may do more
        cells = self.model.bare_cells() if {"forward", "bare_cells"} <= owned else None
        for _ in range(max_new_tokens):
            unread, self._unread = self._unread, []
            scores = self._read(unread, cells)
            if warpers is None:
                token = int(scores.argmax())
            else:
                shares = warpers(None, scores.float()).softmax(dim=-1)
                token = int(torch.multinomial(shares, 1, generator=generator))
            self._unread = [token]
            if token in ends:
                return
            text = decoder.step(self.tokenizer.backend_tokenizer, token)
            if text:
                yield text

    @torch.no_grad()
    def _read(self, ids: list[int], cells: BareCells | None = None) -> torch.Tensor:
        """What comes next, `(1, V)`."""
        if cells is not None and is_plain(self.model, type(self.model)):
            token = torch.tensor([ids], device="cpu")
            if cells.can_read(token, self.cache):
                return self.model.lm_head(cells.read(token[0], self.cache))
        for chunk in torch.tensor([ids], device=self.model.device).split(READ_AT_ONCE, dim=1):
            logits = self.model(chunk, past_key_values=self.cache, logits_to_keep=1).logits
        return logits[:, -1]

    def fork(self) -> "Session":
        """Another session that has read the same."""
        other = copy.copy(self)
        other.cache, other._unread = copy.deepcopy(self.cache), list(self._unread)
        return other

    def save(self, path: str | Path) -> None:
        """
        Write the session into a safetensors file of some kilobytes; the text itself is not in it. Raises `ValueError` if
        nothing was read yet.
        """
        if not self._unread:
            raise ValueError("The session has read nothing: there is nothing to save.")
        length = self.cache.get_seq_length()
        tensors = _tensors_of(self.model, self.cache) if length else {}
        _write(path, SESSION, self.model, tensors | {"unread": torch.tensor(self._unread)}, length)

    @classmethod
    def load(cls, model, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> "Session":
        """The session that `save` wrote. Raises `ValueError` as [`load_state`] does."""
        session = cls(model, tokenizer)
        tensors, length = _read(path, SESSION, model)
        session._unread = tensors.pop("unread").tolist()
        if tensors:
            session.cache = _cache_of(model, tensors, length, path)
        return session


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
    _check_shapes(tensors, sizes, "`cache`")
    return tensors


def _cache_of(model, tensors: dict[str, torch.Tensor], length: int, path: str | Path) -> DynamicCache:
    _check_shapes(tensors, model.config.cell_sizes, str(path))
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        h, c = (tensors[f"layers.{index}.{name}"].to(model.device) for name in "hc")
        layer.update(h, c, num_tokens=length)
    return cache


def _write(path: str | Path, kind: str, model, tensors: dict[str, torch.Tensor], length: int) -> None:
    """Beside the old file first, so that there is always a whole one."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    metadata = {"format": kind, "model": _digest(dict(model.named_parameters())), "tokens": str(int(length))}
    try:
        save_file(tensors, unfinished, metadata=metadata | {"digest": _digest(tensors)})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    os.replace(unfinished, path)


def _read(path: str | Path, kind: str, model) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors, and how many tokens were read."""
    path = Path(path)
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


def _check_shapes(tensors: dict[str, torch.Tensor], sizes: list[int], source: str) -> None:
    rows = len(next(iter(tensors.values()), ()))
    expected = {f"layers.{index}.{name}": (rows, size) for index, size in enumerate(sizes) for name in "hc"}
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
