"""Truncated backpropagation through time: the state runs on from step to step, the gradient does not.

Williams & Peng 1990, and the training of LSTM language models ever since Mikolov et al. 2010. A `LaneDataset` puts the
consecutive chunks of a lane into consecutive batches; the callback gives each batch the state that the last one left.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_lstm.data import LaneDataset, StreamingLanes

from .finished import FinishedRunCallback, dataset_of

logger = logging.get_logger(__name__)


class TruncatedBPTTCallback(FinishedRunCallback):
    """
    Carries the state through training on a `LaneDataset`, and through each evaluation on another:

        Trainer(..., args=LSTMTrainingArguments(...), callbacks=[TruncatedBPTTCallback()])

    Only forwards of a whole batch of lanes get the state: those with `position_ids` and `shift_labels` of that shape
    and without `past_key_values`. Where `position_ids` are 0 the model starts from a zero state, so that new epochs
    and documents need no care. Each process writes its state into every checkpoint as
    `lstm_state_rank{r}.safetensors`, after all else: a checkpoint without it is not complete.

    Where the chunks' lengths are drawn (`LaneDataset(length_seed=...)`), each step's learning rate is scaled by the length
    of its chunks over `bptt_length` (Merity et al. 2018, section 5).

    Args:
        state_drop_probability (`float`, defaults to 0.0):
            How often a lane starts a chunk from a zero state while training, so that the model learns to start (Melis et
            al. 2020 use 0.01).

    Raises:
        ValueError: when training begins, if the batches would not run on from step to step or the checkpoint to resume
            from holds no state that fits; at the first batch of an evaluation, if its lanes do not fit.
    """

    def __init__(self, state_drop_probability: float = 0.0):
        if not 0 <= state_drop_probability < 1:
            raise ValueError(
                f"`state_drop_probability` ({state_drop_probability}) is a probability: at least 0 and below 1."
            )
        super().__init__()
        self.state_drop_probability = state_drop_probability
        self._caches = {}  # the state, by whether the model is training
        self._lengths = []  # of the chunks since the last step of the optimizer
        self._learning_rates = []
        self._hooks = []

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, optimizer=None, **kwargs):
        check_arguments(args)
        dataset = dataset_of(train_dataloader)
        _check_lanes(dataset, "training", args.per_device_train_batch_size, args.world_size)
        _check_reading(dataset, args)
        self._caches = {training: DynamicCache(config=model.config) for training in (True, False)}
        self._train_rows, self._bptt_length = args.per_device_train_batch_size, dataset.bptt_length
        self._train_lengths = {dataset.bptt_length}
        if isinstance(dataset, LaneDataset):
            self._train_lengths = set(dataset.chunk_lengths.tolist())
        self._lengths = []
        self._eval_rows = args.per_device_eval_batch_size
        self._metadata = {
            "world_size": args.world_size,
            **dataset.description,
            "optimizer": type(getattr(optimizer, "optimizer", optimizer)).__name__,  # accelerate wraps it
        }
        if state.global_step > 0:
            self._load(args, state, model)
        super().on_train_begin(args, state, control, train_dataloader=train_dataloader)
        self._remove_hooks()
        self._hooks = [  # before those that an interrupted run may have left: the first one to give a state wins
            model.register_forward_pre_hook(self._carry, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._cut, with_kwargs=True),
        ]

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        scale = sum(self._lengths) / len(self._lengths) / self._bptt_length if self._lengths else 1
        self._learning_rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * scale
        self._lengths = []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for group, learning_rate in zip(optimizer.param_groups, self._learning_rates, strict=True):
            group["lr"] = learning_rate  # the scheduler's

    def on_step_end(self, args, state, control, **kwargs):
        if not all(layer.is_initialized for layer in self._caches[True].layers):
            raise ValueError(
                "No state was carried: the model saw no batch with `position_ids` and `shift_labels` of "
                f"({self._train_rows}, {self._bptt_length}). Use `default_data_collator`, and leave `auto_find_batch_size` off."
            )

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        dataset = dataset_of(eval_dataloader)
        if isinstance(dataset, StreamingLanes):
            raise ValueError(
                "The evaluation data (StreamingLanes) never ends: make a `LaneDataset` of a corpus that does."
            )
        if not isinstance(dataset, LaneDataset):
            return
        if not self._hooks:
            raise ValueError(
                "Nothing carries the state through the lanes of an evaluation outside training: use "
                "`hf_lstm.evaluate_stream(model, stream)`, which scores every token too."
            )
        _check_lanes(dataset, "evaluation", args.per_device_eval_batch_size, args.world_size)
        if dataset.length_seed is not None:
            raise ValueError(
                f"The evaluation data has chunks of random lengths (`length_seed` {dataset.length_seed}), which Trainer "
                "would weigh alike: leave `length_seed` out."
            )

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self._caches[False] = DynamicCache(config=model.config)

    def on_save(self, args, state, control, **kwargs):
        if args.save_only_model or state.is_hyper_param_search:  # neither is ever resumed
            return
        path = _checkpoint(args, state) / state_file(args.process_index)
        tensors = {
            f"layers.{index}.{name}": tensor.contiguous()
            for index, layer in enumerate(self._caches[True].layers)
            for name, tensor in zip("hc", layer.get_state(), strict=True)
        }
        unfinished = path.with_name(f"{path.name}.{uuid4().hex}.unfinished")  # no other run's, if there is one
        files = sorted(file.name for file in path.parent.iterdir() if not file.name.startswith("lstm_state_rank"))
        try:
            save_file(tensors, unfinished, metadata=self._metadata_of(state) | {"files": json.dumps(files)})
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def on_train_end(self, args, state, control, **kwargs):
        self._remove_hooks()

    def _carry(self, module, args, kwargs):
        """Before a forward: give a batch of lanes the state that the batch before it left."""
        if self._is_lane_batch(module, args, kwargs):
            cache = self._caches[module.training]
            if module.training:
                self._lengths.append(kwargs["position_ids"].shape[1])
                self._drop_states(cache)
            kwargs = kwargs | {"past_key_values": cache}
        return args, kwargs

    def _drop_states(self, cache):
        """Zero the state of some lanes, in all layers."""
        layers = [layer for layer in cache.layers if layer.is_initialized]
        if self.state_drop_probability == 0 or not layers:
            return
        kept = torch.rand(self._train_rows, 1, device=layers[0].device) >= self.state_drop_probability
        for layer in layers:
            layer.update(*(state * kept.to(state.device) for state in layer.get_state()), num_tokens=0)

    def _cut(self, module, args, kwargs, output):
        """After it: no gradient runs back into this step from the next one."""
        if kwargs.get("past_key_values") is self._caches[module.training]:
            for layer in self._caches[module.training].layers:
                layer.detach_()

    def _is_lane_batch(self, module, args, kwargs):
        positions, targets = kwargs.get("position_ids"), kwargs.get("shift_labels")
        if args or positions is None or targets is None or kwargs.get("past_key_values") is not None:
            return False
        if module.training:
            rows, length = positions.shape
            return positions.shape == targets.shape and rows == self._train_rows and length in self._train_lengths
        return positions.shape == targets.shape and len(positions) == self._eval_rows

    def _metadata_of(self, state):
        """What tells whether a state fits this run; the history tells one run from another."""
        losses = [
            (entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry
        ]  # alike on all ranks
        history = hashlib.sha256(json.dumps([state.global_step, losses]).encode()).hexdigest()
        return {name: str(value) for name, value in self._metadata.items()} | {"history": history}

    def _load(self, args, state, model):
        # Trainer does not tell its callbacks where it resumes from, unless the argument of that name does.
        named = args.resume_from_checkpoint
        is_named = isinstance(named, str | os.PathLike) and Path(named).is_dir()
        path = (Path(named) if is_named else _checkpoint(args, state)) / state_file(args.process_index)
        if not is_named and not path.parent.is_dir():
            raise ValueError(
                f"The checkpoint of step {state.global_step} to resume from is not in `output_dir` ({args.output_dir}), and "
                "Trainer does not tell its callbacks where it is: name it in the argument `resume_from_checkpoint` of "
                "`LSTMTrainingArguments` too."
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
        except (FileNotFoundError, SafetensorError) as error:
            raise ValueError(
                f"{path.parent} cannot be resumed, since it holds no carried state ({path.name}: {error}): resume from "
                "`hf_lstm.training.last_complete_checkpoint(output_dir)`, and name a checkpoint elsewhere in the argument "
                "`resume_from_checkpoint` of `LSTMTrainingArguments` too."
            ) from error
        expected = self._metadata_of(state)
        if metadata.get("history") != expected["history"]:
            raise ValueError(
                f"{path} belongs to another run than the weights do: name the checkpoint to resume from in the argument "
                "`resume_from_checkpoint` of `LSTMTrainingArguments` too."
            )
        for name in self._metadata:
            if metadata.get(name) != expected[name]:
                raise ValueError(
                    f"`{name}` was {metadata.get(name)} in {path.parent} and is {expected[name]} now: resume with the same "
                    "text, optimizer, processes, batch size and `bptt_length`, since a lane's state belongs to its place."
                )
        tensors = load_file(path, device=str(model.device))
        for index, layer in enumerate(self._caches[True].layers):
            layer.update(tensors[f"layers.{index}.h"], tensors[f"layers.{index}.c"])

    def _remove_hooks(self):
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def state_file(process_index: int) -> str:
    """The name of the file in a checkpoint that holds the carried state of one process."""
    return f"lstm_state_rank{process_index}.safetensors"


def last_complete_checkpoint(output_dir: str | Path, carried: bool = True) -> Path | None:
    """
    The checkpoint of the most steps in `output_dir` that holds everything, and, where a state is `carried`, that of every
    process; `None` if there is none. Later ones that a killed run left incomplete are named in a warning.
    """
    steps = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name):
            steps[int(match[1])] = path
    for step in sorted(steps, reverse=True):
        if is_complete(steps[step], carried):
            return steps[step]
        logger.warning(f"{steps[step]} is not complete and is skipped: the run was stopped while it was written.")
    return None


def is_complete(checkpoint: Path, carried: bool = True) -> bool:
    """
    Whether a checkpoint holds the carried state of every process and all that lay there when it was written; without a
    carried state, whether Trainer came to the end of it, and no state was carried.
    """
    if not carried:
        return (checkpoint / TRAINER_STATE_NAME).is_file() and not (checkpoint / state_file(0)).exists()
    try:
        with safe_open(checkpoint / state_file(0), framework="pt") as file:
            metadata = file.metadata()
    except (FileNotFoundError, SafetensorError):
        return False
    processes, files = int(metadata["world_size"]), json.loads(metadata.get("files", "[]"))
    if not all((checkpoint / name).exists() for name in [TRAINER_STATE_NAME, *files]):
        return False
    return all((checkpoint / state_file(rank)).is_file() for rank in range(processes))


def _checkpoint(args, state):
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def check_arguments(args) -> None:
    """Raise `ValueError` for `TrainingArguments` with which no state can be carried from batch to batch."""
    if args.train_sampling_strategy != "sequential":
        raise ValueError(
            f"`train_sampling_strategy` ({args.train_sampling_strategy}) must be `sequential`, or a lane's chunks come "
            "out of order: use `LSTMTrainingArguments`."
        )
    if not args.dataloader_drop_last:
        raise ValueError(
            "`dataloader_drop_last` (False) must be True, or a last batch lacks lanes: use `LSTMTrainingArguments`."
        )
    if args.remove_unused_columns:
        raise ValueError(
            "`remove_unused_columns` (True) must be False, or batches lose their `shift_labels`: use "
            "`LSTMTrainingArguments`."
        )
    if args.fp16 and args.device.type == "cpu":
        raise ValueError(
            "`fp16` (True) needs a GPU: on a CPU, Trainer would train in float32 without a word. Use `bf16`."
        )
    if args.label_smoothing_factor > 0:
        raise ValueError(
            f"`label_smoothing_factor` ({args.label_smoothing_factor}) must be 0 with lanes: Trainer's smoother would leave "
            "out the last target of each chunk, and divide by the number of all."
        )
    if args.auto_find_batch_size:
        raise ValueError("`auto_find_batch_size` (True) must be False: lanes are laid out for one batch size.")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would split the lanes but not their state: start one process for each "
            "with `accelerate launch`."
        )
    if args.save_total_limit == 1 and args.save_strategy != "no" and not args.save_only_model:
        raise ValueError(
            "`save_total_limit` (1) must be at least 2: the last complete checkpoint is deleted before the next one "
            "is, and a run killed between the two could not be resumed."
        )


def check_penalties(args, config) -> None:
    """Raise `ValueError` where Trainer would not use the loss that holds the penalties' gradient."""
    penalties = (config.activation_regularization, config.temporal_activation_regularization)
    if args.label_smoothing_factor > 0 and any(penalties):
        raise ValueError(
            f"`label_smoothing_factor` ({args.label_smoothing_factor}) must be 0 with activation regularization "
            f"{penalties}: Trainer computes the smoothed loss itself, and the penalties would be lost."
        )
    if args.label_smoothing_factor > 0 and config.trains_without_logits:
        raise ValueError(
            f"`label_smoothing_factor` ({args.label_smoothing_factor}) must be 0 with `loss_chunk_size` "
            f"({config.loss_chunk_size}) or `adaptive_softmax_cutoffs` ({config.adaptive_softmax_cutoffs}): Trainer smooths "
            "the loss from all logits, which are not kept."
        )


