"""Training inside the stock Trainer: truncated backpropagation through time, checkpoints, optimisers and callbacks."""

from .arguments import LSTMTrainingArguments
from .callbacks import (
    DivergenceCallback,
    FinishedRunCallback,
    HubCallback,
    MetricsCallback,
    NonMonotonicTrigger,
)
from .checkpoints import last_complete_checkpoint
from .fine_tuning import GradualUnfreezingCallback, slanted_triangular
from .optimization import NTASGD, EMAAdamW, parameter_groups
from .private import PrivateTrainer
from .tbptt import TruncatedBPTTCallback
from .words import WordCheckpointCallback

__all__ = [
    "NTASGD",
    "DivergenceCallback",
    "EMAAdamW",
    "FinishedRunCallback",
    "GradualUnfreezingCallback",
    "HubCallback",
    "LSTMTrainingArguments",
    "MetricsCallback",
    "NonMonotonicTrigger",
    "PrivateTrainer",
    "TruncatedBPTTCallback",
    "WordCheckpointCallback",
    "last_complete_checkpoint",
    "parameter_groups",
    "slanted_triangular",
]
