"""What the models return: transformers' own outputs, and what regularization adds while training (B batch, T tokens)."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class LSTMModelOutputWithPast(BaseModelOutputWithPast):
    """
    Args:
        temporal_change (`torch.FloatTensor` of shape `(B, T)`, *optional*):
            While training with temporal activation regularization: the mean of (x_t - x_{t-1})² over the features of
            `last_hidden_state`, 0 at the first token of each document.
    """

    temporal_change: torch.FloatTensor | None = None


@dataclass
class LSTMCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Args:
        regularization_loss (`torch.FloatTensor` of shape `()`, *optional*):
            While training with activation regularization: the penalty, averaged as `loss` is. The gradient of `loss`
            contains that of the penalty; its value does not contain the penalty.
    """

    regularization_loss: torch.FloatTensor | None = None
