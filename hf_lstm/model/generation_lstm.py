"""Generation: the adaptation of `generate()` to a recurrent state, and the fast single-token step on a CPU.

Shapes: B rows, one token of each; V vocabulary, D width of the embeddings, H width of a cell.
"""

import copy
import weakref
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin, StoppingCriteriaList, StopStringCriteria

from .cells_lstm import ALL_HOOKS, HOOKS, Weights, is_plain, is_transformed, is_untouched


class PlainStep:
    """
    Single-token step of a stacked model on a CPU, computed from the weights without calling the modules.

    It is valid as long as the weights are the same and the modules compute only what their weights say. This is
    checked before each step, and a new one is made if it fails. A text of one row uses a copy of the weights in
    column-major order, which is multiplied faster. All texts of a model share the copy: their caches hold it and the
    model has only a weak reference, so that it is freed with the last of them. Writes into weights through `.data` or
    numpy are not detected.

    Two layers of 512 in `generate()`, two cores: 3.0 ms a token through the modules, 2.3 without them, 1.9 with the
    copy, which takes 5 ms to make. Two or three rows are slower with it, and a row of 1,024 is not faster.

    Args:
        model (`LSTMModel`): A model for which `is_possible` is true.
    """

    COPY_AFTER, COPY_UP_TO = 8, 2**24  # tokens read in single rows before the copy; limit on its weights
    PLACES = ({("cpu", torch.float32)}, {("cpu", torch.float64)})  # where `torch.lstm_cell` is exact

    def __init__(self, model: Any):
        modules = [model, *model.children(), *(module for layer in model.layers for module in layer.modules())]
        self.cell = model.layers[0].cell
        self.embeddings = model.embed_tokens.weight
        self.gates = [layer.gates().weights() for layer in model.layers]
        self.sizes = [layer.hidden_gates.in_features for layer in model.layers]
        self.weights = [self.embeddings, *(weight for layer in model.layers for weight in layer.parameters())]
        self.config, self.fields = model.config, vars(model.config)
        self.modules = [vars(module) for module in modules]  # looking into these is faster than calling `is_untouched`
        self.hooks = [own[hooks] for own in self.modules for hooks in HOOKS]
        kept = [own[places] for own in self.modules for places in ("_modules", "_parameters")]
        self.parts = [(places, *part) for places in kept for part in places.items()]
        self.numbers = [(own["_modules"], len(own["_modules"])) for own in self.modules]
        self.key, self.count, self.copy = self._key(), 0, None

    @classmethod
    def is_possible(cls, model: Any, kinds: set[type]) -> bool:
        """Return whether a model is on a CPU, in evaluation mode, and computes only embeddings and plain layers."""
        between = (model.in_proj, model.norm)
        return (
            model.config.block_type == "stacked"
            and not model.config.output_hidden_states
            and len(model.layers) == model.config.num_hidden_layers
            and not any(module.training for module in model.modules())
            and all(is_untouched(module, kinds) for module in (model, *model.layers))
            and is_plain(model.embed_tokens, nn.Embedding)
            and model.embed_tokens.max_norm is None
            and all(is_plain(module, nn.Identity) for module in between)
            and is_untouched(model.out_proj, {type(model.out_proj)})
            and all(layer.gates().are_plain() and layer.input_gates.bias is not None for layer in model.layers)
            and {(part.device.type, part.dtype) for part in model.parameters()} in cls.PLACES
        )

    def holds(self, model: Any) -> bool:
        """Return whether the model is unchanged since the step was made."""
        if self.modules[0] is not vars(model) or model.config is not self.config or any(self.hooks) or any(ALL_HOOKS):
            return False
        if self.fields["output_hidden_states"] or self.fields["num_hidden_layers"] != len(self.gates):
            return False
        for own in self.modules:
            if own["training"] or "forward" in own or own.get("_compiled_call_impl") is not None:
                return False
        if any(len(modules) != number for modules, number in self.numbers):  # one was added
            return False
        return all(places.get(name) is part for places, name, part in self.parts) and self._key() == self.key

    def fits(self, input_ids: torch.Tensor, cache: Cache) -> bool:
        """Return whether the cache holds a state of this cell for each row, in the dtype of the weights, and records no history."""
        layers: list[Any] = cache.layers
        rows, place = len(input_ids), (self.embeddings.dtype, self.embeddings.device)
        return len(layers) == len(self.gates) and all(
            layer.is_initialized
            and not getattr(layer, "record_past", True)
            and not layer.is_compileable
            and len(state := layer.get_state()) == len(self.cell.states)
            and all((part.shape, part.dtype, part.device) == ((rows, size), *place) for part in state)
            for layer, size in zip(layers, self.sizes, strict=True)
        )

    def take(self, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Read the tokens `(B, 1)`, update the cache and return h of the last layer, `(B, H)`."""
        layers: list[Any] = cache.layers
        embeddings, gates = self.embeddings, self.gates
        if len(input_ids) == 1:
            embeddings, gates = self._copied()
        x = F.embedding(input_ids[:, 0], embeddings)
        for layer, weights in zip(layers, gates, strict=True):
            x, *_ = layer.update(*self.cell.single(x, layer.get_state(), weights))
        if layers[0].read is not None:
            layers[0].remember(1)
        return x

    def _key(self) -> list[tuple]:
        """Return address, version and dtype of each weight; tensors made under `torch.inference_mode` have no version."""
        return [(w.data_ptr(), None if w.is_inference() else w._version, w.dtype) for w in self.weights]

    def _copied(self):
        """
        Return the column-major copy, made once enough tokens were read, or the weights themselves. Small vocabularies,
        which then read a quarter less, use W E in place of W and E, since W E_v = (W E)_v.
        """
        if self.copy is not None:
            return self.copy
        self.count += 1
        if self.count < self.COPY_AFTER or sum(weight.numel() for weight in self.weights[1:]) > self.COPY_UP_TO:
            return self.embeddings, self.gates
        if any(weight.is_inference() for weight in self.weights):  # changes would not be detected
            return self.embeddings, self.gates
        (first, *others), embeddings = self.gates, self.embeddings
        vocabulary, width = embeddings.shape
        folded = first.W @ embeddings.t() if 4 * vocabulary <= width and not self.cell.has_rounds else None
        if folded is not None and folded.isfinite().all():  # or a one-hot x would spread NaN to all tokens
            first, embeddings = first._replace(W=folded), torch.eye(vocabulary, dtype=folded.dtype)
        self.copy = embeddings, [_column_major(weights) for weights in (first, *others)]
        return self.copy


def _column_major(weights: Weights) -> Weights:
    """Copy the matrices into column-major order."""

    def copied(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.t().contiguous().t()

    rounds = tuple(tuple(copied(matrix) for matrix in part) for part in weights.rounds)
    return weights._replace(W=copied(weights.W), U=copied(weights.U), rounds=rounds)


def take_plain_step(
    model: Any,
    kinds: set[type],
    input_ids: torch.Tensor | None,
    cache: Cache | None,
    others: tuple = (),
    head: nn.Module | None = None,
) -> torch.Tensor | None:
    """
    Take a [`PlainStep`] if it computes the same as the modules: one real token of every row after a state, on a CPU,
    without gradients, and without other arguments.

    Args:
        model (`LSTMModel`): The model.
        kinds (`set[type]`): The classes whose forward it replaces, which excludes subclasses.
        input_ids (`torch.LongTensor` of shape `(B, 1)`): The tokens.
        cache (`Cache`): The state, updated in place.
        others (`tuple`): The other arguments of a forward.
        head (`LSTMForCausalLM`, *optional*): The model around it, if its forward is replaced too.

    Returns:
        The model's outputs, `(B, D)`; `None` if the modules must compute them.
    """
    if input_ids is None or not isinstance(cache, Cache) or not cache.layers or input_ids.shape[1:] != (1,):
        return None
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or is_transformed()
    ):
        return None
    if not all(other is None or other is False for other in others):
        return None
    if head is not None and not is_untouched(head, kinds):
        return None
    first: Any = cache.layers[0]
    step = getattr(first, "plain_step", None) or (model._plain_step and model._plain_step())
    if step is None or not step.holds(model):
        if not PlainStep.is_possible(model, kinds):
            return None
        step = PlainStep(model)
        model._plain_step = weakref.ref(step)
    if not step.fits(input_ids, cache):
        return None
    first.plain_step = step
    return model.out_proj(step.take(input_ids, cache))


class LSTMGenerationMixin(GenerationMixin):
    """`generate()` for LSTMs: decoding steps of one token, rows that end early, and stop strings for any vocabulary."""

    def _sample(self, input_ids, *args, stopping_criteria, **kwargs):
        """
        Sample with criteria that record which rows have ended. A private name, since no public hook has access to both
        the criteria and the inputs of the next step; tests/test_generation.py fails when it changes.
        """
        criteria = EndedRows(stopping_criteria)
        return super()._sample(input_ids, *args, stopping_criteria=criteria, criteria=criteria, **kwargs)

    def _get_stopping_criteria(self, generation_config, stopping_criteria, tokenizer=None, **kwargs):
        """
        Add stop strings that work for any vocabulary. A private name, since `generate()` has no public hook for them;
        tests/test_generation_modes.py fails when it changes.
        """
        strings = generation_config.stop_strings
        if tokenizer is not None:
            generation_config = copy.copy(generation_config)
            generation_config.stop_strings = None
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer=tokenizer, **kwargs)
        if strings is not None:
            criteria.append(StopStrings(tokenizer, strings))
        return criteria

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        inputs_embeds=None,  # `generate()` accepts embeddings only if this is named
        is_first_iteration=False,
        token_type_ids=None,  # tokenizers of BERT's kind return them; not used
        criteria=None,
        **kwargs,
    ):
        """
        Prepare the inputs of a forward. A decoding step reads one token of every row and does not start documents, so
        it has no positions, and a mask only for rows that have ended (`criteria`, an `EndedRows`), whose states stay
        unchanged.
        """
        if input_ids.shape[1] == 0 and inputs_embeds is None:
            raise ValueError(
                "The prompt is empty: give at least one token, such as the `eos_token` that separates documents."
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
            # Without the clone its stride would depend on the length of the text.
            token = token.clone(memory_format=torch.contiguous_format)
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
        """Return `None`: the state of an LSTM has no heads, so the first forward initialises a `StaticCache`."""


class EndedRows(StoppingCriteriaList):
    """Stopping criteria that record which rows have ended: `generate()` continues these with padding."""

    def __init__(self, criteria: StoppingCriteriaList):
        super().__init__(criteria)
        # Without an end of text, rows that have ended continue with tokens instead.
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.ended = self.ended_before = None

    def __call__(self, input_ids, scores, **kwargs):
        ended = super().__call__(input_ids, scores, **kwargs)
        self.ended_before, self.ended = self.ended, ended if self.ended is None else self.ended | ended
        return ended

    def mask(self) -> torch.Tensor | None:
        """Return a mask `(B, 1)`, 0 where the last token is padding after the end of a row; `None` without padding."""
        if not self.pads or self.ended_before is None or len(self.ended) == 1 or not self.ended_before.any():
            return None
        return (~self.ended_before).long()[:, None]


class StopStrings(StopStringCriteria):
    """
    Stop strings that also work for vocabularies without the letters a to f, which transformers puts before each token
    to decode it.
    """

    @staticmethod
    def clean_tokenizer_vocab(tokenizer, static_prefix="abcdef", **kwargs):
        def is_kept(text):
            return text in tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])

        if not is_kept(static_prefix):
            texts = [tokenizer.decode([index], skip_special_tokens=True) for index in range(len(tokenizer))]
            texts.sort(key=str.isspace)  # white space, which some decoders strip, only where there is nothing else
            static_prefix = next((text for text in texts if text and is_kept(text)), static_prefix)
        return StopStringCriteria.clean_tokenizer_vocab(tokenizer, static_prefix=static_prefix, **kwargs)
