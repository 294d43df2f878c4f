"""Arguments of train.py: the model, the data, the card, the optimizer, and Trainer's own with other defaults."""

import re
import shlex
from argparse import ArgumentParser
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from command_line import Parser, check_trainer_flags
from huggingface_hub.errors import StrictDataclassError
from reading import Reading
from saved_models import check_source, first_line
from train_flags import given_flags, recipe_file, with_following, with_train_file
from train_privacy import PrivacyArguments
from transformers import AutoConfig, HfArgumentParser

from hf_lstm import LSTMConfig
from hf_lstm.data import read_text
from hf_lstm.data.corpora import source_of
from hf_lstm.model.cells_lstm import CELLS
from hf_lstm.training import LSTMTrainingArguments
from hf_lstm.training.optimization import KINDS

TOKENIZER_FLAGS = {
    "vocab_size": ("word", "unicode_word", "bpe"),
    "min_frequency": ("word", "unicode_word"),
    "byte_fallback": ("char",),
    "nfc": ("char",),
}


@dataclass
class ModelArguments:
    """Fields of the model's config; with `--model_name_or_path`, those of the saved one."""

    cell_type: str = field(default="lstm", metadata={"help": f"The recurrent cell: {', '.join(CELLS)}."})
    hidden_size: int = field(default=384, metadata={"help": "Width of each cell."})
    embedding_size: int | None = field(
        default=None, metadata={"help": "Width of the embeddings; `hidden_size` by default."}
    )
    num_hidden_layers: int = field(default=1, metadata={"help": "Layers, one on top of the other."})
    mogrifier_rounds: int | None = field(
        default=None,
        metadata={"help": "Rounds in which input and state of a `mogrifier` gate each other; 5 by default."},
    )
    mogrifier_rank: int | None = field(
        default=None, metadata={"help": "Rank of the matrices of these rounds; full by default."}
    )
    forget_gate_bias: float | None = field(
        default=None, metadata={"help": "Bias of a new forget gate, where the cell has one; 1 by default."}
    )
    chrono_max_distance: int | None = field(
        default=None,
        metadata={
            "help": "Longest distance to bridge, in tokens: new gate biases are drawn for it (chrono initialisation)."
        },
    )
    tie_word_embeddings: bool = field(default=True, metadata={"help": "Use the embedding as the output layer too."})
    output_bias: bool = field(default=False, metadata={"help": "Whether the output layer has a bias."})
    initializer_range: float | None = field(default=None, metadata={"help": "Standard deviation of new embeddings."})
    block_type: str = field(default="stacked", metadata={"help": "`stacked`, or `residual` for a deep model."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of the gated MLP after each residual layer; left out by default."}
    )
    layer_types: list[str] | None = field(
        default=None,
        metadata={"help": "Of residual layers: `hf_lstm`, or `hf_lstm_window` for attention. LSTMs by default."},
    )
    attention_window: int | None = field(
        default=None, metadata={"help": "Tokens that attention looks at; 512 by default, where there is any."}
    )
    num_attention_heads: int | None = field(default=None, metadata={"help": "Heads of attention; 1 by default."})
    embedding_dropout: float = field(default=0.0, metadata={"help": "Share of the words dropped in a step."})
    input_dropout: float = field(default=0.0, metadata={"help": "Locked dropout of the embeddings."})
    hidden_dropout: float = field(default=0.0, metadata={"help": "Locked dropout between layers."})
    output_dropout: float = field(default=0.0, metadata={"help": "Locked dropout before the output layer."})
    weight_dropout: float = field(default=0.0, metadata={"help": "Share of the recurrent weights dropped in a step."})
    activation_regularization: float = field(default=0.0, metadata={"help": "Penalty on large outputs (AR)."})
    temporal_activation_regularization: float = field(
        default=0.0, metadata={"help": "Penalty on outputs that change from token to token (TAR)."}
    )
    adversarial_softmax: float = field(
        default=0.0, metadata={"help": "Share by which the target's output row is moved against the state: 0.005."}
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Tokens whose logits are held at a time, for large vocabularies; all by default."},
    )
    adaptive_softmax_cutoffs: list[int] | None = field(
        default=None, metadata={"help": "Ids that split the vocabulary of an adaptive softmax: 2000 10000."}
    )
    direction: Literal["forward", "backward"] = field(
        default="forward", metadata={"help": "`backward`: each document is read from its last character to its first."}
    )


@dataclass
class DataArguments(Reading):
    """The data to train on, and how it is read."""

    recipe: str | None = field(
        default=None,
        metadata={"help": "A file of flags, or the name of one in scripts/recipes; the command line overrides it."},
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A saved model's folder or Hub name, to train on from its weights with its tokenizer."},
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Text, .jsonl, .json, .csv or .parquet file; a pattern of these ('books/*.txt'); a folder of .txt files, "
            "or one that `save_to_disk` made. The flag itself may be left out."
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "File for validation; without it a tenth of the training data is kept for it."}
    )
    test_file: str | None = field(default=None, metadata={"help": "File that is evaluated once, at the end."})
    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub, instead of files."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    join_records: bool = field(
        default=False, metadata={"help": "Whether the records are pieces of one text, as the lines of WikiText are."}
    )
    tokenizer: str = field(
        default="char",
        metadata={
            "help": "`char`, `byte`, `word` (between white space), `unicode_word`, `bpe`, or a tokenizer's folder or Hub name."
        },
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Largest vocabulary of `word` and `unicode_word`; vocabulary of `bpe`, by default 4096."},
    )
    min_frequency: int = field(default=1, metadata={"help": "Times a word must occur to be in the vocabulary."})
    byte_fallback: bool = field(
        default=False, metadata={"help": "Whether `char` spells characters it does not know in bytes."}
    )
    nfc: bool = field(default=False, metadata={"help": "Whether `char` composes characters first, as NFC does."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Whether the training data is read as it is needed, for corpora larger than the disk."},
    )
    batching: str = field(
        default="lanes",
        metadata={
            "help": "`lanes`: the state is carried from batch to batch; `packed`, `padded`: documents in random order."
        },
    )
    shuffle_documents: bool = field(
        default=False, metadata={"help": "Whether lanes hold the documents in another order in each epoch."}
    )
    character_noise: float = field(
        default=0.0, metadata={"help": "Share of the characters of the training text that are corrupted."}
    )
    partial_shuffle: bool = field(
        default=False, metadata={"help": "Whether each lane begins at another place in each epoch."}
    )
    bptt_length: int = field(
        default=32, metadata={"help": "Tokens that gradients run back through; the state itself runs on."}
    )
    random_bptt: bool = field(
        default=False, metadata={"help": "Draw the length of each chunk around `bptt_length`, as AWD-LSTM does."}
    )
    state_drop_probability: float = field(
        default=0.0, metadata={"help": "How often a lane starts a chunk from a zero state."}
    )
    reset_at_documents: bool = field(
        default=False, metadata={"help": "Start every document from a zero state: one poem knows nothing of the last."}
    )

    prompt: str | None = field(
        default=None,
        metadata={
            "help": "Text that samples continue: a line break by default, the beginning of a document if empty."
        },
    )
    checkpoint_at_words: list[str] | None = field(
        default=None,
        metadata={
            "help": "Save a model folder after so many words, repeats counted: 1e6 2e6, or `babylm` for its schedule."
        },
    )
    word_counts: str | None = field(
        default=None,
        metadata={
            "help": "File of the words of each training document, a number a line, for text without white space."
        },
    )

    def __post_init__(self):
        if self.checkpoint_at_words is not None and self.streaming:
            raise ValueError(
                "`--checkpoint_at_words` needs a corpus whose words are counted: leave `--streaming` out."
            )
        if self.train_file is not None and self.dataset_name is not None:
            raise ValueError("`--train_file` and `--dataset_name` exclude each other: name one corpus.")
        for flag in ("train_file", "validation_file", "test_file", "dataset_name", "model_name_or_path"):
            if getattr(self, flag) == "":
                thing = "model" if flag == "model_name_or_path" else "corpus"
                raise ValueError(f"`--{flag}` is empty: name a {thing}, or leave the flag out.")
        for flag in ("train_file", "validation_file", "test_file"):
            name = getattr(self, flag)
            if name is not None and source_of(name)[0] == "hub":
                raise ValueError(
                    f"`--{flag}` {name} does not exist: name a file, a folder or a pattern, or a data set on the Hub by "
                    "`--dataset_name`."
                )
        _check_utf8("prompt", self.prompt)
        if self.batching not in ("lanes", "packed", "padded"):
            raise ValueError(f"`--batching` {self.batching} must be `lanes`, `packed` or `padded`.")
        for flag in ("random_bptt", "state_drop_probability", "shuffle_documents", "partial_shuffle", "streaming"):
            if self.batching != "lanes" and getattr(self, flag):
                raise ValueError(f"`--{flag}` belongs to lanes: leave it out, or `--batching` {self.batching}.")
        for flag, tokenizers in TOKENIZER_FLAGS.items():
            if (
                getattr(self, flag) != type(self).__dataclass_fields__[flag].default
                and self.tokenizer not in tokenizers
            ):
                raise ValueError(
                    f"`--{flag}` means nothing to `--tokenizer` {self.tokenizer}: it is for {' and '.join(tokenizers)}."
                )
        if not 0 <= self.character_noise <= 1 or (self.streaming and self.character_noise > 0):
            raise ValueError(
                f"`--character_noise` {self.character_noise} must be a share from 0 to 1, and 0 with `--streaming`."
            )
        if self.streaming:
            if self.train_file is None and self.dataset_name is None:
                raise ValueError("`--streaming` needs a corpus: name one by `--train_file` or `--dataset_name`.")
            if self.validation_file is None:
                raise ValueError(
                    "`--streaming` needs `--validation_file`, since a stream cannot be split before it is read: name one."
                )
            if self.random_bptt or self.join_records or self.partial_shuffle:
                raise ValueError(
                    "`--streaming` goes with neither `--random_bptt` nor `--join_records` nor `--partial_shuffle`: leave them out."
                )
        if self.prompt is None:
            self.prompt = "def " if self.train_file is None and self.dataset_name is None else "\n"

    @property
    def starts_documents_at_zero(self) -> bool:
        """Tell whether documents start from a zero state: only lanes can carry it on."""
        return self.reset_at_documents or self.batching != "lanes"


@dataclass
class CardArguments:
    """Facts for the model's card that a run cannot know; the card is silent on those left out."""

    license: str | None = field(
        default=None, metadata={"help": "The model's licence as the Hub writes it: apache-2.0."}
    )
    language: list[str] | None = field(default=None, metadata={"help": "Languages of the text, as codes: en zh."})
    data_license: str | None = field(default=None, metadata={"help": "The licence of the training data, in words."})
    data_description: str | None = field(
        default=None,
        metadata={
            "help": "The training data in words, `poems of the Tang dynasty`; by default its file's or Hub name."
        },
    )

    def __post_init__(self):
        for flag in ("data_license", "data_description"):
            _check_utf8(flag, getattr(self, flag))
        if self.data_description is not None and len(self.data_description.strip().splitlines()) != 1:
            raise ValueError(
                f"`--data_description` {self.data_description!r} must be one line of words, which the card puts into its "
                "sentences: `poems of the Tang dynasty`."
            )
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license):
            raise ValueError(
                f"`--license` {self.license!r} must be an identifier of the Hub, such as apache-2.0, cc-by-4.0 or other."
            )
        for language in self.language or ():
            if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)*|code|multilingual", language):
                raise ValueError(f"`--language` {language!r} must be a code of ISO 639, such as en or zh, or `code`.")


