"""End of a run in several processes."""

from typing import cast

import torch
from transformers import Trainer


def end_processes(trainer: Trainer) -> None:
    """
    End what a run's processes share: DDP first, then the connection that it uses. In the other order, which is the
    interpreter's own, gloo's threads can stall or abort the end.
    """
    trainer.model_wrapped = cast(torch.nn.Module, trainer.model)
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()
