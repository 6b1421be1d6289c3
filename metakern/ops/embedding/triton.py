"""The rules of embedding in Triton: rows of the tables of each task, and sums over the occurrences of a token.

The program of a token's first occurrence in a task adds up all of them, in a fixed order, and writes the row. It finds
them by reading the task's tokens. Many tokens are sorted first instead, and the time is that of the most frequent one.
Neither takes atomic additions or a float32 copy of the table. Rows without an occurrence stay zero.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from metakern.ops.core.matrices import shared
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels.launch import INTERPRETED, cdiv, contiguous, jit, launch, wide
from metakern.ops.embedding import places

LARGEST = 2 if INTERPRETED else 1024
LARGEST_SEARCHED = 2 if INTERPRETED else 256  # features of a program that searches
SEARCHED = 5 if INTERPRETED else 4096  # tokens of a task, up to which they are searched


@jit
def _rows_kernel(token_ptr, weight_ptr, y_ptr, N, V, D, BLOCK_D: tl.constexpr):
    """Stores y[t, n] = weight[t, token[t, n]]; a token outside of [0, V) ends the run by an assertion."""
    place = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.load(token_ptr + place).to(tl.int64)
    tl.device_assert((token >= 0) & (token < V), "embedding: tokens must be in [0, V)")
    row = tl.load(weight_ptr + (place // N * V + token) * D + d, d < D)
    tl.store(y_ptr + place * D + d, row, d < D)


@jit
def _search_kernel(token_ptr, ct_y_ptr, out_ptr, N, V, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores out[t, token] = Σ ct_y[t, n] over all n that have the token of place i, if i is the first of them."""
    i, t = tl.program_id(0) % N, (tl.program_id(0) // N).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    tokens = token_ptr + t * N
    token = tl.load(tokens + i)
    before = 0
    for start in range(0, i, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        before += tl.sum((tl.load(tokens + n, n < i, other=-1) == token).to(tl.int32))
    if (before == 0) & (token >= 0) & (token < V):
        total = tl.zeros([BLOCK_D], tl.float64 if ct_y_ptr.dtype.element_ty == tl.float64 else tl.float32)
        for start in range(i // BLOCK_N * BLOCK_N, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            alike = tl.load(tokens + n, n < N, other=-1) == token
            if tl.sum(alike.to(tl.int32)) > 0:
                rows = (t * N + n)[:, None] * D + d[None, :]
                total += tl.sum(wide(tl.load(ct_y_ptr + rows, alike[:, None] & (d < D)[None, :], other=0.0)), 0)
        tl.store(out_ptr + (t * V + token) * D + d, total, d < D)


@jit
def _sum_kernel(place_ptr, order_ptr, end_ptr, ct_y_ptr, out_ptr, rows, D, BLOCK_D: tl.constexpr):
    """Stores out[place] = Σ ct_y[order[i]], over all i of that place; places from `rows` on are of invalid tokens."""
    first = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tl.load(place_ptr + first)
    before = tl.load(place_ptr + first - 1, first > 0, other=-1)
    if (place != before) & (place < rows):
        total = tl.zeros([BLOCK_D], tl.float64 if ct_y_ptr.dtype.element_ty == tl.float64 else tl.float32)
        for i in range(first, tl.load(end_ptr + first)):
            total += wide(tl.load(ct_y_ptr + tl.load(order_ptr + i) * D + d, d < D, other=0.0))  # [BLOCK_D]
        tl.store(out_ptr + place * D + d, total, d < D)


def _rows(weight: Tensor, tokens: Tensor) -> Tensor:
    if shared(weight) or weight._is_zerotensor():
        return F.embedding(tokens, weight[0])
    weight, tokens = contiguous(weight, tokens)
    (T, V, D), N = weight.shape, tokens.shape[1]
    y = torch.empty(T, N, D, dtype=weight.dtype, device=weight.device)
    block = min(triton.next_power_of_2(max(D, 1)), LARGEST)
    # `debug` has the kernel assert; without the second option it would also check its own sums of integers.
    options = {"BLOCK_D": block, "num_warps": max(block // 256, 1), "debug": True, "sanitize_overflow": False}
    launch(_rows_kernel, (T * N, cdiv(D, block)), weight.device, tokens, weight, y, N, V, D, **options)
    return y


def forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    return (_rows(inputs[0], c.tokens),), ()


def jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    return (_rows(t_inputs[0], c.tokens),), ()


def vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    (weight,), (tokens, ct_y) = inputs, contiguous(c.tokens, *ct_outputs)
    (T, V, D), N = weight.shape, tokens.shape[1]
    ct_weight = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    if N <= SEARCHED:
        block = min(triton.next_power_of_2(max(D, 1)), LARGEST_SEARCHED)
        sizes = {"BLOCK_N": 2 if INTERPRETED else 32, "BLOCK_D": block, "num_warps": max(block // 64, 1)}
        launch(_search_kernel, (T * N, cdiv(D, block)), weight.device, tokens, ct_y, ct_weight, N, V, D, **sizes)
        return (ct_weight,)
    place, order = places(tokens, V).sort(stable=True)
    end = torch.searchsorted(place, place, right=True)
    block = min(triton.next_power_of_2(max(D, 1)), LARGEST)
    grid = (len(place), cdiv(D, block))
    arguments = place, order, end, ct_y, ct_weight, T * V, D
    launch(_sum_kernel, grid, weight.device, *arguments, BLOCK_D=block, num_warps=max(block // 256, 1))
    return (ct_weight,)


def vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_outputs: Tensors,
    t_ct_outputs: Tensors | None,
) -> Tensors:
    return (None,) if t_ct_outputs is None else vjp(c, inputs, r, t_ct_outputs)


RULES = Rules(forward, jvp, vjp, vjp_jvp)


def compiled(make: Make) -> list[Sample]:
    sizes = ((160, 128), (160, 2048), (5000, 128))  # tokens of a task, and features
    return [Sample(f"{N}x{D}", (make.integers(2000, 8, N), make(8, 2000, D))) for N, D in sizes]
