"""One thread, no network, and models small enough to be compared number by number."""

import gc
import logging as stdlib_logging
import math
import os
import runpy
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
os.environ["MKL_CBWR"] = "COMPATIBLE"  # or the last bits depend on where in memory a loaded file puts the weights

import pytest
import torch
from transformers.utils import logging

from hf_lstm import LSTMConfig, LSTMForCausalLM
from hf_lstm.model.cells_lstm import CELLS

torch.set_num_threads(1)
logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory):
    """Nothing that a test downloads or prepares stays on the machine."""
    import datasets

    gc.freeze()  # what the imports made stays: collecting garbage need not look through it, which took a quarter of the time
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


# Before recomputing activations was renamed from gradient checkpointing.
IS_OLDER_TRANSFORMERS = not hasattr(LSTMForCausalLM, "activation_checkpointing_enable")
CHECKPOINTING = "gradient_checkpointing" if IS_OLDER_TRANSFORMERS else "activation_checkpointing"

# What transformers says of a test, not of the model.
EXPECTED_LOGS = (
    "right-padding was detected",  # said of any right-padded prompt, which other models do get wrong
    "Passing `generation_config` together with",  # assisted generation does so itself
    "arguments do not match the ones in the `trainer_state.json`",  # resumed otherwise on purpose
    "mtime may not be reliable",  # checkpoints written within a second
    "The speedups for torchdynamo",  # on a CPU
    "[Request received]",  # a server says so of every request
    "so we will NOT tie them",  # of an output layer that was made apart, as it says of Llama's
    "`loss_type=None`",  # of a module that torch.jit traces, which looks at all attributes
    "LOAD REPORT",  # an LSTMModel leaves the output layer of a language model out
)
if IS_OLDER_TRANSFORMERS:  # said by its pipelines
    EXPECTED_LOGS += ("Both `max_new_tokens`", "clean_up_tokenization_spaces_for_bpe")


@pytest.fixture(autouse=True)
def nothing_is_logged():
    """No test may log a warning through transformers, as no test may raise one (pyproject.toml)."""
    records, logger = [], stdlib_logging.getLogger("transformers")
    handler = stdlib_logging.Handler(stdlib_logging.WARNING)
    handler.emit = records.append
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    messages = [record.getMessage() for record in records]
    assert not [message for message in messages if not any(part in message for part in EXPECTED_LOGS)]


def recompute_activations(model, reentrant):
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})


def make_model(dtype=torch.float64, **config):
    """A random model whose states and biases are large enough for an error to show."""
    torch.manual_seed(0)
    config = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2} | config
    model = LSTMForCausalLM(LSTMConfig(**config)).to(dtype).eval()
    # Less where a step could double its input, or each token the state.
    scales = {"mogrifier": (10, 2, 2), "rnn_relu": (10, 0.5, 1)}
    embedding, recurrent, other = scales.get(model.config.cell_type, (20, 2, 2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(embedding if "embed" in name else recurrent if "hidden_gates" in name else other)
            if name.endswith("bias") and not parameter.any():
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3, generator=generator))
    return model


def make_ids(rows, length, seed=1):
    """Token ids that are no special tokens."""
    return torch.randint(4, 31, (rows, length), generator=torch.Generator().manual_seed(seed))


# Each shape of a model with one of the cells: the code of neither asks for the other.
CONFIGS = {
    "stacked": {},
    "tied_narrow": {"cell_type": "gru", "num_hidden_layers": 3, "embedding_size": 8},
    "untied": {"cell_type": "mogrifier", "embedding_size": 10, "tie_word_embeddings": False, "output_bias": True},
    "projected": {"cell_type": "rnn_relu", "embedding_size": 9, "output_projection_size": 9, "last_cell_size": 10},
    "residual": {"block_type": "residual", "initializer_range": 0.2},
    "hybrid": {
        "block_type": "residual",
        "num_hidden_layers": 3,
        "layer_types": ["hf_lstm", "hf_lstm_window", "hf_lstm"],
        "attention_window": 4,
        "num_attention_heads": 2,
        "initializer_range": 0.2,
    },
    "residual_narrow": {
        "cell_type": "rnn_tanh",
        "block_type": "residual",
        "embedding_size": 8,
        "intermediate_size": 10,
        "initializer_range": 0.2,
    },
}


@pytest.fixture(params=CONFIGS)
def model(request):
    """Float64 models of the shapes a config can say."""
    return make_model(**CONFIGS[request.param])


@pytest.fixture(params=CELLS)
def cell(request):
    """Fields of a config for each cell, where a test needs one shape: `make_model(**cell)`."""
    return {"cell_type": request.param}


def choose_kernel(monkeypatch, name):
    """Let `fused` or `explicit` run wherever one of them would, and the other could."""
    from hf_lstm.model import cells_lstm, recurrence_lstm

    if name == "fused":  # the first layer by token, whose result is that by position (tests/test_lookup.py)
        monkeypatch.setattr(cells_lstm, "FEW_PRODUCTS", math.inf)
        monkeypatch.setitem(recurrence_lstm.FUSED_STEPS, "cpu", 1)
    select = recurrence_lstm.select_kernel

    def choose(x, state, gates, reading, record):
        kernel = select(x, state, gates, reading, record)
        return name if kernel in ("fused", "explicit") and reading.batch_sizes and not record else kernel

    monkeypatch.setattr(recurrence_lstm, "select_kernel", choose)


@pytest.fixture(params=["fused", "explicit"])
def kernel(request, monkeypatch):
    """Both ways of computing a layer, whatever the number of steps."""
    choose_kernel(monkeypatch, request.param)
    return request.param


SCRIPTS = Path(__file__).parent.parent / "scripts"
TEXT = "".join(f"{number} bottles of beer on the wall, {number} bottles of beer.\n" for number in range(99, 0, -1))
SMALL = ["--hidden_size", "16", "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "2"]
SMALL += ["--bptt_length", "16", "--logging_steps", "2", "--eval_steps", "4", "--save_steps", "4", "--use_cpu", "true"]


def standard_library(*arguments):
    """The corpus of scripts that are given none."""
    return runpy.run_path(str(SCRIPTS / "standard_library.py"))["standard_library"](*arguments)


def run_script(name, *arguments, shortened=True):
    """
    A script in this process, which spares the import of torch. Unless told otherwise, training draws no curve, which
    takes half a second, and its samples are 20 tokens long.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        if shortened:
            monkeypatch.setattr("hf_lstm.training.report.draw_learning_curve", lambda history, path: path.touch())
            monkeypatch.setattr("hf_lstm.training.report.SAMPLE_LENGTH", 20)
        monkeypatch.syspath_prepend(SCRIPTS)  # where the script itself would look
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS / name), *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")


@pytest.fixture
def run(capsys):
    """Runs a script and gives what it printed."""

    def run(name, *arguments, **options):
        capsys.readouterr()
        run_script(name, *arguments, **options)
        return capsys.readouterr().out

    return run


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "beer.txt"
    path.write_text(TEXT)
    return path
