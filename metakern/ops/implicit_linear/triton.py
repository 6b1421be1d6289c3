"""The scores of implicit_linear in Triton: P, t_P, G, t_G and the cotangents of the rates, in one launch for a rule.

A program has a block of pairs and a block of rows. It sums S and t_S over the inputs, then Q and t_Q over the outputs,
and multiplies by the rates before anything is stored or rounded. The sums over rows are partial, one for each block of
rows, and PyTorch adds them up. The other products are PyTorch's: their sums are as wide as the layer, so that no
program could hold them, and they read the scores of a block of rows from the L2 cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from metakern.ops.core import matrices
from metakern.ops.core.rules import Tensors
from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels.launch import INTERPRETED, cdiv, contiguous, jit, launch, precision, wide
from metakern.ops.implicit_linear import Side, Wanted, by_blocks, rules


class Blocks(NamedTuple):
    """The numbers of pairs and of rows of a block, of the terms that are summed at once, and of warps."""

    size: int
    k: int
    warps: int


# By the bytes of an element: the TF32 products of float32 need more registers.
BLOCKS = {2: Blocks(64, 32, 8), 4: Blocks(32, 16, 4), 8: Blocks(32, 16, 4)}
if INTERPRETED:
    BLOCKS = dict.fromkeys(BLOCKS, Blocks(4, 4, 4))
IN_INTERPRETER = tl.constexpr(INTERPRETED)


class Matrix(NamedTuple):
    """A tensor [T, rows, K] as an argument of kernels: its pointer and strides; the stride of K is 1."""

    ptr: Any
    task: int
    row: int


@triton.jit
def _tile(x, t, row, rows, k, K):
    """Loads a tile of a matrix, [ROWS, BLOCK_K], with zeros outside."""
    ptrs = x.ptr + t * x.task + row.to(tl.int64)[:, None] * x.row + k[None, :]
    return tl.load(ptrs, (row < rows)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """Returns total + a b."""
    if IN_INTERPRETER:  # it would read the bits of bfloat16 as integers
        a, b = a.to(total.dtype), b.to(total.dtype)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def _products(
    x, X, t_x, t_X, t, m, n, M, N, K,
    NEEDED: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns S = X xᵀ, if it is NEEDED, and t_S, [BLOCK_M, BLOCK_N]; or Q and t_Q, with D for X and ct_y for x."""
    S = tl.zeros([m.shape[0], n.shape[0]], ACC)
    t_S = tl.zeros([m.shape[0], n.shape[0]], ACC)
    if NEEDED or t_x is not None or t_X is not None:
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            pairs = _tile(X, t, m, M, k, K)  # [BLOCK_M, BLOCK_K]
            rows = _tile(x, t, n, N, k, K)  # [BLOCK_N, BLOCK_K]
            if NEEDED:
                S = _dot(pairs, rows.T, S, PRECISION)
            if t_x is not None:
                t_S = _dot(pairs, _tile(t_x, t, n, N, k, K).T, t_S, PRECISION)
            if t_X is not None:
                t_S = _dot(_tile(t_X, t, m, M, k, K), rows.T, t_S, PRECISION)
    return S, t_S


@triton.jit
def _put(ptr, at, inside, tile):
    """Stores a tile of scores unless `ptr` is None."""
    if ptr is not None:
        tl.store(ptr + at, tile.to(ptr.dtype.element_ty), inside)


