"""What the logs say beside the loss."""

import math

from transformers import TrainerCallback


class MetricsCallback(TrainerCallback):
    """
    Adds to each log what people read: `perplexity` and `bits_per_token` of the training loss and, with `eval_` before
    them, of the evaluation's, and `regularization_loss`, the penalty (nats per token) that the training loss, a plain
    cross-entropy, does not contain: the mean over the steps since the last log, of this process.

    Trainer calls its reporters (TensorBoard, ...) before the callbacks it is given: `trainer.remove_callback(reporter)`
    and `trainer.add_callback(reporter)` let one see these too.
    """

    def __init__(self):
        self._hook = None
        self._penalty, self._steps = 0.0, 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_train_end(args, state, control)
        self._penalty, self._steps = 0.0, 0
        self._processes = args.world_size if args.average_tokens_across_devices else 1
        self._accumulation = args.gradient_accumulation_steps
        self._hook = model.register_forward_hook(self._add, with_kwargs=True)

    def _add(self, module, args, kwargs, output):
        penalty = getattr(output, "regularization_loss", None)
        if penalty is None:
            return
        whole = kwargs.get("num_items_in_batch") is not None  # then it is a share of the step's mean, or else a mean
        scale = self._processes if whole else 1 / self._accumulation
        self._penalty = self._penalty + penalty * scale  # a tensor: nothing is copied to the host before a log

    def on_step_end(self, args, state, control, **kwargs):
        self._steps += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        added = {}
        for prefix in ("", "eval_"):
            if f"{prefix}loss" in logs:
                loss = logs[f"{prefix}loss"]
                added[f"{prefix}perplexity"] = math.exp(loss) if loss < 700 else math.inf  # beyond a float
                added[f"{prefix}bits_per_token"] = loss / math.log(2)
        if "loss" in logs:
            if not isinstance(self._penalty, float) and self._steps:
                added["regularization_loss"] = self._penalty.item() / self._steps
            self._penalty, self._steps = 0.0, 0
        logs |= added
        state.log_history[-1] |= added

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
