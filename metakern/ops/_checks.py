"""Checks of arguments that the ops share. Every message reads `<op>: <argument> must <rule>, got <value>`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def floating(op: str, **tensors: Tensor | None) -> None:
    """All present tensors are floating point, of one dtype and on one device; the first one sets both."""
    first: Tensor | None = None
    for name, value in tensors.items():
        if value is None:
            continue
        tensor(op, name, value)
        if not value.is_floating_point():
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
