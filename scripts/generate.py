"""Let a model write, to the terminal, as it writes.

python scripts/generate.py --model runs/first --prompt "def main("
echo "def main(" | python scripts/generate.py --model runs/first --max_new_tokens 500 --temperature 0.5
python scripts/generate.py --model runs/first --interactive true
"""

import contextlib
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TextStreamer, set_seed
from transformers.generation import BaseStreamer

from hf_lstm import Session
from hf_lstm.data.streams import encode
from hf_lstm.generation import COLDEST
from hf_lstm.tokenizers import StreamDecoder, dropped_characters, ends_lines, unknown_id

HELP = """What you type is read as it stands, and the model goes on; an empty line lets it go on, Ctrl-C stops it.
/save FILE keeps the text that grew so far, /load FILE takes one up, /reset begins anew, /quit or Ctrl-D ends."""


@dataclass
class Arguments:
    """What to write, and how."""

    model: str = field(metadata={"help": "A model's folder, or its name on the Hub."})
    prompt: str | None = field(
        default=None, metadata={"help": "What to continue; read from the standard input if that is not a terminal."}
    )
    interactive: bool = field(default=False, metadata={"help": "Write a text together: you a line, the model a part."})
    seed: int = field(default=0, metadata={"help": "The same seed writes the same text."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code that comes with the model."})


@dataclass
class SamplingArguments:
    """Flags of `generate()`, under its names."""

    max_new_tokens: int = field(default=300, metadata={"help": "Tokens to write at most."})
    do_sample: bool = field(default=True, metadata={"help": "Draw tokens, rather than take the most probable."})
    temperature: float | None = field(default=0.8, metadata={"help": "Below 1 the text is safer, above 1 wilder."})
    top_k: int | None = field(default=None, metadata={"help": "Draw among the k most probable tokens."})
    top_p: float | None = field(default=None, metadata={"help": "Draw among the most probable that make up p."})
    min_p: float | None = field(default=None, metadata={"help": "Draw among those at least p times the best one's."})
    repetition_penalty: float | None = field(default=None, metadata={"help": "Above 1, repeat less."})
    num_beams: int | None = field(default=None, metadata={"help": "Beams; their text appears at the end."})


class Printer(BaseStreamer):
    """The prompt and what is written, on the terminal, in whole characters as they come."""

    def __init__(self, tokenizer):
        self.decoder = StreamDecoder(tokenizer)

    def put(self, value: torch.Tensor) -> None:
        print("".join(self.decoder.step(token) for token in value.flatten().tolist()), end="", flush=True)

    def end(self) -> None:
        print(self.decoder.end(), flush=True)


def main(arguments: Arguments, sampling: SamplingArguments) -> None:
    folder = Path(arguments.model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: name the folder of a saved model.")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=arguments.trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, trust_remote_code=arguments.trust_remote_code, device_map="auto"
    )
    with contextlib.suppress(AttributeError):  # a standard input that is no file
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 is refused where it is read, line by line
    if arguments.interactive:
        set_seed(arguments.seed)
        converse(model, tokenizer, arguments.prompt, sampling)
        return
    prompt = arguments.prompt
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")

    if sampling.temperature is not None and 0 < sampling.temperature < COLDEST:
        sampling = replace(sampling, do_sample=False)
    options = {flag.name: getattr(sampling, flag.name) for flag in fields(sampling)}
    options = {name: value for name, value in options.items() if value is not None}
    if not sampling.do_sample:
        options = {name: options[name] for name in options if name not in ("temperature", "top_k", "top_p", "min_p")}
    elif sampling.top_k is None:
        options["top_k"] = 0  # `generate()` would draw among 50
    if prompt:
        ids = encode([prompt], tokenizer)[0].tolist()
        options["input_ids"] = torch.tensor([ids], dtype=torch.long, device=model.device)
        options["attention_mask"] = torch.ones_like(options["input_ids"])
        if ids and max(ids) >= model.config.vocab_size:
            raise ValueError(
                f"The tokenizer makes {max(ids)} of a part of the prompt, and the model's vocabulary ends at "
                f"{model.config.vocab_size - 1}: put the tokenizer that it was trained with into its folder."
            )
        if unknown_id(tokenizer) in ids or dropped_characters([prompt], tokenizer):
            print("The model does not know some characters of the prompt.", file=sys.stderr)
    if sampling.num_beams in (None, 1):
        shown = {"skip_special_tokens": not ends_lines(tokenizer)}
        options["streamer"] = Printer(tokenizer) if tokenizer.is_fast else TextStreamer(tokenizer, **shown)

    set_seed(arguments.seed)
    with torch.inference_mode():
        written = model.generate(**options)
    if "streamer" not in options:
        print(tokenizer.decode(written[0], skip_special_tokens=not ends_lines(tokenizer)))


def converse(model, tokenizer, prompt: str | None, sampling: SamplingArguments) -> None:
    """The user's lines and the model's, one text that is never read twice."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys bring back what was typed
    for name in ("repetition_penalty", "num_beams"):
        if getattr(sampling, name) not in (None, 1):
            raise ValueError(
                f"`{name}` ({getattr(sampling, name)}) looks back at the text, which `interactive` does not keep."
            )
    names = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p")
    options = {name: value for name in names if (value := getattr(sampling, name)) is not None}
    session = Session(model, tokenizer)
    print(HELP, flush=True)
    line = prompt
    while True:
        try:
            line = input("> ") if line is None else line
            command, _, path = line.partition(" ")
            if command == "/quit":
                return
            if command == "/save":
                session.save(path)
                print(f"saved to {path}")
            elif command == "/load":
                session = Session.load(model, tokenizer, path)
                print(f"{session.cache.get_seq_length()} tokens were read so far")
            elif command == "/reset":
                session = Session(model, tokenizer)
            elif command.startswith("/"):
                print(HELP)
            else:
                if line:
                    session.feed(line)
                for text in session.stream(**options):
                    print(text, end="", flush=True)
                print()
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return
        except (ValueError, OSError) as error:  # of one line: the text so far stays
            print(error, file=sys.stderr)
        line = None


if __name__ == "__main__":
    try:
        main(*HfArgumentParser((Arguments, SamplingArguments)).parse_args_into_dataclasses())
    except (ValueError, OSError) as error:
        sys.exit(f"generate.py: {error}")
