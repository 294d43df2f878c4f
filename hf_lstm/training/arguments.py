"""Trainer's arguments, with the defaults that lanes need, and the checks of arguments, model and data against each other."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_lstm.data import LaneDataset, StreamingLanes
from hf_lstm.model.configuration_lstm import LSTMConfig


@dataclass
class LSTMTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with the defaults that lanes need: batches are complete, come in order and keep their
    `shift_labels`; each process reads streamed lanes for itself; and the saved config has `use_cache=True`, which Trainer
    would turn off for good (it is off during training anyway).
    """

    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "Order of the training data; lanes need `sequential`."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Whether to drop an incomplete last batch; lanes need `True`."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to drop columns that `forward` does not name; lanes need `False`."}
    )
    use_cache: bool = field(
        default=True, metadata={"help": "Whether the saved model returns its state; never while it trains."}
    )
    accelerator_config: dict | str | None = field(
        default_factory=lambda: {"dispatch_batches": False},
        metadata={"help": "accelerate's own settings; streamed lanes need `dispatch_batches` to be false."},
    )


def check_arguments(args: TrainingArguments) -> None:
    """Raise `ValueError` for arguments with which the state cannot be carried from batch to batch."""
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
            "`fp16` (True) needs a GPU, since on a CPU Trainer would silently train in float32: use `bf16`."
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


def check_penalties(args: TrainingArguments, config: LSTMConfig) -> None:
    """Raise `ValueError` where Trainer would not use the loss that holds the penalties' gradient."""
    penalties = (config.activation_regularization, config.temporal_activation_regularization)
    if args.label_smoothing_factor > 0 and any(penalties):
        raise ValueError(
            f"`label_smoothing_factor` ({args.label_smoothing_factor}) must be 0 with activation regularization "
            f"{penalties}: Trainer computes the smoothed loss itself, and the penalties would be lost."
        )
    if args.label_smoothing_factor > 0 and config.adversarial_softmax > 0:
        raise ValueError(
            f"`label_smoothing_factor` ({args.label_smoothing_factor}) must be 0 with `adversarial_softmax` "
            f"({config.adversarial_softmax}): Trainer computes the smoothed loss itself, from logits that are not lowered."
        )
    if args.label_smoothing_factor > 0 and config.trains_without_logits:
        raise ValueError(
            f"`label_smoothing_factor` ({args.label_smoothing_factor}) must be 0 with `loss_chunk_size` "
            f"({config.loss_chunk_size}) or `adaptive_softmax_cutoffs` ({config.adaptive_softmax_cutoffs}): Trainer smooths "
            "the loss from all logits, which are not kept."
        )


def check_training_data(dataset: LaneDataset | StreamingLanes, args: TrainingArguments) -> None:
    """Raise `ValueError` for training data that this process cannot read as its own lanes, in order."""
    _check_lanes(dataset, "training", args.per_device_train_batch_size, args.world_size)
    if isinstance(dataset, StreamingLanes):
        if (dataset.process_index, dataset.num_processes) != (args.process_index, args.world_size):
            raise ValueError(
                f"The streaming lanes are those of process {dataset.process_index} of {dataset.num_processes}, and this is "
                f"process {args.process_index} of {args.world_size}: make them with `process_index=args.process_index, "
                "num_processes=args.world_size`."
            )
        if args.world_size > 1 and getattr(args.accelerator_config, "dispatch_batches", None) is not False:
            raise ValueError(
                "`dispatch_batches` (True, or None) in `accelerator_config` must be False, or one process would read for "
                "all: use `LSTMTrainingArguments`."
            )
    elif dataset.changes_with_epoch and args.dataloader_persistent_workers:
        raise ValueError(
            "`dataloader_persistent_workers` (True) must be False where documents are shuffled or lanes rotated, or the workers never "
            "learn of a new epoch."
        )


def check_evaluation_data(dataset: LaneDataset, args: TrainingArguments) -> None:
    """Raise `ValueError` for evaluation lanes that do not fit a batch, or whose chunks Trainer would weigh wrongly."""
    _check_lanes(dataset, "evaluation", args.per_device_eval_batch_size, args.world_size)
    if dataset.length_seed is not None:
        raise ValueError(
            f"The evaluation data has chunks of random lengths (`length_seed` {dataset.length_seed}), which Trainer "
            "would weigh alike: leave `length_seed` out."
        )


def _check_lanes(dataset, use, batch_size, processes):
    if not isinstance(dataset, LaneDataset | StreamingLanes):
        raise ValueError(
            f"The {use} data ({type(dataset).__name__}) must be a `LaneDataset`, since only lanes have a state to carry "
            "from batch to batch: make one, or leave `TruncatedBPTTCallback` out."
        )
    if dataset.lanes != batch_size * processes:
        raise ValueError(
            f"The {use} data has {dataset.lanes} lanes, and a batch has {batch_size} rows on each of {processes} "
            f"processes: `lanes` must be their product, {batch_size * processes}."
        )
