"""Model cards of the recipes: rendered from their runs, and quoted in the documentation."""

import json

import pytest
from conftest import SCRIPTS

from hf_lstm.model_card import render_model_card

ROOT = SCRIPTS.parent
RUNS = sorted((ROOT / "model_cards").glob("*.json"))


def test_recipes_have_cards():
    assert {path.stem for path in RUNS} >= {"quickstart", "shakespeare_cpu", "tang", "residual"}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_card_equals_the_rendering_of_its_run(path):
    run = json.loads(path.read_text(encoding="utf-8"))

    card = render_model_card(run, f"{path.stem}.png")

    assert card == path.with_suffix(".md").read_text(encoding="utf-8"), "run scripts/benchmarks/recipes.py"
    assert path.with_suffix(".png").stat().st_size > 5_000
    command = f"python scripts/train.py --recipe scripts/recipes/{path.stem}.args --output_dir runs/{path.stem}"
    assert run["command"] == command
    assert (ROOT / "scripts" / "recipes" / f"{path.stem}.args").is_file()


@pytest.mark.parametrize("page", ["README.md", "model_cards/README.md"])
@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_pages_quote_the_figures_of_the_card(path, page):
    run = json.loads(path.read_text(encoding="utf-8"))
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()

    rows = [line for line in lines if line.startswith("|") and f"{path.stem}.md)" in line]

    assert rows, f"{page} has no table with a link to {path.stem}.md"
    for loss in (run["results"]["validation"]["loss"], run["resets"]["256"]):
        assert f"{loss:.4f}" in rows[0]
    assert f"{run['parameters'] / 1e6:.2f} M" in rows[0]
