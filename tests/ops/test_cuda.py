"""The CUDA kernels without a GPU: their results on an emulated GPU, and the report of the compiler.

`cuda_emulation` compiles the unchanged sources in `csrc/cuda`, with launcher and bindings, for a GPU whose threads are
fibers on the CPU. The recurrent ops run on it and are compared with the reference in float64.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import metakern as mk
from benchmarks.gpu.checks import errors, results
from benchmarks.gpu.recurrent import CELLS, problem
from metakern import native
from metakern.ops.core import backend

ROOT = Path(__file__).parent.parent.parent
every_cell = pytest.mark.parametrize("cell", CELLS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


class Gpu(NamedTuple):
    """An emulated GPU: 10 x compute capability, multiprocessors, bytes of shared memory of a block, largest cluster."""

    arch: int
    processors: int
    shared: int
    largest_cluster: int = 8
    idle: bool = False  # launches are checked and not run


class Emulation:
    """The compiled emulation, which replaces metakern._cuda and the kernels of the device type "cpu"."""

    def __init__(self, path: Path) -> None:
        spec = importlib.util.spec_from_file_location("cuda_emulation._cuda", path)
        assert spec is not None
        assert spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.library = ctypes.CDLL(str(path))
        self.numbers = {name: number for number, name in enumerate(self.module.names())}

        self.plans: list[dict[str, Any]] = []

    def use(self, gpu: Gpu) -> None:
        self.library.emulate(*gpu)
        self.plans.clear()

    def leave_out(self, part: str) -> None:
        self.library.leave_out(("nothing", "block", "release", "acquire", "load").index(part))

    def run(
        self, kernel: str, dtype: torch.dtype, addresses: list[int], sizes: list[int], scalars: Any, _: Any
    ) -> None:
        memory: list[Tensor] = []

        def allocate(size: int) -> int:
            memory.append(torch.full((size + 1024,), 0xFF, dtype=torch.uint8))  # NaN, with a guard behind it
            return memory[-1].data_ptr()

        number, bf16 = self.numbers[kernel], dtype == torch.bfloat16
        self.plans.append(self.module.call(number, bf16, addresses, sizes, list(scalars), 0, allocate))
        assert all((m[-1024:] == 0xFF).all() for m in memory), "a launch writes beyond its memory"


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no compiler")
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("emulation")
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += [f"-I{ROOT}/tests/ops/cuda_emulation", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    sources = [*ROOT.glob("csrc/cuda/*.c*"), *ROOT.glob("tests/ops/cuda_emulation/*.cpp")]
    sources = [source for source in sources if source.suffix != ".cuh"]

    def compiled(source: Path) -> str:
        target = folder / f"{source.name}.o"
        subprocess.run([compiler, *flags, "-xc++", "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    library = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([compiler, "-shared", *objects, "-o", str(library)], check=True)
    return Emulation(library)


@pytest.fixture
def on_gpu(emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> Emulation:
    """Make the emulation the backend "cuda", which takes tensors on the CPU."""
    monkeypatch.setattr(native, "_cuda", emulation.module)
    device = native._Device(native.CUDA_DTYPES, emulation.run)
    monkeypatch.setitem(native._DEVICES, "cpu", device)
    monkeypatch.setattr(backend, "_obstacle", lambda name: None)
    return emulation


class Case(NamedTuple):
    """A problem, the emulated GPU that runs it, and a condition that the plan of one of its launches must meet."""

    gpu: Gpu
    sizes: tuple[int, int, int, int]  # T, B, L, H
    seen: Callable[[dict[str, Any]], bool]
    lengths: bool = False
    reverse: bool = False
    shared: bool = False


H100, A100 = Gpu(90, 132, 227 << 10), Gpu(80, 108, 163 << 10)
CASES = {
    "alone": Case(H100, (2, 3, 3, 5), lambda p: p["meeting"] == "alone", lengths=True),
    "one of everything": Case(H100, (1, 1, 1, 1), lambda p: p["resident"] == p["iterations"]),
    "few rows": Case(H100, (1, 2, 2, 37), lambda p: p["rows"] >= 2, reverse=True),
    "parts": Case(H100, (1, 21, 2, 33), lambda p: p["parts"] > 1 and p["rows"] < 21, shared=True),
    "tiles": Case(Gpu(90, 1, 64 << 10), (2, 21, 2, 18), lambda p: p["rows"] >= 21, lengths=True, reverse=True),
    "clusters": Case(H100, (2, 3, 3, 130), lambda p: p["meeting"] == "cluster" and p["blocks"] > 2, lengths=True),
    "counters": Case(Gpu(80, 4, 163 << 10), (1, 3, 3, 300), lambda p: p["meeting"] == "counter", reverse=True),
    "waves": Case(Gpu(80, 4, 64 << 10), (3, 2, 2, 340), lambda p: p["groups"] < 3 and p["blocks"] > 1),
    "streamed": Case(Gpu(90, 2, 64 << 10), (1, 3, 2, 260), lambda p: p["resident"] < p["iterations"], shared=True),
    "chunks": Case(Gpu(90, 2, 64 << 10, 2), (1, 9, 2, 350), lambda p: p["chunk"] < p["iterations"], lengths=True),
}


@every_dtype
@pytest.mark.parametrize(
    ("cell", "name"),
    # Errors of relu are random where bfloat16 rounds across its kink: small cases alone, averaged over draws.
    [(cell, name) for cell in CELLS for name in CASES if cell != "rnn_relu" or CASES[name].sizes[3] < 100],
)
def test_errors_are_at_most_twice_those_of_plain_pytorch(
    on_gpu: Emulation, cell: str, dtype: torch.dtype, name: str
) -> None:
    """error(kernels) <= 2 x error(plain PyTorch in that dtype) + eps, a geometric mean over draws, at every order."""
    case, eps, mean = CASES[name], torch.finfo(dtype).eps, []
    on_gpu.use(case.gpu)
    options = {"lengths": case.lengths, "reverse": case.reverse, "shared": case.shared}
    T, B, L, H = case.sizes
    H *= 2 if cell.startswith("rnn") and H > 100 else 1  # so that there are as many weights as in an LSTM
    draws = 8 if H < 10 else 3 if cell == "rnn_relu" else 1  # errors of few numbers are random
    for seed in range(1, draws + 1):
        op, plain, arguments = problem(cell, (T, B, L, H), dtype, seed, **options)
        with mk.backend("reference"):
            truth = results(op, arguments, torch.float64)
        with mk.backend("cuda"):
            ours = results(op, arguments, dtype)
        mean.append(torch.stack([errors(ours, truth), errors(results(plain, arguments, dtype), truth)]) + eps / 8)
    ours, theirs = torch.stack(mean).log().mean(0).exp()
    assert (ours <= 2 * theirs + 4 * eps).all(), (ours / theirs).tolist()
    assert any(case.seen(plan) for plan in on_gpu.plans if plan["blocks"]), on_gpu.plans


@pytest.mark.parametrize(
    ("part", "name"),
    [
        *((part, "clusters") for part in ("release", "acquire", "load")),
        *((part, "counters") for part in ("block", "release", "acquire", "load")),
        *((part, "alone") for part in ("block", "load")),
    ],
)
def test_a_barrier_without_one_of_its_parts_is_noticed(on_gpu: Emulation, name: str, part: str) -> None:
    """Most results are others where stores are not released, not acquired, or not loaded as `load_written` does."""
    case, dtype = CASES[name], torch.float32
    on_gpu.use(case.gpu)
    op, _, arguments = problem("gru", case.sizes, dtype, 1, lengths=case.lengths, reverse=case.reverse)
    with mk.backend("cuda"):
        right = results(op, arguments, dtype)
        on_gpu.leave_out(part)
        found = results(op, arguments, dtype)
    different = [not torch.allclose(a, b, rtol=0.1, atol=0.01) for a, b in zip(found, right, strict=True)]
    assert sum(different) > len(different) / 2


@every_cell
@every_dtype
def test_tasks_and_sequences_do_not_depend_on_each_other(on_gpu: Emulation, cell: str, dtype: torch.dtype) -> None:
    """Changing the last task, or the last sequence of each, leaves the others bit-identical."""
    on_gpu.use(Gpu(90, 4, 64 << 10, 2))
    op, _, arguments = problem(cell, (3, 9, 2, 20), dtype, seed=1)
    states = CELLS[cell][1]
    with mk.backend("cuda"):
        base = results(op, arguments, dtype)
        others = [torch.cat([a[:-1], a[-1:] + 1]) for a in arguments]
        for a, b in zip(results(op, others, dtype), base, strict=True):
            assert torch.equal(a[:-1], b[:-1])
        last = [torch.cat([a[:, :-1], a[:, -1:] + 1], 1) if i <= states else a for i, a in enumerate(arguments)]
        for a, b in zip(tree_leaves(op(*last)), tree_leaves(op(*arguments)), strict=True):
            assert torch.equal(a[:, :-1], b[:, :-1])


@every_cell
def test_sizes_of_zero(on_gpu: Emulation, cell: str) -> None:
    on_gpu.use(H100)
    for sizes in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4)):
        op, plain, arguments = problem(cell, sizes, torch.float32, seed=1)
        with mk.backend("cuda"):
            ours = results(op, arguments, torch.float32)
        for a, b in zip(ours, results(plain, arguments, torch.float64), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_gpu_that_is_too_small_or_too_old_is_an_error(on_gpu: Emulation) -> None:
    arguments = torch.ones(1, 1, 1, 28), torch.ones(1, 28, 7), None, None, None
    on_gpu.use(Gpu(90, 1, 1 << 10))
    with pytest.raises(RuntimeError, match="no launch fits this GPU for 7 hidden units: use the reference backend"):
        native.call("lstm_forward", *arguments, scalars=(0.0,))
    on_gpu.use(Gpu(75, 4, 64 << 10))
    with pytest.raises(RuntimeError, match=r"the CUDA kernels need compute capability 8[.]0, got 7[.]5"):
        native.call("lstm_forward", *arguments, scalars=(0.0,))


@every_cell
@pytest.mark.parametrize("gpu", [H100, A100, Gpu(86, 84, 99 << 10)], ids=lambda gpu: f"sm_{gpu.arch}")
def test_every_size_has_a_launch_that_fits(emulation: Emulation, cell: str, gpu: Gpu) -> None:
    """Launches of real sizes are planned and checked as on a GPU: shared memory, and that all blocks fit at once."""
    emulation.use(gpu._replace(idle=True))
    for kernel, number in emulation.numbers.items():
        if not kernel.startswith(cell) or kernel.endswith("cotangents"):
            continue
        signature = native.signatures()[kernel]
        addresses = [64] * (len(signature.inputs) + len(signature.outputs))
        for T, B, H in itertools.product((1, 8, 100), (1, 8, 64, 1000), (1, 64, 100, 256, 512, 1024, 3000)):
            for bf16 in (False, True):
                plan = emulation.module.call(number, bf16, addresses, [T, B, 1, H], [0.0], 0, lambda size: 64)
                assert plan["shared"] <= gpu.shared
                assert plan["blocks"] * plan["units"] >= H
                assert plan["rows"] * plan["parts"] >= B
                assert (plan["meeting"] == "cluster") <= (gpu.arch == 90)


def test_recurrent_kernels_of_cuda_and_of_the_cpu_have_the_same_names(emulation: Emulation) -> None:
    assert set(emulation.numbers) == {k for k in native.signatures() if k.startswith(("rnn", "gru", "lstm"))}


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on the path")
def test_a_build_with_nvcc_has_the_kernels(emulation: Emulation) -> None:
    assert native._cuda is not None, f"reinstall with METAKERN_NATIVE=cuda: {native._cuda_missing}"
    assert native._cuda.names() == emulation.module.names()


@pytest.mark.skipif(native._cuda is None, reason="metakern is built without the CUDA kernels")
def test_the_compiler_spills_nothing() -> None:
    """On sm_80 and sm_90: no stack, no local memory, at most 255 registers, no static shared memory of ours."""
    triton = pytest.importorskip("triton")
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", native._cuda.__file__]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    recurrences = {"sm_80": 0, "sm_90": 0}
    for code in report.split("Fatbin elf code:")[1:]:
        (arch,) = re.findall(r"arch = (sm_\d+)", code.split("Fatbin ptx code:")[0])
        for name, *numbers in re.findall(usage, code):
            registers, stack, shared, local = map(int, numbers)
            assert registers <= 255, (arch, name)
            assert stack == local == 0, (arch, name)
            assert shared == (1024 if arch == "sm_90" else 0), (arch, name)  # what the driver reserves
            recurrences[arch] += "recur" in name
    assert recurrences == dict.fromkeys(recurrences, 4 * 2 * 4)  # by cells, dtypes and rules


def test_the_gpu_benchmark_without_a_gpu_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.gpu"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["benchmarks.gpu: no GPU is present, or this PyTorch was built without CUDA"]
