"""Functions of the tensors of many parameters, element by element, in one launch, as apex's multi-tensor kernels do it.

| table | of | shape |
|---|---|---|
| addresses | an input's or an output's tensors | [count], int64 |
| inner | the elements of a parameter that share a value of an input: those of a task | [count], int64 |
| sizes, starts | the elements of a parameter, and the first of its blocks | [count], int64 |
| owners | the parameter that a block is of | [blocks], int32 |

Tables are kept for the tensors that they were made of: a training loop gets the same memory again and again, and then
nothing is copied to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakern.ops._rules import Tensors
from metakern.ops._triton.launch import INTERPRETED, cdiv, contiguous, launch, wide

BLOCK = 8 if INTERPRETED else 2048
_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

Input = Tensors | float | None  # a tensor [T, ...] for each parameter, or its values [T] for tasks; a number


@triton.jit
def _values(entry, i, at, inside, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Of an input: a table of addresses, with or without one of `inner`, or of one number."""
    if entry[0].dtype.element_ty == tl.float64:
        x = tl.load(entry[0]) if TYPE is tl.float64 else tl.load(entry[0]).to(tl.float32)
    else:
        x_ptr = tl.load(entry[0] + i).to(tl.pointer_type(TYPE))
        if len(entry) == 1:
            x = wide(tl.load(tl.multiple_of(x_ptr, ALIGNED) + at, inside, other=0.0))
        else:
            x = wide(tl.load(x_ptr + at // tl.load(entry[1] + i), inside, other=0.0))
    return x


@triton.jit
def _kernel(
    inputs,
    outputs,
    size_ptr,
    start_ptr,
    owner_ptr,
    F: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = F(*x), in which None stands for an absent input or an output that is not wanted.

    ALIGNED divides all addresses and sizes: 16 lets a thread load and store 16 bytes at once.
    """
    program = tl.program_id(0)
    i = tl.load(owner_ptr + program)
    at = (program - tl.load(start_ptr + i)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.multiple_of(tl.load(size_ptr + i), ALIGNED)
    y = F(*[None if entry is None else _values(entry, i, at, inside, TYPE, ALIGNED) for entry in inputs])
    for k in tl.static_range(OUTPUTS):
        if outputs[k] is not None:
            y_ptr = tl.multiple_of(tl.load(outputs[k] + i).to(tl.pointer_type(TYPE)), ALIGNED)
            tl.store(y_ptr + at, y[k].to(TYPE), inside)


def foreach(function: Any, x: Sequence[Input], like: Tensors, wanted: Sequence[bool] = (True,)) -> list[Tensors | None]:
    """The wanted ones of the outputs function(*x), each a tensor for every one of `like`, None for the others."""
    device = like[0].device
    x = [contiguous(*a) if isinstance(a, tuple) else a for a in x]
    y = [tuple(torch.empty(p.shape, dtype=p.dtype, device=device) for p in like) if want else None for want in wanted]
    sizes = tuple(p.numel() for p in like)
    starts, owners = _blocks(sizes, device)
    addresses = [tuple(t.data_ptr() for t in a) if isinstance(a, tuple) else None for a in (*x, *y)]

    def tables(a: Input, address: tuple[int, ...] | None) -> Tensors | None:
        if address is None or not isinstance(a, tuple):
            return None if not isinstance(a, float | int) else (_table((float(a),), device),)
        inner = tuple(size // max(t.numel(), 1) for size, t in zip(sizes, a, strict=True))
        return (_table(address, device), _table(inner, device)) if max(inner) > 1 else (_table(address, device),)

    launch(
        _kernel,
        (len(owners),),
        device,
        tuple(tables(a, address) for a, address in zip(x, addresses, strict=False)),
        tuple(None if address is None else _table(address, device) for address in addresses[len(x) :]),
        _table(sizes, device),
        starts,
        owners,
        F=function,
        OUTPUTS=len(y),
        TYPE=_TYPES[like[0].dtype],
        ALIGNED=16 if all(n % 16 == 0 for ns in (sizes, *addresses) if ns is not None for n in ns) else 1,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return y


@lru_cache(maxsize=1024)
def _table(values: tuple[int, ...] | tuple[float, ...], device: torch.device) -> Tensor:
    """The values on a device, copied there without waiting for it."""
    table = torch.tensor(values, dtype=torch.float64 if isinstance(values[0], float) else torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


@lru_cache(maxsize=64)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """starts and owners."""
    blocks = torch.tensor([cdiv(size, BLOCK) for size in sizes])
    owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), blocks)
    return (blocks.cumsum(0) - blocks).to(device), owners.to(device)
