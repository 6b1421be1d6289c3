"""learn2learn's base of learners: a module around another one."""

from __future__ import annotations

from typing import Any

from torch import nn


class BaseLearner(nn.Module):
    """A module around `module` that has its attributes too."""

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
