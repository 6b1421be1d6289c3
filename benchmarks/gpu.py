"""The CUDA kernels on a real GPU: built, checked, and timed: `python -m benchmarks.gpu`.

Every rule of every recurrent cell is held against the reference in float64 at real sizes: its error must be at most
twice that of plain PyTorch in the same dtype. Then times, of CUDA graphs that hold several calls, medians of replays:
each rule; forward and vjp beside cuDNN with a weight that all sequences share, TF32 off; and the meta-gradient of an
LSTM language model beside plain PyTorch. compute-sanitizer, where it is, looks for bad accesses and races. All of it
goes to benchmarks/results/<GPU>.json. Where there is no GPU it says so, with exit code 2; a failed check exits with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import metakern as mk
from benchmarks import peers
from benchmarks.maml import machine
from benchmarks.workloads import make
from metakern import _native
from metakern.ops import SPECS
from metakern.ops._spec import Make

ROOT = Path(__file__).parent.parent
CELLS = {"rnn_tanh": (1, 1), "rnn_relu": (1, 1), "gru": (3, 1), "lstm": (4, 2)}  # gates and states
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RULES = ("forward", "jvp", "vjp", "vjp_jvp")
CHECKED = [(4, 8, 12, 64), (3, 5, 7, 100), (2, 20, 8, 256), (8, 8, 6, 512), (2, 8, 6, 1024), (1, 64, 6, 512)]
TIMED = [(32, 2, 32, 64), (8, 8, 20, 256), (8, 8, 128, 512), (8, 8, 64, 1024), (32, 16, 64, 256), (8, 1, 64, 256)]
BESIDE_CUDNN = [(16, 64, 64), (64, 64, 256), (64, 128, 512), (64, 64, 1024)]  # B, L, H
Sizes = tuple[int, int, int, int]  # T, B, L, H


def problem(
    cell: str,
    sizes: Sizes,
    dtype: torch.dtype,
    seed: int,
    *,
    device: str = "cpu",
    lengths: bool = False,
    reverse: bool = False,
    shared: bool = False,
) -> tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]:
    """The op, plain PyTorch, and the arguments to differentiate both by: in float64, with the digits of dtype."""
    (T, B, L, H), (gates, states), draw = sizes, CELLS[cell], Make(seed=seed)
    scale, tasks = max(H, 1) ** -0.5, () if shared else (T,)
    arguments = [draw(T, B, L, 3), *(draw(T, B, H) for _ in range(states)), draw(*tasks, gates * H, 3)]
    arguments += [scale * draw(*tasks, gates * H, H), draw(*tasks, gates * H), draw(*tasks, gates * H)]
    options: dict[str, Any] = {"reverse": reverse}
    if cell.startswith("rnn"):
        options["nonlinearity"] = cell[4:]
    ends = (torch.arange(T * B, device=device).reshape(T, B) * 2 % (L + 1),) if lengths else ()
    spec = SPECS[cell.split("_")[0]]

    def op(*x: Tensor) -> Any:
        return spec.call(*x, *ends, **options)

    def plain(*x: Tensor) -> Any:
        return spec.plain(*x, *ends, **options)

    return op, plain, [a.to(device, dtype).double() for a in arguments]


def results(f: Callable[..., Any], arguments: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, first derivatives, and second ones by reverse over reverse and by forward over reverse."""
    x = [a.to(dtype).requires_grad_() for a in arguments]
    draw, options = Make(device=x[0].device, seed=9), {"allow_unused": True, "materialize_grads": True}
    y = tree_leaves(f(*x))
    ct = [draw(*t.shape).to(dtype).requires_grad_() for t in y]
    ct_x = torch.autograd.grad(y, x, ct, create_graph=True, **options)
    v = [draw(*t.shape).to(dtype) for t in x]
    second = torch.autograd.grad(ct_x, [*x, *ct], v, **options)
    with fwd.dual_level():
        duals = [fwd.make_dual(a.detach().requires_grad_(), t) for a, t in zip(x, v, strict=True)]
        y_dual = tree_leaves(f(*duals))
        t_ct = torch.autograd.grad(y_dual, duals, [c.detach() for c in ct], **options)
        tangents = [fwd.unpack_dual(t).tangent for t in (*y_dual, *t_ct)]
    tangents = [torch.zeros_like(p) if t is None else t for t, p in zip(tangents, (*y, *x), strict=True)]
    return [t.detach().double() for t in (*y, *ct_x, *second, *tangents)]


