"""Model cards of training runs."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from hf_lstm.model.cells_lstm import CELLS
from hf_lstm.model.configuration_lstm import WINDOW_LAYER

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
PACKAGES = ("hf-lstm", "torch", "transformers", "tokenizers", "datasets", "accelerate")


def describe_run(
    folder: str | Path,
    model: PreTrainedModel,
    data: str,
    results: dict[str, dict],
    procedure: str,
    command: str,
    reset_at_documents: bool = False,
    resets: dict[int, float] | None = None,
    sample: str | None = None,
    start: str = "",
    **known: str | list[str] | None,
) -> dict:
    """
    Return the content of a model card as a dict for JSON, from which the card can be rendered now or later.

    Args:
        folder (`str` or `Path`): The model folder. Its name is the name of the model.
        model (`LSTMForCausalLM`): The model.
        data (`str`): Description of the training data.
        results (`dict`): Results of `evaluate_stream` by split.
        procedure (`str`): Description of the training, in sentences, with units.
        command (`str`): The command that trained it.
        reset_at_documents (`bool`, defaults to `False`): Whether the state was reset at every document.
        resets (`dict[int, float]`, *optional*):
            Validation loss, in nats per token, by the number of tokens after which the state is reset.
        sample (`str`, *optional*): A text that the model generated.
        start (`str`, defaults to `""`): The prompt of the code example.
        known (*optional*):
            Facts that only the author knows; those not given or `None` are left out: `license` of the model and
            `language` (`list[str]`), both as identifiers of the Hub, `data_license` (a description) and `datasets`
            (`list[str]`, names on the Hub).
    """
    folder, config = Path(folder), model.config
    cell, kinds = CELLS[config.cell_type], config.layer_types
    windows = kinds.count(WINDOW_LAYER)
    attention = f", attention over {config.attention_window:,} tokens in {windows} of the layers" if windows else ""
    return {
        "name": folder.name,
        "folder": folder.as_posix() if not folder.is_absolute() else folder.name,
        "parameters": model.num_parameters(),
        "architecture": f"{config.num_hidden_layers} x {config.hidden_size}, vocabulary of {config.vocab_size:,}{attention}",
        "cell": cell.title,
        "direction": config.direction,
        "state_size": config.state_size,
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
    """Render the card of a run that `describe_run` returned; `picture` is the file of the learning curve."""
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
    cell = run.get("cell", CELLS["lstm"].title)
    values = run | {
        "cell": cell[0].upper() + cell[1:],
        "start": run["start"].replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"),
        "versions": ", ".join(f"{name} {number}" for name, number in run["versions"].items()),
        "picture": picture,
        "backward": run.get("direction") == "backward",
        "data_license": known.get("data_license"),
    }
    return str(ModelCard.from_template(metadata, template_path=str(TEMPLATE), **values))


def write_model_card(folder: str | Path, run: dict) -> None:
    """Write the output of `describe_run` as `run.json`, and the card as `README.md`, into a model folder."""
    (Path(folder) / "run.json").write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (Path(folder) / "README.md").write_text(render_model_card(run), encoding="utf-8")


def add_to_model_card(folder: str | Path, **facts) -> None:
    """
    Add facts to the card of a model folder, in `run.json` and `README.md`.

    Args:
        folder (`str` or `Path`): A folder in which [`write_model_card`] wrote both.
        facts: `memorisation`, which `scripts/evaluate.py privacy` measures.
    """
    run = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))
    write_model_card(folder, run | facts)
