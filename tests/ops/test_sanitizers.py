"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a separate build and process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def library(name: str) -> str:
    """Return the path of a library of GCC, or its bare name if GCC or the library is missing."""
    try:
        return subprocess.run(
            ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except FileNotFoundError:
        return name


@pytest.mark.slow
@pytest.mark.skipif(not Path(library("libasan.so")).is_absolute(), reason="GCC with its sanitizers is not installed")
def test_no_kernel_accesses_memory_outside_of_its_tensors(tmp_path: Path) -> None:
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    environment = os.environ | {"METAKERN_SANITIZE": "1", "METAKERN_NATIVE": "cpu"}
    subprocess.run(build, cwd=ROOT, env=environment, check=True, timeout=900)
    (built,) = tmp_path.glob("metakern/_C.*")
    # Without the C++ library, too, the sanitizer cannot intercept exceptions.
    preload = f"{library('libasan.so')}:{library('libstdc++.so')}"
    options = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    fuzz = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ops" / "fuzz.py"), str(built), "800"],
        cwd=ROOT,
        env=os.environ | options | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert fuzz.returncode == 0, fuzz.stderr[-8000:]
    assert fuzz.stdout == f"nothing found in {built}\n"