@jit
def _scores_kernel(
    x, X, t_x, t_X, ct_y, D, t_ct_y, t_D, rate_ptr, t_rate_ptr, P_ptr, t_P_ptr, G_ptr, t_G_ptr, sum_ptr, M, N, IN, OUT,
    S_NEEDED: tl.constexpr, Q_NEEDED: tl.constexpr, TANGENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores the scores and the sums that are not None: -Σ_n Q S or, with TANGENTS, -Σ_n (t_Q S + Q t_S)."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks = tl.cdiv(M, BLOCK_M) * blocks_n
    t = (tl.program_id(0) // blocks).to(tl.int64)
    block_n = tl.program_id(0) % blocks % blocks_n
    m = tl.program_id(0) % blocks // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    at = (t * M + m[:, None]) * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    ACC: tl.constexpr = tl.float64 if rate_ptr.dtype.element_ty == tl.float64 else tl.float32
    r = -wide(tl.load(rate_ptr + t * M + m, m < M, other=0.0))[:, None]
    S, t_S = _products(x, X, t_x, t_X, t, m, n, M, N, IN, S_NEEDED, ACC, BLOCK_K, PRECISION)
    _put(P_ptr, at, inside, S * r)
    t_P = t_S * r
    if t_rate_ptr is not None:
        t_r = -wide(tl.load(t_rate_ptr + t * M + m, m < M, other=0.0))[:, None]
        t_P += S * t_r
    _put(t_P_ptr, at, inside, t_P)
    Q, t_Q = _products(ct_y, D, t_ct_y, t_D, t, m, n, M, N, OUT, Q_NEEDED, ACC, BLOCK_K, PRECISION)
    _put(G_ptr, at, inside, Q * r)
    t_G = t_Q * r if t_rate_ptr is None else t_Q * r + Q * t_r
    _put(t_G_ptr, at, inside, t_G)
    if sum_ptr is not None:
        total = tl.sum(t_Q * S + Q * t_S if TANGENTS else Q * S, 1)
        tl.store(sum_ptr + (t * blocks_n + block_n) * M + m, -total, m < M)


def scores(wanted: Wanted, rates: Tensor, t_rates: Tensor | None, of_x: Side, of_ct_y: Side) -> Tensors:
    """Returns P, t_P, G, t_G and the sums for the rates, as `rules` of metakern/ops/implicit_linear asks for them."""
    S, t_S, Q, t_Q = wanted.factors(of_x, of_ct_y, t_rates)
    if not (S or t_S or Q or t_Q):
        return (None,) * 5
    rows = of_x.rows
    (T, N, IN), M, OUT = rows.shape, rates.shape[1], of_ct_y.pairs.shape[2]
    block, block_k, warps = BLOCKS[rows.element_size()]
    of_rates = t_rates is not None
    made = (wanted.P, wanted.t_P and (t_S or of_rates), wanted.G, wanted.t_G and (t_Q or of_rates))
    found = [rows.new_empty(T, M, N) if want else None for want in made]
    sums = rows.new_empty(T, cdiv(N, block), M, dtype=matrices.wide(rates[:0]).dtype) if wanted.for_rates else None
    launch(
        _scores_kernel,
        (cdiv(M, block) * cdiv(N, block) * T,),
        rows.device,
        *_matrices(of_x, S, t_S),
        *_matrices(of_ct_y, Q, t_Q),
        *contiguous(rates, t_rates),
        *found,
        sums,
        *(M, N, IN, OUT),
        S_NEEDED=S,
        Q_NEEDED=Q,
        TANGENTS=wanted.tangents,
        BLOCK_M=block,
        BLOCK_N=block,
        BLOCK_K=block_k,
        PRECISION=precision(),
        num_warps=warps,
        num_stages=3,
    )
    return *found, None if sums is None else sums.sum(1).to(rates.dtype)


def _matrices(side: Side, is_needed: bool, is_tangent_needed: bool) -> list[Matrix | None]:
    """Returns rows, pairs and their tangents as arguments of the kernel; None for those that it does not read."""
    read = (is_needed or is_tangent_needed,) * 2 + (is_tangent_needed,) * 2
    return [_matrix(tensor) if use else None for tensor, use in zip(side, read, strict=True)]


def _matrix(x: Tensor | None) -> Matrix | None:
    if x is None:
        return None
    x = contiguous(x)[0] if x._is_zerotensor() or x.is_neg() or x.stride(-1) != 1 else x
    return Matrix(x, *x.stride()[:2])


RULES = by_blocks(rules(matrices.product, scores))


def compiled(make: Make) -> list[Sample]:
    args = make(4, 64, 512), None, make(4, 1024), make(4, 192, 512), make(4, 192, 1024), make(4, 192)
    return [Sample("correction", args)]
