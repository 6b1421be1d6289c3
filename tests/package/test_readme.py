"""Numbers and pictures of the pages are those of the results, and links to files resolve."""

import re

import pytest

from benchmarks import report
from benchmarks.results import ROOT


@pytest.mark.parametrize("page", report.PAGES)
def test_tables_of_pages_are_those_of_the_results(page: str) -> None:
    text = (ROOT / page).read_text()
    assert report.with_tables(page, text) == text


def test_the_report_is_that_of_the_results() -> None:
    assert report.FULL.read_text() == report.full()


@pytest.mark.parametrize(("page", "least"), [(ROOT / "README.md", 4), (ROOT / "docs/dialogue.md", 1), (report.FULL, 0)])
def test_every_picture_exists(page, least) -> None:
    shown = re.findall(r'(?:src|srcset)="([^"]*)"|!\[[^]]*\]\(([^)]*)\)', page.read_text())
    files = {page.parent / (one or other) for one, other in shown}
    assert len(files) >= least
    for file in files:
        assert file.stat().st_size > 1000
        assert file.suffix == ".png" or file.with_suffix(".png").exists()


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")], ids=str
)
def test_every_link_to_a_file_resolves(page) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
