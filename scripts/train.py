"""Train an LSTM language model, watch it learn, and keep everything it takes to use it.

python scripts/train.py --output_dir runs/first
python scripts/train.py mytext.txt --output_dir runs/mytext
python scripts/train.py --recipe quickstart --train_file 'books/*.txt' --output_dir runs/books
python scripts/train.py --model_name_or_path runs/first --train_file more.txt --output_dir runs/second

Without a corpus it learns Python, from small modules of the standard library. A text is a file, a folder of .txt files, or
a pattern. A recipe is a file of flags, or the name of one in scripts/recipes; flags on the command line override it.
`--output_dir` receives the best model, its tokenizer, metrics.json, learning_curve.png, a model card (README.md, rendered
from run.json) and the checkpoints to resume from.

To write a training script of your own, begin with the sixty lines of train_minimal.py:

python scripts/train_minimal.py
"""

import json
import shlex
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from huggingface_hub.utils import httpx
from screen import prepare_screen, shown
from standard_library import DESCRIPTION
from train_arguments import (
    CardArguments,
    DataArguments,
    ModelArguments,
    OptimizationArguments,
    TrainArguments,
    load_saved,
    name_text,
    parse,
)
from train_data import LEARNT, TrainingData, describe, prepare_data
from train_folder import take_folder
from train_privacy import PrivacyArguments
from train_progress import ProgressLines, show_progress
from train_words import push_word_checkpoints, word_checkpoints
from transformers import GenerationConfig, Trainer, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from hf_lstm import LSTMConfig, LSTMForCausalLM
from hf_lstm.hub import push_folder
from hf_lstm.model_card import describe_run, write_model_card
from hf_lstm.tokenizers import check_tokenizer, ends_lines
from hf_lstm.training import (
    NTASGD,
    DivergenceCallback,
    EMAAdamW,
    FinishedRunCallback,
    MetricsCallback,
    NonMonotonicTrigger,
    PrivateTrainer,
    TruncatedBPTTCallback,
    parameter_groups,
)
from hf_lstm.training.arguments import check_arguments, check_penalties
from hf_lstm.training.processes import end_processes
from hf_lstm.training.report import (
    RESET_EVERY,
    collect_metrics,
    describe_loss,
    describe_procedure,
    draw_learning_curve,
    measure,
    repeatable_command,
    write_sample,
)

FIRST_SAMPLE = 100  # step; the first evaluation, by default at step 500, would be long to wait for


class ProgressWithSamples(ProgressLines):
    """
    Evaluates once more at the last step. Prints the loss of each evaluation and a sample, a first one at step 100; after the
    last step the report prints one of the best model.
    """

    def __init__(self, data: TrainingData, data_args: DataArguments):
        super().__init__()
        self.data, self.data_args = data, data_args

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step >= state.max_steps and args.eval_strategy == "steps":
            control.should_evaluate = True
        if state.global_step == FIRST_SAMPLE and not control.should_evaluate and state.is_world_process_zero:
            self._say_sample(f"step {state.global_step:,}", kwargs["model"])

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        if state.is_world_process_zero and "eval_loss" in metrics:
            validation = self.data.streams["validation"]
            loss = describe_loss(metrics["eval_loss"], validation.num_bytes / len(validation))
            line = f"step {state.global_step:,}: validation, {self.data_args.batching}, {loss}"
            if state.global_step < state.max_steps:
                self._say_sample(line, model)
            else:
                self.say(line)

    def _say_sample(self, line, model):
        self.say(f"{line}; a sample:\n{shown(write_sample(model, self.data.tokenizer, self.data_args.prompt))}\n")


def make_model(model_args: ModelArguments, data_args: DataArguments, args: TrainArguments, tokenizer):
    """Make a model of the flags, or load the one to train on from."""
    if data_args.model_name_or_path is not None:
        model = load_saved(LSTMForCausalLM, data_args.model_name_or_path, dtype=torch.float32)
        check_tokenizer(model, tokenizer)
        config = model.config
    else:
        config = LSTMConfig(
            vocab_size=max(tokenizer.get_vocab().values()) + 1,  # ids may have gaps
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **vars(model_args),
        )
        model = LSTMForCausalLM(config)
    if args.resume_from_checkpoint is not None:
        saved = LSTMConfig.from_pretrained(args.resume_from_checkpoint)
        for name in ("vocab_size", "last_cell_size", "output_projection_size", *vars(model_args)):
            if getattr(saved, name) != getattr(config, name):
                raise ValueError(
                    f"`{name}` is {getattr(saved, name)} in {args.resume_from_checkpoint} and would be "
                    f"{getattr(config, name)}: resume with the corpus and the flags that the run was started with."
                )
    check_penalties(args, config)
    return model


