"""The Euclidean norm of each task, over all tensors of a model.

    forward   n    = √Σ x_i²              summed over the elements of a task, and over i
    jvp       t_n  = Σ x_i t_x_i / n
    vjp       ct_x_i   = k x_i            k = ct_n / n
    vjp_jvp   t_ct_x_i = t_k x_i + k t_x_i            t_k = (t_ct_n - k t_n) / n

| tensor | shape |
|---|---|
| x_i | [T, ...], a shape for each tensor |
| n, k | [T] |

Where n = 0, quotients by n are taken as zero, and so are the first and second derivatives: no NaN. Half precision
accumulates in float32. Residuals: n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from metakern.ops.core import triton_kernels, updates
from metakern.ops.core.autograd import Op
from metakern.ops.core.formula import program, torch_over, torch_root
from metakern.ops.core.matrices import wide
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Cost, Make, Sample, Spec
from metakern.ops.scale import SCALE


def global_norm(x: Sequence[Tensor]) -> Tensor:
    """Returns the Euclidean norm √Σ x_i² over all tensors, for each task; differentiable twice.

    Where the norm is zero, so are its derivatives. Half precision accumulates in float32.

    Args:
        x: Tensors [T, ...] for T tasks, or of any shapes.

    Returns:
        [T] if all tensors have the same first dimension T; otherwise one norm over everything, a scalar.

    Raises:
        TypeError: For tensors that are not floating point, or not of one dtype.
        ValueError: For tensors on several devices, or no tensor.

    >>> import metakern as mk, torch
    >>> mk.ops.global_norm([torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([4.0, 1.0])])
    tensor([5.0000, 1.7321])
    """
    if not x:
        raise ValueError("global_norm: x must hold at least one tensor, got none")
    values, tasks = updates.checked("global_norm", {"x": list(x)})
    (n,) = _op(len(values))(*([xi.unsqueeze(0) for xi in values] if tasks is None else values))
    return n.squeeze(0) if tasks is None else n


def rules(dot: Callable[[Tensors, Tensors], Tensor], run: Callable[..., Any], merged: bool) -> Rules:
    """Returns the four rules.

    dot(x, y) gives Σ x_i y_i, [T]; `run` and `merged` are those of `updates.rules`, here for the formula of `scale`.
    """

    def scaled(rule: str, x: Tensors, **values: Tensors | Tensor) -> Tensors:
        each = {name: v if isinstance(v, tuple) else (v.to(x[0].dtype),) * len(x) for name, v in values.items()}
        (y,) = run(program(SCALE.formula, 2, rule, frozenset(each), None, merged), each, x)
        return y

    def forward(c: SimpleNamespace, x: Tensors) -> tuple[Tensors, Tensors]:
        return (torch_root(dot(x, x)).to(x[0].dtype),), ()

    def jvp(c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors) -> tuple[Tensors, Tensors]:
        return (torch_over(dot(x, t_x), r[0]).to(x[0].dtype),), ()

    def vjp(c: SimpleNamespace, x: Tensors, r: Tensors, ct_y: Tensors) -> Tensors:
        return scaled("forward", x, x0=x, x1=torch_over(wide(ct_y[0]), r[0]))

    def vjp_jvp(
        c: SimpleNamespace,
        x: Tensors,
        r: Tensors,
        t_x: Tensors,
        t_r: Tensors,
        ct_y: Tensors,
        t_ct_y: Tensors | None,
    ) -> Tensors:
        k, t_n = torch_over(wide(ct_y[0]), r[0]), t_r[0]
        t_k = torch_over((-k * t_n) if t_ct_y is None else (t_ct_y[0] - k * t_n), r[0])
        return scaled("jvp", x, x0=x, x1=k, t0=t_x, t1=t_k)

    return Rules(forward, jvp, vjp, vjp_jvp)


def _dot(x: Tensors, y: Tensors) -> Tensor:
    parts = [(wide(a) * wide(b)).unsqueeze(-1).flatten(1).sum(1) for a, b in zip(x, y, strict=True)]
    return torch.stack(parts).sum(0)


KERNELS = {"reference": rules(_dot, updates.run_torch, merged=True), "triton": triton_kernels.rules("global_norm")}


@cache
def _op(count: int) -> Op:
    return Op("global_norm", inputs=tuple(f"x_{i}" for i in range(count)), kernels=KERNELS, saves_output=True)


def _call(*x: Tensor) -> Tensor:
    return global_norm(x)


def _plain(*x: Tensor) -> Tensor:
    alone = any(xi.dim() == 0 or xi.shape[0] != x[0].shape[0] for xi in x)
    rows = [xi.reshape(1 if alone else xi.shape[0], -1) for xi in x]
    norm = torch.cat(rows, 1).square().sum(1).sqrt()
    return norm.squeeze(0) if alone else norm


def _samples(make: Make) -> list[Sample]:
    return [
        Sample("several", (make(3, 2, 4), make(3, 17), make(3))),
        Sample("one", (make(2, 3),)),
        Sample("no-tasks-in-common", (make(2, 3), make(), make(4)), per_task=False),
        Sample("empty-tensor", (make(2, 0), make(2, 3))),
    ]


def _benchmark(make: Make) -> list[Sample]:
    return [Sample("8x24", tuple(make(*shape) for shape in [(8, 512, 128), (8, 512)] * 12))]


def _cost(sample: Sample, order: int) -> Cost:
    n = sum(x.numel() for x in sample.args)
    return Cost(flop=(2, 1, 3)[order] * n, bytes=(1, 2, 3)[order] * n * sample.args[0].element_size())


SPEC = Spec(_op(3), _call, _plain, _samples, _benchmark, _cost)
