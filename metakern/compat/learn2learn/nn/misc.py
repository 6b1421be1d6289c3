"""Small modules, and what freezes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, lmb: Callable[..., Any]) -> None:
        super().__init__()
        self.lmb = lmb

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.lmb(*args, **kwargs)


class Flatten(nn.Module):
    """[B, ...] to [B, -1]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1)


class Scale(nn.Module):
    """x times a learned tensor of `shape`, which is `alpha` everywhere at first."""

    def __init__(self, shape: int | Sequence[int] | None = None, alpha: float = 1.0) -> None:
        super().__init__()
        sizes = (1,) if shape is None else (shape,) if isinstance(shape, int) else tuple(shape)
        self.alpha = nn.Parameter(torch.ones(sizes) * alpha)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha


def freeze(module: M) -> M:
    """The module, of which no parameter requires a gradient from now on."""
    for p in module.parameters():
        p.detach_().requires_grad_(False)
    return module


def unfreeze(module: M) -> M:
    """The module, of which every parameter requires a gradient from now on."""
    return module.requires_grad_()
