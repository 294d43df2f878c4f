"""Storage of benchmark results, with the machine and the commit of the measurement."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """Return the short hash of the commit that is checked out."""
    ran = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return ran.stdout.strip()


def digest(path: str | Path) -> str:
    """Return the hash of a file, by which a stored run knows its text."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_result(name: str, result: dict, folder: Path = RESULTS) -> None:
    """Write a result to `name`.json in a folder, wholly or not at all."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    measured_on = {
        "machine": f"{platform.machine()}, {where}, torch {torch.__version__}",
        "commit": commit(),
    }
    path = folder / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(measured_on | result, indent=2) + "\n")
    partial.replace(path)
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


class StoredRuns:
    """The finished runs of a benchmark in `name`.json: one that is stored with the same settings is not repeated."""

    def __init__(self, name: str, folder: Path = RESULTS, **about: Any):
        """Read the runs that are stored; `about` is written beside them."""
        self.name, self.folder, self.about = name, folder, about
        path = folder / f"{name}.json"
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
        self.runs = [{"commit": stored["commit"]} | run for run in stored["runs"]]

    @property
    def result(self) -> dict:
        return self.about | {"runs": self.runs}

    def add(self, identity: dict, settings: dict, compute: Callable[[], dict]) -> dict | None:
        """
        Compute a run and store it at once, in place of one of the same `identity` and other settings. Return what was
        computed, and `None` for a run that is stored.
        """
        settings = json.loads(json.dumps(settings))  # as a file holds them: lists instead of tuples
        same = [run for run in self.runs if identity.items() <= run.items()]
        if any(run["settings"] == settings for run in same):
            print(f"{identity}: stored", flush=True)
            return None
        found = compute()
        kept = [run for run in self.runs if run not in same]
        self.runs = [*kept, identity | {"settings": settings, "commit": commit()} | found]
        write_result(self.name, self.result, self.folder)
        return found
