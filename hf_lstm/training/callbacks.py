"""Callbacks for the stock Trainer: extra metrics, divergence, finished runs, NT-ASGD and the Hub."""

import math

import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset
from transformers import TrainerCallback
from transformers.dynamic_module_utils import custom_object_save

from hf_lstm.data import StreamingLanes
from hf_lstm.model.modeling_lstm import LSTMPreTrainedModel

from .optimization import NTASGD, unwrapped

ADDED = ("eval_perplexity", "eval_bits_per_token")  # at evaluations


class MetricsCallback(TrainerCallback):
    """
    Adds to each log what people read: `perplexity` and `bits_per_token` of the training loss and, with `eval_` before
    them, of the evaluation's, and `regularization_loss`, the penalty (nats per token) that the training loss, a plain
    cross-entropy, does not contain: the mean over the steps since the last log, of this process.

    Only the logs change: the metrics that `evaluate()` returns stay as they are, since `hyperparameter_search` would add
    up all of them. The one that `metric_for_best_model` names is left among them.

    Trainer calls its reporters (TensorBoard, ...) before the callbacks it is given: `trainer.remove_callback(reporter)`
    and `trainer.add_callback(reporter)` let a reporter see these metrics too.

    Raises:
        ValueError: when training begins, if the best model would be that of the highest perplexity.
    """

    def __init__(self) -> None:
        self._hook = None
        self._of_step = _StepMean("regularization_loss")
        self._penalty: float | torch.Tensor = 0.0
        self._steps = 0
        self._added: dict[str, float] = {}  # to the metrics of the evaluation that is being logged

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.greater_is_better and _best_metric(args) in ADDED:
            raise ValueError(
                f"`greater_is_better` (True) must be False with `metric_for_best_model` ({args.metric_for_best_model}), or "
                "the worst model would be kept."
            )
        self.on_train_end(args, state, control)
        self._penalty, self._steps = 0.0, 0
        self._hook = self._of_step.watch(model, args)

    def on_step_end(self, args, state, control, **kwargs):
        penalty = self._of_step.take()
        if penalty is not None:
            self._penalty = self._penalty + penalty
        self._steps += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        added = {}
        for prefix in ("", "eval_"):
            if f"{prefix}loss" in logs:
                loss = logs[f"{prefix}loss"]
                added[f"{prefix}perplexity"] = math.inf if loss >= 700 else math.exp(loss)  # beyond a float
                added[f"{prefix}bits_per_token"] = loss / math.log(2)
        if "loss" in logs:
            if isinstance(self._penalty, torch.Tensor) and self._steps:
                added["regularization_loss"] = self._penalty.item() / self._steps
            self._penalty, self._steps = 0.0, 0
        self._added = {name: value for name, value in added.items() if name not in logs}
        logs |= self._added
        state.log_history[-1] |= self._added

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        for name in self._added:
            if name != _best_metric(args):
                metrics.pop(name, None)  # Trainer's own dictionary, which it has logged and returns
        self._added = {}

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()
        self._hook = None


class DivergenceCallback(TrainerCallback):
    """
    Ends a run that has diverged before it is saved or writes a sample, so that the last good checkpoint stays. Trainer's
    logs do not show it: `logging_nan_inf_filter` leaves out losses that are NaN or infinite.

    The weights are checked in the steps in which Trainer logs, evaluates, saves or ends; all others cost nothing.

    Raises:
        ValueError: in all processes alike, with the step and its loss (nats per token), if a weight or the loss of an
            evaluation is NaN or infinite.
    """

    def __init__(self) -> None:
        self._hook = None
        self._of_step = _StepMean("loss")
        self._losses: list[float | torch.Tensor] = []  # of the steps since the weights were last checked

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_train_end(args, state, control)
        self._losses = []
        self._hook = self._of_step.watch(model, args)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        loss = self._of_step.take()
        self._losses.append(math.nan if loss is None else loss)
        self._check_weights(args, state, control, model)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self._check_weights(args, state, control, model)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        loss = metrics.get("eval_loss", 0.0)
        if self._hook is not None and not math.isfinite(loss):
            raise ValueError(_diverged(args, f"the evaluation at step {state.global_step} gives a loss of {loss:g}"))

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    @torch.no_grad()
    def _check_weights(self, args, state, control, model):
        if not (control.should_log or control.should_evaluate or control.should_save or control.should_training_stop):
            return
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            losses = dict(enumerate(map(float, self._losses), state.global_step - len(self._losses) + 1))
            step = next((step for step, loss in losses.items() if not math.isfinite(loss)), state.global_step)
            loss = losses.get(step, math.nan)
            how = f"the loss of step {step} is {loss:g}, and the weights after it are not finite"
            raise ValueError(_diverged(args, how))
        self._losses = []


