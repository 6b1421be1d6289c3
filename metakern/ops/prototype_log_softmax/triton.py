"""The rules of prototype_log_softmax in Triton; C, D and the numbers of examples may have any size.

The formulas are those of `__init__.py`. A program of `_forward_kernel`, `_jvp_kernel` or `_query_kernel` has one query
and all classes, and goes through D in blocks; `_mean_kernel` and `_prototype_kernel` have a class and a block of D, and
go through the examples or queries of the task in order, so that there are no atomics. `a` and `b` [T, Q, C] are
-2 ct_z and nothing for the vjp, -2 t_ct_z and -2 ct_z for vjp_jvp: the weights of u - p and of its tangent.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakern.ops.core import matrices
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels.launch import ROUNDED, cdiv, contiguous, jit, launch, wide

LARGEST = 4096  # elements of a block [C, D]


@jit
def _mean_kernel(x_ptr, labels_ptr, shots_ptr, p_ptr, S, C, D, BLOCK_D: tl.constexpr):
    """Stores p[t, c] = the mean of the examples x of class c."""
    t, c = tl.program_id(0).to(tl.int64) // C, tl.program_id(0).to(tl.int64) % C
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], p_ptr.dtype.element_ty)
    for s in range(S):
        mine = tl.load(labels_ptr + t * S + s) == c
        total += wide(tl.load(x_ptr + (t * S + s) * D + d, (d < D) & mine, other=0.0))  # [BLOCK_D]
    shots = tl.load(shots_ptr + t * C + c)
    tl.store(p_ptr + (t * C + c) * D + d, total / tl.where(shots > 0, shots, 1.0), d < D)


@jit
def _forward_kernel(u_ptr, p_ptr, shots_ptr, y_ptr, Q, C, D, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    q = tl.program_id(0).to(tl.int64)
    t, c = q // Q, tl.arange(0, BLOCK_C)
    z = tl.zeros([BLOCK_C], p_ptr.dtype.element_ty)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (c < C)[:, None] & (d < D)[None, :]
        u = wide(tl.load(u_ptr + q * D + d, d < D, other=0.0))[None, :]
        apart = tl.where(inside, u - tl.load(p_ptr + (t * C + c)[:, None] * D + d[None, :], inside, other=0.0), 0.0)
        z -= tl.sum(apart * apart, 1)  # [BLOCK_C]
    z = tl.where(tl.load(shots_ptr + t * C + c, c < C, other=0.0) > 0, z, float("-inf"))
    z -= tl.max(z, 0)
    tl.store(y_ptr + q * C + c, z - tl.log(tl.sum(tl.exp(z), 0)), c < C)


@jit
def _jvp_kernel(
    u_ptr, p_ptr, y_ptr, t_u_ptr, t_p_ptr, shots_ptr, t_y_ptr, Q, C, D, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr
):
    q = tl.program_id(0).to(tl.int64)
    t, c = q // Q, tl.arange(0, BLOCK_C)
    t_z = tl.zeros([BLOCK_C], p_ptr.dtype.element_ty)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (c < C)[:, None] & (d < D)[None, :]
        at = (t * C + c)[:, None] * D + d[None, :]
        u = wide(tl.load(u_ptr + q * D + d, d < D, other=0.0))[None, :]
        t_u = wide(tl.load(t_u_ptr + q * D + d, d < D, other=0.0))[None, :]
        apart = u - tl.load(p_ptr + at, inside, other=0.0)  # [BLOCK_C, BLOCK_D]
        t_z -= 2 * tl.sum(apart * (t_u - tl.load(t_p_ptr + at, inside, other=0.0)), 1)
    present = tl.load(shots_ptr + t * C + c, c < C, other=0.0) > 0
    t_z = tl.where(present, t_z, 0.0)
    pi = tl.exp(wide(tl.load(y_ptr + q * C + c, c < C, other=float("-inf"))))
    tl.store(t_y_ptr + q * C + c, tl.where(present, t_z - tl.sum(pi * t_z, 0), 0.0), c < C)


@jit
def _query_kernel(
    u_ptr,
    p_ptr,
    y_ptr,
    shots_ptr,
    ct_y_ptr,
    t_u_ptr,
    t_p_ptr,
    t_y_ptr,
    t_ct_y_ptr,
    a_ptr,
    b_ptr,
    ct_u_ptr,
    Q,
    C,
    D,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores a, and b where there are tangents, and ct_u = the sum of a (u - p) + b (t_u - t_p) over the classes."""
    q = tl.program_id(0).to(tl.int64)
    t, c = q // Q, tl.arange(0, BLOCK_C)
    present = tl.load(shots_ptr + t * C + c, c < C, other=0.0) > 0
    pi = tl.exp(wide(tl.load(y_ptr + q * C + c, present, other=float("-inf"))))  # [BLOCK_C]
    ct_y = wide(tl.load(ct_y_ptr + q * C + c, present, other=0.0))
    total = tl.sum(ct_y, 0)
    a = -2 * (ct_y - pi * total)
    b = a
    if t_u_ptr is not None:
        a = 2 * pi * wide(tl.load(t_y_ptr + q * C + c, present, other=0.0)) * total
        if t_ct_y_ptr is not None:
            t_ct_y = wide(tl.load(t_ct_y_ptr + q * C + c, present, other=0.0))
            a -= 2 * (t_ct_y - pi * tl.sum(t_ct_y, 0))
        tl.store(b_ptr + q * C + c, b, c < C)
    tl.store(a_ptr + q * C + c, a, c < C)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = present[:, None] & (d < D)[None, :]
        at = (t * C + c)[:, None] * D + d[None, :]
        u = wide(tl.load(u_ptr + q * D + d, d < D, other=0.0))[None, :]
        v = a[:, None] * (u - tl.load(p_ptr + at, inside, other=0.0))  # [BLOCK_C, BLOCK_D]
        if t_u_ptr is not None:
            t_u = wide(tl.load(t_u_ptr + q * D + d, d < D, other=0.0))[None, :]
            v += b[:, None] * (t_u - tl.load(t_p_ptr + at, inside, other=0.0))
        tl.store(ct_u_ptr + q * D + d, tl.sum(v, 0), d < D)


