"""What README.md says of speed is what the files of results hold."""

from conftest import SCRIPTS


def test_the_readme_says_what_the_results_say(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")
    import summary

    readme = (SCRIPTS.parent / "README.md").read_text(encoding="utf-8")

    assert summary.render() in readme, "run scripts/benchmarks/summary.py"
