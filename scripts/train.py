"""Train an LSTM language model, watch it learn, and keep everything it takes to use it.

python scripts/train.py --output_dir runs/first
python scripts/train.py --train_file tinyshakespeare.txt --output_dir runs/shakespeare

Without a corpus it learns Python, from the source of the standard library. `--output_dir` receives the best model, its
tokenizer, metrics.json, learning_curve.png, a model card (README.md) and the checkpoints to resume from.
"""

import itertools
import json
import platform
import shlex
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, HfArgumentParser, Trainer, TrainerCallback, default_data_collator, set_seed

from hf_lstm import (
    LaneDataset,
    LSTMConfig,
    LSTMForCausalLM,
    TokenStream,
    byte_tokenizer,
    char_tokenizer,
    evaluate_stream,
    load_corpus,
)
from hf_lstm.model_card import write_model_card
from hf_lstm.training import LSTMTrainingArguments, TruncatedBPTTCallback, last_complete_checkpoint
from hf_lstm.training.tbptt import check_arguments, is_complete

RESET_EVERY = 256  # the second figure that is reported: what the model knows from so short a past
SAMPLE_LENGTH = 300
STANDARD_LIBRARY = f"the source of Python {platform.python_version()}'s standard library"


@dataclass
class ModelArguments:
    """The model to train."""

    hidden_size: int = field(default=384, metadata={"help": "Width of each LSTM cell."})
    embedding_size: int | None = field(default=None, metadata={"help": "Width of the embeddings, if it is another."})
    num_hidden_layers: int = field(default=1, metadata={"help": "LSTM layers, one on top of the other."})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "Use the embedding as the output layer too."})
    block_type: str = field(default="stacked", metadata={"help": "`stacked`, or `residual` for a deep model."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of the gated MLP after each residual layer; none by default."}
    )
    embedding_dropout: float = field(default=0.0, metadata={"help": "Share of the words dropped in a step."})
    input_dropout: float = field(default=0.0, metadata={"help": "Locked dropout of the embeddings."})
    hidden_dropout: float = field(default=0.0, metadata={"help": "Locked dropout between layers."})
    output_dropout: float = field(default=0.0, metadata={"help": "Locked dropout before the output layer."})
    weight_dropout: float = field(default=0.0, metadata={"help": "Share of the recurrent weights dropped in a step."})
    activation_regularization: float = field(default=0.0, metadata={"help": "Penalty on large outputs (AR)."})
    temporal_activation_regularization: float = field(
        default=0.0, metadata={"help": "Penalty on outputs that change from token to token (TAR)."}
    )


@dataclass
class DataArguments:
    """What to train it on."""

    train_file: str | None = field(
        default=None, metadata={"help": "Text, .jsonl, .csv or .parquet file, or a folder `save_to_disk` made."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "File for validation; without it a tenth of the training data is kept for it."}
    )
    test_file: str | None = field(default=None, metadata={"help": "File that is evaluated once, at the end."})
    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub, instead of files."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which of its configurations."})
    text_column: str = field(default="text", metadata={"help": "The column of the records that holds the text."})
    tokenizer: str = field(default="char", metadata={"help": "`char`, `byte`, or a tokenizer's folder or Hub name."})
    bptt_length: int = field(
        default=64, metadata={"help": "Tokens that gradients run back through; the state itself runs on."}
    )
    reset_at_documents: bool = field(
        default=False, metadata={"help": "Start every document from a zero state: one poem knows nothing of the last."}
    )

    prompt: str | None = field(
        default=None,
        metadata={"help": "What the samples continue: a line break by default, the beginning of a document if empty."},
    )

    def __post_init__(self):
        if self.train_file is not None and self.dataset_name is not None:
            raise ValueError("`--train_file` and `--dataset_name` exclude each other: name one corpus.")
        if self.prompt is None:
            self.prompt = "def " if self.train_file is None and self.dataset_name is None else "\n"


