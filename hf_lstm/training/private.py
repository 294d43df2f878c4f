"""
Training with differential privacy: DP-SGD (Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar & Zhang 2016).

In each step every document takes part with probability q (Poisson sampling), its gradient g_d is clipped to the norm C,
and noise hides each of them:

    g = (Σ_d g_d min(1, C / |g_d|) + σ C z) / (q D)        z ~ N(0, 1), D documents

One document is one example: its loss is the mean over its own tokens, read from a zero state, and q D, the expected
number of documents, divides the sum. Whatever is computed from the gradients afterwards (AdamW, averages of the weights)
is protected as they are. What reads the validation text (the choice of the best checkpoint, NT-ASGD's trigger) is not.

The gradient of each document is a backward pass of its own, through the same kernels as any other, so that dropout of
every kind is drawn for each document, and no part of the model needs to know. The accountant is Opacus' (extra `privacy`).
"""

import functools
import hashlib
import math
import secrets
import warnings
from contextlib import contextmanager
from typing import Any, cast

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_lstm.data import DocumentDataset, LaneDataset, StreamingLanes
from hf_lstm.data.lanes import check_at_least_one

from .callbacks import NonMonotonicTrigger
from .tbptt import TruncatedBPTTCallback

logger = logging.get_logger(__name__)

LEDGER = "hf_lstm_privacy"  # in the `stateful_callbacks` of trainer_state.json
DRAW, NOISE = 0, 1  # the two streams of random numbers


