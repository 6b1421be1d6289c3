"""The kernels of metalstm_update in Triton: the formulas of __init__.py, for a block of coordinates of one task.

| tile | tensor | shape |
|---|---|---|
| h, c and the gates of the first layer | [T, H, N] | [BLOCK_H, BLOCK_N] |
| phi, grad, the gates of the second layer | [T, N], [T, 2, N] | [1, BLOCK_N] |
| w_hh of one gate | [T, 4H, H] | [BLOCK_H, BLOCK_H] |

BLOCK_H holds all hidden units, so that they stay in registers. A program of vjp or vjp_jvp sums the cotangents of the
weights over its block, and PyTorch adds up the blocks. In float64 on a GPU, and for more than LARGEST_H hidden units,
all rules are those of the reference.

jvp and vjp_jvp compute with dual numbers, a value and its tangent. These would not fit into registers beside the
products of the first layer, so that those are PyTorch's there, and a kernel does all between them. The inner loop needs
forward and vjp alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import exp
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl

from metakern.ops.core import matrices
from metakern.ops.core.dual import Dual, duals
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels.launch import (
    INTERPRETED,
    ROUNDED,
    cdiv,
    contiguous,
    jit,
    launch,
    precision,
    wide,
)
from metakern.ops.metalstm_update import REFERENCE, arguments, arguments_vjp

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
def _score(x, t, gate, h_next, phi, last, BIAS: tl.constexpr, H: tl.constexpr, j):
    """Returns the argument of a gate of the second layer, [1, BLOCK_N], with or without its bias."""
    w = wide(tl.load(x[8] + (t * 2 + gate) * H + j, j < H, other=0.0))
    own = x[9] + (t * 2 + gate) * 3
    s = tl.sum(w * h_next, 0)[None, :] + wide(tl.load(own)) * phi + wide(tl.load(own + 1)) * last
    if BIAS:
        s += wide(tl.load(own + 2))
    return s


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
    phi, grad, last_rate, last_decay = _row(x, t, n, N)
    h = wide(tl.load(x[2] + at, inside, other=0.0))
    c = wide(tl.load(x[3] + at, inside, other=0.0))
    log, sign, log_slope, sign_slope = _read(grad, P, LEAST, STEEP)
    i = _sigmoid(_argument(x, t, 0, h, log, sign, H, BLOCK_H, PRECISION))
    f = _sigmoid(_argument(x, t, 1, h, log, sign, H, BLOCK_H, PRECISION))
    g = _tanh(_argument(x, t, 2, h, log, sign, H, BLOCK_H, PRECISION))
    o = _sigmoid(_argument(x, t, 3, h, log, sign, H, BLOCK_H, PRECISION))
    c_next = f * c + i * g
    e = _tanh(c_next)
    rate = _sigmoid(_score(x, t, 0, o * e, phi, last_rate, True, H, j))
    decay = _sigmoid(_score(x, t, 1, o * e, phi, last_decay, True, H, j))
    return (
        (phi, grad, h, c, last_rate, last_decay),
        (log, sign, log_slope, sign_slope),
        (i, f, g, o, c_next, e),
        (rate, decay),
    )


@triton.jit
def _row(x, t, n, N):
    """Returns phi, grad, and the last rate and decay of a block, [1, BLOCK_N] each."""
    return (
        wide(tl.load(x[0] + t * N + n, n < N, other=0.0)),
        wide(tl.load(x[1] + t * N + n, n < N, other=0.0)),
        wide(tl.load(x[4] + t * 2 * N + n, n < N, other=0.0)),
        wide(tl.load(x[4] + (t * 2 + 1) * N + n, n < N, other=0.0)),
    )


@triton.jit
def _gate_of(a_ptr, t, gate, n, N, H: tl.constexpr, j):
    """Returns a gate's block of a tensor [T, 4H, N], [BLOCK_H, BLOCK_N]."""
    return tl.load(a_ptr + ((t * 4 + gate) * H + j) * N + n, (j < H) & (n < N), other=0.0)


