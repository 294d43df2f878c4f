"""Train an LSTM language model, watch it learn, and keep everything it takes to use it.

python scripts/train.py --output_dir runs/first
python scripts/train.py --recipe scripts/recipes/shakespeare_cpu.args --output_dir runs/shakespeare

Without a corpus it learns Python, from the source of the standard library. A recipe is a file of flags; those on the
command line have the last word. `--output_dir` receives the best model, its tokenizer, metrics.json,
learning_curve.png, a model card (README.md, rendered from run.json) and the checkpoints to resume from.
"""

import itertools
import json
import math
import platform
import shlex
import sys
import traceback
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import torch
from arguments import (
    CardArguments,
    DataArguments,
    ModelArguments,
    OptimizationArguments,
    TrainArguments,
    parse,
    take_folder,
)
from corpus import describe, load_texts, load_tokenizer, make_batches
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from huggingface_hub.utils import httpx
from transformers import Trainer, TrainerCallback, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from hf_lstm import LSTMConfig, LSTMForCausalLM, TokenStream, evaluate_stream
from hf_lstm.data.streams import encode
from hf_lstm.hub import push_folder
from hf_lstm.model_card import describe_run, write_model_card
from hf_lstm.tokenizers import ends_lines
from hf_lstm.training import (
    NTASGD,
    DivergenceCallback,
    EMAAdamW,
    FinishedRunCallback,
    MetricsCallback,
    NonMonotonicTrigger,
    TruncatedBPTTCallback,
    parameter_groups,
)
from hf_lstm.training.tbptt import check_arguments, check_penalties

RESET_EVERY = 256  # the second figure that is reported: what the model knows from so short a past
SAMPLE_LENGTH = 300
NOT_REPEATED = ("__resume_from_checkpoint", "__push_to_hub", "__hub_model_id", "__hub_private_repo", "__hub_revision")
STANDARD_LIBRARY = f"the source of Python {platform.python_version()}'s standard library"


class ShowProgress(TrainerCallback):
    """Evaluates once more at the last step, and after each evaluation says in words what the model can do."""

    def __init__(self, tokenizer, data_args, bytes_per_token):
        self.tokenizer, self.data_args, self.bytes_per_token = tokenizer, data_args, bytes_per_token

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and args.eval_strategy == "steps":
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        if state.is_world_process_zero and "eval_loss" in metrics:
            loss = torch.tensor(metrics["eval_loss"])
            bits = loss / math.log(2)
            print(
                f"\nstep {state.global_step:,}: validation, {self.data_args.batching}, {loss:.4f} nats per token, perplexity "
                f"{loss.exp():.2f}, {bits:.3f} bits per token, {bits / self.bytes_per_token:.3f} per byte"
            )
            print(sample(model, self.tokenizer, self.data_args.prompt), end="\n\n", flush=True)


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
            eos_token_id=None if ends_lines(tokenizer) else tokenizer.eos_token_id,
        )
    return tokenizer.decode(written[0], skip_special_tokens=not ends_lines(tokenizer))


def encode_prompt(prompt: str, tokenizer) -> list[int]:
    """An empty prompt is the `<eos>` that stands before each document."""
    return encode([prompt], tokenizer)[0].tolist() if prompt else [tokenizer.eos_token_id]


def prepare(model_args: ModelArguments, data_args: DataArguments, training_args: TrainArguments):
    """Data, tokenizer and model: all that can be refused is refused here, before any work."""
    if find_spec("matplotlib") is None:
        raise ValueError('The learning curve needs matplotlib: `pip install "hf-lstm[train]"`.')
    if data_args.batching == "lanes":
        check_arguments(training_args)
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="preparing the corpus"):  # the others find it in the cache
        texts = load_texts(data_args, training_args.seed)
        tokenizer = load_tokenizer(data_args, texts["train"])
        streams = {
            split: TokenStream.from_documents(rows, tokenizer)
            for split, rows in texts.items()
            if not (split == "train" and data_args.streaming)
        }
    for split, stream in streams.items():
        if len(stream) < 2:
            raise ValueError(f"The {split} split holds a single token: there is nothing to predict.")
    if encode_prompt(data_args.prompt, tokenizer) in (
        [],
        [None],
    ):  # no characters it reads, or no `<eos>` to begin with
        raise ValueError(f"`--prompt` {data_args.prompt!r} is no token to this tokenizer: give another.")
    batches = make_batches(data_args, training_args, texts, streams, tokenizer)
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
    check_penalties(training_args, config)
    if training_args.process_index == 0 and training_args.resume_from_checkpoint is None:
        describe(texts, streams, tokenizer, config.vocab_size)
    return streams, batches, tokenizer, LSTMForCausalLM(config)


