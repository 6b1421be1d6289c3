"""Check the recurrent CUDA kernels against float64, and time them beside cuDNN and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import metakern as mk
from benchmarks import peers
from benchmarks.calls import RULES
from benchmarks.gpu.checks import DTYPES, Check, compare
from benchmarks.gpu.measure import eager_milliseconds, milliseconds, peak_mib
from benchmarks.gpu.pool import Job, Row
from benchmarks.gpu.problems import device, flat, moved
from benchmarks.workloads import make
from metakern import native
from metakern.ops import SPECS
from metakern.ops.core.spec import Make

CELLS = {"rnn_tanh": (1, 1), "rnn_relu": (1, 1), "gru": (3, 1), "lstm": (4, 2)}  # numbers of gates and of states
CHECKED = [(4, 8, 12, 64), (3, 5, 7, 100), (2, 20, 8, 256), (8, 8, 6, 512), (2, 8, 6, 1024), (1, 64, 6, 512)]
TIMED = [(32, 2, 32, 64), (8, 8, 20, 256), (8, 8, 128, 512), (8, 8, 64, 1024), (32, 16, 64, 256), (8, 1, 64, 256)]
BESIDE_CUDNN = [(16, 64, 64), (64, 64, 256), (64, 128, 512), (64, 64, 1024)]  # B, L, H
Sizes = tuple[int, int, int, int]  # T, B, L, H
D = 16  # features of the inputs of checks


def problem(
    cell: str,
    sizes: Sizes,
    dtype: torch.dtype,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    lengths: bool = False,
    reverse: bool = False,
    shared: bool = False,
) -> tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]:
    """Return the op, plain PyTorch, and their differentiable arguments: in float64, rounded to `dtype`."""
    (T, B, L, H), (gates, states), draw = sizes, CELLS[cell], Make(seed=seed)
    scale, tasks = max(H, 1) ** -0.5, () if shared else (T,)
    arguments = [draw(T, B, L, D), *(draw(T, B, H) for _ in range(states)), draw(*tasks, gates * H, D)]
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


def check(cell: str, sizes: Sizes, dtype: str, options: dict[str, bool]) -> Row:
    """Check a cell by the CUDA kernels, or without a GPU, to try this program, by the reference."""
    problems = []
    for seed in (1, 2):
        op, plain, x = problem(cell, sizes, getattr(torch, dtype), seed, device=device(), **options)
        problems.append(Check(op, plain, plain, x))
    return compare("cuda" if torch.cuda.is_available() else "reference", problems, dtype)


def checks(tiny: bool) -> Iterator[Job]:
    """The checks of all cells. ReLU is checked only in float32: in bfloat16 rounding across its kink is chance."""
    cases: list[tuple[str, Sizes, dict[str, bool]]] = [(c, s, {}) for c in CELLS for s in CHECKED]
    cases.append(("lstm", (3, 9, 6, 96), {"lengths": True, "reverse": True}))
    cases.append(("gru", (6, 11, 6, 160), {"shared": True, "lengths": True}))
    if tiny:
        cases = [("gru", (2, 2, 3, 4), {"lengths": True})]
    for dtype in DTYPES:
        for cell, sizes, options in cases:
            if cell != "rnn_relu" or dtype == "float32":
                label = {"op": cell, "sample": "x".join(map(str, sizes)), "dtype": dtype, **options}
                yield Job(label, partial(check, cell, sizes, dtype, options))


def small() -> bool:
    """Check sizes with single blocks, groups of blocks, several tiles and streamed weights, for compute-sanitizer."""
    sizes = (2, 3, 3, 20), (1, 9, 2, 130), (1, 17, 2, 520)
    return all(check(cell, s, dtype, {})["good"] for s in sizes for cell in ("gru", "lstm") for dtype in DTYPES)


def rule_times(cell: str, sizes: Sizes, dtype: str) -> Row:
    """Time the recurrence of each rule on random tensors; return milliseconds and the rate of its products."""
    row: Row = {}
    T, B, L, H = sizes
    of = dict(zip("TBLH", sizes, strict=True))
    for rule in RULES:
        kernel = f"{cell}_{rule}"

        def draw(a: Any, H: int = H) -> Tensor | None:
            if a.indices:
                return None
            x = torch.randn([times * of[dim] for times, dim in a.dims], device=device(), dtype=getattr(torch, dtype))
            return x * H**-0.5 if a.name == "w_hh" else x.sigmoid() if "gates" in a.name else x

        inputs = [draw(a) for a in native.signatures()[kernel].inputs]
        ms = milliseconds(lambda kernel=kernel, inputs=inputs: native.call(kernel, *inputs, scalars=(0.0,)))
        flop = 2 * T * B * L * CELLS[cell][0] * H * H
        row[rule] = {"ms": ms, "us_a_step": 1e3 * ms / L, "tflop_per_s": flop / ms / 1e9}
    return row


def beside_cudnn(B: int, L: int, H: int, name: str) -> Row:
    """Time an LSTM layer with one task beside cuDNN: forward, and forward with vjp."""
    options: dict[str, Any] = {"device": device(), "dtype": getattr(torch, name)}
    layer = nn.LSTM(H, H, batch_first=True, **options)
    x, ct = torch.randn(B, L, H, **options, requires_grad=True), torch.randn(B, L, H, **options)
    weights = [p.detach().requires_grad_() for p in layer.parameters()]

    def ours() -> Tensor:
        return mk.ops.lstm(x, None, *weights)[0]

    def both(f: Callable[[], Tensor], wrt: list[Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(f(), [x, *wrt], ct)

    row: Row = {}
    for name, f, wrt in (("metakern", ours, weights), ("cudnn", lambda: layer(x)[0], list(layer.parameters()))):
        with torch.no_grad():
            row[f"{name}_forward_ms"] = milliseconds(f)
        row[f"{name}_forward_vjp_ms"] = milliseconds(both(f, wrt))
    return row


def meta_steps(name: str) -> Row:
    """Time one meta-gradient of metakern, and of plain PyTorch without cuDNN, which has no second derivative."""
    row: Row = {}
    gradients = {}
    for peer, method in (("metakern", "metakern auto"), ("plain", "plain PyTorch")):
        work = moved(make(name))
        step = peers.load(peer).methods[method](work)
        with torch.backends.cudnn.flags(enabled=peer == "metakern"):
            gradients[peer] = {key: g.detach().clone() for key, g in step().items()}
            row[f"{peer}_peak_mib"] = peak_mib(step)
            row[f"{peer}_ms"] = eager_milliseconds(step, 7 if peer == "metakern" else 3)
    ours, theirs = map(flat, gradients.values())
    row["difference"] = ((ours - theirs).norm() / theirs.norm()).item()
    row["speedup"] = row["plain_ms"] / row["metakern_ms"]
    return row


def jobs(tiny: bool) -> Iterator[Job]:
    """The rules of each cell, an LSTM layer beside cuDNN's, and the meta-gradient of an LSTM language model."""
    timed, beside = ([(1, 1, 2, 8)], [(2, 3, 4)]) if tiny else (TIMED, BESIDE_CUDNN)
    dtypes = ("float32",) if tiny else DTYPES
    for dtype in dtypes:
        for cell in ("lstm", "gru", "rnn_tanh"):
            for sizes in timed:
                yield Job({"cell": cell, "sizes": sizes, "dtype": dtype}, partial(rule_times, cell, sizes, dtype))
        for layer in beside:
            yield Job({"beside": "cudnn", "sizes": layer, "dtype": dtype}, partial(beside_cudnn, *layer, dtype))
    for name in ("lstm:tiny",) if tiny else ("lstm", "lstm:small"):
        yield Job({"workload": name}, partial(meta_steps, name))