def errors(found: list[Tensor], truth: list[Tensor]) -> Tensor:
    return torch.stack([(a - t).norm() / (t.norm() + 1e-30) for a, t in zip(found, truth, strict=True)])


def check(cell: str, sizes: Sizes, dtype: torch.dtype, **options: bool) -> dict[str, Any]:
    """The errors of a cell's rules at all orders, beside those of plain PyTorch."""
    op, plain, arguments = problem(cell, sizes, dtype, seed=1, device="cuda", **options)
    with mk.backend("reference"):
        truth = results(op, arguments, torch.float64)
    with mk.backend("cuda"):
        ours = errors(results(op, arguments, dtype), truth)
        again = errors(results(op, arguments, dtype), truth)
    theirs, eps = errors(results(plain, arguments, dtype), truth), torch.finfo(dtype).eps
    return {
        "cell": cell,
        "sizes": sizes,
        "dtype": str(dtype).removeprefix("torch."),
        **options,
        "error": ours.max().item(),
        "plain": theirs.max().item(),
        "good": bool((ours <= 2 * theirs + 4 * eps).all() and ours.equal(again)),
    }


def checks() -> Iterator[dict[str, Any]]:
    """A rule that bends (relu) is checked in float32 alone: where bf16 rounds over the bend, errors are luck."""
    for dtype in DTYPES.values():
        for cell in CELLS:
            for sizes in CHECKED if cell != "rnn_relu" or dtype == torch.float32 else ():
                yield check(cell, sizes, dtype)
        yield check("lstm", (3, 9, 6, 96), dtype, lengths=True, reverse=True)
        yield check("gru", (6, 11, 6, 160), dtype, shared=True, lengths=True)


def small_checks() -> bool:
    """What compute-sanitizer looks at: single blocks, groups of blocks, several tiles, streamed weights."""
    sizes = (2, 3, 3, 20), (1, 9, 2, 130), (1, 17, 2, 520)
    return all(check(cell, s, d)["good"] for s in sizes for cell in ("gru", "lstm") for d in DTYPES.values())


def sanitized(tool: str) -> str:
    """What compute-sanitizer says: "clean", or the end of its report."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "compute-sanitizer is not on the path"
    command = [program, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=metakern"]
    try:
        run = subprocess.run(
            [*command, sys.executable, "-m", "benchmarks.gpu", "--small"],
            cwd=ROOT,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "ran out of time"
    return "clean" if run.returncode == 0 else (run.stdout + run.stderr)[-1000:]


def milliseconds(f: Callable[[], Any], calls: int = 4, replays: int = 15) -> float:
    """Of a call: the median over replays of a CUDA graph that holds several."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            f()
    graph.replay()
    return statistics.median(_events(graph.replay, replays)) / calls


def eager_milliseconds(f: Callable[[], Any], calls: int = 7) -> float:
    """Of a call as Python makes it."""
    f(), f()
    return statistics.median(_events(f, calls))


def _events(f: Callable[[], Any], calls: int) -> Iterator[float]:
    for _ in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        end.synchronize()
        yield start.elapsed_time(end)


