"""Products of matrices in Triton: one kernel has one or two products, a bias, and sums over rows.

    y = a b + c d + e        s = Σ_k a_k

| tensor | shape |
|---|---|
| a, c | [T, N, K] |
| b, d | [T, K, M] |
| e | [T, M] |
| y | [T, N, M] |
| s | [T, N] |

PyTorch would write y once for the bias, and write and read it for each product, which for a small K is most of their
memory traffic. This kernel writes y once, and rounds once.

On GPUs for data centers it computes all products of float32, in parts of TF32 or bfloat16 on the matrix units, which is
faster than float32 arithmetic there, and as exact. In other dtypes, and on other GPUs, whose matrix units are no faster
than that, it computes sums of a product and another term up to LARGEST_K, which is a guess.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakern.ops.core import matrices
from metakern.ops.core.triton_kernels import launch as launching
from metakern.ops.core.triton_kernels.launch import INTERPRETED, cdiv, contiguous, jit, launch, precision

IN_INTERPRETER = tl.constexpr(INTERPRETED)
LARGEST_K = 128
MOST_TASKS = 2**16 - 1  # the second dimension of a grid
DATA_CENTER = {(8, 0), (9, 0), (10, 0), (10, 3)}  # compute capabilities
Pair = tuple[Tensor | None, Tensor | None]


@triton.jit
def _tile(ptr, rows, columns, stride_row, stride_column, inside):
    return tl.load(ptr + rows * stride_row + columns * stride_column, inside, other=0.0)


@triton.jit
def _plus_product(y, a, b, PRECISION: tl.constexpr):
    if IN_INTERPRETER:  # it would read the bits of bfloat16 as integers
        a, b = a.to(y.dtype), b.to(y.dtype)
    return tl.dot(a, b, y, input_precision=PRECISION, out_dtype=y.dtype)


@jit
def _products_kernel(
    a,
    b,
    c,
    d,
    e,
    s_ptr,
    y_ptr,
    N,
    M,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores y = a b + c d + e, and s; a, b, c and d are each a pointer and its three strides, and e has two strides.

    c and d, or e, or s may be None.
    """
    t = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(M, BLOCK_M)
    row_of_s = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = row_of_s[:, None]
    m = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    ACCUMULATOR: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    y = tl.zeros([BLOCK_N, BLOCK_M], ACCUMULATOR)
    s = tl.zeros([BLOCK_N], ACCUMULATOR)
    for start in range(0, K, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)[None, :]
        row = start + tl.arange(0, BLOCK_K)[:, None]
        left, right = (n < N) & (column < K), (row < K) & (m < M)
        a_tile = _tile(a[0] + t * a[1], n, column, a[2], a[3], left)  # [BLOCK_N, BLOCK_K]
        b_tile = _tile(b[0] + t * b[1], row, m, b[2], b[3], right)  # [BLOCK_K, BLOCK_M]
        y = _plus_product(y, a_tile, b_tile, PRECISION)
        if s_ptr is not None:
            s += tl.sum(a_tile.to(ACCUMULATOR), 1)
        if c is not None:
            c_tile = _tile(c[0] + t * c[1], n, column, c[2], c[3], left)
            d_tile = _tile(d[0] + t * d[1], row, m, d[2], d[3], right)
            y = _plus_product(y, c_tile, d_tile, PRECISION)
    if e is not None:
        y += tl.load(e[0] + t * e[1] + m * e[2], m < M, other=0.0).to(ACCUMULATOR)
    tl.store(y_ptr + (t * N + n) * M + m, y, (n < N) & (m < M))
    if s_ptr is not None:
        tl.store(s_ptr + t * N + row_of_s, s, (row_of_s < N) & (tl.program_id(0) % blocks == 0))


class Blocks(NamedTuple):
    """The block sizes of a launch, its warps and stages, and the precision of its products."""

    N: int
    M: int
    K: int
    warps: int
    stages: int
    precision: str


def blocks(a: Tensor, M: int, two: bool) -> Blocks:
    """Returns the blocks for a product, or for `two`, by measurements on an H100 (benchmarks/NOTES.md)."""
    T, N, _ = a.shape
    if INTERPRETED:
        return Blocks(4, 4, 4, 4, 3, precision())
    if not in_parts(a):
        return Blocks(64, 64, 16 if a.element_size() > 2 else 32, 4, 3, precision())
    if N <= 16:
        return Blocks(16, 32, 64 if two else 128, 4, 2 if two else 3, "tf32x3")
    if T * cdiv(N, 64) * cdiv(M, 64) < 192:
        return Blocks(32, 32, 32, 2, 4, "tf32x3")
    # The matrix units read TF32 along K only, bfloat16 also across it.
    return Blocks(64, 64, 32, 4, 2 if two else 3, "bf16x6" if a.stride(2) != 1 else "tf32x3")