class PrivateTrainer(Trainer):
    """
    Trainer that trains with differential privacy. A document is a row of `train_dataset`, with `input_ids` and `labels`:

        PrivateTrainer(
            model=model,
            args=TrainingArguments("runs/private", max_grad_norm=0.0, per_device_train_batch_size=64, max_steps=1000),
            train_dataset=DocumentDataset(stream, max_length=128, truncate=True),
            epsilon=8.0,
            delta=1e-5,
        )

    `per_device_train_batch_size` is the expected number of documents in a step, q D; a step may have more, fewer or none.
    The noise σ is the least with which all steps together spend at most `epsilon`. Each log says the `epsilon` spent so
    far. Checkpoints hold the accountant's history and the seed of the noise, and a resumed run goes on to the same bits.
    Whoever has the seed can subtract the noise: share the model, not its checkpoints. The training loss and the norms of
    gradients in the logs are computed without noise, and are not protected either.

    Args:
        epsilon (`float`): ε that the whole run may spend; `math.inf` clips and adds no noise.
        delta (`float`): δ: less than one divided by the number of documents.
        clip (`float`, defaults to 1.0): C, the largest norm of a document's gradient.
        noise_seed (`int`, *optional*):
            Seed of the noise and of the documents drawn, for tests; by default a secret from the operating system.
        args, kwargs: Those of `Trainer`.

    Raises:
        ValueError: if opacus is not installed, for numbers outside their ranges, for arguments and data with which a step
            would not be one of independent documents, and, when training begins, for a checkpoint of a run with other
            noise, another share of documents, or other documents.
    """

    def __init__(
        self,
        *args: Any,
        epsilon: float,
        delta: float,
        clip: float = 1.0,
        noise_seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss of a document is its own mean
        _check_numbers(epsilon, delta, clip)
        _check_arguments(self.args)
        _check_data(self)
        self.documents = cast(Any, self.train_dataset)  # checked to have a length
        documents, expected = len(self.documents), self.args.train_batch_size
        if expected > documents:
            raise ValueError(
                f"`per_device_train_batch_size` ({expected}) must be at most the number of documents, {documents}: a step "
                "draws that many of them on average."
            )
        if delta > 1 / documents:
            logger.warning(
                f"`delta` ({delta:g}) is more than one divided by the {documents:,} documents: with it a model that gives "
                "away whole documents could count as private, so choose less."
            )
        self.delta, self.clip, self.sample_rate = delta, clip, expected / documents
        steps = self.args.max_steps
        if steps <= 0:
            steps = math.ceil(self.args.num_train_epochs * math.ceil(documents / expected))
        if steps < 1:
            raise ValueError(
                f"`max_steps` ({self.args.max_steps}) and `num_train_epochs` ({self.args.num_train_epochs}) make no step: the noise "
                "depends on their number, so set one of them above 0."
            )
        self.noise_multiplier = _noise_multiplier(epsilon, delta, self.sample_rate, steps)
        self.accountant = _new_accountant()
        self.noise_seed = secrets.randbits(63) if noise_seed is None else noise_seed
        self.add_callback(_Ledger(self))

    @property
    def epsilon(self) -> float:
        """ε that the steps so far have spent, at `delta`."""
        if self.noise_multiplier == 0:
            return math.inf if self.accountant.history else 0.0
        with _loose_bounds():
            return float(self.accountant.get_epsilon(self.delta))

    def describe(self) -> dict[str, float | int | bool | None]:
        """
        Return the guarantee of the run so far, for its card: `epsilon` (`None` if infinite), `delta`, `clip`,
        `noise_multiplier`, `documents`, `batch_size`, and whether the validation text chose the best checkpoint
        (`chosen`) or the beginning of averaging (`triggered`).
        """
        return {
            "epsilon": None if math.isinf(self.epsilon) else self.epsilon,
            "delta": self.delta,
            "clip": self.clip,
            "noise_multiplier": self.noise_multiplier,
            "documents": len(self.documents),
            "batch_size": self.args.train_batch_size,
            "chosen": self.args.load_best_model_at_end,
            "triggered": any(isinstance(one, NonMonotonicTrigger) for one in self.callback_handler.callbacks),
        }

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the `epsilon` spent to the logs of training."""
        if "loss" in logs and self.noise_multiplier > 0:
            logs["epsilon"] = self.epsilon
        super().log(logs, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Return the documents of each step of an epoch, D / (q D) steps."""
        batches = _PoissonBatches(self)
        workers = self.args.dataloader_num_workers
        return self.accelerator.prepare(DataLoader(batches, collate_fn=_only, num_workers=workers))

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Write the private gradient of a batch of documents into the parameters; return their mean loss, `()`, in nats."""
        model.train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        total = [torch.zeros_like(parameter) for parameter in parameters]
        loss = torch.zeros((), device=self.args.device)
        lengths = inputs["lengths"]
        ids, labels = (inputs[name].to(self.args.device).split(lengths) for name in ("input_ids", "labels"))
        for document, targets in zip(ids, labels, strict=True):
            with self.compute_loss_context_manager():
                value = model(input_ids=document[None], labels=targets[None], use_cache=False).loss
            gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
            scale = self.clip / torch.nn.utils.get_total_norm(gradients).clamp(min=self.clip)
            for part, gradient in zip(total, gradients, strict=True):
                part.add_(gradient * scale)
            loss += value.detach()
        self._write_gradients(parameters, total)
        self.accountant.step(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate)
        return loss / max(1, len(lengths))

    def _write_gradients(self, parameters, total) -> None:
        """Add the noise of this step to the sum of the clipped gradients, and divide by the expected number of documents."""
        generator = torch.Generator(self.args.device)
        generator.manual_seed(int(_random(self.noise_seed, NOISE, self.state.global_step).integers(2**63)))
        for parameter, part in zip(parameters, total, strict=True):
            noise = torch.randn(part.shape, generator=generator, device=part.device, dtype=part.dtype)
            noisy = part.add_(noise, alpha=self.noise_multiplier * self.clip)
            parameter.grad = noisy / self.args.train_batch_size


class _PoissonBatches(Dataset):
    """
    The steps of an epoch: item i holds the documents drawn for it, a function of the seed, the epoch and i alone, so that a
    resumed run draws the same.
    """

    def __init__(self, trainer: PrivateTrainer):
        self.trainer, self.epoch = trainer, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.trainer.documents) / self.trainer.args.train_batch_size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `input_ids` and `labels` of all documents, one after the other, `(tokens,)`, and their `lengths`."""
        documents, step = self.trainer.documents, self.epoch * len(self) + index
        chances = _random(self.trainer.noise_seed, DRAW, step).random(len(documents))
        rows = [documents[number] for number in numpy.flatnonzero(chances < self.trainer.sample_rate).tolist()]
        rows = [row for row in rows if any(label != -100 for label in row["labels"][1:])]  # the others have no loss
        flat = {
            name: torch.tensor([token for row in rows for token in row[name]], dtype=torch.long)
            for name in ("input_ids", "labels")
        }
        return flat | {"lengths": [len(row["input_ids"]) for row in rows]}


class _Ledger(TrainerCallback):
    """Keeps the accountant's history, the seed and a digest of the documents in the state that Trainer saves."""

    def __init__(self, trainer: PrivateTrainer):
        self.trainer, self.digest = trainer, ""

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, kept = self.trainer, (state.stateful_callbacks or {}).get(LEDGER)
        self.digest = _digest(trainer.documents)
        if state.global_step == 0 and trainer.accountant.history:
            raise ValueError(
                "`train` was called a second time, and the epsilon of this trainer is spent by the first: make a new "
                "`PrivateTrainer`, and add the two, or resume from a checkpoint."
            )
        if state.global_step == 0:
            trainer.accountant.history = []
        elif kept is None:
            raise ValueError(
                f"The checkpoint of step {state.global_step} holds no privacy accountant, so its steps were not private: start "
                "anew."
            )
        else:
            noise, rate = kept["history"][-1][:2]
            for name, was, now in (
                ("noise_multiplier", noise, trainer.noise_multiplier),
                ("sample_rate", rate, trainer.sample_rate),
            ):
                if was != now:
                    raise ValueError(
                        f"`{name}` was {was:g} in the checkpoint and would be {now:g}: resume with the same epsilon, delta, "
                        "steps, batch size and documents."
                    )
            if kept.get("documents", self.digest) != self.digest:  # earlier checkpoints hold none
                raise ValueError(
                    "The documents are not those of the checkpoint, or in another order, and the epsilon that it has spent is "
                    "that of its own: resume with the same `train_dataset`, or start anew."
                )
            trainer.accountant.history = [tuple(entry) for entry in kept["history"]]
            trainer.noise_seed = kept["seed"]

    def on_step_end(self, args, state, control, **kwargs):
        history = [list(entry) for entry in self.trainer.accountant.history]
        kept = {"history": history, "seed": self.trainer.noise_seed, "documents": self.digest}
        state.stateful_callbacks[LEDGER] = kept


def _digest(documents) -> str:
    """Hash the tokens and labels of all documents, in their order."""
    digest = hashlib.sha256()
    for row in map(documents.__getitem__, range(len(documents))):
        for name in ("input_ids", "labels"):
            tokens = numpy.asarray(row[name], dtype=numpy.int64)
            digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes())
    return digest.hexdigest()


