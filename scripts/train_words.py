"""Checkpoints of train.py by words read: the schedule of its flags, and the branches of the Hub they are pushed to."""

import re
from pathlib import Path

from train_arguments import DataArguments
from train_data import TrainingData

from hf_lstm.data import read_text
from hf_lstm.hub import push_folder
from hf_lstm.training.words import BABYLM, WordCheckpointCallback

SAMPLED = 1_000  # documents whose script is looked at
# Thai, Lao, Burmese, Khmer, kana and Chinese characters: scripts that write no white space between words.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")


def word_checkpoints(data: TrainingData, data_args: DataArguments) -> WordCheckpointCallback:
    """Make the callback that `--checkpoint_at_words` asks for."""
    words, written = corpus_words(data, data_args), data_args.checkpoint_at_words
    if written == ["babylm"]:
        return WordCheckpointCallback(BABYLM, words, data.tokenizer, as_far_as_read=True)
    try:
        schedule = [float(number) for number in written]
    except ValueError as error:
        raise ValueError(f"`--checkpoint_at_words` {' '.join(written)} must be numbers, or `babylm` alone.") from error
    return WordCheckpointCallback(schedule, words, data.tokenizer)


def corpus_words(data: TrainingData, data_args: DataArguments) -> int:
    """Return the words of the training data: those between white space, or the sum of `--word_counts`."""
    stream = data.streams["train"]
    if data_args.word_counts is not None:
        lines = read_text(data_args.word_counts).split()
        for number, line in enumerate(lines, 1):
            if not line.isdecimal():
                raise ValueError(
                    f"Line {number} of `--word_counts` {data_args.word_counts} is {line!r}: write a number."
                )
        if len(lines) != len(stream.document_starts):
            raise ValueError(
                f"`--word_counts` {data_args.word_counts} holds {len(lines):,} numbers, and the training data "
                f"{len(stream.document_starts):,} documents: write one for each."
            )
        return sum(map(int, lines))
    sample = "".join(row["text"] for row in data.texts["train"].select(range(min(SAMPLED, len(data.texts["train"])))))
    if len(UNSPACED.findall(sample)) > len(sample) / 4:
        raise ValueError(
            "`--checkpoint_at_words` counts words between white space, which this text does not write: name a file with "
            "the words of each document by `--word_counts`."
        )
    return stream.num_words


def push_word_checkpoints(output_dir: str, repo_id: str) -> None:
    """Push each checkpoint to the branch of its name."""
    for folder in sorted(Path(output_dir).glob("chck_*[KM]")):
        (folder / "README.md").write_text(
            f"Checkpoint `{folder.name}` of {repo_id}, by the words it had read, repeats counted. The model's card is on the "
            "main branch.\n",
            encoding="utf-8",
        )
        push_folder(folder, repo_id, revision=folder.name)