def in_parts(a: Tensor) -> bool:
    """Returns whether products with a run in parts of lower precision on the matrix units."""
    if INTERPRETED:
        return True
    return a.dtype == torch.float32 and precision() == "tf32x3" and launching.capability(a.device) in DATA_CENTER


def takes(a: Tensor, *right: Tensor, fused: bool) -> bool:
    """Returns whether the kernel computes the products of a and the tensors on the right; `fused`: and another term."""
    if 0 in (a.shape[2], right[0].shape[2]) or len(a) > MOST_TASKS or (a.device.type == "cpu" and not INTERPRETED):
        return False
    few = fused and a.shape[2] <= LARGEST_K and not all(map(matrices.shared, right))
    return in_parts(a) or (few and (INTERPRETED or a.dtype != torch.float64))


def product(a: Tensor, b: Tensor, add: Tensor | None = None, reuse: bool = False) -> Tensor:
    """Returns add + a b; one large product if tasks share b."""
    bias = None if add is None else _bias(add, len(a))
    if (add is None or bias is not None) and takes(a, b, fused=add is not None):
        T, N, _ = a.shape
        if T > 1 and matrices.shared(b) and (bias is None or matrices.shared(bias)):
            flat = a.flatten(0, 1).unsqueeze(0)
            return _products(flat, b[:1], bias=None if bias is None else bias[:1])[0].view(T, N, b.shape[2])
        return _products(a, b, bias=bias)[0]
    return matrices.product(a, b, add, reuse)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Returns a b for matrices, or for those of each task."""
    return product(a, b) if a.dim() == 3 else product(a[None], b[None])[0]


def total(*pairs: Pair, add: Tensor | None = None) -> Tensor | None:
    """Returns `add` plus the products of the pairs that hold no None, or `add` where there is no such pair."""
    match [(a, b) for a, b in pairs if a is not None and b is not None]:
        case [(a, b), (c, d)] if takes(a, b, d, fused=True):
            bias = None if add is None else _bias(add, len(a))
            if add is None or bias is not None:
                return _products(a, b, c, d, bias)[0]
    return matrices.products(product, *pairs, add=add)


def total_and_sums(pair: Pair, *pairs: Pair) -> tuple[Tensor | None, Tensor | None]:
    """Returns the total of all pairs, and the sums of the first tensor of all over its last dimension, [T, N]."""
    (a, b), whole = pair, [(c, d) for c, d in pairs if c is not None and d is not None]
    if a is not None and b is not None and len(whole) < 2 and in_parts(a) and takes(a, b, fused=True):
        c, d = whole[0] if whole else (None, None)
        return _products(a, b, c, d, sums=True)
    return total(pair, *pairs), None if a is None else a.sum(2)


def _bias(add: Tensor, tasks: int) -> Tensor | None:
    """Returns `add`, [T or 1, N or 1, M], as one row for each task, [T, M]; None if a task has different rows."""
    if add.shape[1] != 1 and add.stride(1) != 0:
        return None
    return add[:, 0].expand(tasks, -1)


def _products(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    d: Tensor | None = None,
    bias: Tensor | None = None,
    sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    (T, N, K), M = a.shape, b.shape[2]
    y = torch.empty(T, N, M, dtype=a.dtype, device=a.device)
    s = torch.empty(T, N, dtype=a.dtype, device=a.device) if sums else None
    strided = (None if x is None else (real := _real(x), *real.stride()) for x in (a, b, c, d, bias))
    size = blocks(a, M, c is not None)
    launch(
        _products_kernel,
        (cdiv(N, size.N) * cdiv(M, size.M), T),
        a.device,
        *strided,
        s,
        y,
        N,
        M,
        K,
        BLOCK_N=size.N,
        BLOCK_M=size.M,
        BLOCK_K=size.K,
        PRECISION=size.precision,
        num_warps=size.warps,
        num_stages=size.stages,
    )
    return y, s


def _real(x: Tensor) -> Tensor:
    """Returns x, of any strides, as values in memory: copied if it is a zero tensor or lazily negated."""
    return contiguous(x)[0] if x._is_zerotensor() or x.is_neg() else x