@jit
def _prototype_kernel(u_ptr, p_ptr, t_u_ptr, t_p_ptr, a_ptr, b_ptr, ct_p_ptr, Q, C, D, BLOCK_D: tl.constexpr):
    """Stores ct_p = minus the sum of a (u - p) + b (t_u - t_p) over the queries."""
    row = tl.program_id(0).to(tl.int64)
    t, c = row // C, row % C
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    p = tl.load(p_ptr + row * D + d, d < D, other=0.0)  # [BLOCK_D]
    ct_p = tl.zeros([BLOCK_D], ct_p_ptr.dtype.element_ty)
    for i in range(Q):
        q = t * Q + i
        ct_p -= tl.load(a_ptr + q * C + c) * (wide(tl.load(u_ptr + q * D + d, d < D, other=0.0)) - p)
        if t_u_ptr is not None:
            t_p = tl.load(t_p_ptr + row * D + d, d < D, other=0.0)
            t_u = wide(tl.load(t_u_ptr + q * D + d, d < D, other=0.0))
            ct_p -= tl.load(b_ptr + q * C + c) * (t_u - t_p)
    tl.store(ct_p_ptr + row * D + d, ct_p, d < D)


@jit
def _example_kernel(ct_p_ptr, labels_ptr, shots_ptr, ct_x_ptr, S, C, D, BLOCK_D: tl.constexpr):
    """Stores ct_x = ct_p / n of the example's class; zeros for an example that does not count."""
    row = tl.program_id(0).to(tl.int64)
    t, c = row // S, tl.load(labels_ptr + row)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    counts = (c >= 0) & (c < C)
    shots = tl.load(shots_ptr + t * C + c, counts, other=1.0)
    ct_p = tl.load(ct_p_ptr + (t * C + c) * D + d, (d < D) & counts, other=0.0)  # [BLOCK_D]
    tl.store(ct_x_ptr + row * D + d, ct_p / shots, d < D)


def forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    u, shots = contiguous(inputs[1], c.shots)
    p = _means(c, inputs[0])
    y = u.new_empty(*u.shape[:2], shots.shape[1])
    _each_query(_forward_kernel, u, p, u, p, shots, y)
    return (y,), (p,)


def jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    u, p, y, t_u, shots = contiguous(inputs[1], *r, t_inputs[1], c.shots)
    t_p, t_y = _means(c, t_inputs[0]), torch.empty_like(y)
    _each_query(_jvp_kernel, u, p, u, p, y, t_u, t_p, shots, t_y)
    return (t_y,), (t_p,)


def vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    return _cotangents(c, inputs, r, ct_outputs[0])


def vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_outputs: Tensors,
    t_ct_outputs: Tensors | None,
) -> Tensors:
    tangents = t_inputs[1], *t_r, None if t_ct_outputs is None else t_ct_outputs[0]
    return _cotangents(c, inputs, r, ct_outputs[0], *tangents)


def _cotangents(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    ct_y: Tensor,
    t_u: Tensor | None = None,
    t_p: Tensor | None = None,
    t_y: Tensor | None = None,
    t_ct_y: Tensor | None = None,
) -> Tensors:
    """Returns the cotangents of support and query, or their tangents if t_u, t_p and t_y are given."""
    u, p, y, ct_y, t_u, t_p, t_y, t_ct_y = contiguous(inputs[1], *r, ct_y, t_u, t_p, t_y, t_ct_y)
    labels, shots = contiguous(c.labels, c.shots)
    a, ct_u, ct_p = torch.empty_like(y, dtype=p.dtype), torch.empty_like(u), torch.empty_like(p)
    b = None if t_u is None else torch.empty_like(a)
    ct_x = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
    _each_query(_query_kernel, u, p, u, p, y, shots, ct_y, t_u, t_p, t_y, t_ct_y, a, b, ct_u)
    (T, S, D), Q, C = ct_x.shape, u.shape[1], p.shape[1]
    columns = _columns(D)
    blocks = cdiv(D, columns["BLOCK_D"])
    launch(_prototype_kernel, (T * C, blocks), u.device, u, p, t_u, t_p, a, b, ct_p, Q, C, D, **columns)
    launch(_example_kernel, (T * S, blocks), u.device, ct_p, labels, shots, ct_x, S, C, D, **columns)
    return ct_x, ct_u


def _means(c: SimpleNamespace, x: Tensor) -> Tensor:
    """Returns the means [T, C, D] of the examples x [T, S, D] of each class; zeros for a class without an example."""
    x, labels, shots = contiguous(x, c.labels, c.shots)
    (T, S, D), C = x.shape, shots.shape[1]
    p, columns = matrices.wide(x[:0]).new_empty(T, C, D), _columns(D)
    grid = T * C, cdiv(D, columns["BLOCK_D"])
    launch(_mean_kernel, grid, x.device, x, labels, shots, p, S, C, D, **columns)
    return p


def _each_query(kernel: triton.JITFunction, u: Tensor, p: Tensor, *tensors: Tensor | None) -> None:
    """Runs a program for each query u [T, Q, D], with all prototypes p [T, C, D] of its task."""
    (T, Q, D), C = u.shape, p.shape[1]
    BLOCK_C = triton.next_power_of_2(C)
    BLOCK_D = triton.next_power_of_2(min(max(D, 1), max(LARGEST // BLOCK_C, 1)))
    launch(kernel, (T * Q,), u.device, *tensors, Q, C, D, BLOCK_C=BLOCK_C, BLOCK_D=BLOCK_D, **ROUNDED)


def _columns(D: int) -> dict[str, int]:
    return {"BLOCK_D": triton.next_power_of_2(min(max(D, 1), max(LARGEST // 8, 1)))}


RULES = Rules(forward, jvp, vjp, vjp_jvp)


def compiled(make: Make) -> list[Sample]:
    labels = make.integers(5, 4, 25)
    many = make.integers(150, 2, 300)
    return [
        Sample("5-way", (make(4, 25, 256), labels, make(4, 75, 256), 5)),
        Sample("150-way", (make(2, 300, 768), many, make(2, 150, 768), 150)),
    ]
