"""Weight decay by kind of parameter, and optimisers that average the weights they pass through.

Trainer(..., optimizer_cls_and_kwargs=(EMAAdamW, {"lr": 4e-3, "params": parameter_groups(model, weight_decay=0.01)}))
"""

import torch
from transformers import TrainerCallback

KINDS = ("recurrent", "bias", "norm", "embedding")


def parameter_groups(model, weight_decay: float, exclude=KINDS) -> list[dict]:
    """
    The parameters of a model for an optimiser: those that decay, and those that do not.

    Args:
        model (`LSTMForCausalLM`): The model.
        weight_decay (`float`): Weight decay of those that do.
        exclude (`Iterable[str]`, defaults to all four):
            What does not decay: `"recurrent"`, the matrices that multiply h; `"bias"`; `"norm"`, the gains of RMSNorm;
            `"embedding"`. AWD-LSTM excludes nothing (Merity et al. 2018), xLSTM all but matrices (Beck et al. 2024).

    Raises:
        ValueError: for a kind that does not exist, or a negative weight decay.
    """
    if unknown := set(exclude) - set(KINDS):
        raise ValueError(f"`exclude` ({', '.join(sorted(unknown))}) must be among {', '.join(KINDS)}.")
    if not weight_decay >= 0:
        raise ValueError(f"`weight_decay` ({weight_decay}) must be at least 0.")
    decaying, spared = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (spared if _kind_of(name, parameter) in exclude else decaying).append(parameter)
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def _kind_of(name, parameter):
    if name.endswith("bias"):
        return "bias"
    if parameter.ndim < 2:
        return "norm"
    if "hidden_gates" in name:
        return "recurrent"
    return "embedding" if "embed_tokens" in name else None


class WeightAveraging(torch.optim.Optimizer):
    """
    What `NTASGD` and `EMAAdamW` share: two sets of weights, the iterate that learns and the average of its path.

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

    def step(self, closure=None):
        """One step of the iterate, after which the model holds the average."""
        if self.param_groups[0]["holds_average"]:
            raise RuntimeError(
                f"The gradients were taken at the average: call `train()` of {type(self).__name__} before the forward of "
                "each step, as Trainer does."
            )
        loss = super().step(closure)
        share = self._share()  # each optimiser's own: of this iterate in the average, None while nothing is averaged
        if share is not None:
            self._average(share)
        return loss

    def train(self) -> None:
        """Let the model hold the iterate."""
        self._show("iterate")

    def eval(self) -> None:
        """Let the model hold the average, if there is one yet."""
        self._show("average")

    def _parameters(self):
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def _show(self, which):
        if self.param_groups[0]["holds_average"] == (which == "average"):
            return
        averaged = [parameter for parameter in self._parameters() if "average" in self.state[parameter]]
        for parameter in averaged:
            parameter.copy_(self.state[parameter][which])
        self.param_groups[0]["holds_average"] = which == "average" and len(averaged) > 0

    @torch.no_grad()
    def _average(self, share):
        for parameter in self._parameters():
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "average" in state:
                state["iterate"].copy_(parameter)
                state["average"].lerp_(parameter, share)
            else:
                state["iterate"], state["average"] = parameter.clone(), parameter.clone()
        self.eval()


class EMAAdamW(WeightAveraging, torch.optim.AdamW):
    """
    AdamW and an exponential moving average of its weights (Polyak & Juditsky 1992; Morales-Brotons, Vogels & Hendrikx
    2024).

    Args:
        params, lr, ...: As `torch.optim.AdamW` takes them.
        decay (`float`, defaults to 0.999):
            Of the average at each step; (1 + t) / (10 + t) at step t while that is less, so that the random weights of
            the beginning are forgotten.
    """

    def __init__(self, params, lr: float = 1e-3, decay: float = 0.999, **kwargs):
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` ({decay}) must be at least 0 and below 1.")
        super().__init__(params, lr=lr, **kwargs)
        self.param_groups[0] |= {"decay": decay, "steps": 0}
        self._prepare()

    def _share(self):
        group = self.param_groups[0]
        group["steps"] += 1
        return 1 - min(group["decay"], (1 + group["steps"]) / (10 + group["steps"]))


class NTASGD(WeightAveraging, torch.optim.SGD):
    """
    Non-monotonically triggered averaged SGD (Merity, Keskar & Socher 2018, algorithm 1): plain SGD, and from the moment
    that the validation loss is no longer better than it was some evaluations ago, the mean of all weights since then.
    `NonMonotonicTrigger` tells it the losses.

    Args:
        params, lr, ...: As `torch.optim.SGD` takes them.
        patience (`int`, defaults to 5): n of the algorithm, evaluations.
    """

    def __init__(self, params, lr: float = 30.0, patience: int = 5, **kwargs):
        if patience < 1:
            raise ValueError(f"`patience` ({patience}) must be at least 1.")
        super().__init__(params, lr=lr, **kwargs)
        self.param_groups[0] |= {"patience": patience, "validation_losses": [], "triggered": False, "steps": 0}
        self._prepare()

    def observe(self, loss: float) -> None:
        """Take note of a validation loss (nats per token), and begin to average if it is time."""
        group = self.param_groups[0]
        earlier = group["validation_losses"][: -group["patience"]]
        group["triggered"] |= bool(earlier) and not loss <= min(earlier)
        group["validation_losses"] = [*group["validation_losses"], loss]

    def _share(self):
        group = self.param_groups[0]
        if not group["triggered"]:
            return None
        group["steps"] += 1
        return 1 / group["steps"]


class NonMonotonicTrigger(TrainerCallback):
    """
    Tells `NTASGD` the loss of each evaluation:

        Trainer(..., optimizer_cls_and_kwargs=(NTASGD, {"lr": 30.0}), callbacks=[NonMonotonicTrigger()])

    Raises:
        ValueError: when training begins without evaluations or with another optimiser; at an evaluation without a loss.
    """

    def __init__(self):
        self._training = False

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self._training = True
        if not isinstance(_unwrapped(optimizer), NTASGD):
            raise ValueError(
                f"The optimizer ({type(_unwrapped(optimizer)).__name__}) must be `NTASGD`: pass "
                '`optimizer_cls_and_kwargs=(NTASGD, {"lr": ...})` to Trainer, or leave `NonMonotonicTrigger` out.'
            )
        if args.eval_strategy == "no":
            raise ValueError("`eval_strategy` (no) must be `steps` or `epoch`: NT-ASGD looks at validation losses.")

    def on_evaluate(self, args, state, control, metrics=None, optimizer=None, **kwargs):
        if not self._training:
            return
        if "eval_loss" not in metrics:
            raise ValueError(
                "NT-ASGD needs the `eval_loss` of each evaluation: give one evaluation data set with labels."
            )
        _unwrapped(optimizer).observe(metrics["eval_loss"])

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        _unwrapped(optimizer).eval()  # in float16 a step may have been skipped

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False


def _unwrapped(optimizer):
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
