"""LSTM language models, and those of other recurrent cells.

    h_t, c_t = cell(x_t, h_{t-1}, c_{t-1})    the equations of each cell: cells_lstm.py
    logits_t = E h_t                          E: the embedding, when tied (Press & Wolf 2017)

The layers are those of layers_lstm.py and, in a hybrid model, attention_lstm.py.

Shapes: B batch, T tokens of this call, D width of a layer's input, H width of its cell, L layers, V vocabulary;
A heads of attention; S segments read side by side, N tokens in all of them (recurrence_lstm.py).

A layer is a pure function of its input and the state it starts from. The model reads and writes the state, which
travels as `past_key_values` (cache_lstm.py); modules hold no state.
"""

import itertools
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .attention_lstm import WindowAttentionLayer
from .cache_lstm import prepare_cache_layers, rows_that_read
from .cells_lstm import CELLS
from .configuration_lstm import LSTM_LAYER, WINDOW_LAYER, LSTMConfig
from .generation_lstm import LSTMGenerationMixin, take_plain_step
from .layers_lstm import LSTMLayer, ResidualLSTMLayer, RMSNorm, linear
from .loading_lstm import StrictLoading
from .recurrence_lstm import find_reading, reads_embeddings
from .training_lstm import AdaptiveSoftmax, compute_losses, locked_dropout, word_dropout

RESIDUAL_LAYERS: dict[str, type[ResidualLSTMLayer] | type[WindowAttentionLayer]] = {
    LSTM_LAYER: ResidualLSTMLayer,
    WINDOW_LAYER: WindowAttentionLayer,
}
"""The layers of a residual model by their names in `layer_types`."""


@dataclass
class LSTMModelOutputWithPast(BaseModelOutputWithPast):
    """
    Outputs of [`LSTMModel`].

    Args:
        document_starts (`torch.BoolTensor` of shape `(B, T)`, *optional*):
            While training, where rows are padded or hold several documents: whether each token is the first of its row
            in this call, or of a document.
    """

    document_starts: torch.Tensor | None = None


