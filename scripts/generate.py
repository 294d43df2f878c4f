"""Generate text in the terminal, printed as it is generated.

python scripts/generate.py --model runs/first --prompt "def main("
echo "def main(" | python scripts/generate.py --model runs/first --max_new_tokens 500 --temperature 0.5
python scripts/generate.py --model runs/first --interactive true
"""

import contextlib
import sys
from dataclasses import dataclass, field, fields, replace

import torch
from command_line import Parser
from saved_models import load_model
from screen import prepare_screen
from transformers import TextStreamer, set_seed
from transformers.generation import BaseStreamer

from hf_lstm import Session
from hf_lstm.decoding import StreamDecoder
from hf_lstm.generation import COLDEST
from hf_lstm.tokenizers import direction_of, encode, ends_lines, in_direction
from hf_lstm.unknown import dropped_characters, unknown_id

HELP = """The model continues your text, line by line; an empty line lets it go on, Ctrl-C stops it.
A model that reads backward writes before your line, and later lines stand before that.
/save FILE saves the state of the text, /load FILE loads one, /reset starts a new text, /quit or Ctrl-D ends."""


@dataclass
class Arguments:
    """Arguments of the script."""

    model: str | None = field(
        default=None, metadata={"help": "A model folder, an adapter's folder (LoRA) or a model on the Hub."}
    )
    prompt: str | None = field(
        default=None, metadata={"help": "The text to continue (default: the standard input unless it is a terminal)."}
    )
    interactive: bool = field(default=False, metadata={"help": "Take turns with the model in writing one text."})
    seed: int = field(default=0, metadata={"help": "Seed of the random numbers."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run the Python files of the model."})


@dataclass
class SamplingArguments:
    """Arguments of `generate()`, under the same names."""

    max_new_tokens: int = field(default=300, metadata={"help": "Maximum number of new tokens."})
    do_sample: bool = field(default=True, metadata={"help": "Sample, instead of taking the most probable token."})
    temperature: float | None = field(
        default=0.8, metadata={"help": "Sampling temperature; 0 takes the most probable token."}
    )
    top_k: int | None = field(default=None, metadata={"help": "Sample from the k most probable tokens."})
    top_p: float | None = field(
        default=None, metadata={"help": "Sample from the top tokens with total probability p."}
    )
    min_p: float | None = field(default=None, metadata={"help": "Minimum probability, relative to the top token."})
    repetition_penalty: float | None = field(default=None, metadata={"help": "Above 1, penalize repeated tokens."})
    num_beams: int | None = field(default=None, metadata={"help": "Number of beams; the text is printed at the end."})


class Printer(BaseStreamer):
    """Streamer that prints the prompt and the generated text as soon as characters are complete."""

    def __init__(self, tokenizer):
        self.decoder = StreamDecoder(tokenizer)

    def put(self, value: torch.Tensor) -> None:
        print("".join(self.decoder.step(token) for token in value.flatten().tolist()), end="", flush=True)

    def end(self) -> None:
        print(self.decoder.end(), flush=True)


def main(arguments: Arguments, sampling: SamplingArguments) -> None:
    model, tokenizer = load_model(arguments.model, arguments.trust_remote_code)
    if sampling.temperature is not None and 0 <= sampling.temperature < COLDEST:
        sampling = replace(sampling, do_sample=False)
    with contextlib.suppress(AttributeError):  # a standard input that is not a file
        sys.stdin.reconfigure(errors="surrogateescape")  # invalid UTF-8 raises an error where its line is read
    if arguments.interactive:
        set_seed(arguments.seed)
        converse(model, tokenizer, arguments.prompt, sampling)
        return
    prompt, direction = arguments.prompt, direction_of(model)
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")

    options = {flag.name: getattr(sampling, flag.name) for flag in fields(sampling)}
    options = {name: value for name, value in options.items() if value is not None}
    if not sampling.do_sample:
        options = {name: options[name] for name in options if name not in ("temperature", "top_k", "top_p", "min_p")}
    elif sampling.top_k is None:
        options["top_k"] = 0  # the default of `generate()` is 50
    if prompt:
        ids = encode([prompt], tokenizer, direction=direction)[0].tolist()
        options["input_ids"] = torch.tensor([ids], dtype=torch.long, device=model.device)
        options["attention_mask"] = torch.ones_like(options["input_ids"])
        if ids and max(ids) >= model.config.vocab_size:
            raise ValueError(
                f"The tokenizer gives the token id {max(ids)}, and the ids of the model end at "
                f"{model.config.vocab_size - 1}: put the tokenizer that it was trained with into its folder."
            )
        if unknown_id(tokenizer) in ids or dropped_characters([prompt], tokenizer):
            print("The model does not know some characters of the prompt.", file=sys.stderr)
    if sampling.num_beams in (None, 1) and direction == "forward":
        shown = {"skip_special_tokens": not ends_lines(tokenizer)}
        options["streamer"] = Printer(tokenizer) if tokenizer.is_fast else TextStreamer(tokenizer, **shown)

    set_seed(arguments.seed)
    with torch.inference_mode():
        written = model.generate(**options)
    if "streamer" not in options:
        text = tokenizer.decode(written[0], skip_special_tokens=not ends_lines(tokenizer))
        print(in_direction(text, direction, tokenizer))


def converse(model, tokenizer, prompt: str | None, sampling: SamplingArguments) -> None:
    """Let the user and the model write one text in turns; no token is read twice."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys recall earlier lines
    for name in ("repetition_penalty", "num_beams"):
        if getattr(sampling, name) not in (None, 1):
            raise ValueError(
                f"`{name}` ({getattr(sampling, name)}) needs the whole text, and `interactive` keeps none: omit it."
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
                print(f"{session.cache.get_seq_length()} tokens read so far")
            elif command == "/reset":
                session = Session(model, tokenizer)
            elif command.startswith("/"):
                print(HELP)
            else:
                if line:
                    session.feed(line)
                backward = session.direction == "backward"  # the new text stands before the line
                for text in [session.write(**options)] if backward else session.stream(**options):
                    print(text, end="", flush=True)
                print()
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return
        except (ValueError, OSError) as error:  # of one line only: the text so far is kept
            print(error, file=sys.stderr)
        line = None


if __name__ == "__main__":
    prepare_screen()
    try:
        main(*Parser((Arguments, SamplingArguments), __doc__).parse_args_into_dataclasses())
    except (ValueError, OSError) as error:
        sys.exit(f"generate.py: {error}")
