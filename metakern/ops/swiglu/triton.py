"""The rules of SwiGLU in Triton, by the formulas of `__init__.py`."""

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels.pointwise import pointwise


@triton.jit
def _forward(gate, up):
    return (gate * tl.sigmoid(gate) * up,)


@triton.jit
def _jvp(gate, up, t_gate, t_up):
    s = tl.sigmoid(gate)
    value = gate * s
    return ((s + value * (1 - s)) * up * t_gate + value * t_up,)


@triton.jit
def _vjp(gate, up, ct_y):
    s = tl.sigmoid(gate)
    value = gate * s
    return (s + value * (1 - s)) * up * ct_y, value * ct_y


@triton.jit
def _vjp_jvp(gate, up, t_gate, t_up, ct_y, t_ct_y):
    s = tl.sigmoid(gate)
    value = gate * s
    first = s + value * (1 - s)
    second = s * (1 - s) * (2 + gate * (1 - 2 * s))
    t_ct_gate = (second * t_gate * up + first * t_up) * ct_y
    t_ct_up = first * t_gate * ct_y
    if t_ct_y is not None:
        t_ct_gate += first * up * t_ct_y
        t_ct_up += value * t_ct_y
    return t_ct_gate, t_ct_up


def forward(c: SimpleNamespace, x: Tensors) -> tuple[Tensors, Tensors]:
    return pointwise(_forward, x), ()


def jvp(c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors) -> tuple[Tensors, Tensors]:
    return pointwise(_jvp, (*x, *t_x)), ()


def vjp(c: SimpleNamespace, x: Tensors, r: Tensors, ct_y: Tensors) -> Tensors:
    return pointwise(_vjp, (*x, *ct_y), c.needs)


def vjp_jvp(
    c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors, t_r: Tensors, ct_y: Tensors, t_ct_y: Tensors | None
) -> Tensors:
    return pointwise(_vjp_jvp, (*x, *t_x, *ct_y, *(t_ct_y or (None,))), c.needs)


RULES = Rules(forward, jvp, vjp, vjp_jvp)


def compiled(make: Make) -> list[Sample]:
    return [Sample("matrix", (make(8, 512, 2048), make(8, 512, 2048)))]
