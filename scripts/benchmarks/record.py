"""Storage of benchmark results, with the machine and the commit of the measurement."""

import json
import platform
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """Return the short hash of the commit that is checked out."""
    ran = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return ran.stdout.strip()


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
