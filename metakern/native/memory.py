"""Check that a tensor's elements lie in memory that can be read, before a kernel gets its address."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# The address passed for a tensor without elements. It is never read, and differs from 0, which is an absent tensor.
EMPTY = 64
# Tensors of exactly these types have memory of their own, or the address 0. A subclass may wrap other tensors.
_OWNERS = (Tensor, nn.Parameter)


def check(op: str, name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a dense tensor, and ValueError unless its storage holds all of its elements.

    Sharded training frees the memory of parameters with `untyped_storage().resize_`. PyTorch's own operations crash on
    such a tensor.

    >>> freed = torch.ones(2)
    >>> _ = freed.untyped_storage().resize_(0)
    >>> check("gelu", "x", freed)
    Traceback (most recent call last):
    ValueError: gelu: x must have the 8 bytes of its elements in its storage, got 0 bytes: its memory was freed
    """
    try:
        held, size, offset = value.untyped_storage().nbytes(), value.nbytes, value.storage_offset()
        if held >= size and not offset and value.is_contiguous() and not value.is_nested:  # almost always
            return
        spans = () if value.is_nested else tuple(zip(value.shape, value.stride(), strict=True))
    except (AttributeError, NotImplementedError, RuntimeError):
        _check_wrapped(op, name, value)
        return
    if value.is_nested:
        _check_wrapped(op, name, value)
    needed = value.itemsize * (1 + offset + sum((n - 1) * stride for n, stride in spans)) if size else 0
    if needed > held:
        raise ValueError(
            f"{op}: {name} must have the {needed} bytes of its elements in its storage, got {held} bytes: "
            "its memory was freed"
        )


def _check_wrapped(op: str, name: str, value: Any) -> None:
    """`check` for a value without a storage or sizes of its own, such as a tensor inside a `torch.func` transform."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        check(op, name, torch._C._functorch.get_unwrapped(value))
    elif value.is_nested:
        raise TypeError(f"{op}: {name} must be a dense tensor, got a nested one: call to_padded_tensor() on it")
    elif value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got one of layout {value.layout}: call to_dense() on it")


def address(op: str, name: str, tensor: Tensor) -> int:
    """Returns the address of a tensor that has passed `check`. Raises ValueError if it has none, like a fake tensor."""
    owner = type(tensor) in _OWNERS
    if owner and (found := tensor.data_ptr()):
        return found
    if not tensor.numel():
        return EMPTY
    if not owner:
        storage = tensor.untyped_storage()
        try:
            base = (
                0 if storage.device.type == "meta" else storage.data_ptr()
            )  # fake tensors report another device, their storage's is "meta"
        except RuntimeError:  # raised by a subclass that wraps other tensors
            base = 0
        if base:
            return tensor.data_ptr()
    kind = str(tensor.device) if owner else type(tensor).__name__
    raise ValueError(f"{op}: {name} must have memory that a kernel can read, got a tensor without any: {kind}")
