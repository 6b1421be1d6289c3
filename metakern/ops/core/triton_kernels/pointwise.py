"""Apply an element-wise function to tensors of one shape: one kernel, which takes the function as an argument.

| tensor | shape |
|---|---|
| x, y | any, all the same |

Half precision is computed in float32. Each input is read once, or not at all if no wanted output needs it. A whole
block is read and written without a mask: where the size is odd, accesses under a mask have one element each.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl

from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.triton_kernels.launch import INTERPRETED, cdiv, contiguous, jit, launch, wide

BLOCK = 64 if INTERPRETED else 1024


@jit
def _kernel(x_ptrs, y_ptrs, size, F: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr):
    """Computes y = F(*x) for tuples of pointers. None is an absent input, or an output that is not wanted."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _compute(x_ptrs, y_ptrs, at, None, F, OUTPUTS)
    else:
        _compute(x_ptrs, y_ptrs, at, at < size, F, OUTPUTS)


@triton.jit
def _compute(x_ptrs, y_ptrs, at, inside, F: tl.constexpr, OUTPUTS: tl.constexpr):
    y = F(*[None if x_ptr is None else wide(tl.load(x_ptr + at, inside)) for x_ptr in x_ptrs])
    for i in tl.static_range(OUTPUTS):
        if y_ptrs[i] is not None:
            tl.store(y_ptrs[i] + at, y[i], inside)


def pointwise(function: Any, x: Tensors, wanted: tuple[bool, ...] = (True,)) -> Tensors:
    """Returns the outputs of function(*x), with None for those not wanted. All of `x` but the first may be None."""
    x = contiguous(*x)
    y = tuple(torch.empty_like(x[0]) if want else None for want in wanted)
    size = x[0].numel()
    launch(
        _kernel,
        (cdiv(size, BLOCK),),
        x[0].device,
        x,
        y,
        size,
        F=function,
        OUTPUTS=len(y),
        BLOCK=BLOCK,
        num_warps=4,
    )
    return y


def unary(value: Any, slope: Any, curvature: Any) -> Rules:
    """Returns the rules of y = f(x), from Triton functions of f(x), f'(x) v and f''(x) ct_y t_x + f'(x) t_ct_y."""

    def forward(c: SimpleNamespace, x: Tensors) -> tuple[Tensors, Tensors]:
        return pointwise(value, x), ()

    def jvp(c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors) -> tuple[Tensors, Tensors]:
        return pointwise(slope, (*x, *t_x)), ()

    def vjp(c: SimpleNamespace, x: Tensors, r: Tensors, ct_y: Tensors) -> Tensors:
        return pointwise(slope, (*x, *ct_y))

    def vjp_jvp(
        c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors, t_r: Tensors, ct_y: Tensors, t_ct_y: Tensors | None
    ) -> Tensors:
        return pointwise(curvature, (*x, *t_x, *ct_y, *(t_ct_y or (None,))))

    return Rules(forward, jvp, vjp, vjp_jvp)
