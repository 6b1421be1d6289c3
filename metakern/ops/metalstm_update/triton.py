"""The kernels of metalstm_update in Triton: the formulas of __init__.py, for a block of coordinates of one task.

| tile | tensor | shape |
|---|---|---|
| h, c and the gates of the first layer | [T, H, N] | [BLOCK_H, BLOCK_N] |
| phi, grad, the gates of the second layer | [T, N], [T, 2, N] | [1, BLOCK_N] |
| w_hh of one gate | [T, 4H, H] | [BLOCK_H, BLOCK_H] |

BLOCK_H holds all hidden units, so that they stay in registers. A program of vjp or vjp_jvp sums the cotangents of the
weights over its block, and PyTorch adds up the blocks. In float64 on a GPU, and for more than LARGEST_H hidden units,
all rules are those of the reference.

jvp and vjp_jvp compute with dual numbers, a value and its tangent. Those of all layers would not fit into registers
beside the products, so the products with w_hh are PyTorch's there. The inner loop needs forward and vjp alone.
"""

from __future__ import annotations

from math import exp
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakern.ops.core import matrices
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels.launch import INTERPRETED, cdiv, contiguous, jit, launch, precision, wide
from metakern.ops.metalstm_update import REFERENCE, summed

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
def _argument(
    x, products, t, gate, n, N, h, log, sign, H: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr
):
    """Returns the argument of a gate of the first layer, [BLOCK_H, BLOCK_N].

    `products` points to w_hh h, [T, 4H, N]; None computes it.
    """
    j, k = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_H)[None, :]
    w_log, w_sign, bias = _weights(x, t, gate, H, j, j < H)
    if products is None:
        product = tl.dot(_matrix(x[6], t, gate, H, j, k), h, input_precision=PRECISION, out_dtype=h.dtype)
    else:
        product = _row(products, t, gate, n, N, H, j)
    return product + w_log * log + w_sign * sign + bias


