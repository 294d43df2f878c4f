"""LSTM language models.

    i, f, g, o = W x_t + U h_{t-1} + b        gates, in the order of `torch.nn.LSTM`
    c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ tanh(g)     forget gate: Gers et al. 2000
    h_t = σ(o) ⊙ tanh(c_t)                    Hochreiter & Schmidhuber 1997
    logits_t = E h_t                          E: the embedding, when tied (Press & Wolf 2017)

A residual layer reads and writes a stream x instead (He et al. 2016; normalised before each branch, Xiong et al. 2020):

    x = x + O LSTM(norm(x))
    x = x + D (act(G norm(x)) ⊙ F norm(x))    gated MLP, optional: Shazeer 2020

Shapes: B batch, T tokens of this call, D width of a layer's input, H width of its cell, L layers, V vocabulary;
S sequences read side by side, N tokens in all of them (segments_lstm.py).

A layer is a pure function of its input and the state it starts from. The model reads and writes the state, which
travels as `past_key_values` (cache_lstm.py); no state lives on a module.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .cache_lstm import fitting_layers, rows_that_read
from .configuration_lstm import LSTMConfig
from .decoding_lstm import BareCells, LSTMGenerationMixin, cells_in_use
from .kernels_lstm import (
    FUSED_STEPS,
    at_least_float32,
    explicit_lstm,
    fused_lstm,
    is_plain,
    is_transformed,
    lstm_step,
    masked_lstm,
)
from .loading_lstm import StrictLoading
from .loss_lstm import AdaptiveSoftmax, find_targets, loss_without_logits
from .outputs_lstm import LSTMCausalLMOutputWithPast, LSTMModelOutputWithPast
from .regularization_lstm import activation_penalty, locked_dropout, temporal_change, weight_dropout, word_dropout
from .segments_lstm import Segments, Steps, find_limits, find_segments, hold


class LSTMLayer(GradientCheckpointingLayer):
    """One LSTM layer."""

    def __init__(self, input_size: int, cell_size: int, config: LSTMConfig):
        super().__init__()
        self.config = config
        self.input_gates = nn.Linear(input_size, 4 * cell_size)  # W, b
        self.hidden_gates = nn.Linear(cell_size, 4 * cell_size, bias=False)  # U

    def forward(self, x, h, c, segments: Segments | Steps | None = None, record: bool = False):
        """
        Args:
            x (`(B, T, D)`): Input.
            h, c (`(B, H)`): State to start from.
            segments (`Segments` or `Steps`, *optional*): What to read, if any row is padded or a document starts inside it.
            record (`bool`, defaults to `False`): Whether to return the states after each token too.

        Returns:
            h after each token, `(B, T, H)`; h and c at each row's end, `(B, H)`; and, if recorded, h and c after each
            token. A padded token leaves h and c as they were.
        """
        rows, length, _ = x.shape
        if segments is None and length == 1 and not record and self._is_single_step(x, h, c):
            h, c = lstm_step(x[:, 0], h, c, self.input_gates, self.hidden_gates)
            return h[:, None], h, c, None
        gates = (self.input_gates, self.hidden_gates, self._dropped_weight())
        if isinstance(segments, Steps):
            outputs, cells, h, c = masked_lstm(x, h, c, segments.real, segments.restarts, *gates)
            return outputs, h, c, (outputs, cells) if record else None
        if segments is None:
            batch_sizes = [rows] * length
            packed, start = x.transpose(0, 1).flatten(0, 1), (h, c)
        else:
            batch_sizes = segments.batch_sizes
            packed, start = segments.pack(x), (segments.start(h), segments.start(c))

        run = fused_lstm if self._is_fusable(x.device.type, len(batch_sizes), record) else explicit_lstm
        outputs, cells, h_end, c_end = run(packed, *start, batch_sizes, *gates)

        cells = torch.cat(cells) if record else None
        if segments is None:
            outputs = outputs.unflatten(0, (length, rows)).transpose(0, 1)
            cells = cells.unflatten(0, (length, rows)).transpose(0, 1) if record else None
        else:
            outputs, h_end, c_end = segments.unpack(outputs, h), segments.end(h_end, h), segments.end(c_end, c)
            cells = segments.unpack(cells, c) if record else None
        return outputs, h_end, c_end, (outputs, cells) if record else None

    def _dropped_weight(self) -> torch.Tensor | None:
        """What stands for U in this forward, if some of its weights are dropped."""
        p = self.config.weight_dropout
        if not self.training or p == 0:
            return None
        if not is_plain(self.hidden_gates):
            raise ValueError(
                f"`weight_dropout` ({p}) drops weights of a plain `nn.Linear`, and `hidden_gates` is a "
                f"{type(self.hidden_gates).__module__}.{type(self.hidden_gates).__name__}, or has hooks: set `model.config.weight_dropout = 0`, or leave "
                "`hidden_gates` out of the adapter's `target_modules`."
            )
        return weight_dropout(self.hidden_gates.weight, p)

    def _is_single_step(self, x, h, c) -> bool:
        """Whether to take torch's cell, which reads the weights as `fused_lstm` does, and knows one type of number."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or (self.training and self.config.weight_dropout):
            return False
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or is_transformed():
            return False
        plain = all(map(is_plain, (self.input_gates, self.hidden_gates)))
        return plain and x.dtype == h.dtype == c.dtype == self.input_gates.weight.dtype

    def _is_fusable(self, device: str, steps: int, record: bool) -> bool:
        """Whether to take torch's kernel, which reads the weights and would bypass whatever else a module does."""
        plain = all(is_plain(gates) for gates in (self.input_gates, self.hidden_gates))
        if not plain or record or steps == 0 or device not in FUSED_STEPS or torch.compiler.is_exporting():
            return False
        if is_transformed():
            return False
        return torch.is_grad_enabled() or steps >= FUSED_STEPS[device]


