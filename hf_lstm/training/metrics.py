"""What the logs say beside the loss."""

import math

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
