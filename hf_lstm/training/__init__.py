"""Truncated backpropagation through time inside the stock Trainer."""

from .arguments import LSTMTrainingArguments
from .tbptt import TruncatedBPTTCallback, last_complete_checkpoint

__all__ = ["LSTMTrainingArguments", "TruncatedBPTTCallback", "last_complete_checkpoint"]
