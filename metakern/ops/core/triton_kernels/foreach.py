"""Run an element-wise formula over the tensors of many parameters in one launch, like apex's multi-tensor kernels.

| table | entry | shape |
|---|---|---|
| addresses | the address of an input's or an output's tensor, for each parameter | [count], int64 |
| inner | how many elements of a parameter share one value of an input, such as those of a task | [count], int64 |
| sizes, starts | the number of elements of a parameter, and the index of its first block | [count], int64 |
| owners | the parameter that a block belongs to | [blocks], int32 |
"""

from __future__ import annotations

import linecache
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakern.ops.core.formula import Generated
from metakern.ops.core.rules import Tensors
from metakern.ops.core.triton_kernels.launch import INTERPRETED, addresses, contiguous, jit, launch, quotient, wide
from metakern.ops.core.triton_kernels.tables import blocks, table
from metakern.ops.core.updates import rules

BLOCKS = (8, 8) if INTERPRETED else (2048, 1024)  # the second for more than MANY inputs, which need more registers
MANY = 12
TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

Input = tuple[Tensor, ...] | float  # for each parameter a tensor [T, ...] or [T]; or a number


@triton.jit
def _values(entry, i, at, inside, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Loads a block of an input. `entry` is (addresses,), (addresses, inner), or (number,), a table of one float64.

    Values beyond the end are 1, so that no formula divides by zero there.
    """
    if entry[0].dtype.element_ty == tl.float64:
        x = tl.load(entry[0]) if TYPE is tl.float64 else tl.load(entry[0]).to(tl.float32)
    else:
        x_ptr = tl.load(entry[0] + i).to(tl.pointer_type(TYPE))
        if len(entry) == 1:
            x = wide(tl.load(tl.multiple_of(x_ptr, ALIGNED) + at, inside, other=1.0))
        else:
            x = wide(tl.load(x_ptr + at // tl.load(entry[1] + i), inside, other=1.0))
    return x


@jit
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
    """Computes y = F(*x) for one block of one parameter.

    ALIGNED divides all addresses and sizes; 16 lets a thread load and store 16 bytes at once.
    """
    program = tl.program_id(0)
    i = tl.load(owner_ptr + program)
    at = (program - tl.load(start_ptr + i)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.multiple_of(tl.load(size_ptr + i), ALIGNED)
    y = F(*[_values(entry, i, at, inside, TYPE, ALIGNED) for entry in inputs])
    for k in tl.static_range(OUTPUTS):
        y_ptr = tl.multiple_of(tl.load(outputs[k] + i).to(tl.pointer_type(TYPE)), ALIGNED)
        tl.store(y_ptr + at, y[k].to(TYPE), inside)


@triton.jit
def root(a):
    a = tl.where(a < 0, 0.0, a)
    return tl.sqrt_rn(a) if a.dtype == tl.float32 else tl.sqrt(a)


@triton.jit
def over(a, b):
    return tl.where(b == 0, 0.0, quotient(a, tl.where(b == 0, 1.0, b)))


@cache
def function(program: Generated) -> Any:
    """Compiles the program to a Triton function. Triton reads the source of a function from `linecache`."""
    file = f"<{program.name} {hash(program.text):x}>"
    linecache.cache[file] = (len(program.text), None, program.text.splitlines(keepends=True), file)
    names = {"__name__": __name__, "quotient": quotient, "root": root, "over": over}
    exec(compile(program.text, file, "exec"), names)
    return triton.jit(names["f"])


def foreach(program: Generated, values: Mapping[str, Input], like: Tensors) -> list[Tensors]:
    """Runs the program and returns its outputs, each a tuple of a tensor like each of `like`."""
    device = like[0].device
    x = [contiguous(*a) if isinstance(a, tuple) else a for a in map(values.__getitem__, program.inputs)]
    y = [tuple(torch.empty(p.shape, dtype=p.dtype, device=device) for p in like) for _ in range(sum(program.given))]
    if not y:
        return []
    sizes = tuple(p.numel() for p in like)
    block = BLOCKS[len(x) > MANY]
    starts, owners = blocks(sizes, block, device)
    places = [addresses(program.name, a) if isinstance(a, tuple) else () for a in (*x, *y)]

    def tables(a: Input, place: tuple[int, ...]) -> tuple[Tensor, ...]:
        if not isinstance(a, tuple):
            return (table((a,), device),)
        inner = tuple(size // max(t.numel(), 1) for size, t in zip(sizes, a, strict=True))
        return (table(place, device), table(inner, device)) if max(inner) > 1 else (table(place, device),)

    launch(
        _kernel,
        (len(owners),),
        device,
        tuple(tables(a, place) for a, place in zip(x, places, strict=False)),
        tuple(table(place, device) for place in places[len(x) :]),
        table(sizes, device),
        starts,
        owners,
        F=function(program),
        OUTPUTS=len(y),
        TYPE=TYPES[like[0].dtype],
        ALIGNED=16 if all(n % 16 == 0 for ns in (sizes, *places) for n in ns) else 1,
        BLOCK=block,
        num_warps=8,
        tables=True,
    )
    return y


RULES = rules(foreach, merged=False)
