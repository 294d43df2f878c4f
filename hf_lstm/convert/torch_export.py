"""The one-token step as torch.export's file: it is loaded by `torch.export.load` where this package is not installed."""

from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache


class Step(nn.Module):
    """`(input_ids (B, 1), [h, c, ...] (B, H) of each layer)` to `(logits (B, 1, V), [h, c, ...])`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, state: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        cache = DynamicCache(config=self.model.config)
        for layer, h, c in zip(cache.layers, state[::2], state[1::2], strict=True):
            layer.update(h, c)
        logits = self.model(input_ids, past_key_values=cache).logits
        return logits, [part for layer in cache.layers for part in layer.get_state()]

    def zero_state(self, rows: int) -> list[torch.Tensor]:
        """What a text begins from."""
        weight = self.model.get_input_embeddings().weight
        return [weight.new_zeros(rows, size) for size in self.model.config.cell_sizes for _ in "hc"]


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
    examples = (torch.zeros(2, 1, dtype=torch.long), step.zero_state(2))
    with torch.no_grad():
        program = torch.export.export(step, examples, dynamic_shapes=(rows, [rows] * len(examples[1])))
    torch.export.save(program, path)
    return path
