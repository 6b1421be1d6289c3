"""The hook by which a recorder sees calls that PyTorch's dispatcher doesn't, such as those of our own kernels.

It stands apart from the recorder (`metakern.meta.capture.recorder`), so that ops need not import the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

F = TypeVar("F", bound=Callable[..., Any])


class Recording(TorchDispatchMode):
    """A mode that is told of the calls of recordable functions."""

    def run(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], has_side_effects: bool) -> Any:
        raise NotImplementedError


def recordable(has_side_effects: bool = False) -> Callable[[F], F]:
    """A function that PyTorch's dispatcher does not see, such as the call of a kernel: recorded as one.

    Set `has_side_effects` if it reads hidden state (such as the random generator) or writes to anything but its
    results. One without results is a check: a program keeps it, though nothing reads it.
    """

    def decorated(function: F) -> F:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch._C._len_torch_dispatch_stack():
                for mode in _get_current_dispatch_mode_stack():
                    if isinstance(mode, Recording):
                        return mode.run(function, args, kwargs, has_side_effects)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorated


def known(tensor: Tensor) -> Any:
    """The number in a tensor that is the same in every run, such as a count of steps: no obstacle to recording."""
    with torch._C.DisableTorchFunction():
        return tensor.tolist()
