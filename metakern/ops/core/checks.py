"""Checks of arguments that all ops share.

Each raises TypeError for a wrong kind or dtype and ValueError for anything else. Every message reads `<op>: <argument>
must <rule>, got <value>`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from metakern.native import memory
from metakern.native.record import recordable


def tensor(op: str, name: str, value: Any) -> None:
    """Requires a dense tensor whose storage holds all of its elements."""
    if torch.compiler.is_dynamo_compiling():  # tensors have no storage while the compiler traces
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    else:
        memory.check(op, name, value)


def floating(op: str, optional: Collection[str] = (), **tensors: Any) -> None:
    """Requires floating-point tensors of one dtype on one device, which the first sets.

    Those that are `optional` may be None.
    """
    first: Tensor | None = None
    for name, value in tensors.items():
        if value is None and name in optional:
            continue
        tensor(op, name, value)
        if (first is None or value.dtype != first.dtype) and not value.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {value.dtype}")
        if first is None:
            first = value
        elif value.dtype != first.dtype:
            raise TypeError(f"{op}: {name} must have the dtype {first.dtype} of the other arguments, got {value.dtype}")
        elif value.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device} like the other arguments, got {value.device}")


def indices(op: str, name: str, value: Tensor, device: torch.device) -> None:
    tensor(op, name, value)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: {name} must be int64 or int32, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like the other arguments, got {value.device}")


def shape(op: str, name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{op}: {name} must have shape {meaning} = {list(expected)}, got {list(value.shape)}")


def tasks(op: str, x: Tensor, features: str, **parameter: tuple[Tensor, str]) -> int | None:
    """Returns T if each task has its own parameter, [T, *sizes], or None if all share it, [*sizes].

    Requires x to be [T, ..., D] or [..., D] accordingly, with the parameter's last size as D. `features` names D in
    messages. `parameter` is one keyword argument: the parameter and the names of its `sizes`, such as "H, D".
    """
    ((name, (value, sizes)),) = parameter.items()
    own = value.dim() - sizes.count(",") - 1
    if own not in (0, 1):
        raise ValueError(f"{op}: {name} must have shape [{sizes}] or [T, {sizes}], got {list(value.shape)}")
    if x.dim() < 1 + own or x.shape[-1] != value.shape[-1] or x.shape[:own] != value.shape[:own]:
        meaning = f"[T, ..., {features}] = [{value.shape[0]}" if own else f"[..., {features}] = ["
        raise ValueError(f"{op}: x must have shape {meaning}{', ' * own}..., {value.shape[-1]}], got {list(x.shape)}")
    return value.shape[0] if own else None


def below(op: str, name: str, value: Tensor, high: int, ignored: int | None = None) -> None:
    """Requires indices in [0, high) or equal to `ignored`. Checks CPU tensors only: a GPU would be waited for."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):  # as inside torch.func.vmap
        value = torch._C._functorch.get_unwrapped(value)
    if value.device.type == "cpu":
        all_below(op, name, value, high, ignored)


@recordable()
def all_below(op: str, name: str, value: Tensor, high: int, ignored: int | None) -> None:
    if value.numel():
        low, top = value.aminmax()
        if low >= 0 and top < high:
            return
    wrong = (value < 0) | (value >= high)
    if ignored is not None:
        wrong &= value != ignored
    if wrong.any():
        raise ValueError(f"{op}: {name} must be in [0, {high}), got {value[wrong][0].item()}")
