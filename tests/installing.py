"""Run commands, and build wheels of the package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)


def build(source: Path, native: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel in `source/dist` with `METAKERN_NATIVE=native`, in a process where torch cannot be imported."""
    script = "import sys; sys.modules['torch'] = None; exec(open('setup.py').read())"
    arguments = ("bdist_wheel", "--dist-dir", "dist")
    return run(sys.executable, "-c", script, *arguments, cwd=source, METAKERN_NATIVE=native, **environment)