@dataclass
class LSTMCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Outputs of [`LSTMForCausalLM`].

    Args:
        regularization_loss (`torch.FloatTensor` of shape `()`, *optional*):
            While training with activation regularization: the penalty, averaged in the same way as `loss`. The
            gradient of `loss` includes that of the penalty; its value does not include the penalty.
    """

    regularization_loss: torch.Tensor | None = None


class LSTMPreTrainedModel(StrictLoading, PreTrainedModel):
    config: LSTMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _can_record_outputs = {"hidden_states": [LSTMLayer, WindowAttentionLayer]}
    _can_compile_fullgraph = True
    _supports_sdpa = True

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        # Only the classes that this config builds: FSDP and device maps look up every class named here.
        kinds = set(cast(list[str], config.layer_types))
        of_residual = {RESIDUAL_LAYERS[kind].__name__ for kind in kinds}
        self._no_split_modules = {"LSTMLayer"} if config.block_type == "stacked" else of_residual

    @torch.no_grad()
    def _init_weights(self, module):
        if not isinstance(module, nn.Linear):
            super()._init_weights(module)
            return
        role = getattr(module, "role", "plain")  # the layers inside an adaptive softmax have none
        # A branch adds little at first, so that the stream does not grow with depth (Radford et al. 2019).
        init.xavier_uniform_(
            module.weight, gain=(2 * self.config.num_hidden_layers) ** -0.5 if role == "branch" else 1
        )
        if role == "recurrent":  # drawn after the above, so that a seed reproduces a stacked model of version 0.1.0
            init.orthogonal_(module.weight)  # Saxe et al. 2014: signals neither vanish nor explode
        if role == "gates":
            init.copy_(module.bias, self._new_gate_biases(module.bias))
        elif module.bias is not None:
            init.zeros_(module.bias)

    def _new_gate_biases(self, like: torch.Tensor) -> torch.Tensor:
        """
        Return new biases of the gates, `(gates H,)`: 0, but for those of the forget gate and, with `chrono_max_distance`,
        of the input gate.
        """
        cell, longest = CELLS[self.config.cell_type], self.config.chrono_max_distance
        biases = torch.zeros_like(like).view(cell.num_gates, -1)
        if longest is not None:  # Tallec & Ollivier 2018: a unit remembers for about u tokens
            units = torch.empty_like(biases[0], dtype=torch.float32).uniform_(1, longest - 1)
            biases[cell.forget_gate] = units.log()
            biases[cell.input_gate] = -biases[cell.forget_gate]
        elif self.config.forget_gate_bias is not None:
            biases[cell.forget_gate] = self.config.forget_gate_bias
        return biases.flatten()


class LSTMModel(LSTMPreTrainedModel):
    """Embedding and layers. `last_hidden_state` has the width that the output layer takes."""

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        embedding_size = cast(int, config.embedding_size)  # `None` stands for a default until the config is complete
        self.embed_tokens = nn.Embedding(config.vocab_size, embedding_size)
        # An optimizer's checkpoint knows parameters by their order, which is therefore the same in every version.
        if config.block_type == "residual":
            self.layers = nn.ModuleList(RESIDUAL_LAYERS[kind](config) for kind in cast(list[str], config.layer_types))
            self.norm: nn.Module = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        else:
            sizes = itertools.pairwise([embedding_size, *config.cell_sizes])
            self.layers = nn.ModuleList(LSTMLayer(*pair, config) for pair in sizes)
            self.norm = nn.Identity()
        self.in_proj: nn.Module = nn.Identity()
        self.out_proj: nn.Module = nn.Identity()
        if config.block_type == "residual" and embedding_size != config.hidden_size:
            self.in_proj = linear(embedding_size, config.hidden_size)
            if config.tie_word_embeddings:
                self.out_proj = linear(config.hidden_size, embedding_size)
        if config.output_projection_size is not None:
            self.out_proj = linear(config.cell_sizes[-1], config.output_projection_size, bias=True)
        self.gradient_checkpointing = False
        self._plain_step = None  # a weak reference
        self.post_init()

    def __getstate__(self):
        """Leave the weak reference out of pickles and copies."""
        return vars(self) | {"_plain_step": None}

    @capture_outputs
    def forward(  # type: ignore[misc]  # `TransformersKwargs` names `position_ids` and others too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> "LSTMModelOutputWithPast":
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                The next `T` tokens of each row; `past_key_values` holds the state after earlier ones.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                0 marks padding, on either side or between. A padded token leaves the row's state as it was and repeats
                its last output. With `past_key_values` the mask may be wider by at most the tokens they have read, padding
                included: its last `T` columns are used.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                A document starts, from a zero state, wherever the position of a real token is 0.
            past_key_values ([`Cache`], *optional*):
                State to continue from, updated in place. Its size does not grow: `2 B (H_1 + ... + H_L)` numbers for
                h and c, half of them for a cell without c; a layer of attention keeps keys and values of
                `attention_window` tokens instead, `2 B attention_window H`.
            inputs_embeds (`torch.Tensor` of shape `(B, T, D)`, *optional*): Embeddings instead of `input_ids`.
            use_cache (`bool`, *optional*):
                Whether to return the state; `config.use_cache` by default, and `False` while training.
            seq_idx (`torch.Tensor` of shape `(B, T)`, *optional*): A document starts wherever this number changes.
            cu_seq_lens_q (`torch.Tensor` of shape `(documents + 1,)`, *optional*):
                Where each document starts among the `B T` tokens, and after the last of them `B T`.

        Returns:
            [`LSTMModelOutputWithPast`]: `last_hidden_state` of shape `(B, T, H)`; of a hybrid model under
            `output_attentions` one map for each layer of attention, `(B, A, T, n + T)`, over the n tokens of the carried
            window and those of this call.

        Raises:
            ValueError: if shapes of the arguments or of the state do not match, or `output_attentions` is asked of
                a model without attention layers, or of another attention than `"eager"`.
        """
        limits = (attention_mask, position_ids, seq_idx, cu_seq_lens_q)
        asked = (inputs_embeds, *limits, *kwargs.values())
        x = take_plain_step(self, {LSTMModel, LSTMLayer}, input_ids, past_key_values, asked)
        if x is not None:
            return LSTMModelOutputWithPast(last_hidden_state=x[:, None], past_key_values=past_key_values)
        output_attentions = kwargs.get("output_attentions")
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        self._check_arguments(input_ids, inputs_embeds, output_attentions)
        x, lookup = self._embed(input_ids) if inputs_embeds is None else (inputs_embeds, {})
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        layers = self._layers_in_use()
        cache_layers = prepare_cache_layers(past_key_values, x.shape[0], layers, self.layers)
        reading, documents = find_reading(x, cache_layers[0], *limits)
        read = None
        if attention_mask is not None and reading is not None:
            read = cache_layers[0].read_after(reading.real)
        x = self.in_proj(locked_dropout(x, self.config.input_dropout if self.training else 0))
        is_residual, maps = self.config.block_type == "residual", []
        for index, (layer, cache_layer) in enumerate(zip(layers, cache_layers, strict=False)):
            if self.training and index > 0 and not is_residual:
                x = locked_dropout(x, self.config.hidden_dropout)
            state = cache_layer.get_state(x.device) or layer.zero_state(x)
            if layer.returns_maps and output_attentions:
                lookup = {"maps": True}
            # The state by position: checkpointing with `use_reentrant` computes no gradients of other arguments.
            x, *states = layer(x, *state, reading=reading, record=cache_layer.record_past, **lookup)
            lookup = {}
            if layer.returns_maps and output_attentions:
                maps.append(states.pop())
            last, past = states[: len(state)], tuple(states[len(state) :])
            cache_layer.update(*last, num_tokens=x.shape[1], past=past)
        x = self.out_proj(self.norm(x))
        if is_residual and reading is not None:  # in a stacked model h, the last output, stays over padding
            x = cache_layers[0].hold(x, reading.real)
        cache_layers[0].remember(x.shape[1], held=x if is_residual else None, document=documents, read=read)
        return LSTMModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            attentions=tuple(maps) if output_attentions else None,
            document_starts=reading.firsts if self.training and reading is not None else None,
        )

    def _embed(self, input_ids) -> tuple[torch.Tensor, dict[str, Any]]:
        """
        Embed tokens `(B, T)`. Where the first layer can use them, return too the row of each token among the K distinct
        ones, `(B, T)`, and the embeddings of these, `(K, D)`.
        """
        vocab_size, p = self.config.vocab_size, self.config.embedding_dropout if self.training else 0
        if not reads_embeddings(self, LSTMLayer, input_ids):
            return word_dropout(self.embed_tokens(input_ids), input_ids, vocab_size, p), {}
        words, tokens = input_ids.unique(return_inverse=True)
        embeddings = word_dropout(self.embed_tokens(words), words, vocab_size, p)
        return F.embedding(tokens, embeddings), {"tokens": tokens, "embeddings": embeddings}

    def _check_arguments(self, input_ids, inputs_embeds, output_attentions: bool) -> None:
        if output_attentions:
            if WINDOW_LAYER not in cast(list[str], self.config.layer_types):
                raise ValueError(
                    "`output_attentions` (True) cannot be returned, since an LSTM has no attention: use "
                    "`output_hidden_states` for the outputs of its layers."
                )
            if self.config._attn_implementation != "eager":
                raise ValueError(
                    f"`output_attentions` (True) cannot be returned by the attention {self.config._attn_implementation!r}, "
                    'which does not compute the maps: call `model.set_attn_implementation("eager")` first.'
                )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        shape = input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:-1]
        if len(shape) != 2:
            raise ValueError(f"The input, of shape {tuple(shape)}, must be of shape (rows, tokens).")
        if inputs_embeds is not None and inputs_embeds.shape[-1] != self.config.embedding_size:
            raise ValueError(
                f"`inputs_embeds` ({inputs_embeds.shape[-1]} wide) must be as wide as `embedding_size` "
                f"({self.config.embedding_size})."
            )
        if shape[1] == 0:
            raise ValueError(f"The input, of shape {tuple(shape)}, must hold at least one token.")

    def _layers_in_use(self) -> list[LSTMLayer | WindowAttentionLayer]:
        """Return the layers to run: fewer in an assistant that exits early, whose last cell must be as wide as the model's."""
        all_layers = cast(list[LSTMLayer | WindowAttentionLayer], list(self.layers))
        layers = all_layers[: self.config.num_hidden_layers]
        size, expected = layers[-1].output_size, all_layers[-1].output_size
        if size != expected:
            raise ValueError(
                f"The first {len(layers)} layers have outputs of width {size}, and the output layer takes {expected}: "
                "`assistant_early_exit` needs cells of equal width."
            )
        return layers


