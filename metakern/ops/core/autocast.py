"""Within `torch.autocast` an op takes its tensors in the dtype that PyTorch's own function would.

    lower      the region's dtype, for products of matrices; sums are in float32 all the same
    float32    for norms and losses
    widest     that of the widest argument, for elementwise ops

float64 stays float64. The ops themselves, and their derivatives wherever these are taken, run with autocast off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from metakern.native import memory

F = TypeVar("F", bound=Callable[..., Any])


_plain: ContextVar[bool] = ContextVar("metakern_plain_operations", default=False)


@contextmanager
def plain_operations() -> Iterator[None]:
    """Within the block ops are made of PyTorch's own operations, which have derivatives of every order."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def autocast(policy: str) -> Callable[[F], F]:
    """For public functions, differentiable through the casts, inside of which no mode of torch functions looks."""

    def decorated(function: F) -> F:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch._C._is_any_autocast_enabled():
                return function(*args, **kwargs)
            floats = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
            if not floats or not torch.is_autocast_enabled(floats[0].device.type):
                return function(*args, **kwargs)
            dtype = _dtype(policy, floats)

            def cast(t: Tensor) -> Tensor:
                if not t.is_floating_point() or t.dtype == torch.float64:
                    return t
                memory.check(function.__name__, "every tensor", t)
                return t.to(dtype)

            with torch.autocast(floats[0].device.type, enabled=False):
                return function(*tree_map_only(Tensor, cast, args), **tree_map_only(Tensor, cast, kwargs))

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if _plain.get():
                from metakern.ops import SPECS

                return SPECS[function.__name__].plain(*args, **kwargs)
            if torch.compiler.is_dynamo_compiling() or not torch._C._len_torch_function_stack():
                return run(*args, **kwargs)
            with torch._C.DisableTorchFunction():  # a mode sees each attribute of a tensor, at the cost of a small op
                return run(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorated


def _dtype(policy: str, floats: list[Tensor]) -> torch.dtype:
    if policy == "lower":
        return torch.get_autocast_dtype(floats[0].device.type)
    widest = reduce(torch.promote_types, (t.dtype for t in floats))
    return torch.promote_types(widest, torch.float32) if policy == "float32" else widest


def plainly(rule: Callable[..., Any], *args: Any) -> Any:
    """rule(*args), with autocast off."""
    if not torch._C._is_any_autocast_enabled():
        return rule(*args)
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        return rule(*args)
