"""The configuration of an LSTM language model."""

import copy
import math
from contextlib import contextmanager
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


@strict
class LSTMConfig(PreTrainedConfig):
    r"""
    The configuration of [`LSTMModel`] and [`LSTMForCausalLM`]. `LSTMConfig()` builds a working model for
    `byte_tokenizer()`.

    Args:
        vocab_size (`int`, defaults to 260): Tokens in the vocabulary.
        hidden_size (`int`, defaults to 512): Width of a cell, the length of its `h` and of its `c`.
        embedding_size (`int`, *optional*, defaults to `hidden_size`):
            Width of a token's embedding. When embeddings are tied and it differs from `hidden_size`, the last cell of a
            stacked model is `embedding_size` wide, as in AWD-LSTM (Merity et al. 2018): 400, 1150, 1150, 400. A residual
            model projects instead.
        num_hidden_layers (`int`, defaults to 2): LSTM layers.
        block_type (`str`, defaults to `"stacked"`):
            `"stacked"`: each cell reads what the one below it writes. `"residual"`: each adds what it makes of the
            normalised stream to the stream, x + W LSTM(RMSNorm(x)), which is what makes depth work: of otherwise equal
            models, Beck et al. 2024 (xLSTM, table 2) find perplexity 2418 for the one and 35 for the other.
        intermediate_size (`int`, *optional*):
            Width of the gated MLP (SwiGLU, Shazeer 2020) that follows each residual LSTM; none by default.
        hidden_act (`str`, defaults to `"silu"`): Its activation.
        rms_norm_eps (`float`, defaults to 1e-6): What keeps RMSNorm (Zhang & Sennrich 2019) from dividing by 0.
        tie_word_embeddings (`bool`, defaults to `True`):
            The output layer's matrix is the embedding's (Press & Wolf 2017, Inan et al. 2017).
        initializer_range (`float`, *optional*, defaults to 0.2, or to 0.02 in a residual model):
            Standard deviation of new embeddings: 0.02 is GPT-2's, since a residual model normalises what it multiplies
            with them, and 0.2 was found to train a stacked one best. Validation loss on tinyshakespeare after 1,000 steps, tied, width 384:
            1.658 with 0.05 (about AWD-LSTM's U(-0.1, 0.1)), 1.564 with 0.2, 1.576 with 0.4, 1.670 with 0.8.
        forget_gate_bias (`float`, defaults to 1.0):
            Bias of the forget gate in a new model (Gers et al. 2000; Jozefowicz et al. 2015).
        embedding_dropout, input_dropout, hidden_dropout, output_dropout, weight_dropout (`float`, default to 0.0):
            What is dropped while training (Merity et al. 2018; regularization_lstm.py): whole words of the vocabulary (not
            of `inputs_embeds`);
            features of the embeddings, of what one layer hands to the next (of each branch in a residual model), and of
            what the output layer takes, the same at all tokens of a row (Gal & Ghahramani 2016); recurrent weights (Wan
            et al. 2013). AWD-LSTM on WikiText-2: 0.1, 0.65, 0.2, 0.4, 0.5.
        activation_regularization, temporal_activation_regularization (`float`, default to 0.0):
            Penalties, while training, on the outputs' squares and on those of their changes from token to token, in nats
            per token and unit (Merity, McCann & Socher 2017). AWD-LSTM: 2 and 1.
        loss_chunk_size (`int`, *optional*):
            While training, tokens whose logits are held at a time, for large vocabularies (loss_lstm.py): the same loss and
            gradients in less memory, and no logits are returned. All of them by default.
        adaptive_softmax_cutoffs (`list[int]`, *optional*):
            Ids at which an adaptive softmax splits the vocabulary, the most frequent words first, as word tokenizers order
            them (Grave et al. 2017; loss_lstm.py): less to compute and to hold while training, at some cost in perplexity.
            For WikiText-103's 267,735 words: 20000, 40000, 200000 (Baevski & Auli 2019).
        use_cache (`bool`, defaults to `True`): Return the state unless the model is training.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): The ids of hf_lstm's own tokenizers.

    Raises:
        huggingface_hub.errors.StrictDataclassError: with the `ValueError` that says why, where a size is below 1, a
            number is of the wrong type or not finite, or the embeddings cannot be tied. So it is however a field is set:
            `config.hidden_size = 64`, `update`, `update_from_string` and `from_pretrained(path, hidden_size=64)` derive
            anew what a default was derived from, validate, and set nothing if anything is refused.
    """

    model_type = "hf_lstm"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 260
    hidden_size: int = 512
    embedding_size: int | None = None
    num_hidden_layers: int = 2
    block_type: Literal["stacked", "residual"] = "stacked"
    intermediate_size: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float | int | None = None
    forget_gate_bias: float | int = 1.0
    embedding_dropout: float | int = 0.0
    input_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    output_dropout: float | int = 0.0
    weight_dropout: float | int = 0.0
    activation_regularization: float | int = 0.0
    temporal_activation_regularization: float | int = 0.0
    loss_chunk_size: int | None = None
    adaptive_softmax_cutoffs: list[int] | None = None
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 3

    def __post_init__(self, **kwargs):
        self.validate_depth()
        self._derive(set(), {})
        super().__post_init__(**kwargs)
        self._is_complete = True

    def __setattr__(self, name, value):
        """Set a field of a complete config as `update` does: what follows from it is derived again, and all is validated."""
        if "_changes" in vars(self):
            self._changes[name] = value
        elif name in type(self).__dataclass_fields__ and vars(self).get("_is_complete"):
            self._apply({name: value})
        else:
            super().__setattr__(name, value)

    def update(self, config_dict):
        """Set fields together: they are validated after the last, and none is set if any is refused."""
        with self._together():
            super().update(config_dict)

    def update_from_string(self, update_str):
        """Set the fields of `"hidden_size=64,num_hidden_layers=3"`, as `update` does."""
        with self._together():
            super().update_from_string(update_str)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Make a config of a dict, then set the fields among the other arguments, as `update` does."""
        changes = {name: kwargs.pop(name) for name in list(kwargs) if name in FIELDS}
        made = super().from_dict(config_dict, **kwargs)
        (made[0] if isinstance(made, tuple) else made).update(changes)
        return made

    @contextmanager
    def _together(self):
        vars(self)["_changes"] = {}
        try:
            yield
            changes = self._changes
        finally:
            del vars(self)["_changes"]
        self._apply(changes)

    def _apply(self, changes):
        changed = copy.copy(self)
        vars(changed)["_is_complete"] = False
        for name, value in changes.items():
            setattr(changed, name, value)
        changed._derive(changes.keys(), self._defaults())
        changed.validate()
        vars(self).update(vars(changed), _is_complete=True)

    def _defaults(self) -> dict:
        """The fields whose defaults follow from other fields."""
        return {
            "embedding_size": self.hidden_size,
            "initializer_range": 0.2 if self.block_type == "stacked" else 0.02,
        }

    def _derive(self, given, former_defaults):
        """Set what was left to its default: None, or, as saved files hold it, the former default itself."""
        for name, default in self._defaults().items():
            value = getattr(self, name)
            if value is None or (name not in given and value == former_defaults.get(name)):
                setattr(self, name, default)

    @property
    def layer_types(self) -> list[str]:
        """What transformers builds a cache from: one layer of type `hf_lstm` (cache_lstm.py) per LSTM layer."""
        return [self.model_type] * self.num_hidden_layers

    @property
    def cell_sizes(self) -> list[int]:
        """Width of each layer's cell, from the first to the last."""
        narrows = self.tie_word_embeddings and self.block_type == "stacked"
        last = self.embedding_size if narrows else self.hidden_size
        return [self.hidden_size] * (self.num_hidden_layers - 1) + [last]

    def validate_depth(self):
        """Run before any list of layers is made."""
        if self.num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"`num_hidden_layers` ({self.num_hidden_layers}) must be at most {MAX_LAYERS:,}.")

    def validate_sizes(self):
        for name in ("vocab_size", "hidden_size", "embedding_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be at least 1.")

        width = max(self.hidden_size, self.embedding_size)
        layer = 8 * width * width + 3 * width * (self.intermediate_size or 0)
        parameters = self.vocab_size * self.embedding_size + self.num_hidden_layers * layer
        if parameters > MAX_PARAMETERS:
            raise ValueError(
                f"`num_hidden_layers` ({self.num_hidden_layers}), `hidden_size` ({self.hidden_size}), `embedding_size` "
                f"({self.embedding_size}) and `vocab_size` ({self.vocab_size}) make a model of some {parameters:.0e} "
                f"parameters: at most {MAX_PARAMETERS:.0e} are built."
            )

    def validate_initialization(self):
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(
                f"`initializer_range` ({self.initializer_range}) is a standard deviation: at least 0, and finite."
            )
        if not math.isfinite(self.forget_gate_bias):
            raise ValueError(f"`forget_gate_bias` ({self.forget_gate_bias}) must be a finite number, such as 1.")

    @property
    def output_size(self) -> int:
        """Width of what the output layer takes."""
        return self.embedding_size if self.tie_word_embeddings else self.hidden_size

    def validate_block(self):
        if self.intermediate_size is not None and self.block_type != "residual":
            raise ValueError(
                f'`intermediate_size` ({self.intermediate_size}) needs `block_type="residual"`: a stacked LSTM has no '
                "MLP."
            )
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ValueError(f"`intermediate_size` ({self.intermediate_size}) must be at least 1, or None for no MLP.")
        if not 0 <= self.rms_norm_eps < math.inf:
            raise ValueError(f"`rms_norm_eps` ({self.rms_norm_eps}) must be at least 0, and finite: 1e-6, say.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` ({self.hidden_act}) must be one of {', '.join(ACT2FN)}.")

    def validate_regularization(self):
        for name in DROPOUTS:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` ({getattr(self, name)}) is a probability: at least 0 and below 1.")
        for name in ("activation_regularization", "temporal_activation_regularization"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"`{name}` ({getattr(self, name)}) is the weight of a penalty: at least 0, and finite."
                )

    def validate_loss(self):
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise ValueError(f"`loss_chunk_size` ({self.loss_chunk_size}) must be at least 1 token, or None for all.")

        cutoffs = self.adaptive_softmax_cutoffs
        if cutoffs is None:
            return
        if cutoffs != sorted(set(cutoffs)) or not cutoffs or cutoffs[0] < 1 or cutoffs[-1] >= self.vocab_size:
            raise ValueError(
                f"`adaptive_softmax_cutoffs` ({cutoffs}) must rise from at least 1 to below `vocab_size` ({self.vocab_size})."
            )
        if self.hidden_size < 4 ** len(cutoffs):
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) leaves the last of {len(cutoffs)} groups no width, since each has a "
                "quarter of the one before: give fewer `adaptive_softmax_cutoffs`, or a width of at least "
                f"{4 ** len(cutoffs)}."
            )
        if self.tie_word_embeddings or self.loss_chunk_size is not None:
            raise ValueError(
                f"`adaptive_softmax_cutoffs` ({cutoffs}) goes neither with tied embeddings nor with `loss_chunk_size`: set "
                "`tie_word_embeddings=False` and `loss_chunk_size=None`."
            )

    @property
    def trains_without_logits(self) -> bool:
        return self.loss_chunk_size is not None or self.adaptive_softmax_cutoffs is not None

    def validate_tying(self):
        stacked = self.block_type == "stacked"
        if stacked and self.cell_sizes[0] != self.hidden_size:
            raise ValueError(
                f"`embedding_size` ({self.embedding_size}) must equal `hidden_size` ({self.hidden_size}) when a single "
                "layer lies between tied embeddings, `assistant_early_exit=1` included: make them equal, add a layer, or set "
                "`tie_word_embeddings=False`."
            )

    def validate_layer_type(self):
        """transformers' own rule knows attention layers only: `layer_types` follows from `num_hidden_layers` here."""

    def to_dict(self):
        """The fields, and the `auto_map` that lets a saved model load where hf_lstm is not installed."""
        fields = super().to_dict() | {"auto_map": dict(AUTO_MAP)}
        return {name: value for name, value in fields.items() if name not in ("_is_complete", "_changes")}


# No LSTM was ever so large: a file that asks for more is damaged, or means harm.
MAX_PARAMETERS, MAX_LAYERS = 10**12, 10_000

# Those that are of LSTMs: transformers sets its own, such as `dtype`, by rules of its own.
FIELDS = frozenset(name for name in LSTMConfig.__annotations__ if name in LSTMConfig.__dataclass_fields__)

DROPOUTS = ("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_dropout")

# Saving a model writes only the classes it used into `auto_map`; the whole map lets `AutoModel` load a causal LM too.
AUTO_MAP = {
    "AutoConfig": "configuration_lstm.LSTMConfig",
    "AutoModel": "modeling_lstm.LSTMModel",
    "AutoModelForCausalLM": "modeling_lstm.LSTMForCausalLM",
}

__all__ = ["LSTMConfig"]
