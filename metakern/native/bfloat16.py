"""Run the matrix products of a block in bfloat16: operands are rounded to bfloat16, products are summed in float32.

Inside `bfloat16_products()`, `metakern.native.product` and the kernels of `metakern.native.call` that multiply matrices
do so, and PyTorch's products of float32 matrices on a CPU (mm, bmm, addmm, baddbmm, and whatever PyTorch makes of them:
linear, matmul, einsum) are replaced by `metakern.native.product`, in backward passes too. All else is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metakern import native

_aten = torch.ops.aten


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Round the operands of float32 matrix products to bfloat16 within the block, in this thread."""
    token = native.in_bfloat16.set(True)
    try:
        with _Products():
            yield
    finally:
        native.in_bfloat16.reset(token)


class _Products(TorchDispatchMode):
    """Replaces PyTorch's products of float32 matrices."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # skipping it would import the compiler
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = _PRODUCTS.get(func)
        if product is None or not all(map(_is_replaced, (arg for arg in args if isinstance(arg, Tensor)))):
            return func(*args, **kwargs or {})
        return product(*args, **kwargs or {})


def _is_replaced(t: Tensor) -> bool:
    return t.dtype == torch.float32 and t.device.type == "cpu" and t.layout == torch.strided


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return native.product(a, b)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return native.product(a.unsqueeze(0), b.unsqueeze(0)).squeeze(0)


def _baddbmm(add: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return native.product(a, b, _times(add, beta), scale=alpha)


def _addmm(add: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return native.product(a.unsqueeze(0), b.unsqueeze(0), _times(add, beta), scale=alpha).squeeze(0)


def _times(add: Tensor, beta: float) -> Tensor | None:
    """Return beta times the summand; None for a beta of 0, for which PyTorch does not read it."""
    return None if beta == 0 else add if beta == 1 else add * beta


def _in_place(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda add, *args, **kwargs: add.copy_(product(add, *args, **kwargs))


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    _aten.mm.default: _mm,
    _aten.bmm.default: _bmm,
    _aten.addmm.default: _addmm,
    _aten.baddbmm.default: _baddbmm,
    _aten.addmm_.default: _in_place(_addmm),
    _aten.baddbmm_.default: _in_place(_baddbmm),
}
