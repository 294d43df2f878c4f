"""Training inside the stock Trainer: truncated backpropagation through time, optimisers, what the logs say."""

from .arguments import LSTMTrainingArguments
from .finished import FinishedRunCallback
from .hub import HubCallback
from .metrics import DivergenceCallback, MetricsCallback
from .optimization import NTASGD, EMAAdamW, NonMonotonicTrigger, parameter_groups
from .tbptt import TruncatedBPTTCallback, last_complete_checkpoint

__all__ = [
    "NTASGD",
    "DivergenceCallback",
    "EMAAdamW",
    "FinishedRunCallback",
    "HubCallback",
    "LSTMTrainingArguments",
    "MetricsCallback",
    "NonMonotonicTrigger",
    "TruncatedBPTTCallback",
    "last_complete_checkpoint",
    "parameter_groups",
]