def make_optimizer(model, optimization_args: OptimizationArguments, args: TrainArguments) -> tuple[type, dict]:
    """Choose the optimizer's class and arguments, in the form that Trainer takes."""
    groups = parameter_groups(model, args.weight_decay, optimization_args.no_decay)
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if optimization_args.averaging == "nt_asgd":
        if args.eval_strategy == "no":
            raise ValueError("`--averaging nt_asgd` reads validation losses: `--eval_strategy` must not be `no`.")
        if optimizer_class not in (torch.optim.AdamW, torch.optim.SGD):
            raise ValueError(f"`--averaging nt_asgd` averages SGD: leave `--optim` {args.optim} out.")
        return NTASGD, {"params": groups, "lr": args.learning_rate, "patience": optimization_args.patience}
    if optimization_args.averaging == "ema":
        if optimizer_class is not torch.optim.AdamW:
            raise ValueError(f"`--averaging ema` averages AdamW: leave `--optim` {args.optim} out.")
        optimizer_class, options = EMAAdamW, options | {"decay": optimization_args.ema_decay}
    return optimizer_class, {"params": groups} | options


def make_trainer(
    model,
    data: TrainingData,
    data_args: DataArguments,
    privacy_args: PrivacyArguments,
    optimization_args: OptimizationArguments,
    args: TrainArguments,
    progress: ProgressLines,
):
    """Make the stock Trainer, or the private one, with the callbacks that these arguments ask for."""
    lanes = data_args.batching == "lanes"
    callbacks = [
        TruncatedBPTTCallback(data_args.state_drop_probability) if lanes else FinishedRunCallback(),
        DivergenceCallback(),
        MetricsCallback(),
    ]
    if optimization_args.averaging == "nt_asgd":
        callbacks.append(NonMonotonicTrigger())
    if data_args.checkpoint_at_words is not None:
        callbacks.append(word_checkpoints(data, data_args))
    optimizer_class, options = make_optimizer(model, optimization_args, args)
    if optimization_args.averaging is not None:
        optimizer_class(**options)  # refuses invalid options now
    kind, budget = Trainer, {}
    if privacy_args.dp_epsilon is not None:
        kind = PrivateTrainer
        budget = {"epsilon": privacy_args.dp_epsilon, "delta": privacy_args.dp_delta, "clip": privacy_args.dp_clip}
    trainer = kind(
        model=model,
        args=args,
        train_dataset=data.datasets["train"],
        eval_dataset=data.datasets["validation"],
        processing_class=data.tokenizer,
        data_collator=data.collator,
        optimizer_cls_and_kwargs=(optimizer_class, options),
        callbacks=callbacks,
        **budget,
    )
    show_progress(trainer, progress)
    for reporter in get_reporting_integration_callbacks(args.report_to):
        trainer.remove_callback(reporter)  # and last again, to see what the callbacks above add to the logs
        trainer.add_callback(reporter)
    if trainer.is_fsdp_enabled:
        raise ValueError(
            "train.py writes samples and measures in one process, and FSDP shares the model out among all: use "
            "DDP, or a Trainer script of your own."
        )
    return trainer


def train(trainer: Trainer, data: TrainingData, data_args: DataArguments) -> float:
    """Train and save the model; returns the seconds that training took."""
    model, args = trainer.model, trainer.args
    if trainer.is_world_process_zero():
        print(f"{model.num_parameters():,} parameters, vocabulary of {len(data.tokenizer):,}")
    kept = None if data_args.model_name_or_path is None else model.generation_config
    if kept is not None:  # Trainer would change its special tokens, and say so
        model.generation_config = GenerationConfig.from_model_config(model.config)
    outcome = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if kept is not None:
        model.generation_config = kept
    else:
        if data_args.streaming or len(data.streams["train"].document_starts) > 1:
            model.generation_config.bos_token_id = data.tokenizer.eos_token_id  # `generate()` alone begins a document
        if ends_lines(data.tokenizer):
            model.generation_config.eos_token_id = None  # a text goes on after a line
    trainer.save_model()
    return outcome.metrics["train_runtime"]


def report(trainer, data: TrainingData, seconds: float, data_args: DataArguments, card_args: CardArguments) -> None:
    """Measure the saved model on every token; write metrics, learning curve and card; print the results."""
    model, folder = trainer.model, Path(trainer.args.output_dir)
    reset_at_documents = data_args.starts_documents_at_zero
    whole = seconds if trainer.args.resume_from_checkpoint is None else None  # of a resumed run Trainer saw a part
    results, reset_loss = measure(model, data.streams, reset_at_documents)
    metrics = collect_metrics(results, reset_loss, model.num_parameters(), trainer.state.global_step, whole)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw_learning_curve(trainer.state.log_history, folder / "learning_curve.png")
    sample = write_sample(model, data.tokenizer, data_args.prompt)
    file = Path(data_args.train_file).name if data_args.train_file else None
    run = describe_run(
        folder,
        model,
        data=card_args.data_description or file or data_args.dataset_name or DESCRIPTION,
        results=results,
        procedure=describe_procedure(
            trainer,
            data_args.batching,
            data_args.bptt_length,
            data_args.reset_at_documents,
            seconds=whole,
            base=data_args.model_name_or_path,
        ),
        command=repeatable_command("scripts/train.py", name_text(sys.argv[1:])),
        reset_at_documents=reset_at_documents,
        resets={RESET_EVERY: reset_loss},
        sample=sample,
        start=data_args.prompt,
        datasets=[data_args.dataset_name] if data_args.dataset_name else None,
        license=card_args.license,
        language=card_args.language,
        data_license=card_args.data_license,
    )
    if isinstance(trainer, PrivateTrainer):
        learnt = data_args.tokenizer in LEARNT and data_args.model_name_or_path is None
        run["differential_privacy"] = trainer.describe() | {"tokenizer_learnt": learnt}
    write_model_card(folder, run)
    print(
        f"A sample of the model of step {trainer.state.best_global_step or trainer.state.global_step:,}:\n{sample}\n"
    )
    for split, result in results.items():
        print(
            f"{split}: {result['loss']:.4f} nats per token, perplexity {result['perplexity']:.3f}, "
            f"{result['bits_per_byte']:.4f} bits per byte, {result['accuracy']:.2%} right, {result['tokens']:,} tokens"
        )
    print(f"validation with the state reset every {RESET_EVERY} tokens: {reset_loss:.4f} nats per token")
    print(f"The model, its card, metrics.json and learning_curve.png are in {folder}")
    prompt = ["--prompt", data_args.prompt] if data_args.prompt.strip() else []
    print(f"Let it write: {sibling_command('generate.py', '--model', str(folder), *prompt)}")