@triton.jit
def _score_jvp(x, t_x, t, gate, h_next, t_h_next, phi, t_phi, last, t_last, H: tl.constexpr, j):
    """Returns the tangent of the argument of a gate of the second layer."""
    of_weights = _score(t_x, t, gate, h_next, phi, last, True, H, j)
    return of_weights + _score(x, t, gate, t_h_next, t_phi, t_last, False, H, j)


@triton.jit
def _layers_jvp(x, t_x, a, t, n, N, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Returns the row of a block, its tangent, and dual numbers: c, i, f, g, o, tanh(c'), c', h', the last two gates.

    `a`: the arguments of the first layer's gates, and their tangents.
    """
    j = tl.arange(0, BLOCK_H)[:, None]
    at, inside = (t * H + j) * N + n, (j < H) & (n < N)
    row, t_row = _row(x, t, n, N), _row(t_x, t, n, N)
    c, t_c = wide(tl.load(x[3] + at, inside, other=0.0)), wide(tl.load(t_x[3] + at, inside, other=0.0))
    i, f = _sigmoid(_gate_of(a[0], t, 0, n, N, H, j)), _sigmoid(_gate_of(a[0], t, 1, n, N, H, j))
    g, o = _tanh(_gate_of(a[0], t, 2, n, N, H, j)), _sigmoid(_gate_of(a[0], t, 3, n, N, H, j))
    t_i, t_f = i * (1 - i) * _gate_of(a[1], t, 0, n, N, H, j), f * (1 - f) * _gate_of(a[1], t, 1, n, N, H, j)
    t_g, t_o = (1 - g * g) * _gate_of(a[1], t, 2, n, N, H, j), o * (1 - o) * _gate_of(a[1], t, 3, n, N, H, j)
    c_next, t_c_next = f * c + i * g, t_f * c + f * t_c + t_i * g + i * t_g
    e = _tanh(c_next)
    t_e = (1 - e * e) * t_c_next
    h_next, t_h_next = o * e, t_o * e + o * t_e
    rate = _sigmoid(_score(x, t, 0, h_next, row[0], row[2], True, H, j))
    decay = _sigmoid(_score(x, t, 1, h_next, row[0], row[3], True, H, j))
    t_rate = _score_jvp(x, t_x, t, 0, h_next, t_h_next, row[0], t_row[0], row[2], t_row[2], H, j)
    t_decay = _score_jvp(x, t_x, t, 1, h_next, t_h_next, row[0], t_row[0], row[3], t_row[3], H, j)
    return (
        row,
        t_row,
        (c, t_c),
        (i, t_i),
        (f, t_f),
        (g, t_g),
        (o, t_o),
        (e, t_e),
        (c_next, t_c_next),
        (h_next, t_h_next),
        (rate, rate * (1 - rate) * t_rate),
        (decay, decay * (1 - decay) * t_decay),
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


@jit
def _update_jvp_kernel(x, t_x, a, t_y, N, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    """Stores t_y, given the arguments of the first layer's gates and their tangents, [T, 4H, N]."""
    t = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    row, t_row, _, _, _, _, _, _, c_next, h_next, rate, decay = _layers_jvp(x, t_x, a, t, n, N, H, BLOCK_H)
    phi, grad, _, _ = row
    t_phi, t_grad, _, _ = t_row
    j = tl.arange(0, BLOCK_H)[:, None]
    at, inside = (t * H + j) * N + n, (j < H) & (n < N)
    t_phi_next = decay[1] * phi + decay[0] * t_phi - rate[1] * grad - rate[0] * t_grad
    tl.store(t_y[0] + t * N + n, t_phi_next, n < N)
    tl.store(t_y[1] + at, h_next[1], inside)
    tl.store(t_y[2] + at, c_next[1], inside)
    tl.store(t_y[3] + t * 2 * N + n, rate[1], n < N)
    tl.store(t_y[3] + (t * 2 + 1) * N + n, decay[1], n < N)


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


@triton.jit
def _cotangents(ct, t, n, N, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Returns the cotangents of phi', h', c', and of the rate and the decay of a block."""
    j = tl.arange(0, BLOCK_H)[:, None]
    at, inside = (t * H + j) * N + n, (j < H) & (n < N)
    return (
        wide(tl.load(ct[0] + t * N + n, n < N, other=0.0)),
        wide(tl.load(ct[1] + at, inside, other=0.0)),
        wide(tl.load(ct[2] + at, inside, other=0.0)),
        wide(tl.load(ct[3] + t * 2 * N + n, n < N, other=0.0)),
        wide(tl.load(ct[3] + (t * 2 + 1) * N + n, n < N, other=0.0)),
    )


@triton.jit
def _gate_vjp_jvp(x, t_x, sums, t, part, gate, ct_gate, t_ct_gate, value, phi, last, h_next, H: tl.constexpr, j):
    """Stores the tangents of the sums of a gate of the second layer, given dual numbers.

    Returns the tangents of its cotangents of phi and of the last gate, then its cotangent of h' and the tangent of it.
    """
    ct_s = ct_gate * value[0] * (1 - value[0])
    t_ct_s = t_ct_gate * value[0] * (1 - value[0]) + ct_gate * (1 - 2 * value[0]) * value[1]
    tl.store(sums[0] + (part * 2 + gate) * H + j, _sum(t_ct_s * h_next[0] + ct_s * h_next[1]), j < H)
    own_sums = sums[1] + (part * 2 + gate) * 3
    tl.store(own_sums, tl.sum(t_ct_s * phi[0] + ct_s * phi[1]))
    tl.store(own_sums + 1, tl.sum(t_ct_s * last[0] + ct_s * last[1]))
    tl.store(own_sums + 2, tl.sum(t_ct_s))
    own, t_own = x[9] + (t * 2 + gate) * 3, t_x[9] + (t * 2 + gate) * 3
    w = wide(tl.load(x[8] + (t * 2 + gate) * H + j, j < H, other=0.0))
    t_w = wide(tl.load(t_x[8] + (t * 2 + gate) * H + j, j < H, other=0.0))
    return (
        wide(tl.load(t_own)) * ct_s + wide(tl.load(own)) * t_ct_s,
        wide(tl.load(t_own + 1)) * ct_s + wide(tl.load(own + 1)) * t_ct_s,
        w * ct_s,
        t_w * ct_s + w * t_ct_s,
    )


@triton.jit
def _store_gate(ct_a, t, gate, n, N, ct, t_ct, H: tl.constexpr, j):
    at, inside = ((t * 4 + gate) * H + j) * N + n, (j < H) & (n < N)
    tl.store(ct_a[0] + at, ct, inside)
    tl.store(ct_a[1] + at, t_ct, inside)


@jit
def _update_vjp_jvp_kernel(
    x, t_x, a, ct, t_ct, t_ct_x, ct_a, sums, N, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Stores the cotangents of the first layer's arguments and their tangents, [T, 4H, N], and what is not from these.

    That are t_ct_x of phi, grad (without what comes through the first layer), c and the gates, and the block's sums for
    the second layer's weights. `a`: the first layer's arguments and their tangents.
    """
    t = tl.program_id(1).to(tl.int64)
    part = t * tl.num_programs(0) + tl.program_id(0)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    row, t_row, c, i, f, g, o, e, _, h_next, rate, decay = _layers_jvp(x, t_x, a, t, n, N, H, BLOCK_H)
    phi, grad, last_rate, last_decay = row
    t_phi, t_grad, t_last_rate, t_last_decay = t_row
    j = tl.arange(0, BLOCK_H)[:, None]
    at, inside = (t * H + j) * N + n, (j < H) & (n < N)
    ct_p, ct_h, ct_c, ct_rate, ct_decay = _cotangents(ct, t, n, N, H, BLOCK_H)
    t_ct_p, t_ct_h, t_ct_c, t_ct_rate, t_ct_decay = _cotangents(t_ct, t, n, N, H, BLOCK_H)
    ct_rate -= grad * ct_p
    ct_decay += phi * ct_p
    t_ct_rate -= t_grad * ct_p + grad * t_ct_p
    t_ct_decay += t_phi * ct_p + phi * t_ct_p
    phis = phi, t_phi
    t_ct_phi = decay[1] * ct_p + decay[0] * t_ct_p
    of_phi, of_last, of_h, t_of_h = _gate_vjp_jvp(
        x, t_x, sums, t, part, 0, ct_rate, t_ct_rate, rate, phis, (last_rate, t_last_rate), h_next, H, j
    )
    tl.store(t_ct_x[4] + t * 2 * N + n, of_last, n < N)
    t_ct_phi += of_phi
    ct_h += of_h
    t_ct_h += t_of_h
    of_phi, of_last, of_h, t_of_h = _gate_vjp_jvp(
        x, t_x, sums, t, part, 1, ct_decay, t_ct_decay, decay, phis, (last_decay, t_last_decay), h_next, H, j
    )
    tl.store(t_ct_x[4] + (t * 2 + 1) * N + n, of_last, n < N)
    tl.store(t_ct_x[0] + t * N + n, t_ct_phi + of_phi, n < N)
    tl.store(t_ct_x[1] + t * N + n, -rate[1] * ct_p - rate[0] * t_ct_p, n < N)
    ct_h += of_h
    t_ct_h += t_of_h
    slope, t_slope = 1 - e[0] * e[0], -2 * e[0] * e[1]
    t_ct_c += t_ct_h * o[0] * slope + ct_h * (o[1] * slope + o[0] * t_slope)
    ct_c += ct_h * o[0] * slope
    tl.store(t_ct_x[3] + at, f[1] * ct_c + f[0] * t_ct_c, inside)
    s, t_s = i[0] * (1 - i[0]), (1 - 2 * i[0]) * i[1]
    t_ct_a = (t_ct_c * g[0] + ct_c * g[1]) * s + ct_c * g[0] * t_s
    _store_gate(ct_a, t, 0, n, N, ct_c * g[0] * s, t_ct_a, H, j)
    s, t_s = f[0] * (1 - f[0]), (1 - 2 * f[0]) * f[1]
    t_ct_a = (t_ct_c * c[0] + ct_c * c[1]) * s + ct_c * c[0] * t_s
    _store_gate(ct_a, t, 1, n, N, ct_c * c[0] * s, t_ct_a, H, j)
    s, t_s = 1 - g[0] * g[0], -2 * g[0] * g[1]
    t_ct_a = (t_ct_c * i[0] + ct_c * i[1]) * s + ct_c * i[0] * t_s
    _store_gate(ct_a, t, 2, n, N, ct_c * i[0] * s, t_ct_a, H, j)
    s, t_s = o[0] * (1 - o[0]), (1 - 2 * o[0]) * o[1]
    t_ct_a = (t_ct_h * e[0] + ct_h * e[1]) * s + ct_h * e[0] * t_s
    _store_gate(ct_a, t, 3, n, N, ct_h * e[0] * s, t_ct_a, H, j)


def _launch(kernel: Any, x: Tensors, *others: Any, **options: Any) -> None:
    T, H, N = x[2].shape
    sizes = {"H": H, "BLOCK_H": max(16, triton.next_power_of_2(H)), "BLOCK_N": BLOCK}
    launch(kernel, (cdiv(N, BLOCK), T), x[0].device, x, *others, N, **sizes, **options, **ROUNDED, num_warps=4)


def _of_products(c: SimpleNamespace) -> dict[str, Any]:
    """Returns the constants of the kernels that compute both layers."""
    return {"P": c.p, "LEAST": exp(-c.p), "STEEP": exp(c.p), "PRECISION": precision()}


def _left(x: Tensors) -> bool:
    """Returns whether the reference computes a call: in float64 on a GPU, for many tasks or hidden units, or none."""
    T, H, _ = x[2].shape
    return (x[0].dtype == torch.float64 and not INTERPRETED) or T >= 2**16 or not 0 < H <= LARGEST_H


def _forward(c: SimpleNamespace, x: Tensors) -> tuple[Tensors, Tensors]:
    if _left(x):
        return REFERENCE.forward(c, x)
    x = contiguous(*x)
    y = tuple(torch.empty_like(x[i]) for i in (0, 2, 3, 4))
    _launch(_update_kernel, x, y, **_of_products(c))
    return y, ()


def _jvp(c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors) -> tuple[Tensors, Tensors]:
    if _left(x):
        return REFERENCE.jvp(c, x, r, t_x)
    x, t_x = contiguous(*x), contiguous(*t_x)
    t_y = tuple(torch.empty_like(x[i]) for i in (0, 2, 3, 4))
    a = arguments(c.p, duals(x, t_x))
    _launch(_update_jvp_kernel, x, t_x, contiguous(a.value, a.tangent), t_y)
    return t_y, ()


def _vjp(c: SimpleNamespace, x: Tensors, r: Tensors, ct_y: Tensors) -> Tensors:
    if _left(x):
        return REFERENCE.vjp(c, x, r, ct_y)
    x, ct_y = contiguous(*x), contiguous(*ct_y)
    ct_x, sums = tuple(map(torch.empty_like, x[:5])), _sums(x, range(5, 10))
    _launch(_update_vjp_kernel, x, ct_y, ct_x, sums, **_of_products(c))
    return (*ct_x, *(s.sum(1).to(x[0].dtype) for s in sums))


def _vjp_jvp(
    c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors, t_r: Tensors, ct_y: Tensors, t_ct_y: Tensors | None
) -> Tensors:
    if _left(x):
        return REFERENCE.vjp_jvp(c, x, r, t_x, t_r, ct_y, t_ct_y)
    t_ct_y = tuple(map(torch.zeros_like, ct_y)) if t_ct_y is None else t_ct_y
    x, t_x, ct_y, t_ct_y = contiguous(*x), contiguous(*t_x), contiguous(*ct_y), contiguous(*t_ct_y)
    t_ct_x, sums, dual = tuple(map(torch.empty_like, x[:5])), _sums(x, (8, 9)), duals(x, t_x)
    a = arguments(c.p, dual)
    ct_a = Dual(torch.empty_like(a.value), torch.empty_like(a.value))
    ct = ct_a.value, ct_a.tangent
    _launch(_update_vjp_jvp_kernel, x, t_x, contiguous(a.value, a.tangent), ct_y, t_ct_y, t_ct_x, ct, sums)
    t_ct_grad, t_ct_h, *weights = (of.tangent for of in arguments_vjp(c.p, dual, ct_a))
    found = t_ct_x[0], t_ct_x[1] + t_ct_grad, t_ct_h, *t_ct_x[3:], *weights, *(s.sum(1) for s in sums)
    return tuple(v.to(x[0].dtype) for v in found)


def _sums(x: Tensors, places: Iterable[int]) -> Tensors:
    """Returns empty tensors for the sums of each block for the weights x[i], i in `places`."""
    blocks, like = cdiv(x[0].shape[1], BLOCK), matrices.wide(x[0])
    return tuple(like.new_empty(x[i].shape[0], blocks, *x[i].shape[1:]) for i in places)


RULES = Rules(_forward, _jvp, _vjp, _vjp_jvp)


def compiled(make: Make) -> list[Sample]:
    T, N, H = 4, 4096, 20
    state = make(T, N), make(T, N), make(T), make(T, H, N), make(T, H, N), make(T, 2, N)
    return [Sample("tasks", (*state, *(make(*s) for s in ((4 * H, 4), (4 * H, H), (4 * H,), (2, H + 2), (2,)))))]
