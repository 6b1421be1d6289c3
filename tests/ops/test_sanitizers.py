"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and their threads under ThreadSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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


@pytest.fixture(scope="module")
def threads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program threads.cpp with all of csrc but the Python module."""
    if not Path(library("libtsan.so")).is_absolute():
        pytest.skip("GCC with its sanitizers is not installed")
    folder, csrc = tmp_path_factory.mktemp("threads"), ROOT / "csrc"
    flags = ["-std=c++17", "-O1", "-g1", "-pthread", "-fsanitize=thread"]
    sources = [*csrc.glob("cpu/*.cpp"), *csrc.glob("*.cpp"), Path(__file__).with_name("threads.cpp")]
    sources.remove(csrc / "bindings.cpp")

    def compiled(source: Path) -> str:
        macro = "-DMETAKERN_ISA=baseline" if source.parent.name == "cpu" else "-DMETAKERN_HAS_baseline=1"
        to = str(folder / f"{source.name}.o")
        subprocess.run(["g++", *flags, macro, "-c", str(source), "-o", to], check=True, timeout=600)
        return to

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run(["g++", *flags, *objects, "-ldl", "-o", str(folder / "program")], check=True, timeout=600)
    return folder / "program"


def in_threads(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = os.environ | {"TSAN_OPTIONS": "exitcode=66 halt_on_error=1 die_after_fork=0"}

    def run(*before: str) -> subprocess.CompletedProcess[str]:
        command = [*before, str(program), *arguments]
        return subprocess.run(command, env=options, capture_output=True, text=True, timeout=600, check=False)

    done = run()
    # GCC's older runtimes can't place their memory where Linux draws addresses from a wide range.
    return run("setarch", "-R") if "unexpected memory mapping" in done.stderr else done


@pytest.mark.slow
def test_no_threads_meet_in_one_place(threads: Path) -> None:
    run = in_threads(threads)
    assert run.returncode == 0, run.stdout + run.stderr[-8000:]
    assert int(run.stdout.removesuffix(" checks\n")) > 1000


@pytest.mark.slow
def test_threads_that_meet_are_reported(threads: Path) -> None:
    run = in_threads(threads, "race")
    assert run.returncode == 66
    assert "data race" in run.stderr