def sibling_command(script: str, *arguments: str) -> str:
    """Write the command of another script, whose folder is named as that of this one was."""
    return shlex.join(["python", str(Path(sys.argv[0]).with_name(script)), *arguments])


def publish(trainer: Trainer, args: TrainArguments) -> None:
    """Push the model's folder to the Hub, or say how to do it later."""
    try:
        commit = push_folder(args.output_dir, trainer.hub_model_id, revision=args.hub_revision)
        push_word_checkpoints(args.output_dir, trainer.hub_model_id)
    except (HfHubHTTPError, httpx.HTTPError, RuntimeError) as error:
        again = ["python", "scripts/push.py", "--model", args.output_dir, "--repo", trainer.hub_model_id]
        again = shlex.join(again + (["--revision", args.hub_revision] if args.hub_revision else []))
        sys.exit(f"train.py: {error.__cause__ or error}\nThe model is saved, and not published: `{again}` does it.")
    print(f"uploaded: {commit.commit_url}")


def run(arguments: list[str], held: ExitStack) -> None:
    """Read the arguments, prepare the data, make model and Trainer, train, report and publish."""
    model_args, data_args, card_args, privacy_args, optimization_args, args = parse(arguments, __doc__)
    held.enter_context(take_folder(args, carried=data_args.batching == "lanes"))
    if find_spec("matplotlib") is None:
        raise ValueError('The learning curve needs matplotlib: `pip install "hf-lstm[train]"`.')
    if data_args.batching == "lanes":
        check_arguments(args)
    set_seed(args.seed)

    data = prepare_data(data_args, args, model_args.direction, truncate=privacy_args.dp_epsilon is not None)
    model = make_model(model_args, data_args, args, data.tokenizer)
    if args.process_index == 0 and args.resume_from_checkpoint is None:
        describe(data, model.config.vocab_size, data_args.model_name_or_path)
    if privacy_args.dp_epsilon is not None and data_args.tokenizer in LEARNT and data_args.model_name_or_path is None:
        print(
            f"Warning: `--tokenizer` {data_args.tokenizer} is learnt from the private text, and its vocabulary tells of it: "
            "`byte`, or the folder of a tokenizer of public text, protects that too.",
            file=sys.stderr,
        )
    progress = ProgressWithSamples(data, data_args)
    held.callback(progress.close)  # before the sentence with which a run may end
    trainer = make_trainer(model, data, data_args, privacy_args, optimization_args, args, progress)
    # With `push_to_hub`, `save_model` would push, with a card of Trainer's own.
    to_publish, args.push_to_hub = args.push_to_hub, False
    seconds = train(trainer, data, data_args)
    if trainer.is_world_process_zero():
        report(trainer, data, seconds, data_args, card_args)
        if to_publish:
            publish(trainer, args)
        else:
            repo = f"YOUR_NAME/{Path(args.output_dir).resolve().name}"
            flags = ["--model", args.output_dir, "--repo", repo, "--private", "true"]
            print(f"Publish it: {sibling_command('push.py', *flags)}")
    end_processes(trainer)


def main(arguments: list[str]) -> None:
    try:
        with ExitStack() as held:  # the lock on `--output_dir` and the bar, until the run has ended
            run(arguments, held)
    except KeyboardInterrupt as stopped:
        if str(stopped):  # in the process that speaks for all
            print(f"train.py: {stopped}", file=sys.stderr)
        sys.exit(130)  # as a shell says that Ctrl-C ended a program
    except StrictDataclassError as error:  # a config wraps the ValueErrors of its checks
        sys.exit(f"train.py: {error.__cause__}")
    except (ValueError, HfHubHTTPError, httpx.HTTPError) as error:  # Trainer makes the repository before it trains
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    prepare_screen()
    main(sys.argv[1:])
