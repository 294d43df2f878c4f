"""Checkpoints that can be resumed: the carried state beside Trainer's own files, and whether all of them are there."""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_lstm.generation import write_tensors

logger = logging.get_logger(__name__)


def state_file(process_index: int) -> str:
    """Return the name of the file in a checkpoint that holds the carried state of one process."""
    return f"lstm_state_rank{process_index}.safetensors"


def last_complete_checkpoint(output_dir: str | Path, carried: bool = True) -> Path | None:
    """
    Find the checkpoint of the most steps in `output_dir` that holds everything, and, where a state is `carried`, that of
    every process; `None` without one. Later ones that a killed run left incomplete are named in a warning.
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
    Whether a checkpoint holds the carried state of every process and all files that lay there when it was written; without
    a carried state, whether Trainer came to the end of it, and it holds no state.
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


def save_carried_state(
    args: TrainingArguments, state: TrainerState, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """Write this process's carried state into the checkpoint of this step, wholly or not at all, after all its other files."""
    path = _checkpoint(args, state) / state_file(args.process_index)
    files = sorted(file.name for file in path.parent.iterdir() if not file.name.startswith("lstm_state_rank"))
    write_tensors(tensors, path, metadata | {"files": json.dumps(files)})


def load_carried_state(
    args: TrainingArguments, state: TrainerState, expected: dict[str, str], device: torch.device
) -> dict[str, torch.Tensor]:
    """
    Read this process's carried state from the checkpoint that Trainer resumes from.

    Args:
        args (`TrainingArguments`): Name the checkpoint in `resume_from_checkpoint`, if it is not in `output_dir`.
        state (`TrainerState`): The resumed run's.
        expected (`dict[str, str]`): The metadata that a state of this run has, `history` among it.
        device (`torch.device`): Where the tensors go.

    Raises:
        ValueError: if the checkpoint or the state in it cannot be found or read, or is of another run.
    """
    # Trainer does not tell its callbacks where it resumes from, unless the argument of that name does.
    named = args.resume_from_checkpoint
    folder = Path(named) if isinstance(named, str | os.PathLike) and Path(named).is_dir() else None
    path = (folder or _checkpoint(args, state)) / state_file(args.process_index)
    if folder is None and not path.parent.is_dir():
        raise ValueError(
            f"The checkpoint of step {state.global_step} to resume from is not in `output_dir` ({args.output_dir}), and "
            "Trainer does not tell its callbacks where it is: name it in the argument `resume_from_checkpoint` of "
            "`LSTMTrainingArguments` too."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {
                "cell_type": "lstm",
                "direction": "forward",
                "partial_shuffle_seed": "None",
            } | file.metadata()  # once the only ones, and not named
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(
            f"{path.parent} cannot be resumed without a carried state ({path.name}: {error}): resume from "
            "`hf_lstm.training.last_complete_checkpoint(output_dir)`, and name a checkpoint elsewhere in the argument "
            "`resume_from_checkpoint` of `LSTMTrainingArguments` too."
        ) from error
    if metadata.get("history") != expected["history"]:
        raise ValueError(
            f"{path} belongs to another run than the weights do: name the checkpoint to resume from in the argument "
            "`resume_from_checkpoint` of `LSTMTrainingArguments` too."
        )
    for name, value in expected.items():
        if metadata.get(name) != value:
            raise ValueError(
                f"`{name}` was {metadata.get(name)} in {path.parent} and is {value} now: resume with the same "
                "model, text, optimizer, processes, batch size and `bptt_length`, since a lane's state belongs to its place."
            )
    return load_file(path, device=str(device))


def _checkpoint(args, state):
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