def _random(seed: int, stream: int, step: int) -> numpy.random.Generator:
    """Return the random numbers of a step, independent of those of other steps and streams."""
    return numpy.random.default_rng([seed, stream, step])


def _only(items):
    """Return the only item of a batch: a step is one already."""
    return items[0]


def _new_accountant():
    try:
        from opacus.accountants import RDPAccountant
    except ImportError as error:
        raise ValueError('Private training needs opacus\' accountant: `pip install "hf-lstm[privacy]"`.') from error
    return RDPAccountant()


@contextmanager
def _loose_bounds():
    """Silence Opacus where a finer search could find a smaller bound: the one found holds too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        yield


@functools.lru_cache
def _noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """Return the least σ, as nearly as Opacus' search finds it, with which all steps spend at most `epsilon`."""
    _new_accountant()
    if math.isinf(epsilon):
        return 0.0
    from opacus.accountants.utils import get_noise_multiplier

    with _loose_bounds():
        return get_noise_multiplier(target_epsilon=epsilon, target_delta=delta, sample_rate=sample_rate, steps=steps)


def _check_numbers(epsilon, delta, clip):
    if not epsilon > 0:
        raise ValueError(
            f"`epsilon` ({epsilon}) must be above 0, such as 8: none of a text could be learnt with less."
        )
    if not 0 < delta < 1:
        raise ValueError(f"`delta` ({delta}) must be above 0 and below 1, less than one divided by the documents.")
    if not 0 < clip < math.inf:
        raise ValueError(
            f"`clip` ({clip}) is the largest norm of a document's gradient: it must be above 0 and finite."
        )


def _check_arguments(args: TrainingArguments) -> None:
    """Raise `ValueError` for arguments that change what a step is."""
    for name, value, needed, reason in (
        ("gradient_accumulation_steps", args.gradient_accumulation_steps, 1, "a step is one draw of documents"),
        ("max_grad_norm", args.max_grad_norm, 0, "each document is clipped alone, and the sum is mostly noise"),
        ("label_smoothing_factor", args.label_smoothing_factor, 0, "the loss of a document is the model's own"),
        ("fp16", args.fp16, False, "a scaled gradient would be clipped at another norm"),
        ("auto_find_batch_size", args.auto_find_batch_size, False, "the noise is chosen for one batch size"),
    ):
        if value != needed:
            raise ValueError(f"`{name}` ({value}) must be {needed} in private training: {reason}.")
    check_at_least_one(per_device_train_batch_size=args.per_device_train_batch_size)
    if args.world_size > 1 or args.n_gpu > 1:
        raise ValueError(
            f"Private training runs on one device, and here are {max(args.world_size, args.n_gpu)}: start a single process, "
            "with `CUDA_VISIBLE_DEVICES=0`."
        )


def _check_data(trainer: Trainer) -> None:
    """Raise `ValueError` for data that are not single documents."""
    dataset: Any = trainer.train_dataset
    callbacks = trainer.callback_handler.callbacks
    if isinstance(dataset, LaneDataset | StreamingLanes) or any(
        isinstance(one, TruncatedBPTTCallback) for one in callbacks
    ):
        raise ValueError(
            "Truncated backpropagation with a carried state (`LaneDataset`, `TruncatedBPTTCallback`) cannot be private, since a "
            "state holds what was read before: use `DocumentDataset`."
        )
    if isinstance(trainer.data_collator, DataCollatorWithFlattening):
        raise ValueError(
            "Packed documents (`DataCollatorWithFlattening`) cannot be private, since each document needs a gradient of its "
            "own: use a collator that pads, for evaluation."
        )
    if dataset is None or isinstance(dataset, IterableDataset) or not len(dataset):
        raise ValueError("`train_dataset` must be a data set of at least one document, whose number is known.")
    if isinstance(dataset, DocumentDataset) and len(dataset) > len(dataset.stream.document_starts):
        raise ValueError(
            f"`max_length` ({dataset.max_length}) cuts documents into several, and privacy is that of a whole one: make the "
            "`DocumentDataset` with `truncate=True`, or a larger `max_length`."
        )
