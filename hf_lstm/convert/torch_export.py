"""Export of the one-token step with `torch.export`; `torch.export.load` reads the file without this package."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from hf_lstm.model.modeling_lstm import LSTMForCausalLM

from .checking import largest_difference


class Step(nn.Module):
    """
    One step, from `input_ids (B, 1)` and the state to `logits (B, 1, V)` and the next state. The state is a list of the
    tensors of each layer: h, and c where the cell has it, `(B, H)` each, or those of a window (attention_lstm.py). h has the
    dtype of the weights; c is float32 if that is a half-precision dtype.
    """

    def __init__(self, model: LSTMForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, state: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        cache: Any = DynamicCache(config=self.model.config)
        parts = iter(state)
        for own, layer in zip(self.model.model.layers, cache.layers, strict=True):
            layer.update(*(next(parts) for _ in own.state_names))
        logits = self.model(input_ids, past_key_values=cache).logits
        return logits, [part for layer in cache.layers for part in layer.get_state()]

    @torch.no_grad()
    def zero_state(self, rows: int) -> list[torch.Tensor]:
        """Return the zero state of `rows` sequences, in the dtypes of the model's own cache."""
        cache: Any = DynamicCache(config=self.model.config)
        self.model(torch.zeros(rows, 1, dtype=torch.long, device=self.model.device), past_key_values=cache)
        return [torch.zeros_like(part) for layer in cache.layers for part in layer.get_state()]


def export_step(model: LSTMForCausalLM, path: str | Path) -> Path:
    """
    Write the step of a model, for any number of rows, and return its path.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    step = Step(model).eval()
    rows = {0: torch.export.Dim("rows", min=1)}
    examples = (torch.zeros(2, 1, dtype=torch.long, device=model.device), step.zero_state(2))
    with torch.no_grad():
        program = torch.export.export(step, examples, dynamic_shapes=(rows, [rows] * len(examples[1])))
    torch.export.save(program, path)
    return path


def difference(model: LSTMForCausalLM, path: str | Path, rows: int = 3, length: int = 9) -> float:
    """
    Return the largest difference, in nats, between the log-probabilities of an exported step and of the model, over
    random tokens with carried state.
    """
    step, state = torch.export.load(path).module(), Step(model).zero_state(rows)

    def read(ids: torch.Tensor) -> torch.Tensor:
        logits, state[:] = step(ids.to(model.device), state)
        return logits

    return largest_difference(model, read, 1, rows, length)
