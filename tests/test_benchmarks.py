"""The figures in the documentation are the rendering of the results."""

import pytest
from conftest import SCRIPTS

PAGES = ["README.md", "scripts/README.md", "scripts/benchmarks/README.md", "scripts/recipes/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_contains_the_rendered_results(page, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")
    import summary

    assert set(summary.PAGES) == set(PAGES)
    assert summary.rendered(page) == (SCRIPTS.parent / page).read_text(encoding="utf-8"), (
        "run scripts/benchmarks/summary.py"
    )