class LSTMForCausalLM(LSTMPreTrainedModel, LSTMGenerationMixin):
    """[`LSTMModel`] with an output layer over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _other_keys_to_ignore: set[str] = set()

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.model = LSTMModel(config)
        if config.adaptive_softmax_cutoffs is None:
            self.lm_head = linear(config.output_size, config.vocab_size, bias=config.output_bias)
        else:
            self.lm_head = AdaptiveSoftmax(config.output_size, config.vocab_size, config.adaptive_softmax_cutoffs)
        self.post_init()

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """
        Keys to leave out of checkpoints: those that were set and, while the output layer is tied to the embedding, its
        own. A checkpoint stores a tensor under one name, and Trainer warns about the other unless it is listed here. A
        private name of transformers; tests/test_saving.py fails when it changes.
        """
        is_tied = getattr(self.lm_head, "weight", None) is self.model.embed_tokens.weight
        return self._other_keys_to_ignore | ({"lm_head.weight"} if is_tied else set())

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, keys):
        self._other_keys_to_ignore = set(keys or ()) - {"lm_head.weight"}

    @can_return_tuple
    def forward(  # type: ignore[misc]  # `TransformersKwargs` names `position_ids` too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LSTMCausalLMOutputWithPast:
        r"""
        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, seq_idx, cu_seq_lens_q:
                See [`LSTMModel`].
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*):
                The tokens themselves, shifted inside the model: the one after each position is its target. Tokens set
                to -100 are not targets; neither is a token that follows only padding in its row.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0):
                The number of last tokens, or the indices of the tokens, to compute logits for; 0 stands for all.
            shift_labels (`torch.LongTensor` of shape `(B, T)`, *optional*):
                The target of each position, used instead of `labels`: no target is lost at the end of a chunk. It is
                not a named parameter because Trainer would take it for a label and evaluate no batch without it.

        Returns:
            [`LSTMCausalLMOutputWithPast`]: `logits` of shape `(B, T, V)`, or `None` while training on targets with
            `config.loss_chunk_size` or an adaptive softmax; `loss` in nats, the mean over all targets, or their sum
            divided by `num_items_in_batch` where Trainer gives it. While training, activation regularization adds its
            gradient to that of `loss` and its value is `regularization_loss`, so that the training perplexity is
            correct.
        """
        read_before = None if attention_mask is None else rows_that_read(past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept]
        hidden = locked_dropout(hidden, self.config.output_dropout if self.training else 0)
        has_labels = labels is not None or kwargs.get("shift_labels") is not None
        logits = loss = regularization_loss = None
        if not (self.training and has_labels and self.config.trains_without_logits):
            logits = self.lm_head(hidden)
        if has_labels:
            loss, regularization_loss = compute_losses(
                self, outputs, hidden, logits, labels, kept, attention_mask, read_before, **kwargs
            )
        return LSTMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            regularization_loss=regularization_loss,
        )

    def next_logits(self, input_ids: torch.Tensor, past_key_values: Cache) -> torch.Tensor:
        """
        Read tokens `(B, T)` and return the logits of the next one, `(B, V)`: those of [`forward`], computed faster for
        one token on a CPU.
        """
        input_ids = input_ids.to(self.model.embed_tokens.weight.device)
        kinds = {LSTMForCausalLM, LSTMModel, LSTMLayer}
        hidden = take_plain_step(self.model, kinds, input_ids, past_key_values, head=self)
        if hidden is not None:
            return self.lm_head(hidden)
        return self(input_ids, past_key_values=past_key_values, logits_to_keep=1).logits[:, -1]

    def resize_token_embeddings(self, *args, **kwargs):
        """Resize the embeddings and the output layer. An adaptive softmax cannot be resized, and raises `ValueError`."""
        if self.config.adaptive_softmax_cutoffs is not None:
            raise ValueError(
                "An adaptive softmax cannot be resized: make a model for the new vocabulary and train it."
            )
        return super().resize_token_embeddings(*args, **kwargs)


# With label smoothing, Trainer shifts the labels only of the classes in this mapping.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[LSTMConfig.model_type] = LSTMForCausalLM.__name__

__all__ = ["LSTMForCausalLM", "LSTMModel", "LSTMPreTrainedModel"]
