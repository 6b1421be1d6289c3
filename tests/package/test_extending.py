"""docs/extending.md, followed to the letter in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from installing import ROOT, run

PAGE = (ROOT / "docs" / "extending.md").read_text()
STEP = re.compile(r"(?:^`(?P<path>[^`\n]+)`:\n\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
COPIED = (
    *(str(path.relative_to(ROOT)) for path in ROOT.glob("build/metakern._C-cpython*")),
    "metakern",
    "csrc",
    "tests",
    "docs",
    "benchmarks",
    "setup.py",
    "pyproject.toml",
    "README.md",
)


def test_every_block_of_the_page_is_a_step() -> None:
    steps = [(step["path"], step["kind"]) for step in STEP.finditer(PAGE)]
    assert len(steps) == PAGE.count("\n```") / 2
    assert {kind for path, kind in steps if not path} == {"diff", "sh"}
    assert {Path(path).suffix for path, _ in steps if path} == {".py", ".cpp"}


@pytest.mark.slow
def test_the_steps_work(tmp_path: Path) -> None:
    if shutil.which("c++") is None or sys.platform != "linux":
        pytest.skip("the page's C++ is built by a compiler")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    environment = {
        "PYTHONPATH": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "METAKERN_NATIVE": "cpu",
    }
    for step in STEP.finditer(PAGE):
        if step["path"]:
            target = tmp_path / step["path"]
            assert not target.exists()
            target.parent.mkdir(exist_ok=True)
            target.write_text(step["text"])
        elif step["kind"] == "diff":
            (tmp_path / "step.patch").write_text(step["text"])
            done = run("git", "apply", "step.patch", cwd=tmp_path)
            assert not done.returncode, done.stderr
        elif step["kind"] == "sh":
            for command in step["text"].splitlines():
                done = run(*command.split(), cwd=tmp_path, **environment)
                assert not done.returncode, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
                assert not command.startswith("pytest") or re.search(r"\d passed", done.stdout)
