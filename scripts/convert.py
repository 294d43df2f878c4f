"""Export a model to another format.

python scripts/convert.py --to onnx --model runs/first --output_dir runs/first/onnx
python scripts/convert.py --to torch --model runs/first --output_dir runs/first/torch
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import hf_lstm  # noqa: F401  registers the model
from hf_lstm.convert.checking import check_file


@dataclass
class Arguments:
    """Arguments of the export."""

    to: Literal["onnx", "torch"] = field(
        metadata={
            "help": "onnx: graphs that run without Python, in float32 and in 8 bits; torch: a file of torch.export."
        }
    )
    model: str = field(metadata={"help": "A model folder or a model on the Hub."})
    output_dir: str = field(metadata={"help": "The output folder."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run the Python files of the model."})


def main(arguments: Arguments) -> None:
    folder = Path(arguments.output_dir)
    trust = {"trust_remote_code": arguments.trust_remote_code}
    if arguments.to == "torch":
        from hf_lstm.convert.torch_export import difference, export_step

        model = AutoModelForCausalLM.from_pretrained(arguments.model, **trust)
        report(export_step(model, folder / "step.pt2"), model, difference, model.dtype)
        return

    from hf_lstm.convert.onnx import difference, export_onnx, quantize_onnx

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, **trust)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, **trust)
    paths = export_onnx(model, tokenizer, folder)
    for path in paths:
        report(path, model, difference, model.dtype)
    for path in paths:
        report(quantize_onnx(path), model, difference, None)
    runner = shutil.copy(Path(__file__).with_name("run_onnx.py"), folder)
    print(f'To generate text with onnxruntime and numpy alone: python {runner} {folder} "a prompt"')


def report(path: Path, model, difference, dtype: torch.dtype | None) -> None:
    """Run an exported file, compare it with the model and report the result."""
    found = check_file(path, lambda: difference(model, path), dtype)
    print(
        f"written to {path}, {path.stat().st_size / 1e6:.1f} MB; "
        f"its log-probabilities differ from the model's by {found:.2g} nats at most"
    )


if __name__ == "__main__":
    try:
        main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
    except (ValueError, OSError) as error:
        sys.exit(f"convert.py: {error}")
