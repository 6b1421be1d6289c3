"""forward and vjp of metalstm_update in Triton: the formulas of __init__.py, for a block of coordinates of one task.

| tile | tensor | shape |
|---|---|---|
| h, c and the gates of the first layer | [T, H, N] | [BLOCK_H, BLOCK_N] |
| phi, grad, the gates of the second layer | [T, N], [T, 2, N] | [1, BLOCK_N] |
| w_hh of one gate | [T, 4H, H] | [BLOCK_H, BLOCK_H] |

BLOCK_H holds all hidden units, so that they stay in registers. A program of vjp sums the cotangents of the weights over
its block, and PyTorch adds up the blocks. The inner loop uses only these two rules; jvp and vjp_jvp are those of the
reference. So are all rules in float64 on a GPU, and for more than LARGEST_H hidden units.
"""

from __future__ import annotations

from math import exp
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl

from metakern.ops.core import matrices
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels.launch import INTERPRETED, cdiv, contiguous, jit, launch, precision, wide
from metakern.ops.metalstm_update import REFERENCE

BLOCK = 16  # at 32 and 64 vjp spilled more registers
LARGEST_H = 32


@triton.jit
def _tanh(x):
    """Returns tanh x: near 0, where the quotient would lose digits, its series."""
    e = tl.exp(-2 * tl.abs(x))
    y = (1 - e) / (1 + e)
    q = x * x
    series = x * (1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835)))))
    return tl.where(q < 0.0625 if x.dtype == tl.float32 else q < 1e-5, series, tl.where(x < 0, -y, y))


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _read(z, P: tl.constexpr, LEAST: tl.constexpr, STEEP: tl.constexpr):
    """Returns u(z) and u'(z), two numbers each."""
    large = tl.abs(z) >= LEAST
    size = tl.where(large, z, 1.0)
    log = tl.where(large, tl.log(tl.abs(size)) / P, -1.0)
    sign = tl.where(large, tl.where(z < 0, -1.0, 1.0), STEEP * z)
    return log, sign, tl.where(large, 1 / (P * size), 0.0), tl.where(large, 0.0, tl.full(z.shape, STEEP, z.dtype))


@triton.jit
def _weights(x, t, gate, H: tl.constexpr, j, some):
    """Returns a gate's weights of u(grad), and its bias, [BLOCK_H, 1] each."""
    row = (t * 4 + gate) * H + j
    log = wide(tl.load(x[5] + row * 2, some, other=0.0))
    sign = wide(tl.load(x[5] + row * 2 + 1, some, other=0.0))
    return log, sign, wide(tl.load(x[7] + row, some, other=0.0))


@triton.jit
def _matrix(w_ptr, t, gate, H: tl.constexpr, j, k):
    """Returns w_hh of a gate, with the rows j and the columns k in the dimensions that these have."""
    return wide(tl.load(w_ptr + ((t * 4 + gate) * H + j) * H + k, (j < H) & (k < H), other=0.0))


@triton.jit
def _argument(x, t, gate, h, log, sign, H: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr):
    """Returns the argument of a gate of the first layer, [BLOCK_H, BLOCK_N]."""
    j, k = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_H)[None, :]
    w_log, w_sign, bias = _weights(x, t, gate, H, j, j < H)
    product = tl.dot(_matrix(x[6], t, gate, H, j, k), h, input_precision=PRECISION, out_dtype=h.dtype)
    return product + w_log * log + w_sign * sign + bias


@triton.jit
def _gate(x, t, gate, h_next, phi, last, H: tl.constexpr, j):
    """Returns a gate of the second layer, [1, BLOCK_N]."""
    w = wide(tl.load(x[8] + (t * 2 + gate) * H + j, j < H, other=0.0))
    own = x[9] + (t * 2 + gate) * 3
    return _sigmoid(
        tl.sum(w * h_next, 0)[None, :]
        + wide(tl.load(own)) * phi
        + wide(tl.load(own + 1)) * last
        + wide(tl.load(own + 2))
    )


