"""`generate()`: what an LSTM does otherwise, and the bare cells of a stacked model, which write faster on a CPU.

What lies between the cells is left out. Two layers of 512 in `generate()`, on two cores and in one run: 3.0 ms a token by
the model's own step, 2.3 through its cells, 1.9 once the weights lie column by column; and a small vocabulary spares a
quarter of what is read then.

Shapes: B batch, H width of the last cell; one token of each row.
"""

import inspect
import itertools
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin, StoppingCriteriaList, StopStringCriteria

COPY_AFTER, COPY_UP_TO = 8, 2**24
"""Tokens of one row after which the layers' weights are copied, and how many weights at most: 5 ms, for two layers of 512,
that are regained in about fifteen tokens. Two or three rows lose by it, and a row of 1,024 gains nothing."""


class BareCells:
    """
    What a model does between `input_ids` and the output layer, for one text: made where that begins and dropped where it
    ends, with the copy of the layers' weights that a single row is written with from its ninth token on. Weights that
    change in the middle of a text go unnoticed.

    Args:
        model (`LSTMModel`): One of `LSTMLayer`s, between which there is nothing, on a CPU.
    """

    def __init__(self, model):
        self.model, self.count = model, 0
        gates = [(layer.input_gates, layer.hidden_gates) for layer in model.layers]
        self.embeddings, self.weights = model.embed_tokens.weight, [(W.weight, U.weight, W.bias) for W, U in gates]
        between = [model.norm, model.in_proj, model.out_proj]
        bypassed = [model, model.embed_tokens, *between, *model.layers, *itertools.chain(*gates)]
        self.size = sum(weight.numel() for weights in self.weights for weight in weights)
        self.modules = [vars(module) for module in bypassed]
        self.hooks = [hooks for module in bypassed for hooks in (module._forward_hooks, module._forward_pre_hooks)]

    def can_read(self, input_ids: torch.Tensor | None, cache: Cache | None, others: tuple = ()) -> bool:
        """
        Whether that is one token of each row after a state, no more is asked than what comes next, and the modules do
        nothing but what their weights say. `others` are the other arguments of a forward.
        """
        if input_ids is None or cache is None or input_ids.shape[1] != 1 or torch.is_grad_enabled():
            return False
        if any(self.hooks) or torch.is_autocast_enabled("cpu") or self.model.config.output_hidden_states:
            return False
        for module in self.modules:
            if module["training"] or "forward" in module or module.get("_compiled_call_impl"):
                return False
        if len(cache.layers) != len(self.weights) or len(self.weights) != self.model.config.num_hidden_layers:
            return False
        place = (self.embeddings.dtype, self.embeddings.device)
        for layer in cache.layers:
            if not layer.is_initialized or getattr(layer, "record_past", True) or layer.is_compileable:
                return False
            if len(layer.keys) != len(input_ids):
                return False
            if (layer.keys.dtype, layer.keys.device) != place or (layer.values.dtype, layer.values.device) != place:
                return False
        return all(other is None or other is False for other in others)

    def read(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """h of the last cell `(B, H)` after `tokens` `(B,)`; the cache is brought up to them."""
        self.count += 1
        if self.count == COPY_AFTER and len(tokens) == 1 and self.size <= COPY_UP_TO:
            self._copy()
        x = F.embedding(tokens, self.embeddings)
        for layer, weights in zip(cache.layers, self.weights, strict=True):
            x, c = torch.lstm_cell(x, layer.get_state(), *weights)
            layer.update(x, c)
        return x

    def _copy(self):
        """A quarter less is read at each token of a small vocabulary if W E is kept, for W_1 (E_v) = (W_1 E)_v."""
        (W, U, b), *others = self.weights
        size, width = self.embeddings.shape
        folded = W @ self.embeddings.t() if 4 * size <= width else None
        if folded is not None and folded.isfinite().all():  # or a zero of x would make nothing of what is none
            W = folded
            self.embeddings = torch.eye(size, dtype=W.dtype, device=W.device)  # x is a column's number, one-hot
        self.weights = [(_by_column(W), _by_column(U), b) for W, U, b in [(W, U, b), *others]]


def _by_column(weight: torch.Tensor) -> torch.Tensor:
    return weight.t().contiguous().t()


_IN_USE: ContextVar[BareCells | None] = ContextVar("bare_cells", default=None)


@contextmanager
def writing_with(cells: BareCells | None):
    """In this, the forwards of this thread, and no others, may write with them."""
    token = _IN_USE.set(cells)
    try:
        yield
    finally:
        _IN_USE.reset(token)


def cells_in_use(model) -> BareCells | None:
    """Those that this thread writes with, if they are this `LSTMModel`'s: an assistant has others."""
    cells = _IN_USE.get()
    return cells if cells is not None and cells.model is model else None


class LSTMGenerationMixin(GenerationMixin):
    """`generate()` for a model whose state is its memory."""

    @wraps(inspect.unwrap(GenerationMixin.generate))
    def generate(self, *args, **kwargs):
        with writing_with(self.bare_cells()):
            return super().generate(*args, **kwargs)

    def _sample(self, input_ids, *args, stopping_criteria, **kwargs):
        """
        As transformers' own, with criteria that tell which rows have ended. A private name, since no public hook sees both
        these and the inputs of the next step; tests/test_generation.py fails when it changes.
        """
        criteria = EndedRows(stopping_criteria)
        return super()._sample(input_ids, *args, stopping_criteria=criteria, criteria=criteria, **kwargs)

    def _get_stopping_criteria(self, generation_config, stopping_criteria, tokenizer=None, **kwargs):
        """
        As transformers' own, with stop strings for every vocabulary. A private name, since no public hook is asked for them;
        tests/test_generation_modes.py fails when it changes.
        """
        strings = generation_config.stop_strings
        if strings is None or tokenizer is None:
            return super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer=tokenizer, **kwargs)
        generation_config.stop_strings = None
        try:
            criteria = super()._get_stopping_criteria(
                generation_config, stopping_criteria, tokenizer=tokenizer, **kwargs
            )
        finally:
            generation_config.stop_strings = strings
        criteria.append(StopStrings(tokenizer, strings))
        return criteria

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        inputs_embeds=None,  # `generate()` takes embeddings only where this is named
        is_first_iteration=False,
        token_type_ids=None,  # BERT's kind of tokenizer gives them, and they say nothing here
        criteria=None,
        **kwargs,
    ):
        """
        A decoding step reads one token of every row and starts no document: no positions, and no mask but of the rows that
        have ended, `criteria` (`EndedRows`), whose states stay where they are.
        """
        if input_ids.shape[1] == 0 and inputs_embeds is None:
            raise ValueError(
                "The prompt is empty: give at least one token, such as the `eos_token` that documents follow."
            )
        if next_sequence_length is not None and next_sequence_length <= 0:
            raise ValueError(
                f"`past_key_values` has read {input_ids.shape[1] - next_sequence_length} tokens and `input_ids` has "
                f"{input_ids.shape[1]}: pass all tokens from the first on, or the new ones with an `attention_mask` "
                "as long as all of them."
            )
        has_read = past_key_values is not None and past_key_values.get_seq_length() > 0
        if not is_first_iteration and next_sequence_length == 1 and has_read:
            token = input_ids[:, -1:].to(past_key_values.layers[0].keys.device)
            token = token.clone(memory_format=torch.contiguous_format)  # else its stride says how long the text is
            unread = dict.fromkeys(("position_ids", "seq_idx", "cu_seq_lens_q", "labels"))
            mask = None if criteria is None else criteria.mask()
            return kwargs | unread | {"input_ids": token, "attention_mask": mask, "past_key_values": past_key_values}
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        seq_idx, read = inputs.get("seq_idx"), past_key_values.get_seq_length() if has_read else 0
        length = next(inputs[name].shape[1] for name in ("inputs_embeds", "input_ids") if inputs.get(name) is not None)
        if seq_idx is not None and seq_idx.shape[1] > length:  # of all tokens, as `position_ids` may be
            inputs["seq_idx"] = seq_idx[:, read : read + length]
        return inputs

    def _get_static_cache_init_shape(self):
        """`None`: the state of an LSTM has no heads, so a `StaticCache` is filled by the first forward."""


