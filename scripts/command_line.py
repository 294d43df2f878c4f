"""The command line of the scripts: flags in groups, help that can be read, and the flag that was meant by another name."""

import inspect
import sys
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from dataclasses import field, fields
from difflib import get_close_matches
from pathlib import Path

from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import is_torch_bf16_gpu_available

# Our flags, and what other programs call them.
MEANT = {
    "num_train_epochs": "epochs num_epochs n_epochs train_epochs",
    "max_steps": "steps num_steps max_iters iterations",
    "per_device_train_batch_size": "batch_size train_batch_size batch lanes",
    "per_device_eval_batch_size": "eval_batch_size",
    "batch_size": "batch",
    "learning_rate": "lr rate max_lr",
    "lr_scheduler_type": "scheduler lr_scheduler lr_schedule",
    "warmup_steps": "warmup warmup_iters warmup_ratio",
    "weight_decay": "wd decay",
    "max_grad_norm": "clip grad_clip gradient_clip clip_grad_norm",
    "optim": "optimizer",
    "bptt_length": "max_length max_seq_length seq_length seq_len sequence_length block_size context_length bptt",
    "max_new_tokens": "max_length length max_tokens num_tokens n_tokens",
    "num_hidden_layers": "layers num_layers n_layers nlayers",
    "hidden_size": "hidden hidden_dim nhid rnn_size units width",
    "embedding_size": "emb_size emsize embedding_dim embedding",
    "output_dropout": "dropout",
    "hidden_dropout": "dropout",
    "cell_type": "cell rnn_type model_type",
    "tie_word_embeddings": "tied tie_weights",
    "train_file": "data dataset corpus text input input_file file text_file train train_data data_path",
    "file": "data dataset corpus input input_file text_file test_file",
    "validation_file": "valid_file eval_file dev_file valid validation",
    "output_dir": "out output out_dir save_dir save model_dir",
    "model": "model_name model_name_or_path model_path checkpoint ckpt",
    "model_name_or_path": "model model_name model_path checkpoint ckpt base_model init_from",
    "resume_from_checkpoint": "resume resume_from continue",
    "use_cpu": "cpu device no_cuda",
    "repo": "repo_id hub_model_id name",
    "temperature": "temp",
    "prompt": "start primetext text",
    "do_sample": "greedy sample",
    "num_beams": "beams beam_size",
}
KINDS = {"int": "INT", "float": "FLOAT", "str": "TEXT", "string_to_bool": "BOOL", "dict": "JSON"}


def flag(help: str, default=None, **options):
    """Make a field of a dataclass of flags; `options` are those of `dataclasses.field`."""
    return field(default=default, metadata={"help": help}, **options)


class Parser(HfArgumentParser):
    """
    `HfArgumentParser` with a group of flags for each dataclass, described by its docstring. A flag must be written whole,
    with underscores or hyphens. Trainer's own flags, where a subclass of `TrainingArguments` does not define them again,
    are told by `--help_all` only. Whatever is wrong with a command line is a `ValueError` of one sentence.

    Args:
        kinds (`type` or `tuple[type]`): The dataclasses.
        description (`str`): What `--help` begins with: the script's docstring.
        task (`str`): The word before the flags, of a script with several tasks.
    """

    def __init__(self, kinds, description: str, task: str = ""):
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        everything = "--help_all" in sys.argv
        self.kinds, self.command = kinds, f"%(prog)s {task}".strip()
        self.kind_of = {flag.name: kind for kind in kinds for flag in fields(kind)}
        self.groups, self.known = {}, []
        self.untold = set()
        for kind in kinds:
            if issubclass(kind, TrainingArguments) and not everything:
                inherited = {flag.name for flag in fields(TrainingArguments)} - inspect.get_annotations(kind).keys()
                self.untold |= inherited
        super().__init__(
            kinds,
            usage=f"{self.command} [--FLAG VALUE ...]",
            description=description.strip(),
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if any(issubclass(kind, TrainingArguments) for kind in kinds):
            self.add_argument("--help_all", action="help", help="show this help with all of Trainer's own flags")

    def add_argument(self, *flags, **options):
        """Add an argument to the group of its dataclass, under names without hyphens."""
        flags = [flag for flag in flags if "-" not in flag[2:]]
        self.known += flags
        name = options.get("dest", flags[0].removeprefix("--"))
        if name not in self.kind_of:
            return super().add_argument(*flags, **options)
        kind = self.kind_of[name]
        if kind not in self.groups:
            title = kind.__name__.removesuffix("Arguments").lower() or "flags"
            self.groups[kind] = self.add_argument_group(title, None if len(self.kinds) == 1 else kind.__doc__)
        if name in self.untold or "dest" in options:  # a `--no_flag`, which `--flag false` says too
            options["help"] = SUPPRESS
        elif (default := options.get("default")) is not False and default not in (None, "", []):
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            options["help"] = f"{options.get('help') or ''} (default: {str(shown).replace('%', '%%')})"
        if "choices" not in options and "action" not in options:
            options["metavar"] = KINDS.get(options["type"].__name__, "VALUE")
        return self.groups[kind].add_argument(*flags, **options)

    def parse_known_args(self, args=None, namespace=None):
        """Parse arguments, after refusing flags that do not exist, and before refusing words that belong to no flag."""
        arguments = []
        for argument in map(str, sys.argv[1:] if args is None else args):
            name, equals, value = argument.partition("=")
            if name.startswith("--") and len(name) > 2 and " " not in name:
                name = name.replace("-", "_").replace("__", "--", 1)
                if name not in self.known:
                    raise ValueError(self.explain(name))
            arguments.append(name + equals + value)
        namespace, left = super().parse_known_args(arguments, namespace)
        if left:
            raise ValueError(f"`{left[0]}` stands without a flag: write the flag before it; `--help` lists them.")
        return namespace, left

    def explain(self, name: str) -> str:
        """Say that a flag does not exist, and which one may be meant."""
        word = name.removeprefix("--")
        near = [f"--{flag}" for flag, names in MEANT.items() if word in names.split() and f"--{flag}" in self.known]
        near = near or [flag for flag in self.known if flag.startswith(f"{name}_")][:3]
        near = near or get_close_matches(name, self.known, n=2, cutoff=0.75)
        remedy = f"did you mean {' or '.join(f'`{flag}`' for flag in near)}?" if near else "`--help` lists the flags."
        return f"`{name}` is not a flag of {self.command % {'prog': Path(self.prog).name}}: {remedy}"

    def error(self, message: str):
        raise ValueError(f"{message}: `--help` lists the flags and what they take.")


def check_trainer_flags(args: TrainingArguments) -> None:
    """Refuse what this machine cannot do, before Trainer's arguments are made."""
    for name in [args.report_to] if isinstance(args.report_to, str) else args.report_to or ():
        if name in INTEGRATION_TO_CALLBACK and name not in get_available_reporting_integrations():
            try:
                INTEGRATION_TO_CALLBACK[name]()  # raises an error that says what is missing, if anything is
            except (RuntimeError, ImportError) as error:
                raise ValueError(
                    f"`--report_to` {name} needs a package that is not installed: `pip install {name}`, or leave the flag out."
                ) from error
    for name in ("bf16", "bf16_full_eval"):
        if getattr(args, name) and not args.use_cpu and not is_torch_bf16_gpu_available():
            raise ValueError(
                f"`--{name}` (True) needs a GPU that computes in bfloat16, and this machine has none: leave it out, or add "
                "`--use_cpu true` to compute so on the CPU."
            )
