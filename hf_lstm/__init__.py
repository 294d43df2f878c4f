"""LSTM language models that behave like any Hugging Face model, with a memory that never grows."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .data import DocumentDataset, LaneDataset, StreamingLanes, TokenStream, load_corpus, load_documents
from .evaluation import evaluate_stream, minimal_pairs, surprisal, word_surprisal
from .generation import Session, load_state, save_state
from .model.configuration_lstm import LSTMConfig
from .model.heads_lstm import LSTMForSequenceClassification, LSTMForTokenClassification
from .model.modeling_lstm import LSTMForCausalLM, LSTMModel, LSTMPreTrainedModel
from .tokenizers import bpe_tokenizer, byte_tokenizer, char_tokenizer, word_tokenizer

__version__ = "0.2.0"

AutoConfig.register(LSTMConfig.model_type, LSTMConfig)
AutoModel.register(LSTMConfig, LSTMModel)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM)
AutoModelForSequenceClassification.register(LSTMConfig, LSTMForSequenceClassification)
AutoModelForTokenClassification.register(LSTMConfig, LSTMForTokenClassification)

# Every save copies the code beside the weights, so a model loads with `trust_remote_code=True` without hf_lstm.
LSTMConfig.register_for_auto_class()
LSTMModel.register_for_auto_class("AutoModel")
LSTMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
LSTMForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
LSTMForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

__all__ = [
    "DocumentDataset",
    "LSTMConfig",
    "LSTMForCausalLM",
    "LSTMForSequenceClassification",
    "LSTMForTokenClassification",
    "LSTMModel",
    "LSTMPreTrainedModel",
    "LaneDataset",
    "Session",
    "StreamingLanes",
    "TokenStream",
    "bpe_tokenizer",
    "byte_tokenizer",
    "char_tokenizer",
    "evaluate_stream",
    "load_corpus",
    "load_documents",
    "load_state",
    "minimal_pairs",
    "save_state",
    "surprisal",
    "word_surprisal",
    "word_tokenizer",
]
