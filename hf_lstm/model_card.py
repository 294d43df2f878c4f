"""The model card that a training run writes about itself."""

import platform
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
PACKAGES = ("hf-lstm", "torch", "transformers", "tokenizers", "datasets", "accelerate")


def write_model_card(
    folder: str | Path,
    model,
    data: str,
    results: dict[str, dict],
    procedure: str,
    command: str,
    reset_at_documents: bool = False,
    sample: str | None = None,
    start: str = "",
) -> Path:
    """
    Write `README.md` into a model's folder, with metadata that the Hub reads.

    Args:
        folder (`str` or `Path`): Where the model lies; its name is the model's.
        model (`LSTMForCausalLM`): The model.
        data (`str`): What it was trained on, in words.
        results (`dict`): What `evaluate_stream` returned of a `TokenStream`, by the name of the split.
        procedure (`str`): How it was trained, in words: sentences with units.
        command (`str`): The command that trained it.
        reset_at_documents (`bool`, defaults to `False`): Whether the state started anew with every document.
        sample (`str`, *optional*): A text the model wrote.
        start (`str`, defaults to `""`): What the snippet lets the model continue.

    Returns:
        `Path`: The card.
    """
    folder = Path(folder)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf-lstm", "lstm"],
        model_name=folder.name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=data,
                dataset_split=split,
                metric_type=metric,
                metric_value=round(result[metric], 6),
            )
            for split, result in results.items()
            for metric in ("loss", "perplexity", "bits_per_byte", "accuracy")
        ],
    )
    config = model.config
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=folder.name,
        folder=folder.as_posix() if not folder.is_absolute() else folder.name,
        parameters=model.num_parameters(),
        architecture=f"{config.num_hidden_layers} x {config.hidden_size}, vocabulary of {config.vocab_size:,}",
        state_size=2 * sum(config.cell_sizes),
        data=data,
        results=results,
        procedure=procedure,
        command=command,
        state="starting anew with every document" if reset_at_documents else "carried through the whole split",
        sample=sample,
        start=start.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"),
        versions=", ".join([f"Python {platform.python_version()}"] + [f"{name} {version(name)}" for name in PACKAGES]),
    )
    path = folder / "README.md"
    card.save(path)
    return path
