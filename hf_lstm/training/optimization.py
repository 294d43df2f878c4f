"""Weight decay by kind of parameter, optimisers that average their weights, and learning rates for random chunk lengths.

Trainer(..., optimizer_cls_and_kwargs=(EMAAdamW, {"lr": 4e-3, "params": parameter_groups(model, weight_decay=0.01)}))
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

KINDS = ("recurrent", "bias", "norm", "embedding")


def parameter_groups(
    model: PreTrainedModel,
    weight_decay: float,
    exclude: Iterable[str] = KINDS,
    learning_rate: float | None = None,
    layer_divisor: float = 1.0,
) -> list[dict]:
    """
    Split the parameters of a model for an optimiser: those that decay, and those that do not.

    Args:
        model (`LSTMForCausalLM`): The model.
        weight_decay (`float`): Weight decay of those that do.
        exclude (`Iterable[str]`, defaults to all four):
            Kinds that do not decay: `"recurrent"`, the matrices that multiply h and those of a Mogrifier's rounds;
            `"bias"`; `"norm"`, the gains of RMSNorm; `"embedding"`. AWD-LSTM excludes nothing (Merity et al. 2018), xLSTM all but matrices (Beck et al. 2024).
        learning_rate (`float`, *optional*): The highest learning rate, needed with a `layer_divisor`.
        layer_divisor (`float`, defaults to 1.0):
            Discriminative learning rates (Howard & Ruder 2018, section 3.2), from the head down: η of the head is
            `learning_rate`, and that of each layer below it is divided once more, η_l = η_{l+1} / `layer_divisor`, last that
            of the embeddings. 2.6 in ULMFiT. There is then a pair of groups for each layer.

    Returns:
        `list[dict]`: pairs of groups of an optimiser, those that decay and those that do not.

    Raises:
        ValueError: for a kind that does not exist, a negative weight decay, or a divisor that is not at least 1 or lacks
            its learning rate.
    """
    exclude = set(exclude)
    if unknown := exclude - set(KINDS):
        raise ValueError(f"`exclude` ({', '.join(sorted(unknown))}) must be among {', '.join(KINDS)}.")
    if not weight_decay >= 0:
        raise ValueError(f"`weight_decay` ({weight_decay}) must be at least 0.")
    if not 1 <= layer_divisor < math.inf or (layer_divisor > 1 and learning_rate is None):
        raise ValueError(
            f"`layer_divisor` ({layer_divisor}) must be at least 1, and more needs a `learning_rate` ({learning_rate}) to divide."
        )
    depths = number_of_depths(model) if layer_divisor > 1 else 1
    members: dict[tuple[int, bool], list[torch.nn.Parameter]] = {
        (depth, is_spared): [] for depth in reversed(range(depths)) for is_spared in (False, True)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            depth = depth_of(name, depths) if depths > 1 else 0
            members[depth, _kind_of(name, parameter) in exclude].append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if is_spared else weight_decay}
        | ({} if learning_rate is None else {"lr": learning_rate / layer_divisor ** (depths - 1 - depth)})
        for (depth, is_spared), parameters in members.items()
    ]


def number_of_depths(model: PreTrainedModel) -> int:
    """Return the number of parts that learn at rates of their own: the embeddings, each layer, and the head."""
    return model.config.num_hidden_layers + 2


def depth_of(name: str, depths: int) -> int:
    """
    Return the part that a parameter belongs to by its name: 0 for the embeddings, with their tied output layer, 1 for the
    first layer, and so on, and `depths` - 1 for whatever stands behind the last.
    """
    if "embed_tokens" in name or "in_proj" in name:
        return 0
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return depths - 1 if layer is None else int(layer[1]) + 1


def _kind_of(name, parameter):
    if name.endswith("bias"):
        return "bias"
    if parameter.ndim < 2:
        return "norm"
    if "hidden_gates" in name or "mogrifier" in name:
        return "recurrent"
    return "embedding" if "embed_tokens" in name else None


class WeightAveraging(torch.optim.Optimizer):
    """
    Base of `NTASGD` and `EMAAdamW`: two sets of weights, the iterate that learns and the average of its path.

    After each step the model holds the average, so that whoever evaluates or saves it gets that. `train()` puts the
    iterate back, and is called before the forward of a step, as Trainer does; `eval()` puts the average there. Both sets
    are part of `state_dict()`, two copies of the weights; what else is loaded into the model is overwritten by the next
    `train()`.

    Raises:
        ValueError: for weights in less than float32, which small changes would not reach.
        RuntimeError: at a step whose gradients were taken at the average.
    """

    def _prepare(self):
        for parameter in self._parameters():
            if torch.promote_types(parameter.dtype, torch.float32) != parameter.dtype:
                raise ValueError(
                    f"Weights of {parameter.dtype} are too coarse to be averaged: keep them in float32, and train with "
                    "`bf16=True` for speed."
                )
        self.param_groups[0]["holds_average"] = False

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # the loss of `closure`, if there is one
        """Take a step with the iterate, after which the model holds the average."""
        if self.param_groups[0]["holds_average"]:
            raise RuntimeError(
                f"The gradients were taken at the average: call `train()` of {type(self).__name__} before the forward of "
                "each step, as Trainer does."
            )
        loss = super().step(closure)
        weight = self._averaging_weight()
        if weight is not None:
            self._average(weight)
        return loss

    def train(self) -> None:
        """Let the model hold the iterate."""
        self._swap_weights("iterate")

    def eval(self) -> None:
        """Let the model hold the average, if there is one yet."""
        self._swap_weights("average")

    def _averaging_weight(self) -> float | None:
        """Weight of this iterate in the average, or `None` while nothing is averaged."""
        raise NotImplementedError  # an abstract method: `NTASGD` and `EMAAdamW` define it

    def _parameters(self):
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def _swap_weights(self, which):
        if self.param_groups[0]["holds_average"] == (which == "average"):
            return
        averaged = [parameter for parameter in self._parameters() if "average" in self.state[parameter]]
        for parameter in averaged:
            parameter.copy_(self.state[parameter][which])
        self.param_groups[0]["holds_average"] = which == "average" and len(averaged) > 0

    @torch.no_grad()
    def _average(self, weight):
        for parameter in self._parameters():
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "average" in state:
                state["iterate"].copy_(parameter)
                state["average"].lerp_(parameter, weight)
            else:
                state["iterate"], state["average"] = parameter.clone(), parameter.clone()
        self.eval()


class EMAAdamW(WeightAveraging, torch.optim.AdamW):
    """
    AdamW with an exponential moving average of its weights (Polyak & Juditsky 1992; Morales-Brotons, Vogels & Hendrikx
    2024).

    Args:
        params, lr, ...: Those of `torch.optim.AdamW`.
        decay (`float`, defaults to 0.999):
            Decay of the average at each step; (1 + t) / (10 + t) at step t while that is less, so that the random weights of
            the beginning are forgotten.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, decay: float = 0.999, **kwargs: Any) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` ({decay}) must be at least 0 and below 1.")
        super().__init__(params, lr=lr, **kwargs)
        self.param_groups[0] |= {"decay": decay, "steps": 0}
        self._prepare()

    def _averaging_weight(self):
        group = self.param_groups[0]
        group["steps"] += 1
        return 1 - min(group["decay"], (1 + group["steps"]) / (10 + group["steps"]))


class NTASGD(WeightAveraging, torch.optim.SGD):
    """
    Non-monotonically triggered averaged SGD (Merity, Keskar & Socher 2018, algorithm 1): plain SGD, and from the moment
    that the validation loss does not improve on that of some evaluations ago, the mean of all weights since then.
    `NonMonotonicTrigger` tells it the losses.

    Args:
        params, lr, ...: Those of `torch.optim.SGD`.
        patience (`int`, defaults to 5): n of the algorithm, evaluations.
    """

    def __init__(self, params: Iterable[Any], lr: float = 30.0, patience: int = 5, **kwargs: Any) -> None:
        if patience < 1:
            raise ValueError(f"`patience` ({patience}) must be at least 1.")
        super().__init__(params, lr=lr, **kwargs)
        self.param_groups[0] |= {"patience": patience, "validation_losses": [], "triggered": False, "steps": 0}
        self._prepare()

    def observe(self, loss: float) -> None:
        """Record a validation loss (nats per token), and begin to average if it is time."""
        group = self.param_groups[0]
        earlier = group["validation_losses"][: -group["patience"]]
        group["triggered"] |= bool(earlier) and not loss <= min(earlier)
        group["validation_losses"] = [*group["validation_losses"], loss]

    def _averaging_weight(self):
        group = self.param_groups[0]
        if not group["triggered"]:
            return None
        group["steps"] += 1
        return 1 / group["steps"]


class ChunkLengthScaling:
    """
    Learning rate of a step, scaled by the mean length of its chunks over `bptt_length` (Merity et al. 2018, section 5).
    """

    def __init__(self, bptt_length: int) -> None:
        self.bptt_length = bptt_length
        self._lengths: list[int] = []  # of the chunks since the last step
        self._learning_rates: list[float] = []  # the scheduler's, during a step

    def add(self, length: int) -> None:
        """Note a chunk of `length` tokens that the next step learns from."""
        self._lengths.append(length)

    def scale(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale the learning rates for the step that follows."""
        scale = sum(self._lengths) / len(self._lengths) / self.bptt_length if self._lengths else 1
        self._learning_rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * scale
        self._lengths = []

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the scheduler's learning rates back after the step."""
        for group, learning_rate in zip(optimizer.param_groups, self._learning_rates, strict=True):
            group["lr"] = learning_rate


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimiser inside of accelerate's wrapper, or the same one if it has none."""
    return getattr(optimizer, "optimizer", optimizer)
