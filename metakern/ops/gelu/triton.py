"""The rules of GELU in Triton, by the formulas of `__init__.py`, with s = sigmoid(2u) for (1 + tanh(u)) / 2."""

from __future__ import annotations

from math import pi, sqrt

import triton
import triton.language as tl

from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels.pointwise import unary
from metakern.ops.gelu import by_approximation

_ROOT_HALF = tl.constexpr(sqrt(1 / 2))
_DENSITY = tl.constexpr(1 / sqrt(2 * pi))  # φ at 0
_K = tl.constexpr(sqrt(2 / pi))
_A = tl.constexpr(0.044715)


@triton.jit
def _cumulative(x):
    """Returns Φ(x)."""
    return 0.5 * (1 + tl.erf(x * _ROOT_HALF))


@triton.jit
def _density(x):
    """Returns φ(x)."""
    return _DENSITY * tl.exp(-0.5 * x * x)


@triton.jit
def _value(x):
    return (x * _cumulative(x),)


@triton.jit
def _slope(x, v):
    return ((_cumulative(x) + x * _density(x)) * v,)


@triton.jit
def _curvature(x, t_x, ct_y, t_ct_y):
    density = _density(x)
    t_ct_x = density * (2 - x * x) * ct_y * t_x
    if t_ct_y is not None:
        t_ct_x += (_cumulative(x) + x * density) * t_ct_y
    return (t_ct_x,)


@triton.jit
def _tanh_parts(x):
    """Returns s, 1 - s (without cancellation), and u'."""
    square = x * x
    twice = 2 * _K * x * (1 + _A * square)
    return tl.sigmoid(twice), tl.sigmoid(-twice), _K * (1 + 3 * _A * square)


@triton.jit
def _tanh_value(x):
    s, _, _ = _tanh_parts(x)
    return (x * s,)


@triton.jit
def _tanh_slope(x, v):
    s, rest, slope = _tanh_parts(x)
    return (s * (1 + 2 * x * rest * slope) * v,)


@triton.jit
def _tanh_curvature(x, t_x, ct_y, t_ct_y):
    s, rest, slope = _tanh_parts(x)
    t_ct_x = 4 * s * rest * (slope + x * (3 * _K * _A * x - (s - rest) * slope * slope)) * ct_y * t_x
    if t_ct_y is not None:
        t_ct_x += s * (1 + 2 * x * rest * slope) * t_ct_y
    return (t_ct_x,)


RULES = by_approximation(none=unary(_value, _slope, _curvature), tanh=unary(_tanh_value, _tanh_slope, _tanh_curvature))


def compiled(make: Make) -> list[Sample]:
    return [Sample(name, (make(8, 512, 512),), {"approximate": name}) for name in ("none", "tanh")]
