"""Choose when an op runs as plain PyTorch, by `plain` of its `Spec`, in place of its rules.

A call of the rules with both derivatives takes 0.1 to 0.4 ms of Python on a CPU, whatever the sizes. On small tensors
PyTorch's own operations are faster, and exact at every order. Each op says how much work makes a call of it small: the
limit is where both take the same time on one core. Sizes alone decide, so that runs repeat bit for bit.
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
_nowhere: ContextVar[bool] = ContextVar("metakern_kernels", default=False)


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
def kernels() -> Iterator[None]:
    """Makes ops run their rules inside a `with` block, on small tensors too.

    It is for calls that a captured program repeats without Python.
    """
    token = _nowhere.set(True)
    try:
        yield
    finally:
        _nowhere.reset(token)


def everywhere() -> bool:
    """Returns whether the call is inside `plain_operations`."""
    return _everywhere.get()


def is_faster(x: Tensor, work: float, limit: float) -> bool:
    """Returns whether an op of the argument x is faster as plain PyTorch: on a CPU, where `work` is below `limit`.

    It is False where the rules were asked for (a backend chosen by hand, `kernels`), in half precision, which the rules
    compute in float32, and inside `torch.func` transforms and the compiler.
    """
    return (
        0 < work < limit
        and x.is_cpu
        and x.dtype in native.DTYPES
        and not _nowhere.get()
        and not is_dynamo_compiling()
        and not torch._C._are_functorch_transforms_active()
        and backend.chosen() == "auto"
    )
