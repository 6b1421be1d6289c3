"""The rules of global_norm in Triton: one launch over all tensors, in which each block stores a partial sum.

| table | contents | shape |
|---|---|---|
| x_ptrs, y_ptrs | the address of each tensor | [count], int64 |
| size | the number of elements of a task in each tensor | [count], int64 |
| start, owner | the first block of each tensor, and the tensor of each block | [count], [blocks of a task] |
| parts | the partial sums, which PyTorch adds up in a fixed order | [T, blocks of a task] |
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from metakern.ops.core.rules import Tensors
from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels.foreach import TYPES, foreach
from metakern.ops.core.triton_kernels.launch import INTERPRETED, addresses, contiguous, jit, launch, wide
from metakern.ops.core.triton_kernels.tables import blocks, table
from metakern.ops.global_norm import SPEC, rules

BLOCK = 8 if INTERPRETED else 4096


@jit
def _dot_kernel(
    x_ptrs,
    y_ptrs,
    size_ptr,
    start_ptr,
    owner_ptr,
    parts_ptr,
    task_blocks,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    task, block = program // task_blocks, program % task_blocks
    i = tl.load(owner_ptr + block)
    size = tl.load(size_ptr + i)
    at = (block - tl.load(start_ptr + i)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, at = at < size, task * size + at
    x = wide(tl.load(tl.load(x_ptrs + i).to(tl.pointer_type(TYPE)) + at, inside, other=0.0))  # [BLOCK]
    y = wide(tl.load(tl.load(y_ptrs + i).to(tl.pointer_type(TYPE)) + at, inside, other=0.0))  # [BLOCK]
    tl.store(parts_ptr + program, tl.sum(x * y, 0))


def _dot(x: Tensors, y: Tensors) -> Tensor:
    tasks, device = x[0].shape[0], x[0].device
    x, y = contiguous(*x), contiguous(*y)
    sizes = tuple(a.numel() // max(tasks, 1) for a in x)
    starts, owners = blocks(sizes, BLOCK, device)
    dtype = torch.float64 if x[0].dtype == torch.float64 else torch.float32
    parts = torch.empty(tasks, len(owners), dtype=dtype, device=device)
    launch(
        _dot_kernel,
        (parts.numel(),),
        device,
        *(table(addresses("global_norm", group), device) for group in (x, y)),
        table(sizes, device),
        starts,
        owners,
        parts,
        len(owners),
        TYPE=TYPES[x[0].dtype],
        BLOCK=BLOCK,
        num_warps=8,
        tables=True,
    )
    return parts.sum(1)


RULES = rules(_dot, foreach, merged=False)


def compiled(make: Make) -> list[Sample]:
    return SPEC.benchmark(make)
