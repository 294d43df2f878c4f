"""The model card that a training run writes about itself."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
PACKAGES = ("hf-lstm", "torch", "transformers", "tokenizers", "datasets", "accelerate")


def describe_run(
    folder: str | Path,
    model,
    data: str,
    results: dict[str, dict],
    procedure: str,
    command: str,
    reset_at_documents: bool = False,
    resets: dict[int, float] | None = None,
    sample: str | None = None,
    start: str = "",
    **known,
) -> dict:
    """
    All that a card says, as a dict that JSON can hold: a card is rendered from it, today or later.

    Args:
        folder (`str` or `Path`): Where the model lies; its name is the model's.
        model (`LSTMForCausalLM`): The model.
        data (`str`): What it was trained on, in words.
        results (`dict`): What `evaluate_stream` returned of a `TokenStream`, by the name of the split.
        procedure (`str`): How it was trained, in words: sentences with units.
        command (`str`): The command that trained it.
        reset_at_documents (`bool`, defaults to `False`): Whether the state started anew with every document.
        resets (`dict[int, float]`, *optional*):
            The loss of the validation text, nats per token, if the state starts anew after so many tokens.
        sample (`str`, *optional*): A text the model wrote.
        start (`str`, defaults to `""`): What the snippet lets the model continue.
        known (*optional*):
            What only its author can say, left out where it is unknown or `None`: `license`, the model's, and `language`
            (`list[str]`), both as the Hub writes them, `data_license`, in words, and `datasets` (`list[str]`), on the Hub.
    """
    folder, config = Path(folder), model.config
    return {
        "name": folder.name,
        "folder": folder.as_posix() if not folder.is_absolute() else folder.name,
        "parameters": model.num_parameters(),
        "architecture": f"{config.num_hidden_layers} x {config.hidden_size}, vocabulary of {config.vocab_size:,}",
        "state_size": 2 * sum(config.cell_sizes),
        "data": data,
        "results": results,
        "procedure": procedure,
        "command": command,
        "state": "starting anew with every document" if reset_at_documents else "carried through the whole split",
        "resets": {str(tokens): loss for tokens, loss in (resets or {}).items()},
        "sample": sample,
        "start": start,
        "known": {name: value for name, value in known.items() if value},
        "versions": {"Python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def render_model_card(run: dict, picture: str = "learning_curve.png") -> str:
    """The card of a run that `describe_run` described, with metadata that the Hub reads; `picture` is its learning curve."""
    known = run.get("known", {})
    metadata = ModelCardData(
        **{name: known[name] for name in ("license", "language", "datasets") if name in known},
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf-lstm", "lstm"],
        model_name=run["name"],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=run["data"],
                dataset_split=split,
                metric_type=metric,
                metric_value=round(result[metric], 6),
            )
            for split, result in run["results"].items()
            for metric in ("loss", "perplexity", "bits_per_byte", "accuracy")
        ],
    )
    values = run | {
        "start": run["start"].replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"),
        "versions": ", ".join(f"{name} {number}" for name, number in run["versions"].items()),
        "picture": picture,
        "data_license": known.get("data_license"),
    }
    return str(ModelCard.from_template(metadata, template_path=str(TEMPLATE), **values))


def write_model_card(folder: str | Path, run: dict) -> None:
    """Write `run.json`, what `describe_run` returned, and `README.md`, the card, into a model's folder."""
    (Path(folder) / "run.json").write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (Path(folder) / "README.md").write_text(render_model_card(run), encoding="utf-8")
