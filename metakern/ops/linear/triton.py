"""The rules of linear in Triton: for weights of each task and a small K, one kernel has one or two products and a bias.

    y = a b + c d + e     y = x Wᵀ + b,  t_y = t_x Wᵀ + x t_Wᵀ + t_b,  t_ct_x = t_ct_y W + ct_y t_W,  t_ct_W likewise

| tensor | shape |
|---|---|
| a, c | [T, N, K] |
| b, d | [T, K, M] |
| e | [T, M] |
| y | [T, N, M] |

PyTorch would write y once for the bias, and write and read it for each product, which for a small K is most of their
memory traffic. This kernel writes y once, and rounds once. LARGEST_K, above which PyTorch's kernels are used, is a
guess.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakern.ops.core import matrices
from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels.launch import INTERPRETED, cdiv, contiguous, jit, launch, precision
from metakern.ops.linear import rules

LARGEST_K = 128
BLOCK = 4 if INTERPRETED else 64
BLOCK_K = 4 if INTERPRETED else 16  # twice that for half precision; the TF32 products of float32 need more registers


@triton.jit
def _tile(ptr, rows, columns, stride_row, stride_column, inside):
    return tl.load(ptr + rows * stride_row + columns * stride_column, inside, other=0.0)


@jit
def _products_kernel(
    a,
    b,
    c,
    d,
    e,
    y_ptr,
    N,
    M,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores y = a b + c d + e; a, b, c and d are each a pointer and its three strides, and e has two strides.

    c and d, or e, may be None.
    """
    t = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(M, BLOCK_M)
    n = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    m = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    ACCUMULATOR: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    y = tl.zeros([BLOCK_N, BLOCK_M], ACCUMULATOR)
    for start in range(0, K, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)[None, :]
        row = start + tl.arange(0, BLOCK_K)[:, None]
        left, right = (n < N) & (column < K), (row < K) & (m < M)
        a_tile = _tile(a[0] + t * a[1], n, column, a[2], a[3], left)  # [BLOCK_N, BLOCK_K]
        b_tile = _tile(b[0] + t * b[1], row, m, b[2], b[3], right)  # [BLOCK_K, BLOCK_M]
        y = tl.dot(a_tile, b_tile, y, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        if c is not None:
            c_tile = _tile(c[0] + t * c[1], n, column, c[2], c[3], left)
            d_tile = _tile(d[0] + t * d[1], row, m, d[2], d[3], right)
            y = tl.dot(c_tile, d_tile, y, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    if e is not None:
        y += tl.load(e[0] + t * e[1] + m * e[2], m < M, other=0.0).to(ACCUMULATOR)
    tl.store(y_ptr + (t * N + n) * M + m, y, (n < N) & (m < M))


def fuses(a: Tensor, *right: Tensor) -> bool:
    """Returns whether a sum with products of a and the tensors on the right is computed by one kernel."""
    few = 0 < a.shape[2] <= LARGEST_K and a.shape[0] < 2**16
    return few and not all(map(matrices.shared, right)) and (INTERPRETED or a.dtype != torch.float64)


def product(a: Tensor, b: Tensor, add: Tensor | None = None, reuse: bool = False) -> Tensor:
    """Returns add + a b; `add` has one row for each task, [T, 1, M]."""
    if add is not None and fuses(a, b):
        return _products(a, b, None, None, add)
    return matrices.product(a, b, add, reuse)


def total(*pairs: tuple[Tensor | None, Tensor | None], add: Tensor | None = None) -> Tensor | None:
    """Returns `add` plus the products of the pairs that hold no None, or `add` where there is no such pair."""
    match [(a, b) for a, b in pairs if a is not None and b is not None]:
        case [(a, b), (c, d)] if fuses(a, b, d):
            return _products(a, b, c, d, add)
        case [(a, b)] if add is not None and fuses(a, b):
            return _products(a, b, None, None, add)
    return matrices.products(matrices.product, *pairs, add=add)


def _products(a: Tensor, b: Tensor, c: Tensor | None, d: Tensor | None, add: Tensor | None) -> Tensor:
    (T, N, K), M = a.shape, b.shape[2]
    y = torch.empty(T, N, M, dtype=a.dtype, device=a.device)
    bias = None if add is None else add.squeeze(1)
    strided = (None if x is None else (real := _real(x), *real.stride()) for x in (a, b, c, d, bias))
    launch(
        _products_kernel,
        (cdiv(N, BLOCK) * cdiv(M, BLOCK), T),
        a.device,
        *strided,
        y,
        N,
        M,
        K,
        BLOCK_N=BLOCK,
        BLOCK_M=BLOCK,
        BLOCK_K=BLOCK_K if a.element_size() > 2 else 2 * BLOCK_K,
        PRECISION=precision(),
        num_warps=4,
        num_stages=3,
    )
    return y


def _real(x: Tensor) -> Tensor:
    """Returns x, of any strides, as values in memory: copied if it is a zero tensor or lazily negated."""
    return contiguous(x)[0] if x._is_zerotensor() or x.is_neg() else x


RULES = rules(product, total)


def compiled(make: Make) -> list[Sample]:
    return [Sample("tasks", (make(8, 96, 128), make(8, 80, 128), make(8, 80)))]
