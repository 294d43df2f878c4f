"""Train recipes one after the other and store their cards in model_cards/.

python scripts/benchmarks/recipes.py quickstart shakespeare_cpu tang residual

The corpora must be in the current folder, as in README.md. Without a recipe, the cards are rendered again from their
JSON.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from hf_lstm.model_card import render_model_card

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"


def train(recipe: str) -> None:
    """Train a recipe in runs/ and copy the files of its card."""
    folder = Path("runs") / recipe
    script, arguments = ROOT / "scripts" / "train.py", f"scripts/recipes/{recipe}.args"
    subprocess.run([sys.executable, script, "--recipe", arguments, "--output_dir", folder], check=True)
    CARDS.mkdir(exist_ok=True)
    shutil.copy(folder / "run.json", CARDS / f"{recipe}.json")
    shutil.copy(folder / "learning_curve.png", CARDS / f"{recipe}.png")


def render() -> None:
    for path in sorted(CARDS.glob("*.json")):
        card = path.with_suffix(".md")
        card.write_text(
            render_model_card(json.loads(path.read_text(encoding="utf-8")), f"{path.stem}.png"), encoding="utf-8"
        )
        print(f"written to {card.relative_to(ROOT)}")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        train(name)
    render()
