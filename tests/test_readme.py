"""The README's numbers are those of the results."""

from benchmarks.report import ROOT, with_tables


def test_the_readme_and_the_results_agree() -> None:
    text = (ROOT / "README.md").read_text()
    assert with_tables(text) == text
