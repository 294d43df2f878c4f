"""Programs in processes of their own, each forked from one process that has imported torch and transformers once.

An import takes seconds and a fork milliseconds. hf_lstm is not imported before the fork, so that a program may hide it.
"""

import contextlib
import importlib
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "transformers.trainer", "transformers.models.auto.modeling_auto", "accelerate", "datasets"]
)


class Program:
    """
    A program in a process of its own.

    Args:
        program (`Path` or `str`): A file, or the code itself.
        arguments: What it finds in `sys.argv`.
        folder (`Path`, *optional*): Where it runs; this process's folder by default.
        environment (`dict`, *optional*): All variables of its environment; by default those of this process.
    """

    def __init__(self, program, *arguments, folder=None, environment=None):
        self.printed = tempfile.TemporaryDirectory()
        if isinstance(program, str):
            (Path(self.printed.name) / "program.py").write_text(program, encoding="utf-8")
            program = Path(self.printed.name) / "program.py"
        self.command = [str(program), *map(str, arguments)]
        place = str(folder or os.getcwd()), dict(environment or os.environ), self.printed.name
        # A daemon: it ends with this process, however that ends.
        self.process = CONTEXT.Process(target=_run, args=(self.command, *place), daemon=True)
        self.process.start()

    def wait(self, timeout=180):
        """Wait for its end, and return what `subprocess.run(..., capture_output=True, text=True)` would; -9 if it was killed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        with self.printed:
            texts = [Path(self.printed.name, name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(self.command, self.process.exitcode, *texts)


def run_program(program, *arguments, **options):
    """Run a [`Program`] to its end."""
    return Program(program, *arguments, **options).wait()


def run_ranks(program, *arguments, ranks=2, folder=None):
    """
    Run a program in several processes that find each other as torchrun's do, and end them all as soon as one fails; return
    what each of them did.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    programs = [
        Program(
            program,
            *arguments,
            folder=folder,
            environment=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    running, deadline = [program.process for program in programs], time.monotonic() + 180
    while any(process.is_alive() for process in running):
        multiprocessing.connection.wait([process.sentinel for process in running if process.is_alive()], timeout=1)
        if any(process.exitcode for process in running) or time.monotonic() > deadline:
            time.sleep(1)  # the others may be about to say why
            for process in running:
                process.kill()
    return [program.wait() for program in programs]


def _run(command, folder, environment, printed):
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(printed, name), os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    _read_environment_again()
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))  # where Python looks for what a script imports
    runpy.run_path(command[0], run_name="__main__")


def _read_environment_again():
    """Let the libraries of the Hub, which read these variables when they are imported, read them now."""
    import datasets.config
    import transformers.dynamic_module_utils
    from huggingface_hub import constants, hf_api

    importlib.reload(constants)
    hf_api.api.endpoint = constants.ENDPOINT
    transformers.dynamic_module_utils.HF_MODULES_CACHE = os.path.join(constants.HF_HOME, "modules")
    with contextlib.suppress(KeyError):
        datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])