def rule_times(cell: str, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    """Milliseconds of each rule's recurrence, on random tensors, and the rate of its products."""
    row: dict[str, Any] = {"cell": cell, "sizes": sizes, "dtype": str(dtype).removeprefix("torch.")}
    T, B, L, H = sizes
    of = dict(zip("TBLH", sizes, strict=True))
    for rule in RULES:
        kernel = f"{cell}_{rule}"

        def draw(a: Any, H: int = H) -> Tensor | None:
            if a.indices:
                return None
            x = torch.randn([times * of[dim] for times, dim in a.dims], device="cuda", dtype=dtype)
            return x * H**-0.5 if a.name == "w_hh" else x.sigmoid() if "gates" in a.name else x

        inputs = [draw(a) for a in _native._signatures()[kernel].inputs]
        ms = milliseconds(lambda kernel=kernel, inputs=inputs: _native.call(kernel, *inputs, scalars=(0.0,)))
        flop = 2 * T * B * L * CELLS[cell][0] * H * H
        row[rule] = {"ms": ms, "us_a_step": 1e3 * ms / L, "tflop_per_s": flop / ms / 1e9}
    return row


def beside_cudnn(B: int, L: int, H: int, dtype: torch.dtype) -> dict[str, Any]:
    """An LSTM layer with one weight: forward, and forward with its vjp."""
    layer = nn.LSTM(H, H, batch_first=True, device="cuda", dtype=dtype)
    x = torch.randn(B, L, H, device="cuda", dtype=dtype, requires_grad=True)
    ct = torch.randn(B, L, H, device="cuda", dtype=dtype)
    weights = [p.detach().requires_grad_() for p in layer.parameters()]

    def ours() -> Tensor:
        return mk.ops.lstm(x, None, *weights)[0]

    def both(f: Callable[[], Tensor], wrt: list[Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(f(), [x, *wrt], ct)

    row: dict[str, Any] = {"sizes": (B, L, H), "dtype": str(dtype).removeprefix("torch.")}
    for name, f, wrt in (("metakern", ours, weights), ("cudnn", lambda: layer(x)[0], list(layer.parameters()))):
        with torch.no_grad():
            row[f"{name}_forward_ms"] = milliseconds(f)
        row[f"{name}_forward_vjp_ms"] = milliseconds(both(f, wrt))
    return row


def meta_steps(name: str) -> dict[str, Any]:
    """One meta-gradient, eager: metakern's and plain PyTorch's, which cuDNN has no second derivative for."""
    row: dict[str, Any] = {"workload": name}
    gradients = {}
    for peer, method in (("metakern", "metakern auto"), ("plain", "plain PyTorch")):
        work = make(name)
        on_gpu = [tuple(t.cuda() for t in batch) for batch in (work.support, work.query)]
        work = replace(work, model=work.model.cuda(), support=on_gpu[0], query=on_gpu[1])
        step = peers.load(peer).methods[method](work)
        with torch.backends.cudnn.flags(enabled=peer == "metakern"):
            gradients[peer] = {key: g.detach().clone() for key, g in step().items()}
            torch.cuda.reset_peak_memory_stats()
            row[f"{peer}_ms"] = eager_milliseconds(step, 7 if peer == "metakern" else 3)
            row[f"{peer}_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    ours, theirs = (torch.cat([gradients[peer][k].flatten() for k in sorted(gradients["plain"])]) for peer in gradients)
    row["difference"] = ((ours - theirs).norm() / theirs.norm()).item()
    row["speedup"] = row["plain_ms"] / row["metakern_ms"]
    return row


def compilers() -> dict[str, str]:
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release ([\d.]+)", nvcc)
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "nvcc": release[1] if release else "",
    }


def build() -> None:
    """Compiles the kernels where this checkout has none, and starts anew with them."""
    if _native._cuda is None or _native._C is None:
        env = os.environ | {"METAKERN_NATIVE": "cuda"}
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=env, check=True)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--small", action="store_true", help="only the small checks that compute-sanitizer runs")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no GPU is present, or this PyTorch was built without CUDA", file=sys.stderr)
        return 2
    build()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if args.small:
        return 0 if small_checks() else 1
    began = time.time()
    found: dict[str, Any] = {"machine": machine() | compilers()}
    path = ROOT / "benchmarks" / "results" / f"{re.sub(r'[^A-Za-z0-9]+', '-', torch.cuda.get_device_name())}.json"

    def keep(key: str, rows: Iterator[dict[str, Any]]) -> None:
        """Each row is printed and written as it comes: a run that is cut short leaves what it found."""
        found[key] = []
        for row in rows:
            found[key].append(row)
            print(f"{time.time() - began:5.0f} s  {key}: {json.dumps(row)}", flush=True)
            path.write_text(json.dumps(found, indent=1) + "\n")

    keep("checks", checks())
    keep("rules", (rule_times(c, s, d) for d in DTYPES.values() for c in ("lstm", "gru", "rnn_tanh") for s in TIMED))
    keep("cudnn", (beside_cudnn(*sizes, dtype) for dtype in DTYPES.values() for sizes in BESIDE_CUDNN))
    keep("meta", (meta_steps(name) for name in ("lstm", "lstm-small")))
    keep("sanitizer", ({tool: sanitized(tool)} for tool in ("memcheck", "racecheck")))
    bad = [row for row in found["checks"] if not row["good"]]
    bad += [row for row in found["sanitizer"] if "clean" not in row.values()]
    print(f"{path}: {len(found['checks'])} checks, {len(bad)} of all failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
