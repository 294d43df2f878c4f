"""Convert a checkpoint of another program into a model folder, or export a model to another format.

python scripts/convert.py --from word-language-model model.pt --vocabulary vocab.txt --output_dir runs/gulordava
python scripts/convert.py --from awd-lstm-lm WT2.pt --vocabulary data/wikitext-2 --output_dir runs/awd
python scripts/convert.py --from torch-lstm state_dict.pt --vocabulary characters.json --output_dir runs/mine
python scripts/convert.py --from fastai model.pth --vocabulary itos.pkl --output_dir runs/fastai
python scripts/convert.py --from flair best-lm.pt --output_dir runs/flair
python scripts/convert.py --from torch-rnn checkpoint_10000.t7 --output_dir runs/torch-rnn
python scripts/convert.py --from char-rnn lm_lstm_epoch50.00_1.3.t7 --output_dir runs/char-rnn
python scripts/convert.py --from keras model.keras --vocabulary tokenizer.json --output_dir runs/keras
python scripts/convert.py --to onnx --model runs/first --output_dir runs/first/onnx
python scripts/convert.py --to torch --model runs/first --output_dir runs/first/torch
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from command_line import Parser
from saved_models import check_source
from screen import prepare_screen
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lstm  # noqa: F401  registers the model
from hf_lstm.convert.checking import check_file
from hf_lstm.convert.folder import FORMATS, convert_checkpoint
from hf_lstm.convert.torch_lstm import Options


@dataclass
class Arguments:
    """Arguments of both directions."""

    output_dir: str = field(metadata={"help": "The output folder."})
    from_: str | None = field(
        default=None,
        metadata={
            "aliases": ["--from"],
            "help": f"The program that wrote SOURCE: {', '.join(FORMATS)}.",
        },
    )
    vocabulary: str | None = field(
        default=None,
        metadata={
            "help": "With --from: a file with one token a line, a JSON list or dictionary, a tokenizer.json, or the folder of the corpus; for fastai its itos.pkl; flair and char-rnn need none."
        },
    )
    cell_type: Literal["lstm", "gru", "rnn_tanh", "rnn_relu"] | None = field(
        default=None, metadata={"help": "With --from: the cell, where a state_dict of nn.RNN does not tell."}
    )
    embedding: str | None = field(
        default=None, metadata={"help": "With --from: the name of the embedding in a state_dict, such as encoder."}
    )
    recurrent: list[str] | None = field(
        default=None,
        metadata={
            "help": "With --from: the names of the recurrent modules, such as rnn, the first one first; SOURCE stands before them."
        },
    )
    decoder: str | None = field(
        default=None, metadata={"help": "With --from: the name of the output layer, such as decoder."}
    )
    config: str | None = field(
        default=None, metadata={"help": "With --from keras: the JSON of the model, for a .weights.h5 file."}
    )
    text: str | None = field(
        default=None, metadata={"help": "With --from: a text file for the check, by default the vocabulary."}
    )
    to: Literal["onnx", "torch"] | None = field(
        default=None,
        metadata={
            "help": "onnx: graphs that run without Python, in float32 and in 8 bits; torch: a file of torch.export."
        },
    )
    model: str | None = field(default=None, metadata={"help": "With --to: a model folder or a model on the Hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "With --to: whether to run the Python files of the model."}
    )


def main(arguments: Arguments, source: str | None) -> None:
    check_arguments(arguments, source)
    if arguments.from_ is not None:
        import_checkpoint(arguments, source)
    elif arguments.to == "torch":
        export_torch(arguments)
    else:
        export_onnx(arguments)


def check_arguments(arguments: Arguments, source: str | None) -> None:
    """Raise `ValueError` for flags of one direction given with the other."""
    if (arguments.from_ is None) == (arguments.to is None):
        raise ValueError(
            "give either `--from FORMAT SOURCE`, to convert a checkpoint, or `--to FORMAT --model MODEL`, to export one."
        )
    of_from = ("vocabulary", "cell_type", "embedding", "recurrent", "decoder", "config", "text")
    foreign = ("model", "trust_remote_code") if arguments.to is None else of_from
    given = [f"--{name}" for name in foreign if getattr(arguments, name)]
    if arguments.to is not None and source is not None:
        given.append(source)
    if given:
        direction = "--from" if arguments.to is None else "--to"
        raise ValueError(f"`{' '.join(given)}` has no meaning with `{direction}`: leave it out.")
    if arguments.to is None and arguments.from_ not in FORMATS:
        raise ValueError(f"`--from` ({arguments.from_}) must be one of {', '.join(FORMATS)}.")
    if arguments.config is not None and arguments.from_ != "keras":
        raise ValueError(f"`--config` has no meaning with `--from {arguments.from_}`: leave it out.")
    if arguments.to is None and source is None:
        raise ValueError(f"`--from {arguments.from_}` needs the file to convert after it.")
    if arguments.to is not None and arguments.model is None:
        raise ValueError(f"`--to {arguments.to}` needs `--model`, a model folder or a model on the Hub.")
    if arguments.to is not None:
        check_source(arguments.model)


def import_checkpoint(arguments: Arguments, source: str) -> None:
    options = Options(
        vocabulary=arguments.vocabulary,
        cell_type=arguments.cell_type,
        embedding=arguments.embedding,
        recurrent=arguments.recurrent,
        decoder=arguments.decoder,
        config=arguments.config,
    )
    result = convert_checkpoint(arguments.from_, source, arguments.output_dir, options, arguments.text)
    for note in result.notes:
        print(note)
    print(
        f"loss of {result.tokens:,} tokens, in nats per token: {result.source_loss:.6f} by the weights and equations of "
        f"{source} in numpy, {result.loss:.6f} by the converted model"
    )
    print(
        f"written to {arguments.output_dir}, {result.model.num_parameters():,} parameters; README.md is its model card"
    )
    print(f'To write with it: python scripts/generate.py --model {arguments.output_dir} --prompt "..."')


def export_torch(arguments: Arguments) -> None:
    from hf_lstm.convert.torch_export import difference, export_step

    model = AutoModelForCausalLM.from_pretrained(arguments.model, trust_remote_code=arguments.trust_remote_code)
    report(export_step(model, Path(arguments.output_dir) / "step.pt2"), model, difference, model.dtype)


def export_onnx(arguments: Arguments) -> None:
    from hf_lstm.convert.onnx import difference, export_onnx, quantize_onnx

    trust = {"trust_remote_code": arguments.trust_remote_code}
    folder = Path(arguments.output_dir)
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
    prepare_screen()
    parser = Parser(Arguments, __doc__)
    parser.usage = "%(prog)s [SOURCE] [--FLAG VALUE ...]"
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="With --from: the file to convert.")
    try:
        arguments, positional = parser.parse_args_into_dataclasses()
        main(arguments, positional.source)
    except (ValueError, OSError) as error:
        sys.exit(f"convert.py: {error}")
