"""The compiled kernels: whether this installation has them, and one checked call for all of them.

A kernel is named `<op>_<rule>` and described by its signature (csrc/kernel.h), from which `call` takes what it checks
and what it allocates: "x:TND weight:TD? -> y:TND ct_weight:TD?weight" reads

    x:TND           a tensor [T, N, D]; the first tensor with a size sets it, the others must agree
    gates:TBL4H     a last dimension of four times the size H
    x:*             any shape, the same for all tensors of the kernel
    target:TNi      integers, passed on as int64; all other tensors share one dtype, float32 or float64
    weight:TD?      may be None
    ct_weight:TD?weight    an output made only where the input `weight` is given
    gates:TBLG=u    an output that takes the memory of the input `u`, which the call uses up
"""

from __future__ import annotations

import re
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
    dims: tuple[tuple[int, str], ...]  # a multiple of a size for each dimension; empty for any shape
    condition: str | None  # after the "?": "" for an input that may be None, or the input that an output goes with
    indices: bool
    memory: str  # the input whose memory an output takes, or ""


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
        dims, _, memory = dims.partition("=")
        dims, optional, condition = dims.partition("?")
        sizes = tuple((int(times or 1), size) for times, size in re.findall(r"(\d*)([A-Z])", dims))
        return _Argument(name, sizes, condition if optional else None, dims.endswith("i"), memory)

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
        name, dims, condition, indices, _ = argument
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
        if not dims:
            fits = tensor.shape == first.shape
        else:
            fits = tensor.dim() == len(dims)
            for (times, dim), size in zip(dims, tensor.shape, strict=False):
                fits = fits and times * sizes.setdefault(dim, size // times) == size
        if not fits:
            letters = "".join(f"{times if times > 1 else ''}{dim}" for times, dim in dims)
            expected = f"{letters} with {sizes}" if sizes else list(first.shape)
            raise ValueError(f"{kernel}: {name} must have shape {expected}, got {list(tensor.shape)}")
        tensors.append(_in_memory(tensor))
    if not sizes:
        sizes["*"] = first.numel()
    given = {argument.name: tensor for argument, tensor in zip(signature.inputs, tensors, strict=True)}

    def output(argument: _Argument) -> Tensor | None:
        if argument.memory:
            return given[argument.memory].detach()  # else a view to forward mode
        if argument.condition is not None and given[argument.condition] is None:
            return None
        shape = [times * sizes[dim] for times, dim in argument.dims] or first.shape
        return torch.empty(shape, dtype=dtype)

    outputs = tuple(output(argument) for argument in signature.outputs)
    # An empty tensor has no address; one that is never read keeps it apart from an absent tensor.
    addresses = [0 if tensor is None else tensor.data_ptr() or 64 for tensor in (*tensors, *outputs)]
    _C.call(signature.number, dtype == torch.float64, addresses, list(sizes.values()), scalars, torch.get_num_threads())
    return outputs


def has_fast_products() -> bool:
    """Whether `product` is faster than torch.bmm here: its library leaves the AVX-512 of CPUs that aren't Intel's alone."""
    return _C is not None and _C.isa() == "avx512" and not _C.is_intel()


def product(a: Tensor, b: Tensor, add: Tensor | None = None) -> Tensor:
    """add + a b of CPU tensors [T, M, K] and [T, K, N]; `add` is expanded to [T, M, N].

    >>> import pytest
    >>> _ = _C or pytest.skip(obstacle())
    >>> product(torch.ones(2, 1, 3), torch.ones(1, 3, 1).expand(2, 3, 1)).flatten()
    tensor([3., 3.])
    """
    (T, M, K), N = a.shape, b.shape[2]
    if b.shape[:2] != (T, K) or a.dtype not in DTYPES or b.dtype != a.dtype:
        raise ValueError(f"product: b must be {[T, K, N]} of {a.dtype}, got {list(b.shape)} of {b.dtype}")
    if a.device.type != "cpu" or b.device.type != "cpu":
        raise ValueError(f"product: a and b must be on the CPU, got {a.device} and {b.device}")
    a, b = _one_unit_stride(a), _one_unit_stride(b)
    address, add_strides = 0, (0, 0)
    if add is not None:
        if add.dtype != a.dtype or add.device.type != "cpu":
            raise ValueError(f"product: add must be {a.dtype} on the CPU, got {add.dtype} on {add.device}")
        add = add.expand(T, M, N).resolve_neg()
        add = add if add.stride(2) == 1 or N == 1 else add.contiguous()
        address, add_strides = add.data_ptr(), add.stride()[:2]
    c = a.new_empty(T, M, N)
    addresses = a.data_ptr(), b.data_ptr(), address, c.data_ptr()
    _C.product(a.dtype == torch.float64, addresses, (T, M, N, K), (*a.stride(), *b.stride(), *add_strides), torch.get_num_threads())
    return c


def _one_unit_stride(x: Tensor) -> Tensor:
    x = x.clone() if x._is_zerotensor() else x.resolve_neg()
    return x if 1 in x.stride()[1:] else x.contiguous()