class ResidualLSTMLayer(LSTMLayer):
    """An LSTM layer that adds to a stream, and the gated MLP that may follow it."""

    def __init__(self, config: LSTMConfig):
        super().__init__(config.hidden_size, config.hidden_size, config)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mlp = GatedMLP(config) if config.intermediate_size is not None else None

    def forward(self, x, h, c, segments: Segments | Steps | None = None, record: bool = False):
        """As `LSTMLayer`, of x and with x of shape `(B, T, H)`."""
        outputs, h, c, states = super().forward(self.norm(x), h, c, segments, record)
        p = self.config.hidden_dropout if self.training else 0
        x = x + locked_dropout(self.o_proj(outputs), p)
        if self.mlp is not None:
            x = x + locked_dropout(self.mlp(x), p)
        return x, h, c, states


class RMSNorm(nn.RMSNorm):
    """Zhang & Sennrich 2019, computed in float32 at least."""

    def forward(self, x):
        dtype = at_least_float32(x.dtype)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps).to(x.dtype)


class GatedMLP(nn.Module):
    def __init__(self, config: LSTMConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        x = self.norm(x)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LSTMPreTrainedModel(StrictLoading, PreTrainedModel):
    config: LSTMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _can_record_outputs = {"hidden_states": LSTMLayer}
    _can_compile_fullgraph = True

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        # The one kind that this model has: whoever splits or shards it looks for each that is named.
        self._no_split_modules = ["LSTMLayer" if config.block_type == "stacked" else "ResidualLSTMLayer"]

    @classmethod
    def is_custom_code(cls) -> bool:
        """`False`: transformers leaves modules of custom code alone that have no parameters of their own, as a layer."""
        return False

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        else:
            super()._init_weights(module)
        # What a branch adds is small at first, so that the stream does not grow with depth (Radford et al. 2019).
        gain = (2 * self.config.num_hidden_layers) ** -0.5
        if isinstance(module, GatedMLP):
            init.xavier_uniform_(module.down_proj.weight, gain=gain)
        if isinstance(module, ResidualLSTMLayer):
            init.xavier_uniform_(module.o_proj.weight, gain=gain)
        if not isinstance(module, LSTMLayer):
            return
        size = module.hidden_gates.in_features
        init.orthogonal_(module.hidden_gates.weight)  # Saxe et al. 2014: signals neither die nor explode
        bias = torch.zeros_like(module.input_gates.bias)
        bias[size : 2 * size] = self.config.forget_gate_bias
        init.copy_(module.input_gates.bias, bias)


class LSTMModel(LSTMPreTrainedModel):
    """Embedding and LSTM layers. `last_hidden_state` is as wide as the output layer takes it."""

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        if config.block_type == "residual":
            self.layers = nn.ModuleList(ResidualLSTMLayer(config) for _ in range(config.num_hidden_layers))
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        else:
            sizes = itertools.pairwise([config.embedding_size, *config.cell_sizes])
            self.layers = nn.ModuleList(LSTMLayer(*pair, config) for pair in sizes)
            self.norm = nn.Identity()
        self.in_proj, self.out_proj = nn.Identity(), nn.Identity()
        if config.block_type == "residual" and config.embedding_size != config.hidden_size:
            self.in_proj = nn.Linear(config.embedding_size, config.hidden_size, bias=False)
            if config.tie_word_embeddings:
                self.out_proj = nn.Linear(config.hidden_size, config.embedding_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
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
                The next `T` tokens of each row; earlier ones are remembered by `past_key_values`.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                0 marks padding, on either side or between. A padded token leaves the row's state as it was and repeats
                its last output. With `past_key_values` the mask may
                be wider: its last `T` columns count.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                A document starts, from a zero state, wherever the position of a real token is 0.
            past_key_values ([`Cache`], *optional*):
                State to continue from, updated in place. Its size, `2 B (H_1 + ... + H_L)` numbers, does not grow.
            inputs_embeds (`torch.Tensor` of shape `(B, T, D)`, *optional*): Embeddings instead of `input_ids`.
            use_cache (`bool`, *optional*):
                Whether to return the state; `config.use_cache` by default, and `False` while training.
            seq_idx (`torch.Tensor` of shape `(B, T)`, *optional*): A document starts wherever this number changes.
            cu_seq_lens_q (`torch.Tensor` of shape `(documents + 1,)`, *optional*):
                Where each document starts among the `B T` tokens, and after the last of them `B T`.

        Returns:
            [`LSTMModelOutputWithPast`]: `last_hidden_state` of shape `(B, T, H)`.

        Raises:
            ValueError: where the tensors or the state do not fit each other.
        """
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError(
                "`output_attentions` (True) has nothing to return, since an LSTM has no attention: "
                "`output_hidden_states` gives what its layers compute."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
            if self.training and self.config.embedding_dropout > 0:
                p = self.config.embedding_dropout
                inputs_embeds = word_dropout(inputs_embeds, input_ids, self.config.vocab_size, p)
        if inputs_embeds.ndim != 3:
            raise ValueError(
                f"The input, of shape {tuple(inputs_embeds.shape[:-1])}, must be of shape (rows, tokens)."
            )
        if inputs_embeds.shape[-1] != self.config.embedding_size:
            raise ValueError(
                f"`inputs_embeds` ({inputs_embeds.shape[-1]} wide) must be as wide as `embedding_size` "
                f"({self.config.embedding_size})."
            )
        if inputs_embeds.shape[1] == 0:
            raise ValueError(f"The input, of shape {tuple(inputs_embeds.shape[:2])}, must hold at least one token.")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        layers = list(self.layers)[: self.config.num_hidden_layers]  # fewer in an assistant that exits early
        cell_sizes = [layer.hidden_gates.in_features for layer in layers]
        cache_layers = fitting_layers(past_key_values, inputs_embeds.shape[0], len(self.layers), cell_sizes)
        carried = cache_layers is not None and cache_layers[0].is_initialized
        segments = documents = None
        limits = (attention_mask, position_ids, seq_idx, cu_seq_lens_q)
        if any(limit is not None for limit in limits):
            shape, device = inputs_embeds.shape[:2], inputs_embeds.device
            document = cache_layers[0].document if carried else None
            real, restarts, documents = find_limits(shape, *limits, carried, document, device)
            if is_transformed() or (shape[1] == 1 and torch.compiler.is_compiling()):
                segments = Steps(real, restarts)
            else:
                segments = find_segments(real, restarts, carried, cu_seq_lens_q)
        x = locked_dropout(inputs_embeds, self.config.input_dropout if self.training else 0)
        x = self.in_proj(x)
        for index, layer in enumerate(layers):
            cache_layer = cache_layers[index] if cache_layers is not None else None
            if carried:
                h, c = (state.to(x.device) for state in cache_layer.get_state())
            else:
                h = x.new_zeros(x.shape[0], cell_sizes[index])
                c = h.to(at_least_float32(h.dtype))
            if self.training and index > 0 and self.config.block_type == "stacked":
                x = locked_dropout(x, self.config.hidden_dropout)
            record = cache_layer is not None and cache_layer.record_past
            x, h, c, states = layer(x, h, c, segments, record)
            if cache_layer is not None:
                cache_layer.update(h, c, num_tokens=x.shape[1], trajectory=states)
        if x.shape[-1] != self.layers[-1].hidden_gates.in_features:
            raise ValueError(
                f"The first {len(layers)} layers end {x.shape[-1]} wide, and the output layer takes "
                f"{self.layers[-1].hidden_gates.in_features}: `assistant_early_exit` needs cells of equal width."
            )
        x = self.out_proj(self.norm(x))
        is_residual = self.config.block_type == "residual"  # a stacked model's output is the state itself
        if segments is not None and is_residual:
            held = cache_layers[0].held if carried else None
            x = hold(x, x.new_zeros(x.shape[0], x.shape[2]) if held is None else held.to(x), segments.real)
        if cache_layers is not None:
            cache_layers[0].remember(x.shape[1], held=x if is_residual else None, document=documents)
        change = None
        if self.training and self.config.temporal_activation_regularization > 0:
            change = temporal_change(x, None if segments is None else segments.firsts)
        return LSTMModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values, temporal_change=change)


class LSTMForCausalLM(LSTMPreTrainedModel, LSTMGenerationMixin):
    """[`LSTMModel`] with an output layer over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.model = LSTMModel(config)
        if config.adaptive_softmax_cutoffs is None:
            self.lm_head = nn.Linear(config.output_size, config.vocab_size, bias=False)
        else:
            self.lm_head = AdaptiveSoftmax(config.output_size, config.vocab_size, config.adaptive_softmax_cutoffs)
        self.post_init()

    @property
    def _keys_to_ignore_on_save(self):
        """The output layer while it is the embedding: a checkpoint holds one tensor, and Trainer warns of the other else."""
        is_tied = getattr(self.lm_head, "weight", None) is self.model.embed_tokens.weight
        return {"lm_head.weight"} if is_tied else set()

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, keys):
        """Discard the keys that transformers collects from the class: the tensors alone decide here."""

    @can_return_tuple
    def forward(
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
                As in [`LSTMModel`].
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*):
                The tokens themselves: the one after each position is its target, and -100 is none. So is a token that
                follows no real one of its row, where `attention_mask` marks padding on the left.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0):
                How many of the last tokens, or which ones, get logits; 0 stands for all.
            shift_labels (`torch.LongTensor` of shape `(B, T)`, *optional*):
                The target of each position, used instead of `labels`: no target is lost at the end of a chunk. It is
                no named parameter because Trainer, taking it for a label, would evaluate no batch without it.

        Returns:
            [`LSTMCausalLMOutputWithPast`]: `logits` of shape `(B, T, V)`, or `None` for targets that are trained on with
            `config.loss_chunk_size` or an adaptive softmax; `loss` in nats, the mean over all targets, or
            their sum over `num_items_in_batch` where Trainer gives it. While training, activation regularization adds
            its gradient to that of `loss`, and its value is `regularization_loss`: a training perplexity stays true.
        """
        cells = None if torch.compiler.is_compiling() else cells_in_use(self.model)
        if cells is not None and not self.training:
            others = (attention_mask, position_ids, inputs_embeds, labels, *kwargs.values())
            if cells.can_read(input_ids, past_key_values, others):
                hidden = cells.read(input_ids[:, 0], past_key_values)[:, None]
                return LSTMCausalLMOutputWithPast(logits=self.lm_head(hidden), past_key_values=past_key_values)
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
        logits = loss = regularization_loss = None
        length = outputs.last_hidden_state.shape[1]
        targets = find_targets(labels, length, kept, attention_mask, read_before, **kwargs)
        if targets is not None:
            kwargs["shift_labels"] = targets
        if self.training and targets is not None and self.config.trains_without_logits:
            loss = loss_without_logits(hidden, self.lm_head, targets, self.config.loss_chunk_size, **kwargs)
        else:
            logits = self.lm_head(hidden)
            if targets is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if self.training and targets is not None:
            change = None if outputs.temporal_change is None else outputs.temporal_change[:, kept]
            regularization_loss = activation_penalty(hidden, change, self.config, targets, **kwargs)
        if regularization_loss is not None:
            loss = loss + (regularization_loss - regularization_loss.detach())  # its gradient, and not its value
        return LSTMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            regularization_loss=regularization_loss.detach() if regularization_loss is not None else None,
        )

    def bare_cells(self) -> BareCells | None:
        """What writes faster than the model's own step: for a stacked model on a CPU, in float32 or float64, else `None`."""
        model, layers = self.model, self.model.layers
        between = (model.norm, model.in_proj, model.out_proj)
        places = {(parameter.device.type, parameter.dtype) for parameter in model.parameters()}
        is_bare = (
            type(model) is LSTMModel
            and is_plain(model.embed_tokens, nn.Embedding)
            and model.embed_tokens.max_norm is None
            and all(type(module) is nn.Identity for module in between)
            and all(type(layer) is LSTMLayer for layer in layers)
            and all(is_plain(layer.input_gates) and is_plain(layer.hidden_gates) for layer in layers)
            and all(layer.input_gates.bias is not None for layer in layers)
            and places in CELLS_ON
        )
        return BareCells(model) if is_bare else None

    def resize_token_embeddings(self, *args, **kwargs):
        """As every model's; an adaptive softmax has the size it was made with, and raises `ValueError`."""
        if self.config.adaptive_softmax_cutoffs is not None:
            raise ValueError(
                "An adaptive softmax cannot be resized: make a model for the new vocabulary and train it."
            )
        return super().resize_token_embeddings(*args, **kwargs)


CELLS_ON = ({("cpu", torch.float32)}, {("cpu", torch.float64)})  # what torch's cell computes as the equations say

# With label smoothing, Trainer shifts the labels of the classes that this mapping names, and of no others.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[LSTMConfig.model_type] = LSTMForCausalLM.__name__

__all__ = ["LSTMForCausalLM", "LSTMModel", "LSTMPreTrainedModel"]
