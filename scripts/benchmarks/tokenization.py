"""Measure the time and memory of turning a large text file into lanes, in a first and a second run.

python scripts/benchmarks/tokenization.py --megabytes 1000

The text is random, with the word frequencies of a language. Memory is the sum of RssAnon over all processes, which
excludes pages of mapped files: the system can reclaim those.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy
from record import RESULTS, write_result

TOKENIZERS = ("byte", "bpe")
VOCAB_SIZE = 4096


def write_text(path: Path, megabytes: int, seed: int = 0) -> None:
    """Write lines of words whose frequency falls with their rank (Zipf's law), a million bytes at a time."""
    generator = numpy.random.default_rng(seed)
    letters = numpy.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    chances = numpy.exp(-numpy.arange(26) / 8)
    words = numpy.array(
        [
            "".join(generator.choice(letters, generator.integers(1, 11), p=chances / chances.sum()))
            for _ in range(30_000)
        ]
    )
    ranks = 1 / numpy.arange(1, len(words) + 1)
    ends = numpy.cumsum(ranks / ranks.sum())
    with path.open("w", encoding="ascii") as file:
        for _ in range(megabytes):
            drawn = words[numpy.searchsorted(ends, generator.random(300_000)).clip(max=len(words) - 1)]
            lines = [" ".join(drawn[start : start + 12]) for start in range(0, len(drawn), 12)]
            file.write(("\n".join(lines) + "\n")[:1_000_000])


def measure(name: str, path: Path) -> None:
    """Do one run in this process and print the times as JSON."""
    from hf_lstm import LaneDataset, TokenStream, bpe_tokenizer, byte_tokenizer
    from hf_lstm.data import load_documents

    seconds, start = {}, time.perf_counter()

    def lap(what):
        nonlocal start
        seconds[what], start = time.perf_counter() - start, time.perf_counter()

    rows = load_documents(path)["train"]
    lap("read")
    saved = path.with_name(f"{name}_tokenizer")
    if name == "byte":
        tokenizer = byte_tokenizer()
    elif saved.exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(saved)
    else:
        tokenizer = bpe_tokenizer(rows["text"], VOCAB_SIZE)
        tokenizer.save_pretrained(saved)
    lap("tokenizer")
    stream = TokenStream.from_documents(rows, tokenizer)
    lap("tokenize")
    lanes = LaneDataset(stream, lanes=16, bptt_length=64)
    for index in range(0, len(lanes), max(1, len(lanes) // 1000)):
        lanes[index]
    lap("a thousand items")
    print(json.dumps({"tokens": len(stream), "kind": str(stream.tokens.type), "seconds": seconds}))


def anonymous_bytes(process: int) -> int:
    """Return the anonymous memory of a process and its descendants in bytes."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # the process has ended
        return 0
    own = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")]
    return sum(own) + sum(anonymous_bytes(int(child)) for child in children)


def run(name: str, path: Path, cache: Path) -> dict:
    """Do one run in a child process and return its result with its peak memory."""
    command = [sys.executable, __file__, "--measure", name, "--file", str(path)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}.")
    return json.loads(process.stdout.read().splitlines()[-1]) | {"anonymous_megabytes": round(peak / 1e6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the text")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--measure", choices=TOKENIZERS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.file)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        write_text(path, options.megabytes)
        for name in TOKENIZERS:
            for time_ in ("first", "second"):
                rows.append({"tokenizer": name, "run": time_} | run(name, path, Path(folder) / "cache"))
                row = rows[-1]
                print(
                    f"{name}, {time_} run: {row['tokens']:,} tokens of {row['kind']}, {row['anonymous_megabytes']:,} MB, "
                    + ", ".join(f"{what} {value:.1f} s" for what, value in row["seconds"].items()),
                    flush=True,
                )
    write_result(
        f"tokenization_{options.megabytes}mb", {"megabytes": options.megabytes, "rows": rows}, options.results
    )


if __name__ == "__main__":
    main()
