"""Let ops run as plain PyTorch, by `plain` of their `Spec`, in place of their rules.

A call of the rules takes more Python than PyTorch's own operation, whatever the sizes, so that on small tensors the
latter is faster. Each op says how much work makes a call of it small: the limit is where
both take the same time on one core. Sizes alone decide, so that runs repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from metakern import native
from metakern.ops.core import backend

_everywhere: ContextVar[bool] = ContextVar("metakern_plain_operations", default=False)
_where_small: ContextVar[bool] = ContextVar("metakern_plain_where_small", default=False)


@contextmanager
def plain_operations() -> Iterator[None]:
    """Makes public functions decorated with `autocast` run as plain PyTorch inside a `with` block.

    They then call `plain` of their `Spec`, which has derivatives of every order.
    """
    token = _everywhere.set(True)
    try:
        yield
    finally:
        _everywhere.reset(token)


@contextmanager
def where_small(is_on: bool = True) -> Iterator[None]:
    """Makes ops run as plain PyTorch on small tensors inside a `with` block, or by their rules if `is_on` is False.

    Plain PyTorch follows autocast in its derivatives, and ends the process where memory of a graph was freed.
    """
    token = _where_small.set(is_on)
    try:
        yield
    finally:
        _where_small.reset(token)


def everywhere() -> bool:
    """Returns whether the call is inside `plain_operations`."""
    return _everywhere.get()


def allowed_where_small() -> bool:
    """Returns whether the call is inside `where_small`."""
    return _where_small.get()


def is_faster(x: Tensor, work: float, limit: float) -> bool:
    """Returns whether an op of the argument x runs as plain PyTorch: on a CPU, `work` below `limit`, in `where_small`.

    It is False where the rules were asked for by a backend chosen by hand, in half precision, which the rules compute
    in float32, and inside `torch.func` transforms and the compiler.
    """
    return (
        _where_small.get()
        and 0 < work < limit
        and x.is_cpu
        and x.dtype in native.DTYPES
        and not is_dynamo_compiling()
        and not torch._C._are_functorch_transforms_active()
        and backend.chosen() == "auto"
    )