def optimizer_of(model, optimization_args: OptimizationArguments, training_args: TrainArguments) -> tuple[type, dict]:
    """The optimizer's class and arguments, as Trainer takes them."""
    groups = parameter_groups(model, training_args.weight_decay, optimization_args.no_decay)
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training_args, model)
    if optimization_args.averaging == "nt_asgd":
        if training_args.eval_strategy == "no":
            raise ValueError("`--averaging nt_asgd` looks at validation losses: `--eval_strategy` must not be `no`.")
        if optimizer_class not in (torch.optim.AdamW, torch.optim.SGD):
            raise ValueError(f"`--averaging nt_asgd` averages SGD: leave `--optim` {training_args.optim} out.")
        return NTASGD, {"params": groups, "lr": training_args.learning_rate, "patience": optimization_args.patience}
    if optimization_args.averaging == "ema":
        if optimizer_class is not torch.optim.AdamW:
            raise ValueError(f"`--averaging ema` averages AdamW: leave `--optim` {training_args.optim} out.")
        optimizer_class, options = EMAAdamW, options | {"decay": optimization_args.ema_decay}
    return optimizer_class, {"params": groups} | options


def make_trainer(streams, batches, tokenizer, model, data_args, optimization_args, training_args) -> Trainer:
    (datasets, collator), validation = batches, streams["validation"]
    callbacks = [
        TruncatedBPTTCallback(data_args.state_drop_probability)
        if data_args.batching == "lanes"
        else FinishedRunCallback(),
        DivergenceCallback(),
        MetricsCallback(),
        ShowProgress(tokenizer, data_args, validation.num_bytes / len(validation)),
    ]
    if optimization_args.averaging == "nt_asgd":
        callbacks.append(NonMonotonicTrigger())
    optimizer_class, options = optimizer_of(model, optimization_args, training_args)
    if optimization_args.averaging is not None:
        optimizer_class(**options)  # refuses what it cannot take
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        processing_class=tokenizer,
        data_collator=collator,
        optimizer_cls_and_kwargs=(optimizer_class, options),
        callbacks=callbacks,
    )
    for reporter in get_reporting_integration_callbacks(training_args.report_to):
        trainer.remove_callback(reporter)  # and last again, to see what the callbacks above add to the logs
        trainer.add_callback(reporter)
    return trainer


def train(trainer: Trainer, streams, tokenizer, data_args: DataArguments, card_args: CardArguments) -> None:
    model, args = trainer.model, trainer.args
    if trainer.is_world_process_zero():
        print(f"{model.num_parameters():,} parameters, vocabulary of {len(tokenizer):,}")
    outcome = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    if data_args.streaming or len(streams["train"].document_starts) > 1:
        model.generation_config.bos_token_id = tokenizer.eos_token_id  # `generate()` alone begins a document
    if ends_lines(tokenizer):
        model.generation_config.eos_token_id = None  # a text goes on after a line
    publish, args.push_to_hub = args.push_to_hub, False  # else `save_model` would push, with a card of Trainer's own
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    report(trainer, streams, tokenizer, outcome.metrics["train_runtime"], data_args, card_args)
    if publish:
        try:
            commit = push_folder(args.output_dir, trainer.hub_model_id, revision=args.hub_revision)
        except (HfHubHTTPError, httpx.HTTPError, RuntimeError) as error:
            again = ["python", "scripts/push.py", "--model", args.output_dir, "--repo", trainer.hub_model_id]
            again = shlex.join(again + (["--revision", args.hub_revision] if args.hub_revision else []))
            sys.exit(
                f"train.py: {error.__cause__ or error}\nThe model is saved, and not published: `{again}` does it."
            )
        print(f"uploaded: {commit.commit_url}")


