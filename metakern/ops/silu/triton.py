"""The rules of SiLU in Triton, by the formulas of `__init__.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels.pointwise import unary


@triton.jit
def _value(x):
    return (x * tl.sigmoid(x),)


@triton.jit
def _slope(x, v):
    s = tl.sigmoid(x)
    return (s * (1 + x * (1 - s)) * v,)


@triton.jit
def _curvature(x, t_x, ct_y, t_ct_y):
    s = tl.sigmoid(x)
    t_ct_x = s * (1 - s) * (2 + x * (1 - 2 * s)) * ct_y * t_x
    if t_ct_y is not None:
        t_ct_x += s * (1 + x * (1 - s)) * t_ct_y
    return (t_ct_x,)


RULES = unary(_value, _slope, _curvature)


def compiled(make: Make) -> list[Sample]:
    return [Sample("matrix", (make(8, 512, 512),))]
