"""Dual numbers of tensors, and the four rules of an op from two functions that are written for tensors.

A dual number x + ε t_x holds a value and its tangent, and ε² = 0. A function of tensors that is computed on dual
numbers gives its tangent too:

    f(x + ε t_x) = y + ε t_y        so that forward gives jvp, and vjp gives vjp_jvp
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from metakern.ops.core.matrices import wide
from metakern.ops.core.rules import Rules, Tensors


@dataclass(frozen=True, eq=False)
class Dual:
    """A tensor and its tangent; the other operand of an operator may be a tensor or a number, which have none."""

    value: Tensor
    tangent: Tensor

    def __add__(self, other: Any) -> Dual:
        if isinstance(other, Dual):
            return Dual(self.value + other.value, self.tangent + other.tangent)
        return Dual(self.value + other, self.tangent)

    def __neg__(self) -> Dual:
        return Dual(-self.value, -self.tangent)

    def __sub__(self, other: Any) -> Dual:
        return self + -other

    def __rsub__(self, other: float) -> Dual:
        return -self + other

    def __mul__(self, other: Any) -> Dual:
        if isinstance(other, Dual):
            return Dual(self.value * other.value, self.tangent * other.value + self.value * other.tangent)
        return Dual(self.value * other, self.tangent * other)

    def __matmul__(self, other: Dual) -> Dual:
        return Dual(self.value @ other.value, self.tangent @ other.value + self.value @ other.tangent)


def linear(f: Callable[..., Tensor], *x: Any) -> Any:
    """Returns f(*x), for a function f of tensors that is linear in all of them together."""
    if isinstance(x[0], Dual):
        return Dual(f(*(a.value for a in x)), f(*(a.tangent for a in x)))
    return f(*x)


def sigmoid(x: Any) -> Any:
    if not isinstance(x, Dual):
        return torch.sigmoid(x)
    s = torch.sigmoid(x.value)
    return Dual(s, s * (1 - s) * x.tangent)


def tanh(x: Any) -> Any:
    if not isinstance(x, Dual):
        return torch.tanh(x)
    y = torch.tanh(x.value)
    return Dual(y, (1 - y * y) * x.tangent)


def duals(x: Tensors, t_x: Tensors) -> list[Dual]:
    """Returns the dual numbers of tensors and their tangents; half precision becomes float32."""
    return [Dual(wide(a), wide(t)) for a, t in zip(x, t_x, strict=True)]


def rules(forward: Callable[..., Tensors], vjp: Callable[..., Tensors]) -> Rules:
    """Returns the four rules in plain PyTorch of an op without residuals; half precision is computed in float32.

    forward(c, *x) returns the outputs, and vjp(c, *x, *ct_y) the cotangents of the inputs. Both are written for tensors
    and for dual numbers.
    """

    def values(x: Tensors, results: Tensors) -> Tensors:
        return tuple((y.tangent if isinstance(y, Dual) else y).to(x[0].dtype) for y in results)

    def _forward(c: SimpleNamespace, x: Tensors) -> tuple[Tensors, Tensors]:
        return values(x, forward(c, *map(wide, x))), ()

    def _jvp(c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors) -> tuple[Tensors, Tensors]:
        return values(x, forward(c, *duals(x, t_x))), ()

    def _vjp(c: SimpleNamespace, x: Tensors, r: Tensors, ct_y: Tensors) -> Tensors:
        return values(x, vjp(c, *map(wide, (*x, *ct_y))))

    def _vjp_jvp(
        c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors, t_r: Tensors, ct_y: Tensors, t_ct_y: Tensors | None
    ) -> Tensors:
        t_ct_y = tuple(map(torch.zeros_like, ct_y)) if t_ct_y is None else t_ct_y
        return values(x, vjp(c, *duals(x, t_x), *duals(ct_y, t_ct_y)))

    return Rules(_forward, _jvp, _vjp, _vjp_jvp)
