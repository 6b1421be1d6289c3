"""What the rooms share: folding into tasks and rows, precision, and products with a weight that tasks may share."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

# product(a, b, add=None, reuse=False) = add + a b, which may take the memory of add with `reuse`
Product = Callable[..., Tensor]


def rows(x: Tensor, tasks: int | None) -> Tensor:
    """[T, ..., D] -> [T, N, D], or [..., D] -> [1, N, D] where there are no tasks (None)."""
    shape = (1, prod(x.shape[:-1]), x.shape[-1]) if tasks is None else (tasks, prod(x.shape[1:-1]), x.shape[-1])
    return x if x.shape == shape else x.reshape(shape)


def wide(x: Tensor) -> Tensor:
    """x in the dtype that accumulates it: float32 for half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def per_row(parameter: Tensor) -> Tensor:
    """[T, D] -> [T, 1, D], in the dtype that accumulates it."""
    return wide(parameter).unsqueeze(1)


def shared(weight: Tensor) -> bool:
    """Whether a `[T, ...]` tensor is the same for all tasks: T = 1, or expanded."""
    return weight.shape[0] == 1 or (weight.stride(0) == 0 and weight.shape[0] > 0)


def product(a: Tensor, b: Tensor, add: Tensor | None = None, reuse: bool = False) -> Tensor:
    """add + a b of `[T, N, K]` and `[T, K, M]`; one large product where b is shared."""
    if not shared(b):
        return torch.bmm(a, b) if add is None else torch.baddbmm(add, a, b)
    flat = a.flatten(0, 1)
    total = None if add is None else add.expand(*a.shape[:2], b.shape[2]).flatten(0, 1)
    y = flat @ b[0] if total is None else torch.addmm(total, flat, b[0])
    return y.unflatten(0, a.shape[:2])


def products(product: Product, *pairs: tuple[Tensor | None, Tensor | None], add: Tensor | None = None) -> Tensor | None:
    """add and the sum of the products of the pairs that are complete; None where there is nothing."""
    total = add
    for a, b in pairs:
        if a is not None and b is not None:
            total = product(a, b, total, reuse=total is not add)
    return total