@triton.jit
def _layers(
    x,
    t,
    n,
    N,
    H: tl.constexpr,
    P: tl.constexpr,
    LEAST: tl.constexpr,
    STEEP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Returns the inputs of a block and all that both layers compute from them."""
    j = tl.arange(0, BLOCK_H)[:, None]
    at, inside = (t * H + j) * N + n, (j < H) & (n < N)
    phi = wide(tl.load(x[0] + t * N + n, n < N, other=0.0))
    grad = wide(tl.load(x[1] + t * N + n, n < N, other=0.0))
    h = wide(tl.load(x[2] + at, inside, other=0.0))
    c = wide(tl.load(x[3] + at, inside, other=0.0))
    last_rate = wide(tl.load(x[4] + t * 2 * N + n, n < N, other=0.0))
    last_decay = wide(tl.load(x[4] + (t * 2 + 1) * N + n, n < N, other=0.0))
    log, sign, log_slope, sign_slope = _read(grad, P, LEAST, STEEP)
    i = _sigmoid(_argument(x, t, 0, h, log, sign, H, BLOCK_H, PRECISION))
    f = _sigmoid(_argument(x, t, 1, h, log, sign, H, BLOCK_H, PRECISION))
    g = _tanh(_argument(x, t, 2, h, log, sign, H, BLOCK_H, PRECISION))
    o = _sigmoid(_argument(x, t, 3, h, log, sign, H, BLOCK_H, PRECISION))
    c_next = f * c + i * g
    e = _tanh(c_next)
    rate = _gate(x, t, 0, o * e, phi, last_rate, H, j)
    decay = _gate(x, t, 1, o * e, phi, last_decay, H, j)
    return (
        (phi, grad, h, c, last_rate, last_decay),
        (log, sign, log_slope, sign_slope),
        (i, f, g, o, c_next, e),
        (rate, decay),
    )


@jit
def _update_kernel(
    x,
    y,
    N,
    H: tl.constexpr,
    P: tl.constexpr,
    LEAST: tl.constexpr,
    STEEP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inputs, _, first, gates = _layers(x, t, n, N, H, P, LEAST, STEEP, BLOCK_H, PRECISION)
    j = tl.arange(0, BLOCK_H)[:, None]
    at, inside = (t * H + j) * N + n, (j < H) & (n < N)
    tl.store(y[0] + t * N + n, gates[1] * inputs[0] - gates[0] * inputs[1], n < N)
    tl.store(y[1] + at, first[3] * first[5], inside)
    tl.store(y[2] + at, first[4], inside)
    tl.store(y[3] + t * 2 * N + n, gates[0], n < N)
    tl.store(y[3] + (t * 2 + 1) * N + n, gates[1], n < N)


@triton.jit
def _sum(values):
    return tl.sum(values, 1)[:, None]


@triton.jit
def _gate_vjp(x, sums, t, part, gate, ct_gate, value, phi, last, h_next, H: tl.constexpr, j):
    """Stores the sums of a gate of the second layer; returns its cotangents of phi, of the last gate, and of h'."""
    ct_s = ct_gate * value * (1 - value)
    tl.store(sums[3] + (part * 2 + gate) * H + j, _sum(ct_s * h_next), j < H)
    own, own_sums = x[9] + (t * 2 + gate) * 3, sums[4] + (part * 2 + gate) * 3
    tl.store(own_sums, tl.sum(ct_s * phi))
    tl.store(own_sums + 1, tl.sum(ct_s * last))
    tl.store(own_sums + 2, tl.sum(ct_s))
    w = wide(tl.load(x[8] + (t * 2 + gate) * H + j, j < H, other=0.0))
    return wide(tl.load(own)) * ct_s, wide(tl.load(own + 1)) * ct_s, w * ct_s


@triton.jit
def _argument_vjp(
    x, sums, t, part, gate, ct_a, h, log, sign, H: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr
):
    """Stores the sums of a gate of the first layer; returns its parts of the cotangents of h and of u(grad)."""
    j, k = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_H)[None, :]
    row = (part * 4 + gate) * H + j
    ct_w = tl.dot(ct_a, tl.trans(h), input_precision=PRECISION, out_dtype=h.dtype)
    tl.store(sums[1] + row * H + k, ct_w, (j < H) & (k < H))
    tl.store(sums[0] + row * 2, _sum(ct_a * log), j < H)
    tl.store(sums[0] + row * 2 + 1, _sum(ct_a * sign), j < H)
    tl.store(sums[2] + row, _sum(ct_a), j < H)
    w_log, w_sign, _ = _weights(x, t, gate, H, j, j < H)
    transposed = _matrix(x[6], t, gate, H, k, j)  # the unit that is read has the rows, the gate's unit the columns
    ct_h = tl.dot(transposed, ct_a, input_precision=PRECISION, out_dtype=h.dtype)
    return ct_h, tl.sum(w_log * ct_a, 0)[None, :], tl.sum(w_sign * ct_a, 0)[None, :]