def _check_reading(dataset, args):
    """Raise `ValueError` where another process or worker than the lanes were made for would read them."""
    if isinstance(dataset, StreamingLanes):
        if (dataset.process_index, dataset.num_processes) != (args.process_index, args.world_size):
            raise ValueError(
                f"The streaming lanes are those of process {dataset.process_index} of {dataset.num_processes}, and this is "
                f"process {args.process_index} of {args.world_size}: make them with `process_index=args.process_index, "
                "num_processes=args.world_size`."
            )
        if args.world_size > 1 and args.accelerator_config.dispatch_batches is not False:
            raise ValueError(
                "`dispatch_batches` (True, or None) in `accelerator_config` must be False, or one process would read for "
                "all: use `LSTMTrainingArguments`."
            )
    elif dataset.shuffle_seed is not None and args.dataloader_persistent_workers:
        raise ValueError(
            "`dataloader_persistent_workers` (True) must be False where documents are shuffled, or the workers never "
            "learn of a new epoch."
        )


def _check_lanes(dataset, use, batch_size, processes):
    if not isinstance(dataset, LaneDataset | StreamingLanes):
        raise ValueError(
            f"The {use} data ({type(dataset).__name__}) must be a `LaneDataset`, or there is no state to carry from "
            "batch to batch: make one, or leave `TruncatedBPTTCallback` out."
        )
    if dataset.lanes != batch_size * processes:
        raise ValueError(
            f"The {use} data has {dataset.lanes} lanes, and a batch has {batch_size} rows on each of {processes} "
            f"processes: `lanes` must be their product, {batch_size * processes}."
        )
