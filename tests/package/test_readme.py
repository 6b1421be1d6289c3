"""The README's numbers and pictures, and those of RESULTS.md, are those of the results."""

import re

from benchmarks import report
from benchmarks.results import ROOT


def test_the_readme_and_the_results_agree() -> None:
    text = (ROOT / "README.md").read_text()
    assert report.with_tables(text) == text
    assert report.FULL.read_text() == report.full()


def test_every_picture_is_there() -> None:
    for page, least in ((ROOT / "README.md", 3), (report.FULL, 0)):
        shown = re.findall(r'(?:src|srcset)="([^"]*)"|!\[[^]]*\]\(([^)]*)\)', page.read_text())
        files = {page.parent / (one or other) for one, other in shown}
        assert len(files) >= least
        for file in files:
            assert file.stat().st_size > 1000
            assert file.suffix == ".png" or file.with_suffix(".png").exists()