@jit
def _update_vjp_kernel(
    x,
    ct,
    ct_x,
    sums,
    N,
    H: tl.constexpr,
    P: tl.constexpr,
    LEAST: tl.constexpr,
    STEEP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores ct_x, and the block's sums for the weights, each [T, blocks, ...]."""
    t = tl.program_id(1).to(tl.int64)
    part = t * tl.num_programs(0) + tl.program_id(0)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inputs, read, first, gates = _layers(x, t, n, N, H, P, LEAST, STEEP, BLOCK_H, PRECISION)
    phi, grad, h, c, last_rate, last_decay = inputs
    log, sign, log_slope, sign_slope = read
    i, f, g, o, _, e = first
    rate, decay = gates
    j = tl.arange(0, BLOCK_H)[:, None]
    at, inside = (t * H + j) * N + n, (j < H) & (n < N)
    ct_p = wide(tl.load(ct[0] + t * N + n, n < N, other=0.0))
    ct_rate = wide(tl.load(ct[3] + t * 2 * N + n, n < N, other=0.0)) - grad * ct_p
    ct_decay = wide(tl.load(ct[3] + (t * 2 + 1) * N + n, n < N, other=0.0)) + phi * ct_p
    of_phi, of_last, of_h = _gate_vjp(x, sums, t, part, 0, ct_rate, rate, phi, last_rate, o * e, H, j)
    tl.store(ct_x[4] + t * 2 * N + n, of_last, n < N)
    ct_phi, ct_h = decay * ct_p + of_phi, wide(tl.load(ct[1] + at, inside, other=0.0)) + of_h
    of_phi, of_last, of_h = _gate_vjp(x, sums, t, part, 1, ct_decay, decay, phi, last_decay, o * e, H, j)
    tl.store(ct_x[4] + (t * 2 + 1) * N + n, of_last, n < N)
    tl.store(ct_x[0] + t * N + n, ct_phi + of_phi, n < N)
    ct_h += of_h
    ct_c = wide(tl.load(ct[2] + at, inside, other=0.0)) + ct_h * o * (1 - e * e)
    tl.store(ct_x[3] + at, f * ct_c, inside)
    a = ct_c * g * i * (1 - i)
    h_i, log_i, sign_i = _argument_vjp(x, sums, t, part, 0, a, h, log, sign, H, BLOCK_H, PRECISION)
    a = ct_c * c * f * (1 - f)
    h_f, log_f, sign_f = _argument_vjp(x, sums, t, part, 1, a, h, log, sign, H, BLOCK_H, PRECISION)
    a = ct_c * i * (1 - g * g)
    h_g, log_g, sign_g = _argument_vjp(x, sums, t, part, 2, a, h, log, sign, H, BLOCK_H, PRECISION)
    a = ct_h * e * o * (1 - o)
    h_o, log_o, sign_o = _argument_vjp(x, sums, t, part, 3, a, h, log, sign, H, BLOCK_H, PRECISION)
    tl.store(ct_x[2] + at, h_i + h_f + h_g + h_o, inside)
    ct_grad = (log_i + log_f + log_g + log_o) * log_slope + (sign_i + sign_f + sign_g + sign_o) * sign_slope
    tl.store(ct_x[1] + t * N + n, ct_grad - rate * ct_p, n < N)


def _launch(kernel: Any, c: SimpleNamespace, x: Tensors, *others: Tensors) -> None:
    T, H, N = x[2].shape
    launch(
        kernel,
        (cdiv(N, BLOCK), T),
        x[0].device,
        x,
        *others,
        N,
        H=H,
        P=c.p,
        LEAST=exp(-c.p),
        STEEP=exp(c.p),
        BLOCK_H=max(16, triton.next_power_of_2(H)),
        BLOCK_N=BLOCK,
        PRECISION=precision(),
        num_warps=4,
    )


def _left(x: Tensors) -> bool:
    """Returns whether the reference computes a call: in float64 on a GPU, for many tasks or hidden units, or none."""
    T, H, _ = x[2].shape
    return (x[0].dtype == torch.float64 and not INTERPRETED) or T >= 2**16 or not 0 < H <= LARGEST_H


def _forward(c: SimpleNamespace, x: Tensors) -> tuple[Tensors, Tensors]:
    if _left(x):
        return REFERENCE.forward(c, x)
    x = contiguous(*x)
    y = tuple(torch.empty_like(x[i]) for i in (0, 2, 3, 4))
    _launch(_update_kernel, c, x, y)
    return y, ()


def _vjp(c: SimpleNamespace, x: Tensors, r: Tensors, ct_y: Tensors) -> Tensors:
    if _left(x):
        return REFERENCE.vjp(c, x, r, ct_y)
    x, ct_y = contiguous(*x), contiguous(*ct_y)
    ct_x = tuple(torch.empty_like(a) for a in x[:5])
    blocks, like = cdiv(x[0].shape[1], BLOCK), matrices.wide(x[0])
    sums = tuple(like.new_empty(w.shape[0], blocks, *w.shape[1:]) for w in x[5:])
    _launch(_update_vjp_kernel, c, x, ct_y, ct_x, sums)
    return (*ct_x, *(s.sum(1).to(x[0].dtype) for s in sums))


RULES = Rules(_forward, REFERENCE.jvp, _vjp, REFERENCE.vjp_jvp)


def compiled(make: Make) -> list[Sample]:
    T, N, H = 4, 4096, 20
    state = make(T, N), make(T, N), make(T), make(T, H, N), make(T, H, N), make(T, 2, N)
    return [Sample("tasks", (*state, *(make(*s) for s in ((4 * H, 4), (4 * H, H), (4 * H,), (2, H + 2), (2,)))))]
