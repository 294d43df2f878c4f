"""Conversion from and to other formats, one module per format."""

from .folder import convert_checkpoint
from .torch_lstm import to_torch_lstm

__all__ = ["convert_checkpoint", "to_torch_lstm"]