@dataclass
class OptimizationArguments:
    """Averages of weights, and kinds of parameters without weight decay."""

    averaging: str | None = field(
        default=None,
        metadata={
            "help": "`ema`: AdamW whose weights are averaged; `nt_asgd`: SGD, averaged once it stops improving."
        },
    )
    ema_decay: float = field(default=0.999, metadata={"help": "Decay of the average of `ema` at each step."})
    patience: int = field(default=5, metadata={"help": "Evaluations without progress after which `nt_asgd` averages."})
    no_decay: list[str] = field(
        default_factory=lambda: list(KINDS),
        metadata={
            "help": "Parameters that `--weight_decay` spares: any of recurrent, bias, norm, embedding; or `none`."
        },
    )

    def __post_init__(self):
        if self.averaging not in (None, "ema", "nt_asgd"):
            raise ValueError(f"`--averaging` {self.averaging} must be `ema` or `nt_asgd`, or left out.")
        if self.no_decay == ["none"]:
            self.no_decay = []
        if unknown := set(self.no_decay) - set(KINDS):
            raise ValueError(f"`--no_decay` {' '.join(sorted(unknown))} must be among {', '.join(KINDS)}, or `none`.")


@dataclass
class TrainArguments(LSTMTrainingArguments):
    """Trainer's own arguments, with defaults for a small model on one machine."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder that the run writes to; it must be empty, or hold the run to resume."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training data."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Lanes on each device."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Lanes on each device in evaluation."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Highest learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "How the learning rate falls."})
    lr_scheduler_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Its parameters, as JSON; by default the rate falls to a twentieth."}
    )
    warmup_steps: float = field(default=50, metadata={"help": "Steps in which the learning rate rises."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Decay of AdamW's second moment."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two logs of the training loss."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate."})
    eval_steps: float | None = field(default=500, metadata={"help": "Steps between two evaluations and samples."})
    save_steps: float = field(default=500, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep, at least 2."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Whether the best model is the result."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available,
        metadata={"help": "Whether batches are copied to a GPU from pinned memory."},
    )
    include_num_input_tokens_seen: str = field(
        default="all", metadata={"help": "Whether to log tokens, and tokens per second."}
    )
    report_to: str = field(default="none", metadata={"help": "`tensorboard`, `wandb`, ... to watch the run there."})
    max_steps: int = field(default=-1, metadata={"help": "Steps to train, instead of `--num_train_epochs`."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Norm to which gradients are clipped; 0 for none."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16."})
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU although there is a GPU."})
    seed: int = field(default=42, metadata={"help": "Seed of weights and order."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "`true` goes on with the run that `--output_dir` holds, or name a checkpoint."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Whether to publish the model when it is trained."})
    hub_strategy: str = field(
        default="end", metadata={"help": "Must be `end`: the folder is checked before it is uploaded."}
    )

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError(
                "`--output_dir` is missing: name a folder for the model, such as `--output_dir runs/first`."
            )
        if self.hub_token is not None:
            raise ValueError(
                "`--hub_token` would lie in training_args.bin and in the history of your shell: set HF_TOKEN in the "
                "environment, or call `hf auth login` once."
            )
        if self.hub_strategy != "end":
            raise ValueError(
                f"`--hub_strategy` {self.hub_strategy} would upload all that lies in `--output_dir`, unchecked: leave it at "
                "`end`, and the model is published when it is trained."
            )
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "cosine_with_min_lr":
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.05}
        check_trainer_flags(self)
        super().__post_init__()
        in_steps = (
            self.save_strategy == self.logging_strategy == "steps" and min(self.save_steps, self.logging_steps) >= 1
        )
        if in_steps and self.save_steps % self.logging_steps:
            raise ValueError(
                f"`--save_steps` ({self.save_steps:g}) must be a multiple of `--logging_steps` "
                f"({self.logging_steps:g}), or a resumed run would log other losses than one that ran through."
            )


def load_saved(kind: type, name: str, **options: Any):
    """Call `from_pretrained` of a class on the model to train on from, and name the flag in whatever goes wrong."""
    try:
        return kind.from_pretrained(name, **options)
    except Exception as error:  # the libraries behind it raise classes of their own
        reason = error.__cause__ if isinstance(error, StrictDataclassError) else error
        raise ValueError(f"`--model_name_or_path` {name} cannot be loaded: {first_line(reason)}") from error


def _take_saved_config(model_args: ModelArguments, name: str, given: dict[str, Any]) -> None:
    """Let the flags of the model be the fields of a saved config, and refuse those that were `given` other values."""
    for flag in ("tokenizer", *TOKENIZER_FLAGS):
        if flag in given:
            raise ValueError(
                f"`--{flag}` and `--model_name_or_path` exclude each other, since the tokenizer of {name} is kept: leave one "
                "of them out."
            )
    check_source(name, "--model_name_or_path")
    config = load_saved(AutoConfig, name)
    if not isinstance(config, LSTMConfig):
        raise ValueError(
            f"`--model_name_or_path` {name} is a model of the type {config.model_type}: name one of the type "
            f"{LSTMConfig.model_type}."
        )
    for flag in vars(model_args):
        saved = getattr(config, flag)
        if given.get(flag, saved) != saved:
            raise ValueError(
                f"`--{flag}` {given[flag]} contradicts the config of {name}, where it is {saved}: leave the flag out, or "
                "train a new model."
            )
        setattr(model_args, flag, saved)


def _check_utf8(flag, text):
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`--{flag}` {text!r} is not UTF-8: type it in a terminal that is set to it.") from error


GROUPS = (ModelArguments, DataArguments, CardArguments, PrivacyArguments, OptimizationArguments, TrainArguments)


def name_text(arguments: list[str]) -> list[str]:
    """Name the flag of a text that was typed without one."""
    return with_train_file(arguments, GROUPS)


def with_recipes(arguments: list[str]) -> list[str]:
    """Put the flags of recipes in the place of their names, before all others."""
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe", action="append", default=[])
    found, arguments = finder.parse_known_args(name_text(arguments))
    words: list[str] = []
    for recipe in found.recipe:
        text = read_text(recipe_file(recipe))
        if "--recipe" in text:
            raise ValueError(f"`--recipe` {recipe} names another recipe: give both on the command line.")
        words += text.split()
    return [*words, *arguments]


def data_of_command(command: str) -> tuple[DataArguments, CardArguments]:
    """Read the arguments of the data and of the card from the command of a run, as its run.json holds it."""
    parser = HfArgumentParser((DataArguments, CardArguments), allow_abbrev=False)
    words = with_recipes(shlex.split(command)[2:])  # after `python scripts/train.py`
    return parser.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)[:2]


def parse(
    arguments: list[str],
    description: str = "",
) -> tuple[ModelArguments, DataArguments, CardArguments, PrivacyArguments, OptimizationArguments, TrainArguments]:
    """Parse the six groups of arguments; flags override a recipe's, which override a saved model's config."""
    arguments, reasons = with_following(with_recipes(arguments), GROUPS)
    parser = Parser(GROUPS, description)
    parsed = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    model_args, data_args, _, privacy_args, _, training_args = parsed
    if training_args.process_index == 0:
        print(*reasons, sep="\n", end="\n" if reasons else "")
    privacy_args.check(data_args, training_args)
    if data_args.model_name_or_path is not None:
        _take_saved_config(model_args, data_args.model_name_or_path, given_flags(arguments, GROUPS)[0])
    if data_args.streaming and training_args.max_steps <= 0:
        raise ValueError("`--streaming` needs `--max_steps`: a stream does not say when it ends.")
    if data_args.batching != "lanes" and training_args.train_sampling_strategy == "sequential":  # the default of lanes
        training_args.train_sampling_strategy, training_args.dataloader_drop_last = "random", False
    return parsed
