"""Trainer's arguments, with the defaults that lanes need."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class LSTMTrainingArguments(TrainingArguments):
    """`TrainingArguments` for lanes: batches come in order, all are complete, and keep their `shift_labels`; streamed ones
    are read by each process for itself; and the model is saved with its `use_cache` on, which Trainer would turn off for
    good (it is off while training anyway)."""

    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "Order of the training data; lanes need `sequential`."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Whether to drop an incomplete last batch; lanes need `True`."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to drop what `forward` does not name; lanes need `False`."}
    )
    use_cache: bool = field(
        default=True, metadata={"help": "Whether the saved model returns its state; never while it trains."}
    )
    accelerator_config: dict | str | None = field(
        default_factory=lambda: {"dispatch_batches": False},
        metadata={"help": "accelerate's own settings; streamed lanes need `dispatch_batches` to be false."},
    )
