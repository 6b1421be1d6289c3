"""Small modules, and functions that freeze and unfreeze one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Lambda(nn.Module):
    """A module that calls a function.

    Args:
        lmb: Any function; the module returns what it returns.

    >>> import torch
    >>> from metakern.compat.learn2learn.nn import Lambda
    >>> Lambda(torch.square)(torch.tensor(3.0))
    tensor(9.)
    """

    def __init__(self, lmb: Callable[..., Any]) -> None:
        super().__init__()
        self.lmb = lmb

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.lmb(*args, **kwargs)


class Flatten(nn.Module):
    """Flattens all dimensions but the first: [B, ...] to [B, n].

    >>> import torch
    >>> from metakern.compat.learn2learn.nn import Flatten
    >>> Flatten()(torch.ones(2, 3, 4)).shape
    torch.Size([2, 12])
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1)


class Scale(nn.Module):
    """Multiplies its input by a learned tensor, `alpha`.

    Args:
        shape: The tensor's shape, which broadcasts with the input's; by default [1].
        alpha: Its initial value, everywhere.

    >>> import torch
    >>> from metakern.compat.learn2learn.nn import Scale
    >>> Scale(3, alpha=2.0)(torch.ones(3)).detach()
    tensor([2., 2., 2.])
    """

    def __init__(self, shape: int | Sequence[int] | None = None, alpha: float = 1.0) -> None:
        super().__init__()
        sizes = (1,) if shape is None else (shape,) if isinstance(shape, int) else tuple(shape)
        self.alpha = nn.Parameter(torch.ones(sizes) * alpha)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha


def freeze(module: M) -> M:
    """Detaches all parameters of a module and lets none require a gradient, in place; returns the module.

    >>> import torch
    >>> from metakern.compat.learn2learn.nn import freeze
    >>> any(p.requires_grad for p in freeze(torch.nn.Linear(3, 1)).parameters())
    False
    """
    for p in module.parameters():
        p.detach_().requires_grad_(False)
    return module


def unfreeze(module: M) -> M:
    """Lets all parameters of a module require a gradient, in place; returns the module.

    >>> import torch
    >>> from metakern.compat.learn2learn.nn import freeze, unfreeze
    >>> all(p.requires_grad for p in unfreeze(freeze(torch.nn.Linear(3, 1))).parameters())
    True
    """
    return module.requires_grad_()
