"""A case: a model, its loss, and batches of two tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

D = 6


class Case(NamedTuple):
    """Arguments of `mk.doctor`; `options` are its keyword arguments."""

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    support: Any
    query: Any
    options: dict[str, Any] = {}  # noqa: RUF012, never written to


def squared(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def case(*middle: nn.Module, loss: Callable[[nn.Module, Any], Tensor] = squared, **options: Any) -> Case:
    """Return a case whose model has `middle` between two linear layers, in float64.

    The first module of `middle` has the path "2" in the model.
    """
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), *middle, nn.Linear(D, 3)).double()
    support, query = ((torch.randn(2, 5, D).double(), torch.randn(2, 5, 3).double()) for _ in range(2))
    return Case(model, loss, support, query, options)


class Act(nn.Module):
    """A module that applies a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class SavesInput(Function):
    """x³ + x, with x saved for a backward that subclasses define."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3 + x
