"""Write a model in another format.

python scripts/convert.py --to onnx --model runs/first --output_dir runs/first/onnx
python scripts/convert.py --to torch --model runs/first --output_dir runs/first/torch
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import hf_lstm  # noqa: F401  registers the model


@dataclass
class Arguments:
    """From what to what."""

    to: Literal["onnx", "torch"] = field(
        metadata={
            "help": "onnx: graphs that run without Python, in float32 and in 8 bits; torch: torch.export's file."
        }
    )
    model: str = field(metadata={"help": "A model's folder, or its name on the Hub."})
    output_dir: str = field(metadata={"help": "The folder to write into."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code that comes with the model."})


def main(arguments: Arguments) -> None:
    model = AutoModelForCausalLM.from_pretrained(arguments.model, trust_remote_code=arguments.trust_remote_code)
    folder = Path(arguments.output_dir)
    if arguments.to == "torch":
        from hf_lstm.convert.torch_export import export_step

        print(f"written to {export_step(model, folder / 'step.pt2')}")
        return

    from hf_lstm.convert.onnx import difference, export_onnx, quantize_onnx

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=arguments.trust_remote_code)
    paths = export_onnx(model, tokenizer, folder)
    for path in paths + [quantize_onnx(path) for path in paths]:
        print(
            f"written to {path}, {path.stat().st_size / 1e6:.1f} MB; "
            f"its log-probabilities differ from the model's by {difference(model, path):.2g} nats at most"
        )
    runner = shutil.copy(Path(__file__).with_name("run_onnx.py"), folder)
    print(f'python {runner} {folder} "a beginning" lets it write, with onnxruntime and numpy alone')


if __name__ == "__main__":
    try:
        main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
    except (ValueError, OSError) as error:
        sys.exit(f"convert.py: {error}")