@dataclass
class TrainArguments(LSTMTrainingArguments):
    """How to train it: Trainer's own arguments, with defaults for a small model on one machine."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Where everything goes; must not hold other things."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training data."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Lanes on each device."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Lanes on each device in evaluation."})
    learning_rate: float = field(default=4e-3, metadata={"help": "Highest learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "How the learning rate falls."})
    lr_scheduler_kwargs: dict | str | None = field(
        default_factory=lambda: {"min_lr_rate": 0.05}, metadata={"help": "Its parameters, as JSON."}
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
    report_to: str = field(default="none", metadata={"help": "`tensorboard`, `wandb`, ... to watch the run there."})

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("`--output_dir` is missing: name a folder for the model.")
        super().__post_init__()
        in_steps = (
            self.save_strategy == self.logging_strategy == "steps" and min(self.save_steps, self.logging_steps) >= 1
        )
        if in_steps and self.save_steps % self.logging_steps:
            raise ValueError(
                f"`--save_steps` ({self.save_steps:g}) must be a multiple of `--logging_steps` "
                f"({self.logging_steps:g}), or a resumed run would log other losses than one that ran through."
            )
        folder = Path(self.output_dir)
        if self.resume_from_checkpoint is None:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ValueError(
                    f"`--output_dir` {folder} already holds something: name another folder, or go on with the run it "
                    "holds by `--resume_from_checkpoint true`."
                )
        elif self.resume_from_checkpoint.lower() == "true":
            checkpoint = last_complete_checkpoint(folder)
            if checkpoint is None:
                raise ValueError(f"`--output_dir` {folder} holds no complete checkpoint: start the run anew.")
            self.resume_from_checkpoint = str(checkpoint)
        elif not is_complete(Path(self.resume_from_checkpoint)):
            raise ValueError(
                f"`--resume_from_checkpoint` {self.resume_from_checkpoint} is no complete checkpoint: `true` finds the "
                "last one in `--output_dir`."
            )


class ShowProgress(TrainerCallback):
    """Evaluates once more at the last step, and after each evaluation says in words what the model can do."""

    def __init__(self, tokenizer, start):
        self.tokenizer, self.start = tokenizer, start

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = args.eval_strategy != "no"

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        if state.is_world_process_zero and "eval_loss" in metrics:
            loss = torch.tensor(metrics["eval_loss"])
            print(f"\nstep {state.global_step}: validation {loss:.4f} nats per token, perplexity {loss.exp():.2f}")
            print(sample(model, self.tokenizer, self.start), end="\n\n", flush=True)


def sample(model, tokenizer, start: str) -> str:
    """A text that the model writes after `start`; the same random numbers each time, and no others disturbed."""
    model.eval()
    ids = torch.tensor([encode_prompt(start, tokenizer)], device=model.device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=SAMPLE_LENGTH,
            do_sample=True,
            temperature=0.7,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.decode(written[0], skip_special_tokens=True)


def encode_prompt(prompt: str, tokenizer) -> list[int]:
    """An empty prompt is the `<eos>` that stands before each document."""
    return tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else [tokenizer.eos_token_id]


def load_tokenizer(name: str, texts):
    if name == "char":
        return char_tokenizer(texts)
    if name == "byte":
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`--tokenizer` {name} is neither `char` nor `byte`, and cannot be loaded: {error}"
        ) from error


def prepare(model_args: ModelArguments, data_args: DataArguments, training_args: TrainArguments):
    """Streams, lanes, tokenizer and model: all that can be refused is refused here, before any work."""
    if find_spec("matplotlib") is None:
        raise ValueError('The learning curve needs matplotlib: `pip install "hf-lstm[train]"`.')
    check_arguments(training_args)
    set_seed(training_args.seed)
    corpus = load_corpus(
        data_args.train_file or data_args.dataset_name,
        config_name=data_args.dataset_config_name,
        validation_file=data_args.validation_file,
        test_file=data_args.test_file,
        text_column=data_args.text_column,
    )
    tokenizer = load_tokenizer(data_args.tokenizer, corpus["train"]["text"])
    streams = {split: TokenStream.from_documents(documents["text"], tokenizer) for split, documents in corpus.items()}
    for split, stream in streams.items():
        if len(stream) < 2:
            raise ValueError(f"The {split} split holds a single token: there is nothing to predict.")
    if encode_prompt(data_args.prompt, tokenizer) in (
        [],
        [None],
    ):  # no characters it reads, or no `<eos>` to begin with
        raise ValueError(f"`--prompt` {data_args.prompt!r} is no token to this tokenizer: give another.")
    batch_sizes = {
        "train": training_args.per_device_train_batch_size,
        "validation": training_args.per_device_eval_batch_size,
    }
    lanes = {
        split: LaneDataset(
            streams[split],
            lanes=batch_size * training_args.world_size,
            bptt_length=data_args.bptt_length,
            reset_at_documents=data_args.reset_at_documents,
        )
        for split, batch_size in batch_sizes.items()
    }
    config = LSTMConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,  # ids may have gaps
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **vars(model_args),
    )
    if training_args.resume_from_checkpoint is not None:
        saved = LSTMConfig.from_pretrained(training_args.resume_from_checkpoint)
        for name in ("vocab_size", *vars(model_args)):
            if getattr(saved, name) != getattr(config, name):
                raise ValueError(
                    f"`{name}` is {getattr(saved, name)} in {training_args.resume_from_checkpoint} and would be "
                    f"{getattr(config, name)}: resume with the corpus and the flags that the run was started with."
                )
    return streams, lanes, tokenizer, LSTMForCausalLM(config)


def train(streams, lanes, tokenizer, model, data_args: DataArguments, training_args: TrainArguments) -> None:
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=lanes["train"],
        eval_dataset=lanes["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[TruncatedBPTTCallback(), ShowProgress(tokenizer, data_args.prompt)],
    )
    if trainer.is_world_process_zero():
        for split, stream in streams.items():
            print(f"{split}: {len(stream.document_starts):,} documents, {len(stream):,} tokens")
        print(f"{model.num_parameters():,} parameters, vocabulary of {len(tokenizer):,}")
    outcome = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    if len(streams["train"].document_starts) > 1:
        model.generation_config.bos_token_id = tokenizer.eos_token_id  # `generate()` alone begins a document
    trainer.save_model()
    if trainer.is_world_process_zero():
        report(trainer, streams, tokenizer, outcome.metrics["train_runtime"], data_args)


def report(trainer, streams, tokenizer, seconds: float, data_args: DataArguments) -> None:
    """Measure the saved model on every token, and write it all down."""
    model, args, folder = trainer.model, trainer.args, Path(trainer.args.output_dir)
    results = {
        split: evaluate_stream(model, streams[split], reset_at_documents=data_args.reset_at_documents)
        for split in ("validation", "test")
        if split in streams
    }
    short = evaluate_stream(
        model,
        streams["validation"],
        bptt_length=16 * RESET_EVERY,
        reset_at_documents=data_args.reset_at_documents,
        reset_every=RESET_EVERY,
    )
    metrics = {f"eval_{name}": value for name, value in results["validation"].items()}
    metrics |= {f"test_{name}": value for name, value in results.get("test", {}).items()}
    metrics |= {f"eval_loss_reset_every_{RESET_EVERY}": short["loss"]}
    metrics |= {"train_steps": trainer.state.global_step, "parameters": model.num_parameters()}
    duration = ""
    if args.resume_from_checkpoint is None:  # what Trainer measured is all there was
        metrics["train_runtime"] = seconds
        duration = f" in {seconds:.0f} s"
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw_learning_curve(trainer.state.log_history, folder / "learning_curve.png")
    text = sample(model, tokenizer, data_args.prompt)
    tokens_per_step = (
        args.train_batch_size * args.gradient_accumulation_steps * args.world_size * data_args.bptt_length
    )
    write_model_card(
        folder,
        model,
        data=Path(data_args.train_file).name if data_args.train_file else data_args.dataset_name or STANDARD_LIBRARY,
        results=results,
        procedure=f"{trainer.state.global_step:,} steps of {tokens_per_step:,} tokens{duration}; truncated "
        f"backpropagation through {data_args.bptt_length} tokens with the state carried on; seed {args.seed}. "
        f"The weights are those of step {trainer.state.best_global_step or trainer.state.global_step:,}.",
        command=command_of(sys.argv[1:]),
        reset_at_documents=data_args.reset_at_documents,
        sample=text,
        start=data_args.prompt,
    )
    print(f"\n{text}\n")
    for split, result in results.items():
        print(
            f"{split}: {result['loss']:.4f} nats per token, perplexity {result['perplexity']:.3f}, "
            f"{result['bits_per_byte']:.4f} bits per byte, {result['accuracy']:.2%} right, {result['tokens']:,} tokens"
        )
    print(f"validation with the state reset every {RESET_EVERY} tokens: {short['loss']:.4f} nats per token")
    print(f"The model, its card, metrics.json and learning_curve.png are in {folder}")


def command_of(arguments: list[str]) -> str:
    """The command of a run as others can repeat it: from the beginning, and without its author's folders."""
    shown = []
    for flag, argument in itertools.pairwise(["", *arguments]):
        if "--resume_from_checkpoint" in (flag, argument) or argument.startswith("--resume_from_checkpoint="):
            continue
        name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        shown.append(name + equals + (Path(value).name if value.startswith("/") and Path(value).exists() else value))
    return shlex.join(["python", "scripts/train.py", *shown])


def draw_learning_curve(history: list[dict], path: Path) -> None:
    """Training and validation loss over the steps, as Trainer logged them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="nats per token", title=path.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    try:
        arguments = HfArgumentParser((ModelArguments, DataArguments, TrainArguments)).parse_args_into_dataclasses()
        prepared = prepare(*arguments)
    except (ValueError, StrictDataclassError) as error:  # a config wraps what it refuses in the second
        sys.exit(f"train.py: {error.__cause__ if isinstance(error, StrictDataclassError) else error}")
    train(*prepared, *arguments[1:])