class FinishedRunCallback(TrainerCallback):
    """
    Ends a resumed run at once if it has already taken all its steps: nothing is trained or saved, and the best model is
    loaded as usual. Trainer checks only after a step whether it was the last, and so would train one more each time, and
    delete a checkpoint for it. `TruncatedBPTTCallback` does the same.

    For streamed lanes Trainer then warns that there was not a single sample.

    Raises:
        ValueError: for an iterable data set other than `StreamingLanes`, which cannot be told to end.
    """

    def __init__(self) -> None:
        self._finished = False

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self._finished = state.global_step >= state.max_steps
        dataset = dataset_of(train_dataloader)
        if isinstance(dataset, StreamingLanes):
            dataset.ended = self._finished
        elif self._finished:
            batches = train_dataloader.batch_sampler
            while hasattr(batches, "batch_sampler"):  # accelerate gives each process its share of another's batches
                batches = batches.batch_sampler
            if isinstance(dataset, IterableDataset) or not isinstance(batches, BatchSampler):
                raise ValueError(
                    f"The run has taken its {state.max_steps} steps, and Trainer would read more of "
                    f"{type(dataset).__name__}: load the model from its last checkpoint, or raise `max_steps`."
                )
            batches.sampler = ()  # of this `train()` alone, which made the data loader
        if self._finished:
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._finished:  # or a strategy of epochs would evaluate and save once more
            control.should_log = control.should_evaluate = control.should_save = False


class NonMonotonicTrigger(TrainerCallback):
    """
    Tells `NTASGD` the loss of each evaluation:

        Trainer(..., optimizer_cls_and_kwargs=(NTASGD, {"lr": 30.0}), callbacks=[NonMonotonicTrigger()])

    Raises:
        ValueError: when training begins without evaluations or with another optimiser; at an evaluation without a loss.
    """

    def __init__(self) -> None:
        self._training = False

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self._training = True
        if not isinstance(unwrapped(optimizer), NTASGD):
            raise ValueError(
                f"The optimizer ({type(unwrapped(optimizer)).__name__}) must be `NTASGD`: pass "
                '`optimizer_cls_and_kwargs=(NTASGD, {"lr": ...})` to Trainer, or leave `NonMonotonicTrigger` out.'
            )
        if args.eval_strategy == "no":
            raise ValueError("`eval_strategy` (no) must be `steps` or `epoch`: NT-ASGD reads validation losses.")

    def on_evaluate(self, args, state, control, metrics=None, optimizer=None, **kwargs):
        if not self._training:
            return
        if "eval_loss" not in metrics:
            raise ValueError(
                "NT-ASGD needs the `eval_loss` of each evaluation: give one evaluation data set with labels."
            )
        unwrapped(optimizer).observe(metrics["eval_loss"])

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        unwrapped(optimizer).eval()  # in float16 a step may have been skipped

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False


class HubCallback(TrainerCallback):
    """
    Puts the model's code beside its config before each push. In the middle of training Trainer uploads a config that
    names this code, and not the code; such a model could not be loaded without hf_lstm.
    """

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero and isinstance(model, LSTMPreTrainedModel):
            custom_object_save(model, args.output_dir)  # and the modules that it and its config import


def dataset_of(dataloader: DataLoader | None) -> Dataset | None:
    """Return the data set behind a data loader; accelerate wraps those that are read in order in one of its own."""
    dataset = getattr(dataloader, "dataset", None)
    return dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset


def _diverged(args, how):
    return (
        f"The run has diverged: {how}; start it anew with a lower `learning_rate` ({args.learning_rate:g}) or another "
        f"`max_grad_norm` ({args.max_grad_norm:g}): no checkpoint was written since."
    )


def _best_metric(args):
    """Return the metric that chooses the best model, under the name by which Trainer looks it up."""
    return args.metric_for_best_model and "eval_" + args.metric_for_best_model.removeprefix("eval_")


class _StepMean:
    """
    The mean over a step, of all processes, of one loss of the outputs: the sum of those that the model divided by the tokens
    of the whole step, else the mean over the forwards, of batches or of the documents of private training.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.total: torch.Tensor | None = None
        self.forwards, self.of_sum = 0, 1

    def watch(self, model, args):
        """Begin a step and register the hook, which is returned."""
        self.of_sum = args.world_size if args.average_tokens_across_devices else 1
        self.take()
        return model.register_forward_hook(self._add, with_kwargs=True)

    def _add(self, module, inputs, kwargs, output):
        value = getattr(output, self.name, None)
        if not module.training or value is None:
            return
        is_part = kwargs.get("num_items_in_batch") is not None
        value = value.detach() * (
            self.of_sum if is_part else 1
        )  # a tensor: nothing is copied to the host before a log
        self.total = value if self.total is None else self.total + value
        self.forwards += not is_part

    def take(self) -> torch.Tensor | None:
        """Return the mean of the step, `()`, and begin another; `None` without forwards."""
        total, forwards = self.total, self.forwards
        self.total, self.forwards = None, 0
        return None if total is None else total / max(1, forwards)
