"""Report of a training run: a sample, losses, the learning curve, and the sentences of its model card."""

import itertools
import math
import shlex
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer

from hf_lstm.data import TokenStream
from hf_lstm.evaluation import evaluate_stream
from hf_lstm.model.modeling_lstm import LSTMForCausalLM
from hf_lstm.tokenizers import encode, ends_lines, in_direction

RESET_EVERY = 256  # tokens; the second loss that is reported shows what the model knows from so short a past
SAMPLE_LENGTH = 300  # tokens
ONE_PASS = (
    "This run read each training text once: a gap between the curves is not overfitting.\n"
    "The validation text is another one, and may be harder."
)
# Flags that others who repeat a run leave out: those of its author's folders and repository.
NOT_REPEATED = ("__resume_from_checkpoint", "__push_to_hub", "__hub_model_id", "__hub_private_repo", "__hub_revision")


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, direction: str = "forward") -> list[int]:
    """
    Encode the prompt of a sample for a model of this `config.direction`; an empty one is the `<eos>` that stands before
    each document.

    Raises:
        ValueError: if no token is left, since the tokenizer knows none of its characters or has no `<eos>`.
    """
    ids = encode([prompt], tokenizer, direction=direction)[0].tolist() if prompt else [tokenizer.eos_token_id]
    if ids in ([], [None]):
        raise ValueError(f"`prompt` ({prompt!r}) has no token in the tokenizer's vocabulary: give another.")
    return ids


def write_sample(
    model: LSTMForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, length: int | None = None
) -> str:
    """
    Let the model write `length` tokens after a prompt, at a temperature of 0.7, with the same random numbers each time and
    without touching the generators of the run.

    Args:
        model (`LSTMForCausalLM`): The model; it is left in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        prompt (`str`): Text to continue; an empty one begins a document.
        length (`int`, *optional*): Tokens to write at most, 300 by default.

    Returns:
        `str`: the prompt and what was written, which stands before it if the model reads backward.
    """
    model.eval()
    direction = model.config.direction
    ids = torch.tensor([prompt_ids(prompt, tokenizer, direction)], device=model.device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        written = model.generate(  # type: ignore[misc]  # transformers annotates `self` twice
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=SAMPLE_LENGTH if length is None else length,
            do_sample=True,
            temperature=0.7,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=None if ends_lines(tokenizer) else tokenizer.eos_token_id,
            return_dict_in_generate=False,
        )
    text = str(tokenizer.decode(written[0], skip_special_tokens=not ends_lines(tokenizer)))
    return in_direction(text, direction, tokenizer)


def describe_loss(loss: float, bytes_per_token: float) -> str:
    """Say a loss (nats per token) in the units that people read."""
    bits = loss / math.log(2)
    perplexity = math.exp(loss) if loss < 700 else math.inf  # beyond a float
    return (
        f"{loss:.4f} nats per token, perplexity {perplexity:.2f}, {bits:.3f} bits per token, "
        f"{bits / bytes_per_token:.3f} per byte"
    )


def measure(
    model: LSTMForCausalLM, streams: dict[str, TokenStream], reset_at_documents: bool
) -> tuple[dict[str, dict[str, Any]], float]:
    """
    Evaluate a model on every token of the validation and test streams.

    Returns:
        `tuple`: by the name of the split what `evaluate_stream` returns, and the validation loss (nats per token) with the
        state reset every `RESET_EVERY` tokens.
    """
    results: dict[str, dict[str, Any]] = {
        split: evaluate_stream(model, streams[split], reset_at_documents=reset_at_documents)
        for split in ("validation", "test")
        if split in streams
    }
    short: dict[str, Any] = evaluate_stream(
        model,
        streams["validation"],
        bptt_length=16 * RESET_EVERY,
        reset_at_documents=reset_at_documents,
        reset_every=RESET_EVERY,
    )
    return results, short["loss"]


def collect_metrics(
    results: dict[str, dict[str, Any]], reset_loss: float, parameters: int, steps: int, seconds: float | None
) -> dict[str, Any]:
    """Collect the contents of metrics.json: the results of `measure`, and the size, steps and time (seconds) of the run."""
    metrics = {f"eval_{name}": value for name, value in results["validation"].items()}
    metrics |= {f"test_{name}": value for name, value in results.get("test", {}).items()}
    metrics |= {f"eval_loss_reset_every_{RESET_EVERY}": reset_loss}
    metrics |= {"train_steps": steps, "parameters": parameters}
    return metrics if seconds is None else metrics | {"train_runtime": seconds}


def describe_procedure(
    trainer: Trainer,
    batching: str,
    bptt_length: int,
    reset_at_documents: bool,
    seconds: float | None = None,
    base: str | None = None,
) -> str:
    """
    Say how a model was trained, in the sentences of its card.

    Args:
        trainer (`Trainer`): The trainer, after `train()`.
        batching (`str`): `lanes`, `packed` or `padded`.
        bptt_length (`int`): Tokens that gradients ran back through.
        reset_at_documents (`bool`): Whether lanes started each document from a zero state.
        seconds (`float`, *optional*): How long it took, if all of it was measured.
        base (`str`, *optional*): The model whose weights it began with, if they were not random.
    """
    args, state = trainer.args, trainer.state
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if batching == "lanes":
        tokens = batch * bptt_length
        steps = f"steps of {tokens:,} tokens, {state.global_step * tokens / 1e6:.2f} million in all"
        method = f"truncated backpropagation through {bptt_length} tokens with the state carried on"
        method += " within each document" if reset_at_documents else ""
    else:
        steps = f"steps of {batch:,} documents, {batching}"
        method = f"backpropagation through at most {bptt_length} tokens of each document"
    duration = "" if seconds is None else f", in {seconds:.0f} s on {describe_machine()}"
    start = "" if base is None else f"; begun with the weights of {_without_folder(base)}"
    return (
        f"{state.global_step:,} {steps}{duration}; {method}{start}; seed {args.seed}. "
        f"The weights are those of step {state.best_global_step or state.global_step:,}."
    )


def describe_machine() -> str:
    """Name the devices that this process computes on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads()} CPU cores"


def repeatable_command(script: str, arguments: list[str]) -> str:
    """Write the command of a run as others can repeat it: from the beginning, without its author's folders and repository."""
    shown: list[str] = []
    for flag, argument in itertools.pairwise(["", *arguments]):
        flag, name = flag.replace("-", "_"), argument.partition("=")[0].replace("-", "_")
        if name in NOT_REPEATED or (flag in NOT_REPEATED and not argument.startswith("--")):
            continue
        name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        shown.append(name + equals + _without_folder(value))
    return shlex.join(["python", script, *shown])


def _without_folder(value):
    return Path(value).name if value.startswith("/") and Path(value).exists() else value


def draw_learning_curve(history: list[dict[str, Any]], path: Path) -> None:
    """
    Draw training and validation loss (nats per token) over the steps, from Trainer's `log_history`. Of a run of one pass
    the picture says how to read a gap between the two.
    """
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
    if all(entry.get("epoch", 0) <= 1 for entry in history):
        figure.supxlabel(ONE_PASS, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
