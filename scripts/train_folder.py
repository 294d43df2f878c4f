"""The folder of a run of train.py: taken for one run, which may go on from a checkpoint in it."""

import shlex
import sys
from argparse import ArgumentParser
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from train_arguments import TrainArguments

from hf_lstm.training import last_complete_checkpoint
from hf_lstm.training.checkpoints import is_complete

LOCK_FILE = ".lock"  # in `--output_dir`, while a run holds it; those that are killed leave it behind


@contextmanager
def take_folder(args: TrainArguments, carried: bool):
    """
    Hold `output_dir` for this run alone, which is refused if another one holds it, and let `resume_from_checkpoint` be a
    checkpoint that holds everything, the carried state if there is one. The main process decides for all.

    Ctrl-C inside raises a `KeyboardInterrupt` that says what is kept. The hold is a lock of the operating system on a file
    in the folder, and ends with the process, however that ends.
    """
    with ExitStack() as stack:
        outcome = [None, args.resume_from_checkpoint]
        if args.process_index == 0:
            try:
                stack.enter_context(_hold(Path(args.output_dir)))
                outcome[1] = _find_checkpoint(args, carried)
            except ValueError as error:
                outcome[0] = str(error)
        refused, args.resume_from_checkpoint = broadcast_object_list(outcome)
        if refused is not None:
            raise ValueError(refused)
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_describe_stop(args, carried) if args.process_index == 0 else "") from None


@contextmanager
def _hold(folder: Path):
    path = folder / LOCK_FILE
    missing = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    lock = FileLock(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"`--output_dir` {folder} belongs to a run that has not ended: wait for it, or name another folder."
        ) from None
    except OSError as error:
        raise ValueError(
            f"`--output_dir` {folder} cannot be made or written ({error.strerror}): name another folder."
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows lets nobody delete an open file, and does so itself
            path.unlink()
        lock.release()
        with suppress(OSError):  # it holds something now
            for place in missing:
                place.rmdir()


def _describe_stop(args: TrainArguments, carried: bool) -> str:
    """Say what Ctrl-C left of a run, and the command that goes on with it."""
    folder = Path(args.output_dir)
    checkpoint = last_complete_checkpoint(folder, carried)
    if checkpoint is not None:
        program = ["python"] if args.world_size == 1 else ["accelerate", "launch"]
        finder = ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--resume_from_checkpoint", "--resume-from-checkpoint")
        _, arguments = finder.parse_known_args(sys.argv[1:])
        command = shlex.join([*program, sys.argv[0], *arguments, "--resume_from_checkpoint", "true"])
        return f"stopped; {checkpoint} is kept, and the run goes on from there by `{command}`."
    if any(path.name != LOCK_FILE for path in folder.iterdir()):
        return f"stopped before the first checkpoint: delete {folder}, and the same command begins anew."
    return "stopped before the first checkpoint, and nothing is kept: the same command begins anew."


def _find_checkpoint(args: TrainArguments, carried: bool) -> str | None:
    folder, named = Path(args.output_dir), args.resume_from_checkpoint
    if named is None:
        if any(path.name != LOCK_FILE for path in folder.iterdir()):
            resumable = any(is_complete(path, carried) for path in folder.glob("checkpoint-*"))
            go_on = ", or go on with the run it holds by `--resume_from_checkpoint true`" if resumable else ""
            raise ValueError(f"`--output_dir` {folder} already holds something: name another folder{go_on}.")
        return None
    if named.lower() == "true":
        checkpoint = last_complete_checkpoint(folder, carried)
        if checkpoint is None:
            raise ValueError(
                f"`--output_dir` {folder} holds no complete checkpoint: leave `--resume_from_checkpoint` out, and name a "
                "folder that is empty or new."
            )
        return str(checkpoint)
    if not is_complete(Path(named), carried):
        raise ValueError(
            f"`--resume_from_checkpoint` {named} is not a complete checkpoint: `true` finds the last one in `--output_dir`."
        )
    return named