@triton.jit
def _row(a_ptr, t, gate, n, N, H: tl.constexpr, j):
    """Returns a gate's block of a tensor [T, 4H, N], [BLOCK_H, BLOCK_N]."""
    return tl.load(a_ptr + ((t * 4 + gate) * H + j) * N + n, (j < H) & (n < N), other=0.0)


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
def _inputs(x, t, n, N, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Returns phi, grad, h, c, and the last rate and decay of a block."""
    j = tl.arange(0, BLOCK_H)[:, None]
    at, inside = (t * H + j) * N + n, (j < H) & (n < N)
    return (
        wide(tl.load(x[0] + t * N + n, n < N, other=0.0)),
        wide(tl.load(x[1] + t * N + n, n < N, other=0.0)),
        wide(tl.load(x[2] + at, inside, other=0.0)),
        wide(tl.load(x[3] + at, inside, other=0.0)),
        wide(tl.load(x[4] + t * 2 * N + n, n < N, other=0.0)),
        wide(tl.load(x[4] + (t * 2 + 1) * N + n, n < N, other=0.0)),
    )


@triton.jit
def _layers(
    x,
    products,
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
    phi, grad, h, c, last_rate, last_decay = _inputs(x, t, n, N, H, BLOCK_H)
    log, sign, log_slope, sign_slope = _read(grad, P, LEAST, STEEP)
    i = _sigmoid(_argument(x, products, t, 0, n, N, h, log, sign, H, BLOCK_H, PRECISION))
    f = _sigmoid(_argument(x, products, t, 1, n, N, h, log, sign, H, BLOCK_H, PRECISION))
    g = _tanh(_argument(x, products, t, 2, n, N, h, log, sign, H, BLOCK_H, PRECISION))
    o = _sigmoid(_argument(x, products, t, 3, n, N, h, log, sign, H, BLOCK_H, PRECISION))
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
def _argument_jvp(x, t_x, t_products, t, gate, n, N, read, t_read, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Returns the tangent of the argument of a gate of the first layer, given that of w_hh h."""
    j = tl.arange(0, BLOCK_H)[:, None]
    w_log, w_sign, _ = _weights(x, t, gate, H, j, j < H)
    t_w_log, t_w_sign, t_bias = _weights(t_x, t, gate, H, j, j < H)
    of_weights = t_w_log * read[0] + t_w_sign * read[1] + t_bias
    return _row(t_products, t, gate, n, N, H, j) + of_weights + w_log * t_read[0] + w_sign * t_read[1]


@triton.jit
def _score_jvp(x, t_x, t, gate, h_next, t_h_next, phi, t_phi, last, t_last, H: tl.constexpr, j):
    """Returns the tangent of the argument of a gate of the second layer."""
    of_weights = _score(t_x, t, gate, h_next, phi, last, True, H, j)
    return of_weights + _score(x, t, gate, t_h_next, t_phi, t_last, False, H, j)


@triton.jit
def _layers_jvp(
    x,
    t_x,
    t_products,
    t,
    n,
    N,
    inputs,
    read,
    first,
    gates,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Returns the tangents of what `_layers` returns, those of h' in place of the slopes of u."""
    j = tl.arange(0, BLOCK_H)[:, None]
    t_inputs = _inputs(t_x, t, n, N, H, BLOCK_H)
    phi, _, _, c, last_rate, last_decay = inputs
    t_phi, t_grad, _, t_c, t_last_rate, t_last_decay = t_inputs
    i, f, g, o, _, e = first
    rate, decay = gates
    t_read = read[2] * t_grad, read[3] * t_grad
    t_i = i * (1 - i) * _argument_jvp(x, t_x, t_products, t, 0, n, N, read, t_read, H, BLOCK_H)
    t_f = f * (1 - f) * _argument_jvp(x, t_x, t_products, t, 1, n, N, read, t_read, H, BLOCK_H)
    t_g = (1 - g * g) * _argument_jvp(x, t_x, t_products, t, 2, n, N, read, t_read, H, BLOCK_H)
    t_o = o * (1 - o) * _argument_jvp(x, t_x, t_products, t, 3, n, N, read, t_read, H, BLOCK_H)
    t_c_next = t_f * c + f * t_c + t_i * g + i * t_g
    t_e = (1 - e * e) * t_c_next
    t_h_next = t_o * e + o * t_e
    t_s = _score_jvp(x, t_x, t, 0, o * e, t_h_next, phi, t_phi, last_rate, t_last_rate, H, j)
    t_rate = rate * (1 - rate) * t_s
    t_s = _score_jvp(x, t_x, t, 1, o * e, t_h_next, phi, t_phi, last_decay, t_last_decay, H, j)
    return (
        t_inputs,
        (t_read[0], t_read[1], t_h_next),
        (t_i, t_f, t_g, t_o, t_c_next, t_e),
        (t_rate, decay * (1 - decay) * t_s),
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
    inputs, _, first, gates = _layers(x, None, t, n, N, H, P, LEAST, STEEP, BLOCK_H, PRECISION)
    j = tl.arange(0, BLOCK_H)[:, None]
    at, inside = (t * H + j) * N + n, (j < H) & (n < N)
    tl.store(y[0] + t * N + n, gates[1] * inputs[0] - gates[0] * inputs[1], n < N)
    tl.store(y[1] + at, first[3] * first[5], inside)
    tl.store(y[2] + at, first[4], inside)
    tl.store(y[3] + t * 2 * N + n, gates[0], n < N)
    tl.store(y[3] + (t * 2 + 1) * N + n, gates[1], n < N)


@jit
def _update_jvp_kernel(
    x,
    t_x,
    products,
    t_products,
    t_y,
    N,
    H: tl.constexpr,
    P: tl.constexpr,
    LEAST: tl.constexpr,
    STEEP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores t_y, given w_hh h and its tangent, [T, 4H, N]."""
    t = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inputs, read, first, gates = _layers(x, products, t, n, N, H, P, LEAST, STEEP, BLOCK_H, PRECISION)
    t_inputs, t_read, t_first, t_gates = _layers_jvp(
        x, t_x, t_products, t, n, N, inputs, read, first, gates, H, BLOCK_H
    )
    j = tl.arange(0, BLOCK_H)[:, None]
    at, inside = (t * H + j) * N + n, (j < H) & (n < N)
    t_phi = t_gates[1] * inputs[0] + gates[1] * t_inputs[0] - t_gates[0] * inputs[1] - gates[0] * t_inputs[1]
    tl.store(t_y[0] + t * N + n, t_phi, n < N)
    tl.store(t_y[1] + at, t_read[2], inside)
    tl.store(t_y[2] + at, t_first[4], inside)
    tl.store(t_y[3] + t * 2 * N + n, t_gates[0], n < N)
    tl.store(t_y[3] + (t * 2 + 1) * N + n, t_gates[1], n < N)


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
    inputs, read, first, gates = _layers(x, None, t, n, N, H, P, LEAST, STEEP, BLOCK_H, PRECISION)
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
def _gate_vjp_jvp(
    x,
    t_x,
    sums,
    t,
    part,
    gate,
    ct_gate,
    t_ct_gate,
    value,
    t_value,
    phi,
    t_phi,
    last,
    t_last,
    h_next,
    t_h_next,
    H: tl.constexpr,
    j,
):
    """Stores the tangents of what `_gate_vjp` stores; returns those of what it returns, and its cotangent of h'."""
    ct_s = ct_gate * value * (1 - value)
    t_ct_s = t_ct_gate * value * (1 - value) + ct_gate * (1 - 2 * value) * t_value
    tl.store(sums[3] + (part * 2 + gate) * H + j, _sum(t_ct_s * h_next + ct_s * t_h_next), j < H)
    own_sums = sums[4] + (part * 2 + gate) * 3
    tl.store(own_sums, tl.sum(t_ct_s * phi + ct_s * t_phi))
    tl.store(own_sums + 1, tl.sum(t_ct_s * last + ct_s * t_last))
    tl.store(own_sums + 2, tl.sum(t_ct_s))
    own, t_own = x[9] + (t * 2 + gate) * 3, t_x[9] + (t * 2 + gate) * 3
    w = wide(tl.load(x[8] + (t * 2 + gate) * H + j, j < H, other=0.0))
    t_w = wide(tl.load(t_x[8] + (t * 2 + gate) * H + j, j < H, other=0.0))
    return (
        wide(tl.load(t_own)) * ct_s + wide(tl.load(own)) * t_ct_s,
        wide(tl.load(t_own + 1)) * ct_s + wide(tl.load(own + 1)) * t_ct_s,
        t_w * ct_s + w * t_ct_s,
        w * ct_s,
    )


@triton.jit
def _argument_vjp_jvp(
    x, t_x, ct_a, sums, t, part, gate, n, N, a, t_a, read, t_read, H: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Stores a gate's cotangent `a` and its tangent `t_a`, and the sums of the weights that multiply u(grad), and b.

    Returns the gate's part of the cotangent of u(grad)'s logarithm, and the tangents of this and of that of the sign.
    """
    j = tl.arange(0, BLOCK_H)[:, None]
    at = ((t * 4 + gate) * H + j) * N + n
    tl.store(ct_a[0] + at, a, (j < H) & (n < N))
    tl.store(ct_a[1] + at, t_a, (j < H) & (n < N))
    row = (part * 4 + gate) * H + j
    tl.store(sums[0] + row * 2, _sum(t_a * read[0] + a * t_read[0]), j < H)
    tl.store(sums[0] + row * 2 + 1, _sum(t_a * read[1] + a * t_read[1]), j < H)
    tl.store(sums[2] + row, _sum(t_a), j < H)
    w_log, w_sign, _ = _weights(x, t, gate, H, j, j < H)
    t_w_log, t_w_sign, _ = _weights(t_x, t, gate, H, j, j < H)
    return (
        tl.sum(w_log * a, 0)[None, :],
        tl.sum(t_w_log * a + w_log * t_a, 0)[None, :],
        tl.sum(t_w_sign * a + w_sign * t_a, 0)[None, :],
    )


@jit
def _update_vjp_jvp_kernel(
    x,
    t_x,
    products,
    t_products,
    ct,
    t_ct,
    t_ct_x,
    ct_a,
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
    """Stores t_ct_x but that of h, the block's sums for the weights but w_hh, and ct_a and its tangent, [T, 4H, N].

    It is given w_hh h and its tangent, [T, 4H, N]; `t_ct` may be None.
    """
    t = tl.program_id(1).to(tl.int64)
    part = t * tl.num_programs(0) + tl.program_id(0)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inputs, read, first, gates = _layers(x, products, t, n, N, H, P, LEAST, STEEP, BLOCK_H, PRECISION)
    t_inputs, t_read, t_first, t_gates = _layers_jvp(
        x, t_x, t_products, t, n, N, inputs, read, first, gates, H, BLOCK_H
    )
    phi, grad, _, c, last_rate, last_decay = inputs
    t_phi, t_grad, _, t_c, t_last_rate, t_last_decay = t_inputs
    i, f, g, o, _, e = first
    t_i, t_f, t_g, t_o, _, t_e = t_first
    rate, decay = gates
    t_rate, t_decay = t_gates
    j = tl.arange(0, BLOCK_H)[:, None]
    at, inside = (t * H + j) * N + n, (j < H) & (n < N)
    ct_p, ct_h, ct_c, ct_rate, ct_decay = _cotangents(ct, t, n, N, H, BLOCK_H)
    t_ct_p, t_ct_h, t_ct_c = tl.zeros_like(ct_p), tl.zeros_like(ct_h), tl.zeros_like(ct_c)
    t_ct_rate, t_ct_decay = tl.zeros_like(ct_rate), tl.zeros_like(ct_decay)
    if t_ct is not None:
        t_ct_p, t_ct_h, t_ct_c, t_ct_rate, t_ct_decay = _cotangents(t_ct, t, n, N, H, BLOCK_H)
    ct_rate -= grad * ct_p
    ct_decay += phi * ct_p
    t_ct_rate -= t_grad * ct_p + grad * t_ct_p
    t_ct_decay += t_phi * ct_p + phi * t_ct_p
    h_next = o * e
    of_phi, of_last, t_of_h, of_h = _gate_vjp_jvp(
        x,
        t_x,
        sums,
        t,
        part,
        0,
        ct_rate,
        t_ct_rate,
        rate,
        t_rate,
        phi,
        t_phi,
        last_rate,
        t_last_rate,
        h_next,
        t_read[2],
        H,
        j,
    )
    tl.store(t_ct_x[4] + t * 2 * N + n, of_last, n < N)
    t_ct_phi = t_decay * ct_p + decay * t_ct_p + of_phi
    ct_h += of_h
    t_ct_h += t_of_h
    of_phi, of_last, t_of_h, of_h = _gate_vjp_jvp(
        x,
        t_x,
        sums,
        t,
        part,
        1,
        ct_decay,
        t_ct_decay,
        decay,
        t_decay,
        phi,
        t_phi,
        last_decay,
        t_last_decay,
        h_next,
        t_read[2],
        H,
        j,
    )
    tl.store(t_ct_x[4] + (t * 2 + 1) * N + n, of_last, n < N)
    tl.store(t_ct_x[0] + t * N + n, t_ct_phi + of_phi, n < N)
    ct_h += of_h
    t_ct_h += t_of_h
    t_ct_c += t_ct_h * o * (1 - e * e) + ct_h * (t_o * (1 - e * e) - 2 * o * e * t_e)
    ct_c += ct_h * o * (1 - e * e)
    tl.store(t_ct_x[3] + at, t_f * ct_c + f * t_ct_c, inside)
    a = ct_c * g * i * (1 - i)
    t_a = (t_ct_c * g + ct_c * t_g) * i * (1 - i) + ct_c * g * (1 - 2 * i) * t_i
    log_i, t_log_i, t_sign_i = _argument_vjp_jvp(x, t_x, ct_a, sums, t, part, 0, n, N, a, t_a, read, t_read, H, BLOCK_H)
    a = ct_c * c * f * (1 - f)
    t_a = (t_ct_c * c + ct_c * t_c) * f * (1 - f) + ct_c * c * (1 - 2 * f) * t_f
    log_f, t_log_f, t_sign_f = _argument_vjp_jvp(x, t_x, ct_a, sums, t, part, 1, n, N, a, t_a, read, t_read, H, BLOCK_H)
    a = ct_c * i * (1 - g * g)
    t_a = (t_ct_c * i + ct_c * t_i) * (1 - g * g) - 2 * ct_c * i * g * t_g
    log_g, t_log_g, t_sign_g = _argument_vjp_jvp(x, t_x, ct_a, sums, t, part, 2, n, N, a, t_a, read, t_read, H, BLOCK_H)
    a = ct_h * e * o * (1 - o)
    t_a = (t_ct_h * e + ct_h * t_e) * o * (1 - o) + ct_h * e * (1 - 2 * o) * t_o
    log_o, t_log_o, t_sign_o = _argument_vjp_jvp(x, t_x, ct_a, sums, t, part, 3, n, N, a, t_a, read, t_read, H, BLOCK_H)
    slope = read[2]
    t_ct_grad = (t_log_i + t_log_f + t_log_g + t_log_o) * slope + (t_sign_i + t_sign_f + t_sign_g + t_sign_o) * read[3]
    t_ct_grad -= (log_i + log_f + log_g + log_o) * P * slope * slope * t_grad
    tl.store(t_ct_x[1] + t * N + n, t_ct_grad - t_rate * ct_p - rate * t_ct_p, n < N)


def _launch(kernel: Any, c: SimpleNamespace, x: Tensors, *others: Tensors | None) -> None:
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
    x, y = contiguous(*x), _like_outputs(x)
    _launch(_update_kernel, c, x, y)
    return y, ()


def _jvp(c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors) -> tuple[Tensors, Tensors]:
    if _left(x):
        return REFERENCE.jvp(c, x, r, t_x)
    x, t_x, t_y = contiguous(*x), contiguous(*t_x), _like_outputs(x)
    _launch(_update_jvp_kernel, c, x, t_x, *_products(x, t_x), t_y)
    return t_y, ()


def _vjp(c: SimpleNamespace, x: Tensors, r: Tensors, ct_y: Tensors) -> Tensors:
    if _left(x):
        return REFERENCE.vjp(c, x, r, ct_y)
    x, ct_y = contiguous(*x), contiguous(*ct_y)
    ct_x, sums = _like_inputs(x)
    _launch(_update_vjp_kernel, c, x, ct_y, ct_x, sums)
    return (*ct_x, *(s.sum(1).to(x[0].dtype) for s in sums))


def _vjp_jvp(
    c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors, t_r: Tensors, ct_y: Tensors, t_ct_y: Tensors | None
) -> Tensors:
    if _left(x):
        return REFERENCE.vjp_jvp(c, x, r, t_x, t_r, ct_y, t_ct_y)
    x, t_x, ct_y, t_ct_y = contiguous(*x), contiguous(*t_x), contiguous(*ct_y), t_ct_y and contiguous(*t_ct_y)
    (t_ct_x, sums), products = _like_inputs(x), _products(x, t_x)
    ct_a, t_ct_a = (torch.empty_like(product) for product in products)
    _launch(_update_vjp_jvp_kernel, c, x, t_x, *products, ct_y, t_ct_y, t_ct_x, (ct_a, t_ct_a), sums)
    (h, w), (t_h, t_w) = ([matrices.wide(v[i]) for i in (2, 6)] for v in (x, t_x))
    t_ct_x[2].copy_(torch.baddbmm(t_w.mT @ ct_a, w.mT, t_ct_a))
    totals = [s.sum(1) for s in sums]
    totals[1] = summed(t_ct_a, h) + summed(ct_a, t_h)
    return (*t_ct_x, *(total.to(x[0].dtype) for total in totals))


def _products(x: Tensors, t_x: Tensors) -> tuple[Tensor, Tensor]:
    """Returns w_hh h and its tangent, [T, 4H, N]."""
    (h, w), (t_h, t_w) = ([matrices.wide(v[i]) for i in (2, 6)] for v in (x, t_x))
    return w @ h, torch.baddbmm(t_w @ h, w, t_h)


def _like_outputs(x: Tensors) -> Tensors:
    """Returns empty tensors of the sizes of phi', h', c' and gates', given the inputs."""
    return tuple(torch.empty(x[i].shape, dtype=x[i].dtype, device=x[i].device) for i in (0, 2, 3, 4))


def _like_inputs(x: Tensors) -> tuple[Tensors, Tensors]:
    """Returns empty tensors for the cotangents of phi, grad and the state, and for each block's of the weights."""
    blocks, like = cdiv(x[0].shape[1], BLOCK), matrices.wide(x[0])
    return tuple(map(torch.empty_like, x[:5])), tuple(
        w.new_empty(w.shape[0], blocks, *w.shape[1:], dtype=like.dtype) for w in x[5:]
    )


RULES = Rules(_forward, _jvp, _vjp, _vjp_jvp)


def compiled(make: Make) -> list[Sample]:
    T, N, H = 4, 4096, 20
    state = make(T, N), make(T, N), make(T), make(T, H, N), make(T, H, N), make(T, 2, N)
    return [Sample("tasks", (*state, *(make(*s) for s in ((4 * H, 4), (4 * H, H), (4 * H,), (2, H + 2), (2,)))))]
