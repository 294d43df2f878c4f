"""Progress of a training run on screen: a line for each log, and below them one bar if that is a terminal."""

import sys
import time
from datetime import timedelta

from transformers import PrinterCallback, ProgressCallback, Trainer


class ProgressLines(ProgressCallback):
    """Prints a line for each log of the training loss, above the bar of the steps if there is a terminal for one."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._began, self._first_step = time.monotonic(), state.global_step
        if sys.stderr.isatty() and not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)
        if (bar := self.training_bar) is not None:  # a resumed run begins in its middle
            self.current_step = bar.initial = bar.n = bar.last_print_n = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs):
        """Draw no second bar."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in logs:
            return
        taken, left = state.global_step - self._first_step, state.max_steps - state.global_step
        seconds = (time.monotonic() - self._began) / max(1, taken) * left
        words = [f"loss {logs['loss']:.4f}", f"learning rate {logs['learning_rate']:.2g}"]
        if "epsilon" in logs:
            words.append(f"epsilon {logs['epsilon']:.2f}")
        if "train_tokens_per_second" in logs:
            words.append(f"{logs['train_tokens_per_second']:,.0f} tokens/s")
        if left:
            words.append(f"{timedelta(seconds=round(seconds))} left")
        self.say(f"step {state.global_step:,} of {state.max_steps:,}: {', '.join(words)}")

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def say(self, text: str) -> None:
        """Print a text, above the bar if there is one."""
        (print if self.training_bar is None else self.training_bar.write)(text)
        sys.stdout.flush()  # whoever follows a file sees it at once

    def close(self) -> None:
        """End the bar of a run, however that ended."""
        if self.training_bar is not None:
            self.training_bar.close()
        self.training_bar = None


def show_progress(trainer: Trainer, progress: ProgressLines) -> None:
    """Let a Trainer show its progress so, and no longer by bars and dictionaries of its own."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(progress)
