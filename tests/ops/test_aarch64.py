"""The C++ kernels for 64-bit Arm, with or without such a machine: they compile, their tiles stay in registers, and a
program in an emulator finds their results right.

Clang is that of the package ziglang, which brings what it needs to compile for another system; GCC is Debian's
g++-aarch64-linux-gnu, and the emulator its qemu-user.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import setuptools

ROOT = Path(__file__).parent.parent.parent
ACCUMULATORS = 20  # of the largest tile; csrc/cpu/matrix.cpp


class Compiler(NamedTuple):
    """A C++ compiler for 64-bit Arm: its command, the options to link a program, and how that file begins."""

    command: tuple[str, ...]
    link: tuple[str, ...]
    magic: bytes


ZIG, ELF = (sys.executable, "-m", "ziglang", "c++", "-target"), b"\x7fELF\x02\x01\x01"
COMPILERS = {
    "gcc-linux": Compiler(("aarch64-linux-gnu-g++",), ("-static",), ELF),
    "clang-linux": Compiler((*ZIG, "aarch64-linux-musl"), ("-static",), ELF),
    "clang-macos": Compiler((*ZIG, "aarch64-macos.11.0"), (), b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01"),  # Mach-O, arm64
}


@pytest.fixture(scope="module", params=COMPILERS)
def compiler(request: pytest.FixtureRequest) -> Compiler:
    found = COMPILERS[request.param]
    if found.command[0] == sys.executable and not importlib.util.find_spec("ziglang"):
        pytest.skip("ziglang, a compiler for other machines, is not here")
    if not shutil.which(found.command[0]):
        pytest.skip(f"{found.command[0]}, a compiler for other machines, is not here")
    return found


@pytest.fixture(scope="module")
def setup() -> dict[str, Any]:
    """What setup.py defines on a machine with 64-bit Arm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", lambda **arguments: None)
        patch.setattr(platform, "machine", lambda: "aarch64")
        patch.delenv("METAKERN_SANITIZE", raising=False)
        return runpy.run_path("setup.py")


def compiled(compiler: Compiler, setup: dict[str, Any], source: Path, to: Path, *options: str) -> Path:
    """Compile a source of `csrc` as setup.py does, with warnings as errors."""
    (isa,) = setup["ISAS"]
    flags = [*setup["FLAGS"], *setup["ISAS"][isa], "-fPIC", "-Wall", "-Wextra", "-Werror"]
    macro = f"-DMETAKERN_ISA={isa}" if source.parent.name == "cpu" else f"-DMETAKERN_HAS_{isa}=1"
    command = [*compiler.command, *flags, macro, *options, str(source), "-o", str(to)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr
    return to


@pytest.fixture(scope="module")
def program(compiler: Compiler, setup: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program aarch64.cpp with all of csrc but the Python module."""
    folder = tmp_path_factory.mktemp("aarch64")
    csrc = ROOT / "csrc"
    sources = [*csrc.glob("cpu/*.cpp"), *csrc.glob("*.cpp"), Path(__file__).with_name("aarch64.cpp")]
    sources.remove(csrc / "bindings.cpp")
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(compiled, compiler, setup, source, folder / f"{number}.o", "-c")
            for number, source in enumerate(sources)
        ]
        objects = [str(job.result()) for job in jobs]
    command = [*compiler.command, *compiler.link, "-pthread", *objects, "-o", str(folder / "program")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr
    return folder / "program"


@pytest.mark.slow
def test_the_kernels_compile_and_link_without_openmp(compiler: Compiler, program: Path) -> None:
    assert program.read_bytes().startswith(compiler.magic)


@pytest.mark.slow
def test_their_results_are_right_in_an_emulator(compiler: Compiler, program: Path) -> None:
    if compiler.magic != ELF:
        pytest.skip("no emulator runs programs of macOS")
    emulator = [] if platform.machine() == "aarch64" and sys.platform == "linux" else ["qemu-aarch64"]
    if emulator and not shutil.which(*emulator):
        pytest.skip("qemu-aarch64, an emulator of 64-bit Arm, is not here")
    run = subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    found = re.fullmatch(r"neon: (\d+) checks\n", run.stdout)
    assert found, run.stdout
    assert int(found[1]) > 1_000_000


def inner_loops(assembly: str) -> list[list[str]]:
    """The bodies of all loops that contain no other loop or jump."""
    lines, labels, loops = assembly.splitlines(), {}, []
    begun = 0  # the last line from which control could have jumped
    for number, line in enumerate(lines):
        if label := re.match(r"(\.?L\w+):", line):
            labels[label[1]] = number
        if jump := re.match(r"\s+(?:b(?:\.?[a-z]+)?|cbn?z|tbn?z)\s.*?(\.?L\w+)$", line):
            if labels.get(jump[1], -1) > begun:
                loops.append(lines[labels[jump[1]] + 1 : number])
            begun = number
    return loops


@pytest.mark.slow
def test_the_sums_of_a_tile_stay_in_registers(compiler: Compiler, setup: dict[str, Any], tmp_path: Path) -> None:
    source = ROOT / "csrc" / "cpu" / "matrix.cpp"
    loops = inner_loops(compiled(compiler, setup, source, tmp_path / "matrix.s", "-S", "-Wno-error").read_text())
    products = [sum("fmla" in line for line in loop) for loop in loops]
    tiles = [loop for loop, count in zip(loops, products, strict=True) if count >= ACCUMULATORS]
    assert max(products) == ACCUMULATORS
    assert len(tiles) == 4  # float32 and float64, of the rows and the columns of A
    for loop in tiles:
        assert not [line for line in loop if re.search(r"\[(sp|x29, ?#?-)|\b(st[rp]|dup|f?mov)\s+[qdv]\d", line)], loop
