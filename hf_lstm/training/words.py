"""Checkpoints by the number of words read, such as BabyLM asks for."""

import math
import shutil
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Every million words up to 10 million, then every 10 million up to 100 million, then every 100 million up to a billion.
BABYLM = tuple(10**power * number for power in (6, 7, 8) for number in range(1 if power == 6 else 2, 11))


def checkpoint_name(words: float) -> str:
    """
    Return the name of a checkpoint's folder and branch: `chck_1M` after a million words, `chck_500K` after fewer. Other
    whole numbers have other names.
    """
    size, letter = (1e6, "M") if words >= 1e6 else (1e3, "K")
    return f"chck_{f'{words / size:.6f}'.rstrip('0').rstrip('.')}{letter}"


class WordCheckpointCallback(TrainerCallback):
    """
    Saves a complete model folder into `output_dir` whenever a number of words has been read: `chck_1M` after a million.

    An epoch counts as all words of the corpus, and a part of one in proportion to its steps; words read again count again.
    A folder is there wholly or not at all. One that a killed run left is kept by the run that resumes it.

    Args:
        schedule (`Iterable[float]`): Numbers of words.
        corpus_words (`int`): Words of the training data, as `wc -w` counts them.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Saved beside the model.
        as_far_as_read (`bool`, defaults to `False`): Whether numbers beyond the words of the run are left out.

    Raises:
        ValueError: for a number that is not above 0 or not whole, or a corpus without words; when training begins, for a
            number beyond the words that the run will read.
    """

    def __init__(
        self,
        schedule: Iterable[float],
        corpus_words: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        as_far_as_read: bool = False,
    ) -> None:
        self.schedule = sorted(set(schedule))
        self.corpus_words, self.tokenizer, self.as_far_as_read = corpus_words, tokenizer, as_far_as_read
        self.read_before = 0.0  # words, when the run was resumed
        if corpus_words < 1:
            raise ValueError(f"The corpus holds {corpus_words} words: checkpoints by words need at least one.")
        if not self.schedule or not self.schedule[0] > 0:
            raise ValueError(f"The numbers of words {self.schedule} must be above 0, and at least one.")
        if broken := [number for number in self.schedule if number % 1 != 0]:
            raise ValueError(f"The number of words {broken[0]} must be whole: give 1e6 for a million.")

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)  # of an epoch
        words = self.corpus_words * state.max_steps / steps
        if self.as_far_as_read and self.schedule[0] <= words:
            self.schedule = [number for number in self.schedule if number <= words * (1 + 1e-9)]
        if self.schedule[-1] > words * (1 + 1e-9):
            wanted = self.schedule[0 if self.as_far_as_read else -1]
            raise ValueError(
                f"The run reads {words:,.0f} words, and a checkpoint is wanted after {wanted:,.0f}: leave it out, or train for "
                "more epochs."
            )
        self.read_before = self.corpus_words * (state.epoch or 0) * (1 + 1e-9) if state.global_step else 0.0
        for number in self.schedule:
            if number <= self.read_before and not (Path(args.output_dir) / checkpoint_name(number)).exists():
                logger.warning(
                    f"The run is resumed after {self.read_before:,.0f} words, so {checkpoint_name(number)} cannot be written any more."
                )

    def on_step_end(self, args, state, control, model=None, **kwargs):
        read = self.corpus_words * state.epoch * (1 + 1e-9)  # an epoch is a sum of fractions
        for words in self.schedule:
            folder = Path(args.output_dir) / checkpoint_name(words)
            if self.read_before < words <= read and state.is_world_process_zero and not folder.exists():
                self._save(model, folder)

    def _save(self, model, folder):
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
