"""What the logs say beside the loss, and the end of a run whose loss is no number."""

import math

import torch
from transformers import TrainerCallback

ADDED = ("eval_perplexity", "eval_bits_per_token")  # at evaluations


class MetricsCallback(TrainerCallback):
    """
    Adds to each log what people read: `perplexity` and `bits_per_token` of the training loss and, with `eval_` before
    them, of the evaluation's, and `regularization_loss`, the penalty (nats per token) that the training loss, a plain
    cross-entropy, does not contain: the mean over the steps since the last log, of this process.

    Logs alone: the metrics that `evaluate()` returns stay as they are, since `hyperparameter_search` would add up all it
    finds there. The one that `metric_for_best_model` names is left among them.

    Trainer calls its reporters (TensorBoard, ...) before the callbacks it is given: `trainer.remove_callback(reporter)`
    and `trainer.add_callback(reporter)` let one see these too.

    Raises:
        ValueError: when training begins, if the best model would be that of the highest perplexity.
    """

    def __init__(self):
        self._hook = None
        self._penalty, self._steps = 0.0, 0
        self._added = {}  # to the metrics of the evaluation that is being logged

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.greater_is_better and _named(args) in ADDED:
            raise ValueError(
                f"`greater_is_better` (True) must be False with `metric_for_best_model` ({args.metric_for_best_model}), or "
                "the worst model would be kept."
            )
        self.on_train_end(args, state, control)
        self._penalty, self._steps = 0.0, 0
        self._hook = _watch(model, args, self._add)

    def _add(self, output, share):
        penalty = getattr(output, "regularization_loss", None)
        if penalty is not None:
            self._penalty = self._penalty + penalty * share  # a tensor: nothing is copied to the host before a log

    def on_step_end(self, args, state, control, **kwargs):
        self._steps += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        added = {}
        for prefix in ("", "eval_"):
            if f"{prefix}loss" in logs:
                loss = logs[f"{prefix}loss"]
                added[f"{prefix}perplexity"] = math.inf if loss >= 700 else math.exp(loss)  # beyond a float
                added[f"{prefix}bits_per_token"] = loss / math.log(2)
        if "loss" in logs:
            if not isinstance(self._penalty, float) and self._steps:
                added["regularization_loss"] = self._penalty.item() / self._steps
            self._penalty, self._steps = 0.0, 0
        self._added = {name: value for name, value in added.items() if name not in logs}
        logs |= self._added
        state.log_history[-1] |= self._added

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        for name in self._added:
            if name != _named(args):
                metrics.pop(name, None)  # Trainer's own dictionary, which it has logged and returns
        self._added = {}

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()
        self._hook = None


class DivergenceCallback(TrainerCallback):
    """
    Ends a run that has diverged before it is saved or writes a sample, so that the last good checkpoint stays. Trainer's
    logs do not tell: `logging_nan_inf_filter` leaves losses out that are no numbers.

    The weights are looked at in the steps in which Trainer logs, evaluates, saves or ends; all others cost nothing.

    Raises:
        ValueError: in all processes alike, with the step and its loss (nats per token), if a weight or the loss of an
            evaluation is NaN or infinite.
    """

    def __init__(self):
        self._hook = None
        self._loss, self._losses = None, []  # of this step, and of those since the weights were last looked at

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_train_end(args, state, control)
        self._loss, self._losses = None, []
        self._hook = _watch(model, args, self._add)

    def _add(self, output, share):
        loss = getattr(output, "loss", None)
        if loss is not None:
            loss = loss.detach() * share  # a tensor, which is not copied to the host either
            self._loss = loss if self._loss is None else self._loss + loss

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._losses.append(math.nan if self._loss is None else self._loss)
        self._loss = None
        self._look(args, state, control, model)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self._look(args, state, control, model)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        loss = metrics.get("eval_loss", 0.0)
        if self._hook is not None and not math.isfinite(loss):
            raise ValueError(_diverged(args, f"the evaluation at step {state.global_step} gives a loss of {loss:g}"))

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    @torch.no_grad()
    def _look(self, args, state, control, model):
        if not (control.should_log or control.should_evaluate or control.should_save or control.should_training_stop):
            return
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            losses = dict(enumerate(map(float, self._losses), state.global_step - len(self._losses) + 1))
            step = next((step for step, loss in losses.items() if not math.isfinite(loss)), state.global_step)
            loss = losses.get(step, math.nan)
            how = f"the loss of step {step} is {loss:g}, and the weights after it are not finite"
            raise ValueError(_diverged(args, how))
        self._losses = []


def _diverged(args, how):
    return (
        f"The run has diverged: {how}; start it anew with a lower `learning_rate` ({args.learning_rate:g}) or another "
        f"`max_grad_norm` ({args.max_grad_norm:g}): no checkpoint was written since."
    )


def _named(args):
    """The metric that says which model is the best, as Trainer looks it up."""
    return args.metric_for_best_model and "eval_" + args.metric_for_best_model.removeprefix("eval_")


def _watch(model, args, add):
    """
    Let `add` see each output of a model that is training, and by what its loss is multiplied to be its share of the mean
    of a step, over all processes.
    """
    of_mean = 1 / args.gradient_accumulation_steps
    of_sum = args.world_size if args.average_tokens_across_devices else 1

    def hook(module, inputs, kwargs, output):
        if module.training:
            add(output, of_mean if kwargs.get("num_items_in_batch") is None else of_sum)

    return model.register_forward_hook(hook, with_kwargs=True)
