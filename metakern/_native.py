"""The compiled kernels: whether this installation has them, and one checked call for all of them.

A kernel is named `<op>_<rule>` and described by its signature (csrc/kernel.h), from which `call` takes what it checks
and what it allocates: "x:TND weight:TD? -> y:TND ct_weight:TD?weight" reads

    x:TND           a tensor [T, N, D]; the first tensor with a size sets it, the others must agree
    x:*             any shape, the same for all tensors of the kernel
    target:TNi      integers, passed on as int64; all other tensors share one dtype, float32 or float64
    weight:TD?      may be None
    ct_weight:TD?weight    an output made only where the input `weight` is given
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

_C: Any = None
_missing = ""
try:
    _C = import_module("metakern._C")
except ImportError as error:
    _missing = str(error)

DTYPES = frozenset({torch.float32, torch.float64})


def obstacle() -> str | None:
    """Why the C++ kernels can't be used, or None."""
    if _C is None:
        return (
            f"the C++ kernels are missing ({_missing}): reinstall where a C++17 compiler is, with METAKERN_NATIVE=cpu"
        )
    return None


class _Argument(NamedTuple):
    name: str
    dims: str
    condition: str | None  # after the "?": "" for an input that may be None, or the input that an output goes with
    indices: bool


class _Signature(NamedTuple):
    number: int
    inputs: list[_Argument]
    outputs: list[_Argument]


@cache
def _signatures() -> dict[str, _Signature]:
    if _C is None:
        raise RuntimeError(obstacle())

    def parse(text: str) -> _Argument:
        name, _, dims = text.partition(":")
        dims, optional, condition = dims.partition("?")
        return _Argument(name, dims.removesuffix("i"), condition if optional else None, dims.endswith("i"))

    signatures = {}
    for number, (kernel, text) in enumerate(_C.signatures()):
        inputs, outputs = ([parse(part) for part in side.split()] for side in text.split("->"))
        signatures[kernel] = _Signature(number, inputs, outputs)
    return signatures


def _in_memory(tensor: Tensor) -> Tensor:
    """The tensor in contiguous memory: forward mode has zeros without any, and a view may be lazily negated."""
    return (tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()).contiguous()


def call(kernel: str, *inputs: Tensor | None, scalars: Sequence[float] = ()) -> tuple[Tensor | None, ...]:
    """Runs a kernel on CPU tensors and returns its outputs.

    Raises ValueError or TypeError, before anything runs, where the inputs do not fit the signature.

    >>> import pytest
    >>> _ = _C or pytest.skip(obstacle())
    >>> call("gelu_tanh_forward", torch.zeros(3))
    (tensor([0., 0., 0.]),)
    """
    signature = _signatures()[kernel]
    if len(inputs) != len(signature.inputs):
        raise TypeError(f"{kernel}: inputs must number {len(signature.inputs)}, got {len(inputs)}")
    sizes: dict[str, int] = {}
    first = inputs[0]
    if first is None or first.dtype not in DTYPES:
        raise TypeError(
            f"{kernel}: {signature.inputs[0].name} must be float32 or float64, got {getattr(first, 'dtype', None)}"
        )
    dtype = first.dtype
    tensors: list[Tensor | None] = []  # kept, so that the addresses of contiguous copies stay good
    for argument, tensor in zip(signature.inputs, inputs, strict=True):
        name, dims, condition, indices = argument
        if tensor is None:
            if condition is None:
                raise TypeError(f"{kernel}: {name} must be a tensor, got None")
            tensors.append(None)
            continue
        tensor = tensor.long() if indices else tensor
        if tensor.dtype != dtype and not indices:
            raise TypeError(f"{kernel}: {name} must be {dtype} like the other tensors, got {tensor.dtype}")
        if tensor.device.type != "cpu":
            raise ValueError(f"{kernel}: {name} must be on the CPU, got {tensor.device}")
        if dims == "*":
            fits = tensor.shape == first.shape
        else:
            fits = tensor.dim() == len(dims)
            for dim, size in zip(dims, tensor.shape, strict=False):
                fits = fits and sizes.setdefault(dim, size) == size
        if not fits:
            expected = f"{dims} with {sizes}" if sizes else list(first.shape)
            raise ValueError(f"{kernel}: {name} must have shape {expected}, got {list(tensor.shape)}")
        tensors.append(_in_memory(tensor))
    if not sizes:
        sizes["*"] = first.numel()
    given = {argument.name for argument, tensor in zip(signature.inputs, tensors, strict=True) if tensor is not None}
    outputs: tuple[Tensor | None, ...] = tuple(
        None
        if condition is not None and condition not in given
        else torch.empty(first.shape if dims == "*" else [sizes[dim] for dim in dims], dtype=dtype)
        for _, dims, condition, _ in signature.outputs
    )
    # An empty tensor has no address; one that is never read keeps it apart from an absent tensor.
    addresses = [0 if tensor is None else tensor.data_ptr() or 64 for tensor in (*tensors, *outputs)]
    _C.call(signature.number, dtype == torch.float64, addresses, list(sizes.values()), scalars, torch.get_num_threads())
    return outputs
