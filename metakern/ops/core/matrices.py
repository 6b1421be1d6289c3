"""Helpers of the ops: reshaping to tasks and rows, the dtype of accumulation, and products with a shared weight."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

# product(a, b, add=None, reuse=False) returns add + a b; with `reuse` the result may take the memory of add
Product = Callable[..., Tensor]


def rows(x: Tensor, tasks: int | None) -> Tensor:
    """Reshapes x [T, ..., D] to [T, N, D], or x [..., D] to [1, N, D] if `tasks` is None."""
    shape = (1, prod(x.shape[:-1]), x.shape[-1]) if tasks is None else (tasks, prod(x.shape[1:-1]), x.shape[-1])
    return x if x.shape == shape else x.reshape(shape)


def wide(x: Tensor) -> Tensor:
    """Returns x in the dtype of its accumulation: float32 for half precision, its own for others."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def per_row(parameter: Tensor) -> Tensor:
    """Returns a parameter [T, D] as [T, 1, D], in the dtype of its accumulation."""
    return wide(parameter).unsqueeze(1)


def shared(weight: Tensor) -> bool:
    """Whether a tensor [T, ...] is the same for all tasks: T = 1, or T has stride 0."""
    return weight.shape[0] == 1 or (weight.stride(0) == 0 and weight.shape[0] > 0)


def product(a: Tensor, b: Tensor, add: Tensor | None = None, reuse: bool = False) -> Tensor:
    """Returns add + a b for a [T, N, K] and b [T, K, M]; one large product if tasks share b."""
    if not shared(b):
        return torch.bmm(a, b) if add is None else torch.baddbmm(add, a, b)
    flat = a.flatten(0, 1)
    total = None if add is None else add.expand(*a.shape[:2], b.shape[2]).flatten(0, 1)
    y = flat @ b[0] if total is None else torch.addmm(total, flat, b[0])
    return y.unflatten(0, a.shape[:2])


def products(product: Product, *pairs: tuple[Tensor | None, Tensor | None], add: Tensor | None = None) -> Tensor | None:
    """Returns `add` plus the products of all pairs without a None. Returns None if there is no term at all."""
    total = add
    for a, b in pairs:
        if a is not None and b is not None:
            total = product(a, b, total, reuse=total is not add)
    return total
