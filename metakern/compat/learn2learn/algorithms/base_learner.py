"""learn2learn's base class of learners: a module that wraps another one."""

from __future__ import annotations

from typing import Any

from torch import nn


class BaseLearner(nn.Module):
    """A module that wraps `module`, calls it, and has its attributes beside its own.

    >>> import torch
    >>> from metakern.compat.learn2learn import BaseLearner
    >>> learner = BaseLearner(torch.nn.Linear(8, 4))
    >>> learner.out_features, learner(torch.ones(2, 8)).shape
    (4, torch.Size([2, 4]))
    """

    module: nn.Module

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self.module = module  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None:
                raise
            return getattr(module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
