"""The configuration of an LSTM language model."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class LSTMConfig(PreTrainedConfig):
    r"""
    The configuration of [`LSTMModel`] and [`LSTMForCausalLM`]. `LSTMConfig()` builds a working model for
    `byte_tokenizer()`.

    Args:
        vocab_size (`int`, defaults to 260): Tokens in the vocabulary.
        hidden_size (`int`, defaults to 512): Width of a cell, the length of its `h` and of its `c`.
        embedding_size (`int`, *optional*, defaults to `hidden_size`):
            Width of a token's embedding. When embeddings are tied and it differs from `hidden_size`, the last cell is
            `embedding_size` wide, as in AWD-LSTM (Merity et al. 2018): 400, 1150, 1150, 400.
        num_hidden_layers (`int`, defaults to 2): LSTM layers.
        tie_word_embeddings (`bool`, defaults to `True`):
            The output layer's matrix is the embedding's (Press & Wolf 2017, Inan et al. 2017).
        initializer_range (`float`, defaults to 0.2):
            Standard deviation of new embeddings. Validation loss on tinyshakespeare after 1,000 steps, tied, width 384:
            1.658 with 0.05 (about AWD-LSTM's U(-0.1, 0.1)), 1.564 with 0.2, 1.576 with 0.4, 1.670 with 0.8.
        forget_gate_bias (`float`, defaults to 1.0):
            Bias of the forget gate in a new model (Gers et al. 2000; Jozefowicz et al. 2015).
        use_cache (`bool`, defaults to `True`): Return the state unless the model is training.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): The ids of hf_lstm's own tokenizers.

    Raises:
        huggingface_hub.errors.StrictDataclassError: with the `ValueError` that says why, where a size is below 1, a
            number is of the wrong type, or the embeddings cannot be tied.
    """

    model_type = "hf_lstm"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 260
    hidden_size: int = 512
    embedding_size: int | None = None
    num_hidden_layers: int = 2
    tie_word_embeddings: bool = True
    initializer_range: float | int = 0.2
    forget_gate_bias: float | int = 1.0
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 3

    def __post_init__(self, **kwargs):
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """What transformers builds a cache from: one layer of type `hf_lstm` (cache_lstm.py) per LSTM layer."""
        return [self.model_type] * self.num_hidden_layers

    @property
    def cell_sizes(self) -> list[int]:
        """Width of each layer's cell, from the first to the last."""
        last = self.embedding_size if self.tie_word_embeddings else self.hidden_size
        return [self.hidden_size] * (self.num_hidden_layers - 1) + [last]

    def validate_sizes(self):
        for name in ("vocab_size", "hidden_size", "embedding_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be at least 1.")

    def validate_initializer_range(self):
        if self.initializer_range < 0:
            raise ValueError(f"`initializer_range` ({self.initializer_range}) is a standard deviation: at least 0.")

    def validate_tying(self):
        if self.tie_word_embeddings and self.num_hidden_layers == 1 and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"`embedding_size` ({self.embedding_size}) must equal `hidden_size` ({self.hidden_size}) when a single "
                "layer lies between tied embeddings: make them equal, add a layer, or set `tie_word_embeddings=False`."
            )

    def validate_layer_type(self):
        """transformers' own rule knows attention layers only: `layer_types` follows from `num_hidden_layers` here."""

    def to_dict(self):
        """The fields, and the `auto_map` that lets a saved model load where hf_lstm is not installed."""
        return super().to_dict() | {"auto_map": dict(AUTO_MAP)}


# Saving a model writes only the classes it used into `auto_map`; the whole map lets `AutoModel` load a causal LM too.
AUTO_MAP = {
    "AutoConfig": "configuration_lstm.LSTMConfig",
    "AutoModel": "modeling_lstm.LSTMModel",
    "AutoModelForCausalLM": "modeling_lstm.LSTMForCausalLM",
}

__all__ = ["LSTMConfig"]
