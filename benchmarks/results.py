"""Read and write the results: a JSON file for each kind of machine, `results/<slug>.json`, which has parts.

    {"maml": {workload: entry}, "sweep": {workload: entry}, "attention": entry, "recurrent": entry, "ops": entry}

An entry names its machine, versions, commit and date. Each benchmark writes only its own part.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "results"
TOLD = (
    "results",
    "*.md",
    "report.py",
    "tables.py",
    "targets.py",
    "pictures.py",
)  # files of benchmarks that no measurement depends on
CODE = ("metakern", "csrc", "benchmarks", *(f":!benchmarks/{name}" for name in TOLD))


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> dict[str, str | int]:
    """Return this machine, versions, date, and the last commit that changed code, with a + if code is uncommitted."""
    import torch

    import metakern as mk

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": cpu,
        "cores": cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "metakern": mk.__version__,
        "commit": _git("log", "-1", "--format=%h", "--", *CODE)
        + "+" * bool(_git("status", "--porcelain", "--", *CODE)),
        "date": time.strftime("%Y-%m-%d"),
    }


def _git(*arguments: str) -> str:
    """Return git's output in the clone that this file is in, or "" if it is in none."""
    if not (ROOT / ".git").exists():
        return ""
    said = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
    return said.stdout.strip()


def slug(where: dict[str, Any]) -> str:
    """Return the name of a kind of machine.

    >>> slug({"cpu": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cores": 8})
    'intel-xeon-platinum-8481c-8c'
    """
    cpu = re.sub(r"\((r|tm)\)|\bcpu\b|@.*|\d+-core processor|\bprocessor\b", " ", where["cpu"].lower())
    return f"{'-'.join(re.findall('[a-z0-9]+', cpu)) or 'cpu'}-{where['cores']}c"


def file(where: dict[str, Any]) -> Path:
    """Return the machine's file: in the clone, or in the current folder if the benchmarks were installed."""
    folder = FOLDER if FOLDER.is_dir() else Path("results")
    return folder / f"{slug(where)}.json"


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def keep(path: Path, part: str, entry: dict[str, Any], name: str | None = None) -> None:
    """Write an entry as a part, or as `name` into a part. The rest of the file stays, even if others write to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        found = load(path)
        found[part] = entry if name is None else found.get(part, {}) | {name: entry}
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps(found, indent=1) + "\n")
        draft.replace(path)
    finally:
        os.close(folder)
