"""The screen that scripts write to: a terminal, or a file in some encoding."""

import re
import sys
from logging import getLogger

from transformers.utils import logging

CHATTER = ("Loading weights", "Writing model shards")  # bars of transformers that are full in a moment
SWIFT = "mtime may not be reliable"  # a warning of checkpoints that were written within a second
CONTROLS = re.compile("\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # without tabs and line ends


def prepare_screen() -> None:
    """
    Let text be printed whatever the encoding of the standard output, with escapes for characters that it lacks, as on the
    standard error. Leave out the libraries' bars: all of them unless the standard error is a terminal.
    """
    getLogger("transformers.trainer_utils").addFilter(_is_news)
    if hasattr(sys.stdout, "reconfigure"):  # a file
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr.isatty():
        logging.set_tqdm_hook(_without_chatter)
        return
    logging.disable_progress_bar()  # huggingface_hub's too
    if "datasets" in sys.modules:  # a script that reads no corpus need not wait a second for it
        sys.modules["datasets"].disable_progress_bars()


def shown(text: str) -> str:
    """Escape the control characters of a text that a model wrote: a terminal would obey them."""
    return CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def _without_chatter(bar, arguments, options):
    return bar(*arguments, **options | {"disable": options.get("desc") in CHATTER or options.get("disable")})


def _is_news(record):
    return SWIFT not in record.getMessage()
