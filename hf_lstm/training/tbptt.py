"""Truncated backpropagation through time: the state runs on from step to step, the gradient does not.

Williams & Peng 1990, and the training of LSTM language models ever since Mikolov et al. 2010. A `LaneDataset` puts the
consecutive chunks of a lane into consecutive batches; the callback gives each batch the state that the last one left.
"""

import hashlib
import json
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from hf_lstm.data import LaneDataset, StreamingLanes
from hf_lstm.model.cache_lstm import load_state_tensors, state_tensors

from .arguments import check_arguments, check_evaluation_data, check_training_data
from .callbacks import FinishedRunCallback, dataset_of
from .checkpoints import load_carried_state, save_carried_state
from .optimization import ChunkLengthScaling, unwrapped


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
            from does not hold a state that fits; at the first batch of an evaluation, if its lanes do not fit.
    """

    def __init__(self, state_drop_probability: float = 0.0) -> None:
        if not 0 <= state_drop_probability < 1:
            raise ValueError(
                f"`state_drop_probability` ({state_drop_probability}) is a probability: it must be at least 0 and below 1."
            )
        super().__init__()
        self.state_drop_probability = state_drop_probability
        self._scaling = ChunkLengthScaling(1)  # of the learning rate; made anew for each data set
        self._caches: dict[bool, DynamicCache] = {}  # the state, by whether the model is training
        self._hooks: list[RemovableHandle] = []
        self._train_rows = self._eval_rows = 0  # of the batches that get the state
        self._train_lengths: set[int] = set()
        self._metadata: dict[str, Any] = {}  # of the run, for its checkpoints

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, optimizer=None, **kwargs):
        check_arguments(args)
        dataset = dataset_of(train_dataloader)
        check_training_data(dataset, args)
        self._caches = {training: DynamicCache(config=model.config) for training in (True, False)}
        self._train_rows, self._eval_rows = args.per_device_train_batch_size, args.per_device_eval_batch_size
        self._train_lengths = {dataset.bptt_length}
        if isinstance(dataset, LaneDataset):
            self._train_lengths = set(dataset.chunk_lengths.tolist())
        self._scaling = ChunkLengthScaling(dataset.bptt_length)
        self._metadata = {
            "world_size": args.world_size,
            "cell_type": model.config.cell_type,
            **dataset.fingerprint,
            "optimizer": type(unwrapped(optimizer)).__name__,
        }
        if state.global_step > 0:
            tensors = load_carried_state(args, state, self._metadata_of(state), model.device)
            load_state_tensors(self._caches[True], tensors)
        super().on_train_begin(args, state, control, train_dataloader=train_dataloader)
        self._remove_hooks()
        self._hooks = [  # prepended, so that hooks left over from an interrupted `train()` find a state and do nothing
            model.register_forward_pre_hook(self._carry, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._cut, with_kwargs=True),
        ]

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self._scaling.scale(optimizer)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self._scaling.restore(optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        if not all(layer.is_initialized for layer in self._caches[True].layers):
            raise ValueError(
                "No state was carried: the model saw no batch with `position_ids` and `shift_labels` of "
                f"({self._train_rows}, {self._scaling.bptt_length}): use `default_data_collator`, and leave `auto_find_batch_size` off."
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
                "The state is not carried through the lanes of an evaluation outside training: use "
                "`hf_lstm.evaluate_stream(model, stream)`, which scores every token too."
            )
        check_evaluation_data(dataset, args)

    def on_save(self, args, state, control, **kwargs):
        if args.save_only_model or state.is_hyper_param_search:  # neither is ever resumed
            return
        save_carried_state(args, state, state_tensors(self._caches[True]), self._metadata_of(state))

    def on_train_end(self, args, state, control, **kwargs):
        self._remove_hooks()

    def _carry(self, module, args, kwargs):
        """Give a batch of lanes, before its forward, the state that the batch before it left."""
        if self._is_lane_batch(module, args, kwargs):
            cache = self._caches[module.training]
            if module.training:
                self._scaling.add(kwargs["position_ids"].shape[1])
                self._drop_states(cache)
            kwargs = kwargs | {"past_key_values": cache}
        return args, kwargs

    def _drop_states(self, cache):
        """Zero the state of some lanes, in all layers."""
        layers = [layer for layer in cache.layers if layer.is_initialized]
        if self.state_drop_probability == 0 or not layers:
            return
        dropped = torch.rand(self._train_rows, device=layers[0].device) < self.state_drop_probability
        for layer in layers:
            layer.forget(dropped)

    def _cut(self, module, args, kwargs, output):
        """Detach the state after the forward, so that no gradient runs back into this step from the next one."""
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
        """Describe this run as its checkpoints do, by its settings and its history, which tells it from other runs."""
        losses = [
            (entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry
        ]  # alike on all ranks
        history = hashlib.sha256(json.dumps([state.global_step, losses]).encode()).hexdigest()
        return {name: str(value) for name, value in self._metadata.items()} | {"history": history}

    def _remove_hooks(self):
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
