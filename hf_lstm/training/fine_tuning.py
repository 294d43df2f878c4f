"""Fine-tuning as in ULMFiT (Howard & Ruder 2018, section 3.3): gradual unfreezing, and slanted triangular learning rates."""

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from .optimization import depth_of, number_of_depths


class GradualUnfreezingCallback(TrainerCallback):
    """
    Trains the head alone in the first epoch, with the last layer in the second, and so on down to the embeddings.

    It freezes when training begins, after Trainer has made its optimizer, which would leave frozen parameters out for good.
    After training all parameters are as they were, those among them that were frozen before.
    """

    def __init__(self) -> None:
        self._free: dict[str, torch.nn.Parameter] = {}  # parameters that were not frozen before

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_train_end(args, state, control)
        self._free = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        depths = number_of_depths(model)
        lowest = depths - 1 - int(state.epoch + 1e-6)  # an epoch is a sum of fractions
        for name, parameter in self._free.items():
            parameter.requires_grad_(depth_of(name, depths) >= lowest)

    def on_train_end(self, args, state, control, **kwargs):
        for parameter in self._free.values():
            parameter.requires_grad_(True)
        self._free = {}


def slanted_triangular(
    optimizer: torch.optim.Optimizer, steps: int, cut_fraction: float = 0.1, ratio: float = 32
) -> LambdaLR:
    """
    Make a schedule that rises for a short while and falls for a long one (Howard & Ruder 2018, equation 3):

        cut = ⌊T cut_fraction⌋
        p = t / cut                                       if t < cut
            1 - (t - cut) / (cut (1 / cut_fraction - 1))  otherwise
        η_t = η_max (1 + p (ratio - 1)) / ratio

    Trainer takes it as `optimizers=(optimizer, slanted_triangular(optimizer, steps))`.

    Args:
        optimizer (`torch.optim.Optimizer`): Its learning rates are η_max, one for each group.
        steps (`int`): T, the number of optimizer steps.
        cut_fraction (`float`, defaults to 0.1): The share of steps in which the learning rate rises.
        ratio (`float`, defaults to 32): How much smaller than η_max the lowest learning rate is.

    Raises:
        ValueError: for numbers outside their ranges.
    """
    if steps < 1 or not 0 < cut_fraction < 1 or not ratio >= 1:
        raise ValueError(
            f"`steps` ({steps}) must be at least 1, `cut_fraction` ({cut_fraction}) between 0 and 1, and `ratio` ({ratio}) at "
            "least 1."
        )
    cut = max(1, int(steps * cut_fraction))

    def factor(step):
        p = step / cut if step < cut else 1 - (step - cut) / (cut * (1 / cut_fraction - 1))
        return (1 + max(0.0, p) * (ratio - 1)) / ratio

    return LambdaLR(optimizer, factor)
