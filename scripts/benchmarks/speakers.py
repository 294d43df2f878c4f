"""Make a task of classification from the works of Shakespeare: who speaks this passage?

python scripts/benchmarks/speakers.py --train_file tinyshakespeare.txt --output_dir speakers

The classes are the 8 speakers with the most lines. Their speeches are cut into passages of at most 4 lines, and all passages
of a speech lie in one part. `--output_dir` receives train.csv, validation.csv and test.csv, the last two with as many
passages of each speaker, and language.txt for a language model: the file without the speeches of these two parts.
"""

import argparse
import csv
import random
import re
from collections import Counter
from pathlib import Path

SPEAKERS, LINES = 8, 4
PASSAGES = {"test": 60, "validation": 30}  # of each speaker
SPEECH = re.compile(r"([A-Z][\w' -]*):\n(.+)", flags=re.DOTALL)


def make_task(text: str, passages: dict[str, int] = PASSAGES) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """Return the passages and speakers of each part, and the text for a language model."""
    speeches = [match.groups() for block in text.split("\n\n") if (match := SPEECH.fullmatch(block.strip("\n")))]
    lines = Counter()
    for speaker, words in speeches:
        lines[speaker] += words.count("\n") + 1
    parts: dict[str, list[tuple[str, str]]] = {name: [] for name in ("train", *passages)}
    held_out = set()
    generator = random.Random(0)
    for speaker, _ in lines.most_common(SPEAKERS):
        own = sorted({words for name, words in speeches if name == speaker})
        generator.shuffle(own)
        for part, number in passages.items():
            found: list[str] = []
            while len(found) < number and own:
                held_out.add(own[-1])
                found += cut(own.pop())
            if len(found) < number:
                raise ValueError(
                    f"{speaker} has too few passages for the {part} part, {len(found)} of {number}: give more text."
                )
            parts[part] += [(passage, speaker) for passage in found[:number]]
        parts["train"] += [(passage, speaker) for words in own for passage in cut(words)]
    kept = [f"{speaker}:\n{words}" for speaker, words in speeches if words not in held_out]
    for rows in parts.values():
        generator.shuffle(rows)
    return parts, "\n\n".join(kept) + "\n"


def cut(words: str) -> list[str]:
    """Cut a speech into passages."""
    lines = words.split("\n")
    return ["\n".join(lines[start : start + LINES]) for start in range(0, len(lines), LINES)]


def write_task(parts: dict[str, list[tuple[str, str]]], language: str, folder: Path) -> None:
    """Write the files of a task."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        write_rows(rows, folder / f"{part}.csv")
    (folder / "language.txt").write_text(language, encoding="utf-8", newline="\n")


def write_rows(rows: list[tuple[str, str]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--train_file", type=Path, required=True, help="tinyshakespeare.txt, or speeches written like it."
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    found, rest = make_task(arguments.train_file.read_text(encoding="utf-8"))
    write_task(found, rest, arguments.output_dir)
    for part, rows in found.items():
        print(f"{part}: {len(rows):,} passages of {', '.join(sorted({speaker for _, speaker in rows}))}")
