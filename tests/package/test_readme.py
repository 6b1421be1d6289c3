"""The numbers and pictures of the pages are those of the results."""

import re

import pytest

from benchmarks import report
from benchmarks.results import ROOT


@pytest.mark.parametrize("page", report.PAGES)
def test_a_page_and_the_results_agree(page: str) -> None:
    text = (ROOT / page).read_text()
    assert report.with_tables(page, text) == text


def test_the_report_and_the_results_agree() -> None:
    assert report.FULL.read_text() == report.full()


@pytest.mark.parametrize(("page", "least"), [(ROOT / "README.md", 2), (ROOT / "docs/dialogue.md", 1), (report.FULL, 0)])
def test_every_picture_is_there(page, least) -> None:
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
