"""The section on speed of README.md equals the rendering of the results."""

from conftest import SCRIPTS


def test_the_readme_contains_the_rendered_results(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")
    import summary

    readme = (SCRIPTS.parent / "README.md").read_text(encoding="utf-8")

    assert summary.render() in readme, "run scripts/benchmarks/summary.py"
