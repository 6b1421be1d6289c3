"""The hook that shows a recorder the calls that PyTorch's dispatcher does not see, such as those of our own kernels.

It is separate from the recorder (`metakern.meta.capture.recorder`), so that ops need not import the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack

F = TypeVar("F", bound=Callable[..., Any])


class Recording(TorchDispatchMode):
    """A dispatch mode whose `run` is called in place of each recordable function.

    `reads` is called with the tensors of a kernel that is launched otherwise, as Triton's are.
    """

    def run(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], has_side_effects: bool) -> Any:
        raise NotImplementedError

    def reads(self, tensors: Iterable[Tensor]) -> None:
        raise NotImplementedError


def recorder() -> Recording | None:
    """Returns the active recorder, if there is one."""
    if torch._C._len_torch_dispatch_stack():
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, Recording):
                return mode
    return None


def in_cuda_graph(device: torch.device) -> bool:
    """Returns whether a CUDA graph is recorded on the current stream of a device.

    `torch.cuda.is_current_stream_capturing` does not say so where metakern records one.
    """
    return device.type == "cuda" and torch._C._cuda_isCurrentStreamCapturing()


def recordable(has_side_effects: bool = False) -> Callable[[F], F]:
    """Returns a decorator for a function that PyTorch's dispatcher does not see, such as a kernel call.

    A recorder records each call of the function as one step. Set `has_side_effects` if it reads hidden state (such as
    the random generator) or writes to anything but its results. A function that returns None is a check, and dead-code
    elimination keeps it.
    """

    def decorated(function: F) -> F:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            mode = recorder()
            return function(*args, **kwargs) if mode is None else mode.run(function, args, kwargs, has_side_effects)

        return call  # type: ignore[return-value]

    return decorated


def unrecorded(function: F) -> F:
    """Makes a recorder not see what the function does, for constants of kernels that are kept from call to call."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def known(tensor: Tensor) -> Any:
    """Returns the number in a tensor without stopping a recorder, for numbers that are the same in every run.

    An example is the count of an optimizer's steps.
    """
    with torch._C.DisableTorchFunction():
        return tensor.tolist()
