"""The one-token step as torch.export's file: it is loaded by `torch.export.load` where this package is not installed."""

from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache

from .checking import largest_difference


class Step(nn.Module):
    """
    `(input_ids (B, 1), [h, c, ...] (B, H) of each layer)` to `(logits (B, 1, V), [h, c, ...])`. As in the model, h has the
    type of the weights, and c float32 where that is a half.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, state: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        cache = DynamicCache(config=self.model.config)
        for layer, h, c in zip(cache.layers, state[::2], state[1::2], strict=True):
            layer.update(h, c)
        logits = self.model(input_ids, past_key_values=cache).logits
        return logits, [part for layer in cache.layers for part in layer.get_state()]

    @torch.no_grad()
    def zero_state(self, rows: int) -> list[torch.Tensor]:
        """The state that a text begins from, in the types that the model itself hands on."""
        cache = DynamicCache(config=self.model.config)
        self.model(torch.zeros(rows, 1, dtype=torch.long, device=self.model.device), past_key_values=cache)
        return [torch.zeros_like(part) for layer in cache.layers for part in layer.get_state()]


def export_step(model, path: str | Path) -> Path:
    """
    Write the step of an `LSTMForCausalLM`, for any number of rows.

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


def difference(model, path: str | Path, rows: int = 3, length: int = 9) -> float:
    """
    The largest difference, in nats, of the log-probabilities of a file's step and of the model, over random tokens and
    the state that follows them.
    """
    step, state = torch.export.load(path).module(), Step(model).zero_state(rows)

    def read(ids):
        logits, state[:] = step(ids.to(model.device), state)
        return logits

    return largest_difference(model, read, 1, rows, length)
