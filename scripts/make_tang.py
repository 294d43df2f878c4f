"""Make train.jsonl, validation.jsonl and test.jsonl of Tang poems, the corpus of scripts/recipes/tang.args.

git clone --depth 1 https://github.com/chinese-poetry/chinese-poetry
python scripts/make_tang.py chinese-poetry --output_dir tang

Each line is a poem, with `title`, `author` and `text`, the lines of the poem as they are written there. Poems of at least 16
characters are taken, each text once, in an order that a hash of the text decides: 1,000 for the test, 1,000 for
validation, and 22,000 for training, of fewer poems in the same proportion.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

from screen import prepare_screen

FOLDER = "全唐诗"  # of the repository
NAME = re.compile(r"poet\.tang\.(\d+)\.json")  # not those of Song poems, of authors, and of simplified characters
SHORTEST = 16  # characters: shorter ones are fragments
POEMS, SHARE = 24_000, 24  # in all, at most; and the part of them, one in so many, for validation and for the test


def read_poems(path: Path) -> list[dict[str, str]]:
    """Read the poems of a file: a list of objects with `title`, `author` and `paragraphs`, the lines."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return [
            {"title": record["title"], "author": record["author"], "text": "\n".join(record["paragraphs"])}
            for record in records
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a list of poems with `title`, `author` and `paragraphs` ({type(error).__name__}: {error}): "
            "restore it by `git checkout` in the clone."
        ) from error


def split_poems(poems: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Choose poems for each part; of those with the same text the first is taken."""
    by_text = {poem["text"]: poem for poem in reversed(poems) if len(poem["text"]) >= SHORTEST}
    order = sorted(by_text, key=lambda text: hashlib.sha256(text.encode()).digest())[:POEMS]
    held_out = max(1, len(order) // SHARE)
    if len(order) < 3:
        raise ValueError(
            f"There are {len(order)} poems of at least {SHORTEST} characters, and three parts: clone the whole repository."
        )
    chosen = [by_text[text] for text in order]
    return {
        "train": chosen[2 * held_out :],
        "validation": chosen[held_out : 2 * held_out],
        "test": chosen[:held_out],
    }


def main(repository: Path, output_dir: Path) -> None:
    found = {
        int(match[1]): path for path in (repository / FOLDER).glob("*.json") if (match := NAME.fullmatch(path.name))
    }
    if not found:
        raise ValueError(
            f"{repository} holds no {FOLDER}/poet.tang.0.json: name a clone, made by `git clone --depth 1 "
            "https://github.com/chinese-poetry/chinese-poetry`."
        )
    if output_dir.exists():
        raise ValueError(f"`--output_dir` {output_dir} exists already: name another folder, or remove it.")
    parts = split_poems([poem for number in sorted(found) for poem in read_poems(found[number])])
    unfinished = output_dir.with_name(f"{output_dir.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name, poems in parts.items():
        with open(unfinished / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(poem, ensure_ascii=False) + "\n" for poem in poems)
        characters = sum(len(poem["text"]) for poem in poems)
        print(f"{output_dir / name}.jsonl: {len(poems):,} poems, {characters:,} characters")
    unfinished.rename(output_dir)


if __name__ == "__main__":
    prepare_screen()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, help="a clone of chinese-poetry")
    parser.add_argument("--output_dir", type=Path, default=Path("tang"), help="the folder to make")
    arguments = parser.parse_args()
    try:
        main(arguments.repository, arguments.output_dir)
    except (ValueError, OSError) as error:
        sys.exit(f"make_tang.py: {error}")
