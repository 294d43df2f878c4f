"""Data of train.py, from its arguments: tokenizer, token streams and batches, and a summary of them before it starts."""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from saved_models import check_source, first_line
from standard_library import standard_library
from train_arguments import DataArguments, TrainArguments, load_saved
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from hf_lstm import (
    DocumentDataset,
    LaneDataset,
    StreamingLanes,
    TokenStream,
    bpe_tokenizer,
    byte_tokenizer,
    char_tokenizer,
    load_corpus,
    load_documents,
    word_tokenizer,
)
from hf_lstm.data import one_split
from hf_lstm.evaluation.noise import add_character_noise
from hf_lstm.tokenizers import in_direction
from hf_lstm.training.report import prompt_ids
from hf_lstm.unknown import drops_text, unknown_id

LEARNT = ("char", "word", "unicode_word", "bpe")  # tokenizers that are learnt from the training data
LEARNT_FROM = 10_000  # rows of a streamed corpus that a tokenizer is learnt from
COUNTED = 1_000  # rows of a streamed corpus in which unknown tokens are counted
SEARCHED = 100_000_000  # bytes of training data in which validation data is looked for
SHUFFLED = 1_000  # rows of a streamed corpus that are shuffled at a time


@dataclass
class TrainingData:
    """A corpus, ready for Trainer: `texts` (rows) and `streams` (tokens) by split, and `datasets` of batches."""

    texts: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    streams: dict[str, TokenStream]  # without `train` if it is streamed
    datasets: dict[str, Any]
    collator: Callable
    direction: str  # of the model


def prepare_data(
    args: DataArguments, training_args: TrainArguments, direction: str, truncate: bool = False
) -> TrainingData:
    """
    Load, tokenize and batch the corpus; whatever is wrong with it is refused here, before any work. With `truncate` a
    document of more than `--bptt_length` tokens for training ends there.
    """
    with training_args.main_process_first(desc="preparing the corpus"):  # the others find it in the cache
        texts = load_texts(args, training_args.seed)
        tokenizer = load_tokenizer(args, texts["train"], direction)
        streams = {
            split: TokenStream.from_documents(rows, tokenizer, direction)
            for split, rows in texts.items()
            if not (split == "train" and args.streaming)
        }
    for split, stream in streams.items():
        if len(stream) < 2:
            raise ValueError(f"The {split} split holds a single token: it must hold at least two, to predict one.")
    prompt_ids(args.prompt, tokenizer, direction)
    datasets, collator = make_batches(args, training_args, texts, streams, tokenizer, direction, truncate)
    return TrainingData(texts, tokenizer, streams, datasets, collator, direction)


@dataclass
class Noise:
    """Corrupt the text of each row, for `Dataset.map`; a row has noise of its own."""

    share: float
    seed: int

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, str]:
        return {"text": add_character_noise(row["text"] or "", self.share, seed=[self.seed, index])[0]}


def load_texts(args: DataArguments, seed: int):
    """Load the rows of each split; those of a streamed corpus are read as they are needed."""
    if not args.streaming:
        texts = load_corpus(
            args.train_file or args.dataset_name or standard_library(),
            config_name=args.dataset_config_name,
            validation_file=args.validation_file,
            test_file=args.test_file,
            join_records=args.join_records,
            **args.reading,
        )
        if args.character_noise > 0:
            texts["train"] = texts["train"].map(
                Noise(args.character_noise, seed), with_indices=True, desc="adding noise"
            )
        return texts
    corpus = load_documents(
        args.train_file or args.dataset_name, args.dataset_config_name, streaming=True, **args.reading
    )
    texts = {"train": one_split(corpus, "train", args.train_file or args.dataset_name)}
    if args.shuffle_documents:
        texts["train"] = texts["train"].shuffle(seed, buffer_size=SHUFFLED)
    for split, file in (("validation", args.validation_file), ("test", args.test_file)):
        if file is not None:
            texts[split] = one_split(load_documents(file, **args.reading), split, file)
    return texts


