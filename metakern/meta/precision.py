"""The option `precision`: in what precision matrix products are computed. docs/mathematics.md says what that means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from metakern import native
from metakern.native.bfloat16 import bfloat16_products

F = TypeVar("F", bound=Callable[..., Any])


def check(precision: object, parameters: Iterable[nn.Parameter]) -> None:
    """Raise ValueError unless `precision` is None, or "bfloat16" with float32 parameters on a CPU and no autocast.

    Raises RuntimeError where "bfloat16" is asked for and the C++ kernels are missing.
    """
    if precision is None:
        return
    if precision != "bfloat16":
        raise ValueError(f'MAML: precision must be None or "bfloat16", got {precision!r}')
    if obstacle := native.obstacle():
        raise RuntimeError(f"MAML: precision must be None without the C++ kernels: {obstacle}")
    if torch.is_autocast_enabled("cpu"):
        raise ValueError('MAML: precision must be None inside torch.autocast, got "bfloat16": use one of the two')
    for p in parameters:
        if p.device.type != "cpu":
            raise ValueError(
                f'MAML: precision must be None for a model on {p.device}, got "bfloat16": use torch.autocast there'
            )
        if p.is_floating_point() and p.dtype != torch.float32:
            raise ValueError(
                f'MAML: precision must be None for parameters of {p.dtype}, got "bfloat16", which rounds the operands '
                "of float32 products: call model.float()"
            )


def in_precision(precision: str | None) -> Callable[[F], F]:
    """Return a decorator that computes a function's products in bfloat16, or changes nothing if `precision` is None."""
    if precision is None:
        return lambda function: function

    def decorated(function: F) -> F:
        def call(*args: Any) -> Any:
            with bfloat16_products():
                return function(*args)

        return call  # type: ignore[return-value]

    return decorated
