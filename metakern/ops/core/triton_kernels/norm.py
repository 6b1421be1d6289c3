"""The kernels of layer norm and RMS norm. RMS norm is layer norm with a mean of 0, and has no mean_ptr.

Formulas and names are those of metakern/ops/layer_norm and rms_norm. vjp applied to t_ct_y is a term of vjp_jvp, so one
kernel serves both. Its argument v is ct_y for vjp, which has no tangents, and t_ct_y for vjp_jvp. The kernels are
compiled with ROUNDED; tl.fma stands where a product and a sum may be rounded once.

| tile | tensor | shape |
|---|---|---|
| x, y, v, ct_y, t_x | [T, N, D] | [BLOCK_N, BLOCK_D] |
| weight, bias | [T, D], a pointer and its stride over T | [BLOCK_N, BLOCK_D], equal rows |
| mean, ρ | [T, N] | [BLOCK_N, 1] |

A row that fits into a block is read from memory once: the second loop loads the same values with no store in between,
and the compiler removes these loads. The sums over rows, ct_w and ct_b, use no atomics: each program sums a chunk of
rows, and PyTorch adds up the chunks. If a row takes several blocks, a second launch computes these sums, with one block
of columns for each program.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakern.ops.core import matrices
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.triton_kernels.launch import INTERPRETED, ROUNDED, cdiv, contiguous, jit, launch, wide

# The widest row that is one block. The tiles of a wider one would not all stay in registers.
LARGEST = {"forward": 16384, "jvp": 8192, "vjp": 8192}
TILE = 32 if INTERPRETED else 2048
PROGRAMS = 2 if INTERPRETED else 1024  # that sum a chunk of rows each, if that makes at most MOST tiles for each
MOST = 2 if INTERPRETED else 64
STAGED_BYTES = 8192  # the largest tile of which the next one is loaded early: seven tensors may have one, twice


@triton.jit
def _load(ptr, n, d, D: tl.constexpr, inside):
    return wide(tl.load(ptr + n * D + d, inside, other=0.0))  # [BLOCK_N, BLOCK_D]


@triton.jit
def _parameter(ptr_and_stride, t, n, d, D: tl.constexpr):
    """Returns a parameter, read once for each row: a tile of one row would have another layout than those of x."""
    at = tl.broadcast_to(ptr_and_stride[0] + t * ptr_and_stride[1] + d, [n.shape[0], d.shape[1]])
    return wide(tl.load(at, tl.broadcast_to(d < D, at.shape), other=0.0))  # [BLOCK_N, BLOCK_D]


@triton.jit
def _centered(x_ptr, mean_ptr, n, d, D: tl.constexpr, some, inside):
    x = _load(x_ptr, n, d, D, inside)
    if mean_ptr is not None:
        x = tl.where(inside, x - tl.load(mean_ptr + n, some, other=0.0), 0.0)
    return x  # [BLOCK_N, BLOCK_D]


@triton.jit
def _normal(x_ptr, mean_ptr, rstd_ptr, n, d, D: tl.constexpr, some, inside):
    """Returns x̂ and ρ."""
    rstd = tl.load(rstd_ptr + n, some, other=1.0)
    return _centered(x_ptr, mean_ptr, n, d, D, some, inside) * rstd, rstd


@triton.jit
def _mean(a, D: tl.constexpr):
    return tl.sum(a, 1)[:, None] / D


@triton.jit
def _projected(a, x_hat, mean_a, mean_x_hat_a):
    """Returns P a = a - mean(a) - x̂ mean(x̂ a)."""
    return tl.fma(x_hat, -mean_x_hat_a, a - mean_a)


@triton.jit
def _rows(chunk, tile, N, TILES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the task of a chunk of TILES * BLOCK_N rows, one tile's rows among all T * N, and a mask: which exist."""
    chunks = tl.cdiv(N, TILES * BLOCK_N)
    row = (chunk % chunks * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    t = chunk // chunks
    return t, t * N + row, row < N


@triton.jit
def _columns(block, some, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return d, some & (d < D)


@jit
def _forward_kernel(
    x_ptr,
    weight,
    bias,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    N,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t, n, some = _rows(tl.program_id(0).to(tl.int64), 0, N, 1, BLOCK_N)
    zero = tl.zeros([BLOCK_N, 1], rstd_ptr.dtype.element_ty)
    count, mean, square = zero, zero, zero  # Σ 1, its mean, and Σ (x - mean)²
    for block in range((D + BLOCK_D - 1) // BLOCK_D):
        d, inside = _columns(block, some, D, BLOCK_D)
        x = _load(x_ptr, n, d, D, inside)
        if mean_ptr is not None:  # add the block's moments to those so far (Chan, Golub, LeVeque 1983)
            size = tl.sum((d < D).to(zero.dtype), 1)[:, None]
            own_mean = tl.sum(x, 1)[:, None] / size
            x = tl.where(inside, x - own_mean, 0.0)
            step, share = own_mean - mean, size / (count + size)
            square += step * step * share * count
            mean += step * share
            count += size
        square += tl.sum(x * x, 1)[:, None]
    rstd = 1 / tl.sqrt(square / D + EPS)
    for block in range((D + BLOCK_D - 1) // BLOCK_D):
        d, inside = _columns(block, some, D, BLOCK_D)
        y = (_load(x_ptr, n, d, D, inside) - mean) * rstd
        if weight is not None:
            y *= _parameter(weight, t, n, d, D)
        if bias is not None:
            y += _parameter(bias, t, n, d, D)
        tl.store(y_ptr + n * D + d, y, inside)
    tl.store(rstd_ptr + n, rstd, some)
    if mean_ptr is not None:
        tl.store(mean_ptr + n, mean, some)


@jit
def _jvp_kernel(
    x,
    weight,
    t_x_ptr,
    t_weight,
    t_bias,
    t_y_ptr,
    t_mean_ptr,
    t_rstd_ptr,
    N,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """t_y, t_mean and t_ρ. `x` holds the pointers of x, mean and ρ."""
    t, n, some = _rows(tl.program_id(0).to(tl.int64), 0, N, 1, BLOCK_N)
    zero = tl.zeros([BLOCK_N, 1], x[2].dtype.element_ty)
    t_mean, slope = zero, zero  # mean(t_x) and mean(x̂ t_x)
    for block in range((D + BLOCK_D - 1) // BLOCK_D):
        d, inside = _columns(block, some, D, BLOCK_D)
        x_hat, _ = _normal(x[0], x[1], x[2], n, d, D, some, inside)
        t_x = _load(t_x_ptr, n, d, D, inside)
        slope += _mean(x_hat * t_x, D)
        if t_mean_ptr is not None:
            t_mean += _mean(t_x, D)
    rstd = tl.load(x[2] + n, some, other=1.0)
    for block in range((D + BLOCK_D - 1) // BLOCK_D):
        d, inside = _columns(block, some, D, BLOCK_D)
        x_hat, _ = _normal(x[0], x[1], x[2], n, d, D, some, inside)
        t_y = _projected(_load(t_x_ptr, n, d, D, inside), x_hat, t_mean, slope) * rstd
        if weight is not None:
            t_y = tl.fma(x_hat, _parameter(t_weight, t, n, d, D), t_y * _parameter(weight, t, n, d, D))
        if t_bias is not None:
            t_y += _parameter(t_bias, t, n, d, D)
        tl.store(t_y_ptr + n * D + d, t_y, inside)
    tl.store(t_rstd_ptr + n, -rstd * rstd * slope, some)
    if t_mean_ptr is not None:
        tl.store(t_mean_ptr + n, t_mean, some)


@triton.jit
def _cotangents(v_ptr, ct_y_ptr, weight, t_weight, t, n, d, D: tl.constexpr, inside, zero):
    """Returns v, ct_y, t_g = t_w ct_y + w v and g = w ct_y; an absent v or ct_y is zero."""
    v, ct_y = zero, zero
    if v_ptr is not None:
        v = _load(v_ptr, n, d, D, inside)
    if ct_y_ptr is not None:
        ct_y = _load(ct_y_ptr, n, d, D, inside)
    t_g, g = v, ct_y
    if weight is not None:
        w = _parameter(weight, t, n, d, D)
        t_g, g = w * v, w * ct_y
        if ct_y_ptr is not None:
            t_g = tl.fma(_parameter(t_weight, t, n, d, D), ct_y, t_g)
    return v, ct_y, t_g, g


@triton.jit
def _t_normal(x_hat, rstd, t_x, n, d, D: tl.constexpr, some, inside):
    """Returns t_x̂ and t_ρ. `t_x` holds the pointers of t_x, t_mean and t_ρ."""
    t_rstd = tl.load(t_x[2] + n, some, other=0.0)
    t_x_hat = tl.fma(x_hat, t_rstd / rstd, _centered(t_x[0], t_x[1], n, d, D, some, inside) * rstd)
    return t_x_hat, t_rstd


@jit
def _vjp_kernel(
    x,
    weight,
    v_ptr,
    ct_y_ptr,
    t_x,
    t_weight,
    out_ptr,
    weight_sum_ptr,
    bias_sum_ptr,
    N,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out: ct_x or t_ct_x; and for each chunk of rows its part of the cotangents of weight and bias, [chunks, D].

    Without ct_y there is no t_x. If out is not wanted, program (chunk, block) computes only that block of columns.
    """
    chunk = tl.program_id(0).to(tl.int64)
    first = 0 if out_ptr is not None else tl.program_id(1)
    zero = tl.zeros([BLOCK_N, BLOCK_D], x[2].dtype.element_ty)
    weight_sum, bias_sum = zero, zero
    for tile in tl.range(0, TILES, num_stages=STAGES):
        t, n, some = _rows(chunk, tile, N, TILES, BLOCK_N)
        none = tl.zeros([BLOCK_N, 1], x[2].dtype.element_ty)
        mean_t_g, mean_x_t_g, mean_g, mean_x_g, mean_t_x_g = none, none, none, none, none
        if out_ptr is not None:
            for block in range((D + BLOCK_D - 1) // BLOCK_D):
                d, inside = _columns(block, some, D, BLOCK_D)
                x_hat, rstd = _normal(x[0], x[1], x[2], n, d, D, some, inside)
                _, _, t_g, g = _cotangents(v_ptr, ct_y_ptr, weight, t_weight, t, n, d, D, inside, zero)
                mean_x_t_g += _mean(x_hat * t_g, D)
                if x[1] is not None:
                    mean_t_g += _mean(t_g, D)
                if ct_y_ptr is not None:
                    t_x_hat, _ = _t_normal(x_hat, rstd, t_x, n, d, D, some, inside)
                    mean_x_g += _mean(x_hat * g, D)
                    mean_t_x_g += _mean(t_x_hat * g, D)
                    if x[1] is not None:
                        mean_g += _mean(g, D)
        for block in range(first, (D + BLOCK_D - 1) // BLOCK_D if out_ptr is not None else first + 1):
            d, inside = _columns(block, some, D, BLOCK_D)
            x_hat, rstd = _normal(x[0], x[1], x[2], n, d, D, some, inside)
            v, ct_y, t_g, g = _cotangents(v_ptr, ct_y_ptr, weight, t_weight, t, n, d, D, inside, zero)
            out = rstd * _projected(t_g, x_hat, mean_t_g, mean_x_t_g)
            weight_sum = tl.fma(v, x_hat, weight_sum)
            bias_sum += v
            if ct_y_ptr is not None:
                t_x_hat, t_rstd = _t_normal(x_hat, rstd, t_x, n, d, D, some, inside)
                out = tl.fma(_projected(g, x_hat, mean_g, mean_x_g), t_rstd, out)
                out = tl.fma(tl.fma(x_hat, mean_t_x_g, t_x_hat * mean_x_g), -rstd, out)
                weight_sum = tl.fma(ct_y, t_x_hat, weight_sum)
            if out_ptr is not None:
                tl.store(out_ptr + n * D + d, out, inside)
    d = first * BLOCK_D + tl.arange(0, BLOCK_D)
    if weight_sum_ptr is not None:
        tl.store(weight_sum_ptr + chunk * D + d, tl.sum(weight_sum, 0), d < D)
    if bias_sum_ptr is not None:
        tl.store(bias_sum_ptr + chunk * D + d, tl.sum(bias_sum, 0), d < D)


def _blocks(T: int, N: int, D: int, largest: int) -> tuple[tuple[int, ...], dict[str, int]]:
    """Returns a grid with a program for each block of rows, and the options of a launch."""
    block_d = min(triton.next_power_of_2(D), largest)
    block_n = max(min(TILE // block_d, triton.next_power_of_2(N)), 1)
    warps = min(max(block_n * block_d // 256, 4), 32)
    return (T * cdiv(N, block_n),), {"D": D, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps, **ROUNDED}


def _strided(parameter: Tensor | None) -> tuple[Tensor, int] | None:
    """Returns a parameter [T, D] with unit stride over D, and its stride over T, which is 0 if tasks share it."""
    if parameter is None:
        return None
    if parameter.stride(1) != 1 or parameter._is_zerotensor() or parameter.is_neg():
        (parameter,) = contiguous(parameter)
    return parameter, parameter.stride(0)


def rules(centered: bool) -> Rules:
    """Returns the rules of layer norm if `centered`, else those of RMS norm, which has no bias and no mean."""

    def of_rows(residuals: Tensors) -> Tensors:
        return contiguous(*(residuals if centered else (None, *residuals)))

    def forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
        x, *parameters = inputs
        T, N, D = x.shape
        (x,) = contiguous(x)
        y, rstd = torch.empty_like(x), matrices.wide(x[:0]).new_empty(T, N)
        mean = torch.empty_like(rstd) if centered else None
        weight, bias = (_strided(p) for p in (*parameters, None)[:2])
        grid, blocks = _blocks(T, N, D, LARGEST["forward"])
        launch(_forward_kernel, grid, x.device, x, weight, bias, y, mean, rstd, N, EPS=c.eps, **blocks)
        return (y,), (rstd,) if mean is None else (mean, rstd)

    def jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
        T, N, D = inputs[0].shape
        x, t_x = contiguous(inputs[0], t_inputs[0])
        mean, rstd = of_rows(r)
        t_y, t_rstd, t_mean = torch.empty_like(x), torch.empty_like(rstd), torch.empty_like(rstd) if centered else None
        weight, t_weight, t_bias = (_strided(p) for p in (inputs[1], t_inputs[1], (*t_inputs, None)[2]))
        grid, blocks = _blocks(T, N, D, LARGEST["jvp"])
        primal = (x, mean, rstd)
        launch(_jvp_kernel, grid, x.device, primal, weight, t_x, t_weight, t_bias, t_y, t_mean, t_rstd, N, **blocks)
        return (t_y,), (t_rstd,) if t_mean is None else (t_mean, t_rstd)

    def vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_y: Tensors) -> Tensors:
        return pulled_back(c, inputs, r, ct_y[0])

    def vjp_jvp(
        c: SimpleNamespace,
        inputs: Tensors,
        r: Tensors,
        t_inputs: Tensors,
        t_r: Tensors,
        ct_y: Tensors,
        t_ct_y: Tensors | None,
    ) -> Tensors:
        return pulled_back(c, inputs, r, None if t_ct_y is None else t_ct_y[0], ct_y[0], t_inputs, t_r)

    def pulled_back(
        c: SimpleNamespace,
        inputs: Tensors,
        r: Tensors,
        v: Tensor | None,
        ct_y: Tensor | None = None,
        t_inputs: Tensors | None = None,
        t_r: Tensors = (),
    ) -> Tensors:
        T, N, D = inputs[0].shape
        x, v, ct_y = contiguous(inputs[0], v, ct_y)
        primal, weight = (x, *of_rows(r)), _strided(inputs[1])
        t_x, t_weight = None, None
        if t_inputs is not None:
            t_x, t_weight = (*contiguous(t_inputs[0]), *of_rows(t_r)), _strided(t_inputs[1])
        out = torch.empty_like(x) if c.needs[0] else None
        (size,), blocks = _blocks(T, N, D, LARGEST["vjp"])
        tiles = min(triton.next_power_of_2(max(size // PROGRAMS, 1)), MOST) if size else 1
        stages = 2 if blocks["BLOCK_N"] * blocks["BLOCK_D"] * x.element_size() <= STAGED_BYTES else 1
        chunks = cdiv(N, tiles * blocks["BLOCK_N"])
        learn = (*c.needs[1:], False)[:2]
        found = primal[2].new_empty(sum(learn), T, chunks, D)  # added up at once
        parts = iter(found)
        sums = [next(parts) if need else None for need in learn]

        def run(out: Tensor | None, sums: list[Tensor | None], columns: int) -> None:
            arguments = (primal, weight, v, ct_y, t_x, t_weight, out, *sums, N)
            launch(_vjp_kernel, (T * chunks, columns), x.device, *arguments, TILES=tiles, STAGES=stages, **blocks)

        if blocks["BLOCK_D"] >= D:
            run(out, sums, 1)
        else:
            if out is not None:
                run(out, [None, None], 1)
            if any(c.needs[1:]):
                run(None, sums, cdiv(D, blocks["BLOCK_D"]))
        totals = iter((found[:, :, 0] if chunks == 1 else found.sum(2)).to(x.dtype)) if any(learn) else iter(())
        return out, *(next(totals) if need else None for need in learn[: len(inputs) - 1])

    return Rules(forward, jvp, vjp, vjp_jvp)