def load_tokenizer(args: DataArguments, rows, direction: str):
    """Learn a tokenizer from the training data, in the order in which the model reads it, or load a saved one."""
    if args.model_name_or_path is not None:
        return load_saved(AutoTokenizer, args.model_name_or_path)
    if args.streaming:
        rows = rows.take(LEARNT_FROM)
    texts = (in_direction(text, direction) for batch in rows.iter(1000) for text in batch["text"])
    if args.tokenizer == "byte":
        return byte_tokenizer()
    if args.tokenizer == "char":
        return char_tokenizer(texts, byte_fallback=args.byte_fallback, nfc=args.nfc)
    if args.tokenizer == "bpe":
        return bpe_tokenizer(texts, 4096 if args.vocab_size is None else args.vocab_size)
    if args.tokenizer in ("word", "unicode_word"):
        split = "whitespace" if args.tokenizer == "word" else "unicode"
        return word_tokenizer(texts, args.vocab_size, args.min_frequency, split)
    remedy = "give `char`, `byte`, `word`, `unicode_word`, `bpe`, or a folder or Hub name"
    check_source(
        args.tokenizer, "--tokenizer", ("tokenizer.json", "tokenizer_config.json", "config.json"), remedy=remedy
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    except Exception as error:  # the libraries behind it raise classes of their own
        raise ValueError(
            f"`--tokenizer` {args.tokenizer} cannot be loaded ({first_line(error)}): {remedy}."
        ) from error
    if tokenizer.eos_token is None:  # BERT's kind
        tokenizer.add_special_tokens({"eos_token": tokenizer.sep_token or "<eos>"})
    return tokenizer


def make_batches(args: DataArguments, training_args: TrainArguments, texts, streams, tokenizer, direction, truncate):
    """Make the data sets for training and evaluation, and the collator of their batches."""
    if args.batching != "lanes":
        sets = {"train": DocumentDataset(streams["train"], args.bptt_length, truncate)}
        sets["validation"] = DocumentDataset(streams["validation"], args.bptt_length)
        if args.batching == "packed":
            return sets, DataCollatorWithFlattening()
        padding = copy.deepcopy(tokenizer)
        padding.padding_side = "right"  # on the left, transformers' loss would have one more target a row
        if padding.pad_token is None:
            padding.pad_token = padding.eos_token
        return sets, DataCollatorForSeq2Seq(padding)
    fit_batches(args, training_args, streams)
    common = {"bptt_length": args.bptt_length, "reset_at_documents": args.reset_at_documents}
    lanes = training_args.per_device_train_batch_size * training_args.world_size
    if args.streaming:
        place = {"process_index": training_args.process_index, "num_processes": training_args.world_size}
        train = StreamingLanes(texts["train"], tokenizer, lanes, **common, **place, direction=direction)
        next(item for item in train if item is not None)  # a corpus that cannot be read is refused now
    else:
        train = LaneDataset(
            streams["train"],
            lanes,
            **common,
            length_seed=training_args.seed if args.random_bptt else None,
            shuffle_seed=training_args.seed if args.shuffle_documents else None,
            partial_shuffle_seed=training_args.seed if args.partial_shuffle else None,
        )
    eval_lanes = training_args.per_device_eval_batch_size * training_args.world_size
    validation = LaneDataset(streams["validation"], eval_lanes, **common)
    return {"train": train, "validation": validation}, default_data_collator


def fit_batches(args: DataArguments, training_args: TrainArguments, streams: dict[str, TokenStream]) -> None:
    """Let a batch hold no more lanes than a short text fills, and say so. Raises `ValueError` where it fills none."""
    for split, flag in (("train", "per_device_train_batch_size"), ("validation", "per_device_eval_batch_size")):
        if split not in streams:
            continue
        tokens, lanes = len(streams[split]), getattr(training_args, flag)
        longest = (tokens - 1) // training_args.world_size
        fitting = longest // args.bptt_length
        if fitting < 1:
            raise ValueError(
                f"`--bptt_length` ({args.bptt_length}) must be at most {longest} for the {split} text, which has {tokens:,} "
                f"tokens: lower it, or give more text{'' if split == 'train' else ' by `--validation_file`'}."
            )
        if fitting < lanes:
            setattr(training_args, flag, fitting)
            if training_args.process_index == 0:
                print(
                    f"`--{flag}` is {fitting} instead of {lanes}: the {split} text has {tokens:,} tokens, and each lane takes "
                    f"{args.bptt_length} (`--bptt_length`)."
                )


def describe(data: TrainingData, vocab_size: int, base: str | None = None) -> None:
    """Print how much each split holds, and warn of obvious mistakes; `base` is the model that the tokenizer is of."""
    texts, tokenizer, streams = data.texts, data.tokenizer, data.streams
    unknown = unknown_of(tokenizer)
    if drops_text(tokenizer):
        _warn(
            "the tokenizer has no token for text that it lacks and drops it in silence, so bits per byte mean little where "
            f"it does{': `--tokenizer bpe` knows every text' if base is None else ''}."
        )
    counts = {split: stream.counts(vocab_size) for split, stream in streams.items()}
    for split in texts:
        if split not in streams:
            print(f"{split}: streamed")
            continue
        stream = streams[split]
        rate = 0 if unknown is None else counts[split][unknown].item() / len(stream)
        print(
            f"{split}: {len(stream.document_starts):,} documents, {len(stream):,} tokens, "
            f"{len(stream) / stream.num_bytes:.3f} tokens per byte, {rate:.2%} unknown"
        )
        if split == "validation" and rate > 0.05 and base is None:
            _warn(
                f"{rate:.1%} of the validation tokens are unknown to the tokenizer, and its bits per byte mean little: "
                "`--tokenizer bpe`, or `char` with `--byte_fallback true`, knows every text."
            )
    if base is not None:
        if "train" not in streams:
            rows = [row["text"] for row in texts["train"].take(COUNTED)]
            counts["train"] = TokenStream.from_documents(rows, tokenizer, data.direction).counts(vocab_size)
        warn_of_unknown(counts, tokenizer, base, f"the first {COUNTED:,} rows of " if "train" not in streams else "")
    if "train" not in streams:
        return
    never = (counts["train"] == 0).sum().item()
    if base is None and never > vocab_size / 2 + 256:  # bytes cost little and are there for texts to come
        _warn(
            f"{never:,} of {vocab_size:,} tokens of the vocabulary never occur in the training data: a smaller "
            "vocabulary, such as `--tokenizer bpe --vocab_size 4096` learns, would cost less and learn more."
        )
    passages = passages_of(texts["validation"])
    found = occurring(passages, texts["train"])
    if len(found) > len(passages) / 2:
        _warn(
            f"{len(found)} of {len(passages)} passages of the validation data stand in the training data too: the "
            "validation loss measures memory."
        )


def unknown_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id for text that the tokenizer lacks, unless it is also `<eos>`, like GPT-2's."""
    unknown = unknown_id(tokenizer)
    return None if unknown == tokenizer.eos_token_id else unknown


def warn_of_unknown(counts, tokenizer, base: str, part: str) -> None:
    """Warn of the tokens (with `char`, the characters) that the tokenizer of a saved model does not know."""
    index = unknown_of(tokenizer)
    name = None if index is None else tokenizer.convert_ids_to_tokens(index)
    for split, count in counts.items():
        unknown = 0 if index is None else count[index].item()
        if unknown > 0:
            _warn(
                f"{unknown:,} of {count.sum().item():,} tokens of {part if split == 'train' else ''}the {split} data are "
                f"unknown to the tokenizer of {base}, whose vocabulary is kept: each is read as {name}."
            )


def passages_of(rows, number: int = 8, length: int = 200) -> set[str]:
    """Draw passages evenly from a data set, without those that are too short to mean anything."""
    step = max(1, len(rows) // number)
    passages = [(rows[index]["text"] or "")[:length] for index in range(0, len(rows), step)][:number]
    return {passage for passage in passages if len(passage) >= 20}


def occurring(passages: set[str], rows) -> set[str]:
    """Find the passages that stand in the first rows."""
    import pyarrow.compute

    found, searched = set(), 0
    for table in rows.with_format("arrow").iter(1000):
        for passage in passages - found:
            if pyarrow.compute.any(pyarrow.compute.match_substring(table["text"], passage)).as_py():
                found.add(passage)
        searched += table.nbytes
        if searched > SEARCHED:
            break
    return found


def _warn(message):
    print(f"Warning: {message}", file=sys.stderr)