def report(trainer, streams, tokenizer, seconds: float, data_args: DataArguments, card_args: CardArguments) -> None:
    """Measure the saved model on every token, and write it all down."""
    model, args, folder = trainer.model, trainer.args, Path(trainer.args.output_dir)
    reset_at_documents = data_args.reset_at_documents or data_args.batching != "lanes"
    results = {
        split: evaluate_stream(model, streams[split], reset_at_documents=reset_at_documents)
        for split in ("validation", "test")
        if split in streams
    }
    short = evaluate_stream(
        model,
        streams["validation"],
        bptt_length=16 * RESET_EVERY,
        reset_at_documents=reset_at_documents,
        reset_every=RESET_EVERY,
    )
    metrics = {f"eval_{name}": value for name, value in results["validation"].items()}
    metrics |= {f"test_{name}": value for name, value in results.get("test", {}).items()}
    metrics |= {f"eval_loss_reset_every_{RESET_EVERY}": short["loss"]}
    metrics |= {"train_steps": trainer.state.global_step, "parameters": model.num_parameters()}
    duration = ""
    if args.resume_from_checkpoint is None:  # what Trainer measured is all there was
        metrics["train_runtime"] = seconds
        duration = f", in {seconds:.0f} s on {machine()}"
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw_learning_curve(trainer.state.log_history, folder / "learning_curve.png")
    text = sample(model, tokenizer, data_args.prompt)
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if data_args.batching == "lanes":
        tokens = batch * data_args.bptt_length
        steps = f"steps of {tokens:,} tokens, {trainer.state.global_step * tokens / 1e6:.2f} million in all"
        method = f"truncated backpropagation through {data_args.bptt_length} tokens with the state carried on"
        method += " within each document" if data_args.reset_at_documents else ""
    else:
        steps = f"steps of {batch:,} documents, {data_args.batching}"
        method = f"backpropagation through at most {data_args.bptt_length} tokens of each document"
    run = describe_run(
        folder,
        model,
        data=Path(data_args.train_file).name if data_args.train_file else data_args.dataset_name or STANDARD_LIBRARY,
        results=results,
        procedure=f"{trainer.state.global_step:,} {steps}{duration}; {method}; seed {args.seed}. "
        f"The weights are those of step {trainer.state.best_global_step or trainer.state.global_step:,}.",
        command=command_of(sys.argv[1:]),
        reset_at_documents=reset_at_documents,
        resets={RESET_EVERY: short["loss"]},
        sample=text,
        start=data_args.prompt,
        datasets=[data_args.dataset_name] if data_args.dataset_name else None,
        **vars(card_args),
    )
    write_model_card(folder, run)
    print(f"\n{text}\n")
    for split, result in results.items():
        print(
            f"{split}: {result['loss']:.4f} nats per token, perplexity {result['perplexity']:.3f}, "
            f"{result['bits_per_byte']:.4f} bits per byte, {result['accuracy']:.2%} right, {result['tokens']:,} tokens"
        )
    print(f"validation with the state reset every {RESET_EVERY} tokens: {short['loss']:.4f} nats per token")
    print(f"The model, its card, metrics.json and learning_curve.png are in {folder}")


def machine() -> str:
    """What it ran on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads()} CPU cores"


def command_of(arguments: list[str]) -> str:
    """The command of a run as others can repeat it: from the beginning, without its author's folders and repository."""
    shown = []
    for flag, argument in itertools.pairwise(["", *arguments]):
        flag, name = flag.replace("-", "_"), argument.partition("=")[0].replace("-", "_")
        if name in NOT_REPEATED or (flag in NOT_REPEATED and not argument.startswith("--")):
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


def main(arguments: list[str]) -> None:
    with ExitStack() as held:  # what the run takes for itself, until it has ended
        try:
            model_args, data_args, card_args, optimization_args, training_args = parse(arguments)
            held.enter_context(take_folder(training_args, carried=data_args.batching == "lanes"))
            streams, batches, tokenizer, model = prepare(model_args, data_args, training_args)
            trainer = make_trainer(streams, batches, tokenizer, model, data_args, optimization_args, training_args)
            if trainer.is_fsdp_enabled:
                raise ValueError(
                    "train.py writes samples and measures in one process, and FSDP shares the model out among all: use "
                    "DDP, or a Trainer script of your own."
                )
        except (ValueError, StrictDataclassError) as error:  # a config wraps what it refuses in the second
            sys.exit(f"train.py: {error.__cause__ if isinstance(error, StrictDataclassError) else error}")
        except (HfHubHTTPError, httpx.HTTPError) as error:  # Trainer makes the repository before it trains
            sys.exit(f"train.py: {error}")
        try:
            train(trainer, streams, tokenizer, data_args, card_args)
        except ValueError as error:
            if "hf_lstm" not in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts:
                raise  # not in our words
            sys.exit(f"train.py: {error}")
        # DDP first, then what its processes talk through: the other way round gloo's threads can stall or abort the end.
        trainer.model_wrapped = trainer.model
        trainer.accelerator.free_memory()
        trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