class EndedRows(StoppingCriteriaList):
    """Stopping criteria that remember which rows they have ended: `generate()` goes on writing padding into these."""

    def __init__(self, criteria):
        super().__init__(criteria)
        self.pads = any(
            hasattr(criterion, "eos_token_id") for criterion in criteria
        )  # else the rows go on with tokens
        self.ended = self.ended_before = None

    def __call__(self, input_ids, scores, **kwargs):
        ended = super().__call__(input_ids, scores, **kwargs)
        self.ended_before, self.ended = self.ended, ended if self.ended is None else self.ended | ended
        return ended

    def mask(self) -> torch.Tensor | None:
        """`(B, 1)`: 0 where the last token is padding behind the end of a row; `None` if it is nowhere."""
        if not self.pads or self.ended_before is None or len(self.ended) == 1 or not self.ended_before.any():
            return None
        return (~self.ended_before).long()[:, None]


class StopStrings(StopStringCriteria):
    """transformers' own, which puts "abcdef" before each token to decode it, for vocabularies without these letters too."""

    @staticmethod
    def clean_tokenizer_vocab(tokenizer, static_prefix="abcdef", **kwargs):
        def is_kept(text):
            return text in tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])

        if not is_kept(static_prefix):
            texts = [tokenizer.decode([index], skip_special_tokens=True) for index in range(len(tokenizer))]
            texts.sort(key=str.isspace)  # white space, which some decoders strip, only where there is nothing else
            static_prefix = next((text for text in texts if text and is_kept(text)), static_prefix)
        return StopStringCriteria.clean_tokenizer_vocab(tokenizer, static_prefix=static_prefix, **kwargs)
