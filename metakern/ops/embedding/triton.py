"""The vjp and vjp_jvp of embedding in Triton: sums over the occurrences of a token. PyTorch's kernels gather the rows.

Occurrences are sorted by their row of the table. The program at the first occurrence of a row adds up all of them, in
order, and writes the row. This takes no atomic additions and no float32 copy of the table. Rows without an occurrence
stay zero. The time is that of the most frequent token.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch
import triton
import triton.language as tl

from metakern.ops.core.rules import Tensors
from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels.launch import INTERPRETED, cdiv, contiguous, jit, launch, wide
from metakern.ops.embedding import REFERENCE, places

LARGEST = 2 if INTERPRETED else 1024


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


def vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    (weight,), (ct_y,) = inputs, contiguous(*ct_outputs)
    T, V, D = weight.shape
    ct_weight = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    place, order = places(c.tokens, V).sort(stable=True)
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


RULES = replace(REFERENCE, vjp=vjp, vjp_jvp=vjp_jvp)


def compiled(make: Make) -> list[Sample]:
    return [Sample(f"{D}", (make.integers(2000, 8, 160), make(8, 2000, D))) for D in (128, 2048)]
