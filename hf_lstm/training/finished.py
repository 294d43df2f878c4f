"""A run that had come to its end, and is resumed."""

from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import BatchSampler, IterableDataset
from transformers import TrainerCallback

from hf_lstm.data import StreamingLanes


class FinishedRunCallback(TrainerCallback):
    """
    Lets a resumed run that has had all its steps end at once: nothing is trained or saved, and the best model is loaded
    as ever. Trainer asks only after a step whether it was the last, and so would train one more each time, and delete a
    checkpoint for it. `TruncatedBPTTCallback` does the same.

    Of streamed lanes Trainer then warns that there was no sample.

    Raises:
        ValueError: for a stream of another kind, which nobody can tell that it has ended.
    """

    def __init__(self):
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
                    f"The run has had its {state.max_steps} steps, and Trainer would take more of {type(dataset).__name__}: "
                    "load the model from its last checkpoint, or raise `max_steps`."
                )
            batches.sampler = ()  # of this `train()` alone, which made the data loader
        if self._finished:
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._finished:  # or a strategy of epochs would evaluate and save once more
            control.should_log = control.should_evaluate = control.should_save = False


def dataset_of(dataloader):
    """The data set behind a data loader; accelerate puts one of its own before those that are read in order."""
    dataset = getattr(dataloader, "dataset", None)
    return dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset
