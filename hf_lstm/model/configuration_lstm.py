"""Configuration of an LSTM language model."""

import copy
import math
from pathlib import Path
from typing import Any, Literal, cast

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, configuration_utils
from transformers.activations import ACT2FN

from .cells_lstm import CELLS

LSTM_LAYER, WINDOW_LAYER = "hf_lstm", "hf_lstm_window"
"""The types of layers, and of their layers of a cache."""


@strict
class LSTMConfig(PreTrainedConfig):
    r"""
    Configuration of [`LSTMModel`] and [`LSTMForCausalLM`]. `LSTMConfig()` builds a working model for
    `byte_tokenizer()`.

    Args:
        vocab_size (`int`, defaults to 260): Number of tokens in the vocabulary.
        hidden_size (`int`, defaults to 512): Width of a cell, the length of its `h` and of its `c`.
        cell_type (`str`, defaults to `"lstm"`):
            The recurrent cell (cells_lstm.py): `"lstm"`; `"gru"` (Cho et al. 2014), as in torch; `"rnn_tanh"` or
            `"rnn_relu"`, a plain recurrent network; `"mogrifier"` (Melis et al. 2020), an LSTM whose input and state gate
            each other first.
        mogrifier_rounds (`int`, *optional*, defaults to 5 for a Mogrifier):
            Rounds of that gating, alternately of x and of h; 0 leaves an LSTM.
        mogrifier_rank (`int`, *optional*):
            Rank of the matrices of the rounds, each then a product of two; full matrices by default.
        embedding_size (`int`, *optional*, defaults to `hidden_size`):
            Width of a token's embedding. When embeddings are tied and it differs from `hidden_size`, the last cell of
            a stacked model is `embedding_size` wide, as in AWD-LSTM (Merity et al. 2018): 400, 1150, 1150, 400. A
            residual model projects instead.
        num_hidden_layers (`int`, defaults to 2): Number of layers.
        block_type (`str`, defaults to `"stacked"`):
            `"stacked"`: each cell reads the output of the one below it. `"residual"`: each adds its output for the
            normalised stream to the stream, x + W LSTM(RMSNorm(x)), which makes deep models trainable: for otherwise
            equal models, Beck et al. 2024 (xLSTM, table 2) report perplexity 2418 for stacked and 35 for residual
            layers.
        intermediate_size (`int`, *optional*):
            Width of the gated MLP (SwiGLU, Shazeer 2020) that follows each residual layer; none by default.
        layer_types (`list[str]`, *optional*):
            The type of each layer of a residual model: `"hf_lstm"`, or `"hf_lstm_window"` for attention over the last tokens
            (attention_lstm.py). All layers are LSTMs by default, which is not saved. At least one layer must be an
            LSTM, since the attention knows no positions. A smaller `num_hidden_layers` that is set afterwards, as
            `assistant_early_exit` does, leaves the first of them.
        attention_window (`int`, *optional*, defaults to 512 with such layers):
            Tokens that one attends to, itself among them. From the first token on, the layer keeps keys and values of so
            many.
        num_attention_heads (`int`, *optional*, defaults to 1 with such layers):
            Heads of the attention, each `hidden_size / num_attention_heads` wide. One is enough in SHA-RNN (Merity 2019).
        hidden_act (`str`, defaults to `"silu"`): Activation of the gated MLP.
        rms_norm_eps (`float`, defaults to 1e-6): Epsilon of RMSNorm (Zhang & Sennrich 2019), against division by 0.
        tie_word_embeddings (`bool`, defaults to `True`):
            Whether the output layer uses the embedding matrix (Press & Wolf 2017, Inan et al. 2017).
        initializer_range (`float`, *optional*, defaults to 0.2, or to 0.02 in a residual model):
            Standard deviation of new embeddings: 0.02 is GPT-2's, since a residual model normalises the input of its
            output layer, and 0.2 was found to train a stacked one best. Validation loss on tinyshakespeare after 1,000
            steps, tied, width 384: 1.658 with 0.05 (about AWD-LSTM's U(-0.1, 0.1)), 1.564 with 0.2, 1.576 with 0.4,
            1.670 with 0.8.
        forget_gate_bias (`float`, *optional*, defaults to 1.0 for cells with a forget gate):
            Bias of the forget gate in a new model (Gers et al. 2000; Jozefowicz et al. 2015).
        chrono_max_distance (`int`, *optional*):
            The longest distance, in tokens, that a new model should bridge, T (Tallec & Ollivier 2018): the biases of the
            forget gate are log u with u ~ U(1, T - 1), those of the input gate -log u. It takes the place of
            `forget_gate_bias`.
        output_bias (`bool`, defaults to `False`): Whether the output layer has a bias, as in most old checkpoints.
        last_cell_size (`int`, *optional*):
            Width of the last cell of a stacked model, `hidden_size` by default. With tied embeddings it needs
            `output_projection_size`.
        output_projection_size (`int`, *optional*):
            Width of a linear layer with a bias between the last cell and the output layer, also the width of
            `last_hidden_state`; none by default. With tied embeddings it must equal `embedding_size`.
        embedding_dropout, input_dropout, hidden_dropout, output_dropout, weight_dropout (`float`, default to 0.0):
            Dropout probabilities while training (Merity et al. 2018; training_lstm.py): of whole words of the
            vocabulary (not with `inputs_embeds`); of features of the embeddings, of the outputs of each layer but the
            last (of each branch in a residual model), and of the output layer's input, the same at all tokens of a row
            (Gal & Ghahramani 2016); of recurrent weights (Wan et al. 2013). AWD-LSTM on WikiText-2: 0.1, 0.65, 0.2,
            0.4, 0.5.
        activation_regularization, temporal_activation_regularization (`float`, default to 0.0):
            Penalties, while training, on the squares of the outputs and of their changes from token to token, in nats
            per token and unit (Merity, McCann & Socher 2017). AWD-LSTM: 2 and 1.
        adversarial_softmax (`float`, defaults to 0.0):
            While training, the share ε of its length by which the output layer's row of each target is moved against the
            state, at worst (Wang, Gong & Liu 2019; training_lstm.py): the training loss is that of the moved rows. Theirs
            on the Penn Treebank: 0.005. Not with an adaptive softmax.
        loss_chunk_size (`int`, *optional*):
            While training, number of tokens whose logits are held at a time, for large vocabularies (training_lstm.py):
            the same loss and gradients in less memory, but logits are not returned. All tokens by default.
        adaptive_softmax_cutoffs (`list[int]`, *optional*):
            Ids at which an adaptive softmax splits the vocabulary, the most frequent words first, as word tokenizers
            order them (Grave et al. 2017; training_lstm.py): less compute and memory while training, at some cost in
            perplexity. For WikiText-103's 267,735 words: 20000, 40000, 200000 (Baevski & Auli 2019).
        direction (`str`, defaults to `"forward"`):
            `"backward"` for a model that reads each text from its last character to its first, as one of the two models
            of flair does (Akbik et al. 2018). hf_lstm's functions for text reverse it on the way in and out (tokenizers.py);
            the model itself, `generate()` and `pipeline` see ids in the order in which they are given.
        classifier_pooling (`str`, defaults to `"last"`):
            Outputs that a classifier of texts takes: the `"last"`, the `"max"` or the `"mean"` of all, or all three,
            `"concat"` (Howard & Ruder 2018, ULMFiT).
        classifier_hidden_size (`int`, *optional*):
            Width of ULMFiT's block in a classifier, 50 there: batch norm, dropout of `output_dropout`, a linear layer and
            ReLU before the output layer; none by default.
        use_cache (`bool`, defaults to `True`): Whether to return the state, except while training.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*):
            Special tokens; by default those of hf_lstm's tokenizers.

    Raises:
        huggingface_hub.errors.StrictDataclassError: caused by a `ValueError` with the reason, if a size is below 1, a
            number is of the wrong type or not finite, or the embeddings cannot be tied. This holds for every way to
            set a field: `config.hidden_size = 64`, `update`, `update_from_string` and `from_pretrained(path,
            hidden_size=64)` derive the defaults that depend on it again, validate, and change nothing if a value is
            refused.
    """

    model_type = LSTM_LAYER
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 260
    hidden_size: int = 512
    cell_type: str = "lstm"
    mogrifier_rounds: int | None = None
    mogrifier_rank: int | None = None
    embedding_size: int | None = None
    num_hidden_layers: int = 2
    block_type: Literal["stacked", "residual"] = "stacked"
    intermediate_size: int | None = None
    layer_types: list[str] | None = None
    attention_window: int | None = None
    num_attention_heads: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float | int | None = None
    forget_gate_bias: float | int | None = None
    chrono_max_distance: int | None = None
    output_bias: bool = False
    last_cell_size: int | None = None
    output_projection_size: int | None = None
    embedding_dropout: float | int = 0.0
    input_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    output_dropout: float | int = 0.0
    weight_dropout: float | int = 0.0
    activation_regularization: float | int = 0.0
    temporal_activation_regularization: float | int = 0.0
    adversarial_softmax: float | int = 0.0
    loss_chunk_size: int | None = None
    adaptive_softmax_cutoffs: list[int] | None = None
    direction: Literal["forward", "backward"] = "forward"
    classifier_pooling: Literal["last", "max", "mean", "concat"] = "last"
    classifier_hidden_size: int | None = None
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 3

    def __post_init__(self, **kwargs):
        if "output_size" in kwargs:
            raise ValueError(
                f"`output_size` ({kwargs['output_size']}) is derived from other fields: leave it out of the config."
            )
        self.validate_depth()
        self._derive(type(self).__dataclass_fields__.keys(), {})
        super().__post_init__(**kwargs)
        self._is_complete = True

    def __setattr__(self, name, value):
        """Set a field of a complete config as `update` does: derive dependent defaults again and validate all fields."""
        if name in type(self).__dataclass_fields__ and vars(self).get("_is_complete"):
            self.update({name: value})
        else:
            super().__setattr__(name, value)

    def update(self, config_dict):
        """Set fields together: all are validated after the last, and either all or none of them are set."""
        changed = self._incomplete_copy()
        PreTrainedConfig.update(changed, config_dict)
        changed._derive(config_dict.keys(), self._defaults())
        changed.validate()
        vars(self).update(vars(changed), _is_complete=True)

    def update_from_string(self, update_str):
        """Set the fields of `"hidden_size=64,num_hidden_layers=3"`, as `update` does."""
        changed = self._incomplete_copy()
        PreTrainedConfig.update_from_string(changed, update_str)
        names = [field.split("=")[0] for field in update_str.split(",")]
        self.update({name: getattr(changed, name) for name in names})

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Make a config from a dict, then set the fields among the other arguments, as `update` does."""
        # The fields of LSTMs: transformers sets its own, such as `dtype`, by its own rules.
        changes = {name: kwargs.pop(name) for name in list(kwargs) if name in LSTMConfig.__annotations__}
        made = super().from_dict(config_dict, **kwargs)
        (made[0] if isinstance(made, tuple) else made).update(changes)
        return made

    def _incomplete_copy(self):
        changed = copy.copy(self)
        vars(changed)["_is_complete"] = False
        return changed

    def _defaults(self) -> dict:
        """Return the defaults that depend on other fields."""
        cell = CELLS.get(self.cell_type, CELLS["lstm"])  # `validate_cell` refuses another
        has_constant_bias = cell.forget_gate is not None and self.chrono_max_distance is None
        return {
            "embedding_size": self.hidden_size,
            "initializer_range": 0.2 if self.block_type == "stacked" else 0.02,
            "forget_gate_bias": 1.0 if has_constant_bias else None,
            "mogrifier_rounds": 5 if cell.has_rounds else None,
            "layer_types": [LSTM_LAYER] * min(self.num_hidden_layers, MAX_LAYERS),  # `validate_depth` refuses more
            "attention_window": 512 if self._has_windows else None,
            "num_attention_heads": 1 if self._has_windows else None,
        }

    def _derive(self, given, former_defaults):
        """Set fields that were left at their default: `None` or, in saved files, the former default itself."""
        if "layer_types" in given:
            self._given_types = copy.copy(self.layer_types)  # which its owner may change
        elif self._given_types is not None:
            self.layer_types = self._given_types[: self.num_hidden_layers]
        for name, default in self._defaults().items():
            value = getattr(self, name)
            if value is None or (name not in given and value == former_defaults.get(name)):
                setattr(self, name, default)

    @property
    def _has_windows(self) -> bool:
        """Whether there are attention layers, also among those that an early exit leaves out."""
        return WINDOW_LAYER in (self._given_types or ())

    @property
    def state_size(self) -> int:
        """Numbers that the state of one row holds, in all layers, without the flags of windows."""
        kinds = cast(list[str], self.layer_types)
        cells = [size for size, kind in zip(self.cell_sizes, kinds, strict=True) if kind == LSTM_LAYER]
        windows = (len(kinds) - len(cells)) * 2 * self.hidden_size * (self.attention_window or 0)
        return len(CELLS[self.cell_type].states) * sum(cells) + windows

    @property
    def cell_sizes(self) -> list[int]:
        """Width of each layer's cell, from the first to the last."""
        is_free = self.block_type == "residual" or self.output_projection_size is not None
        last = self.last_cell_size or (self.hidden_size if is_free else self._tied_size)
        return [self.hidden_size] * (self.num_hidden_layers - 1) + [last]

    def validate_depth(self):
        """Run before lists of layers are made."""
        if self.num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"`num_hidden_layers` ({self.num_hidden_layers}) must be at most {MAX_LAYERS:,}.")

    def validate_cell(self):
        if self.cell_type not in CELLS:
            raise ValueError(f"`cell_type` ({self.cell_type!r}) must be one of {', '.join(CELLS)}.")
        cell, rounds, rank = CELLS[self.cell_type], self.mogrifier_rounds, self.mogrifier_rank
        for name, value in (("mogrifier_rounds", rounds), ("mogrifier_rank", rank)):
            if value is not None and not cell.has_rounds:
                raise ValueError(
                    f'`{name}` ({value}) needs `cell_type="mogrifier"`, and it is {self.cell_type!r}: leave one out, or set `{name}` to None.'
                )
        if rounds is not None and not 0 <= rounds <= MAX_LAYERS:
            raise ValueError(f"`mogrifier_rounds` ({rounds}) must be at least 0 and at most {MAX_LAYERS:,}.")
        if rank is not None and rank < 1:
            raise ValueError(f"`mogrifier_rank` ({rank}) must be at least 1, or None for full matrices.")
        bias, longest = self.forget_gate_bias, self.chrono_max_distance
        for name, value in (("forget_gate_bias", bias), ("chrono_max_distance", longest)):
            if value is not None and cell.forget_gate is None:
                raise ValueError(
                    f"`{name}` ({value}) sets biases of a forget gate, which `cell_type` ({self.cell_type!r}) lacks: leave "
                    "it out, or set it to None."
                )
        if bias is not None and longest is not None:
            raise ValueError(
                f"`forget_gate_bias` ({bias}) and `chrono_max_distance` ({longest}) exclude each other, since both set the "
                "biases of the forget gate: leave one out."
            )
        if bias is not None and not abs(bias) <= 1000:
            raise ValueError(f"`forget_gate_bias` ({bias}) must be a number from -1000 to 1000, such as 1.")
        if longest is not None and not 3 <= longest <= 10**9:
            raise ValueError(f"`chrono_max_distance` ({longest}) must be at least 3 and at most 1,000,000,000 tokens.")

    def validate_sizes(self):
        for name in SIZES:
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"`{name}` ({size}) must be at least 1.")

        width = max(self.hidden_size, self.embedding_size, self.last_cell_size or 0, self.output_projection_size or 0)
        a_round = width * (width if self.mogrifier_rank is None else 2 * self.mogrifier_rank)
        layer = 8 * width * width + (self.mogrifier_rounds or 0) * a_round
        layer += 3 * width * (self.intermediate_size or 0)
        parameters = self.vocab_size * self.embedding_size + self.num_hidden_layers * layer
        if parameters > MAX_PARAMETERS:
            names = (*SIZES, "intermediate_size", "mogrifier_rounds", "mogrifier_rank")
            fields = [(name, getattr(self, name)) for name in names if getattr(self, name) is not None]
            raise ValueError(
                f"{', '.join(f'`{name}` ({size})' for name, size in fields)} make a model of about {parameters:.0e} parameters: "
                f"at most {MAX_PARAMETERS:.0e} are allowed."
            )

    def validate_initialization(self):
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(
                f"`initializer_range` ({self.initializer_range}) is a standard deviation: it must be at least 0 and finite."
            )

    @property
    def output_size(self) -> int:
        """
        Width of `last_hidden_state`, which the output layer and every head take: `hidden_size` in most models, but not
        with tied embeddings of another size or an `output_projection_size`. It is derived, and never saved.
        """
        last = self._tied_size if self.block_type == "residual" else self.cell_sizes[-1]
        return self.output_projection_size or last

    @property
    def _tied_size(self) -> int:
        """Width of the output layer's input without `output_projection_size`: that of the embeddings if they are tied."""
        return cast(int, self.embedding_size) if self.tie_word_embeddings else self.hidden_size

    def validate_block(self):
        if self.intermediate_size is not None and self.block_type != "residual":
            raise ValueError(
                f'`intermediate_size` ({self.intermediate_size}) needs `block_type="residual"`: a stacked LSTM has no '
                "MLP."
            )
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ValueError(f"`intermediate_size` ({self.intermediate_size}) must be at least 1, or None for no MLP.")
        if not 0 <= self.rms_norm_eps < math.inf:
            raise ValueError(f"`rms_norm_eps` ({self.rms_norm_eps}) must be at least 0 and finite, such as 1e-6.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` ({self.hidden_act}) must be one of {', '.join(ACT2FN)}.")

    def validate_regularization(self):
        for name in DROPOUTS:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` ({getattr(self, name)}) is a probability: at least 0 and below 1.")
        for name in ("activation_regularization", "temporal_activation_regularization"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"`{name}` ({getattr(self, name)}) is the weight of a penalty: it must be at least 0 and finite."
                )

    def validate_loss(self):
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise ValueError(f"`loss_chunk_size` ({self.loss_chunk_size}) must be at least 1 token, or None for all.")

        cutoffs, epsilon = self.adaptive_softmax_cutoffs, self.adversarial_softmax
        if not 0 <= epsilon < math.inf:
            raise ValueError(f"`adversarial_softmax` ({epsilon}) must be at least 0 and finite, such as 0.005.")
        if cutoffs is None:
            return
        if epsilon > 0:
            raise ValueError(
                f"`adversarial_softmax` ({epsilon}) needs one output layer for all words, and `adaptive_softmax_cutoffs` "
                f"({cutoffs}) makes several: set one of them to its default."
            )
        if cutoffs != sorted(set(cutoffs)) or not cutoffs or cutoffs[0] < 1 or cutoffs[-1] >= self.vocab_size:
            raise ValueError(
                f"`adaptive_softmax_cutoffs` ({cutoffs}) must increase, from at least 1 to below `vocab_size` ({self.vocab_size})."
            )
        if self.output_size < 4 ** len(cutoffs):
            raise ValueError(
                f"`adaptive_softmax_cutoffs` ({cutoffs}) makes {len(cutoffs)} groups, each a quarter as wide as the one before, "
                f"too many for an output layer's input of width {self.output_size}: give fewer, or a width of at least "
                f"{4 ** len(cutoffs)}."
            )
        if self.tie_word_embeddings or self.loss_chunk_size is not None or self.output_bias:
            raise ValueError(
                f"`adaptive_softmax_cutoffs` ({cutoffs}) excludes tied embeddings, `loss_chunk_size` and `output_bias`: set "
                "`tie_word_embeddings=False`, `loss_chunk_size=None` and `output_bias=False`."
            )

    @property
    def trains_without_logits(self) -> bool:
        """Whether the loss is computed without logits while training."""
        return self.loss_chunk_size is not None or self.adaptive_softmax_cutoffs is not None

    def validate_classifier(self):
        size = self.classifier_hidden_size
        if size is not None and size < 1:
            raise ValueError(
                f"`classifier_hidden_size` ({size}) must be at least 1, such as 50, or None for no block."
            )

    def validate_tying(self):
        stacked, tied = self.block_type == "stacked", self.tie_word_embeddings
        if self.last_cell_size is not None and not (stacked and (not tied or self.output_projection_size is not None)):
            raise ValueError(
                f'`last_cell_size` ({self.last_cell_size}) needs `block_type="stacked"` and either `tie_word_embeddings=False` '
                "or `output_projection_size`: set these, or leave it out."
            )
        if tied and self.output_projection_size not in (None, self.embedding_size):
            raise ValueError(
                f"`output_projection_size` ({self.output_projection_size}) must equal `embedding_size` "
                f"({self.embedding_size}) with tied embeddings: make them equal, or set `tie_word_embeddings=False`."
            )
        if stacked and self.last_cell_size is None and self.cell_sizes[0] != self.hidden_size:
            raise ValueError(
                f"`embedding_size` ({self.embedding_size}) must equal `hidden_size` ({self.hidden_size}) in a model with tied "
                "embeddings and a single layer, also under `assistant_early_exit=1`: make them equal, add a layer, or set "
                "`tie_word_embeddings=False`."
            )

    def validate_layer_type(self):
        """Check `layer_types` in place of transformers, which knows attention layers only, and the fields of windows."""
        types = self._given_types or []
        if unknown := [name for name in types if name not in (LSTM_LAYER, WINDOW_LAYER)]:
            raise ValueError(
                f"`layer_types` ({unknown[0]!r} in it) must hold {LSTM_LAYER!r} and {WINDOW_LAYER!r} only."
            )
        left = len(cast(list[str], self.layer_types))
        if self._given_types is not None and left != self.num_hidden_layers > 0:  # `validate_sizes` refuses others
            raise ValueError(
                f"`layer_types` ({len(types)} entries) must have one for each of `num_hidden_layers` "
                f"({self.num_hidden_layers}): make them equal."
            )
        window, heads = self.attention_window, self.num_attention_heads
        for name, value in (("attention_window", window), ("num_attention_heads", heads)):
            if value is not None and not self._has_windows:
                raise ValueError(
                    f"`{name}` ({value}) needs a layer of attention, which the model lacks: leave it out, or name one in "
                    f"`layer_types`, such as {[LSTM_LAYER, WINDOW_LAYER]}."
                )
        if not self._has_windows:
            return
        if self.block_type != "residual":
            raise ValueError(
                f"`layer_types` ({types}) has attention, which adds to a stream and needs residual layers: set "
                '`block_type="residual"`, or leave it out.'
            )
        if LSTM_LAYER not in cast(list[str], self.layer_types):
            raise ValueError(
                f"`layer_types` ({self.layer_types}) must hold at least one {LSTM_LAYER!r}, since attention alone does not know the order "
                "of tokens."
            )
        if window is not None and not 1 <= window <= MAX_WINDOW:
            raise ValueError(f"`attention_window` ({window}) must be at least 1 and at most {MAX_WINDOW:,} tokens.")
        if heads is not None and (heads < 1 or self.hidden_size % heads):
            raise ValueError(
                f"`num_attention_heads` ({heads}) must divide `hidden_size` ({self.hidden_size}): give a divisor of it, such as 1."
            )

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save the config, and remove the code files that version 0.1.0 saved under other names."""
        super().save_pretrained(save_directory, *args, **kwargs)
        for name in FORMER_FILES:
            Path(save_directory, name).unlink(missing_ok=True)

    def to_dict(self):
        """Return the fields, and the `auto_map` with which a saved model loads where hf_lstm is not installed."""
        fields = super().to_dict() | {"auto_map": dict(AUTO_MAP)}
        fields.pop("_is_complete", None)
        if fields.pop("_given_types", None) is None:  # it follows from `num_hidden_layers`
            fields.pop("layer_types", None)
        elif WINDOW_LAYER not in cast(list[str], self.layer_types):  # in the layers that are left
            fields |= {"attention_window": None, "num_attention_heads": None}
        return fields


# Far above any LSTM: a file that asks for more is damaged or malicious.
MAX_PARAMETERS, MAX_LAYERS, MAX_WINDOW = 10**12, 10_000, 2**20

SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "embedding_size",
    "vocab_size",
    "last_cell_size",
    "output_projection_size",
)
DROPOUTS = ("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_dropout")

# Code that version 0.1.0 saved beside a model, under names that are no longer used.
FORMER_FILES = tuple(
    f"{name}_lstm.py" for name in ("decoding", "kernels", "loss", "outputs", "regularization", "segments")
)

# Saving a model writes only the classes it used into `auto_map`; with the whole map `AutoModel` loads a causal LM too.
AUTO_MAP = {
    "AutoConfig": "configuration_lstm.LSTMConfig",
    "AutoModel": "modeling_lstm.LSTMModel",
    "AutoModelForCausalLM": "modeling_lstm.LSTMForCausalLM",
    "AutoModelForSequenceClassification": "heads_lstm.LSTMForSequenceClassification",
    "AutoModelForTokenClassification": "heads_lstm.LSTMForTokenClassification",
}

# Trainer reads the config of a checkpoint as a plain `PreTrainedConfig`, which refuses layers of other names.
ALLOWED: Any = configuration_utils.ALLOWED_ATTN_LAYER_TYPES
configuration_utils.ALLOWED_ATTN_LAYER_TYPES = (*ALLOWED, LSTM_LAYER, WINDOW_LAYER)

__all__ = ["LSTMConfig"]
