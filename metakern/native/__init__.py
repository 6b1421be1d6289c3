"""Call the compiled kernels, with checked arguments. `obstacle` says whether this installation has them.

Tensors on the CPU go to C++ kernels, in float32 or float64. Those on a GPU go to the CUDA kernel of the same name and
signature, in float32 or bfloat16, on PyTorch's current stream. A kernel is named `<op>_<rule>`. Its signature, such as
"x:TND weight:TD? -> y:TND ct_weight:TD?weight", says what `call` checks and allocates; csrc/signature.h explains it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cache, lru_cache
from importlib import import_module
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from metakern.native import choice, memory
from metakern.native.record import recordable


def _module(name: str) -> tuple[Any, str]:
    """Returns a compiled module and "", or None and the reason why it can't be imported."""
    try:
        return import_module(name), ""
    except ImportError as error:
        return None, str(error)


C, _missing = _module("metakern._C")
_cuda, _cuda_missing = _module("metakern._cuda")

DTYPES = frozenset({torch.float32, torch.float64})
LARGEST_EMPTY = 2**24
# Whether float32 kernels on a CPU round the operands of their matrix products to bfloat16 (`metakern.native.bfloat16`).
in_bfloat16: ContextVar[bool] = ContextVar("metakern_products_in_bfloat16", default=False)
CUDA_DTYPES = frozenset({torch.float32, torch.bfloat16})


def obstacle() -> str | None:
    """Returns why the C++ kernels can't be used, or None if they can."""
    if C is None:
        return (
            f"the C++ kernels are missing ({_missing}): install a C++17 compiler and reinstall with METAKERN_NATIVE=cpu"
        )
    return None


def cuda_obstacle() -> str | None:
    """Returns why the CUDA kernels can't be used, or None if they can. Does not initialize the GPU."""
    if _cuda is None:
        return f"the CUDA kernels are missing ({_cuda_missing}): install nvcc and reinstall with METAKERN_NATIVE=cuda"
    if not torch.cuda.is_available():
        return "no GPU is present, or this PyTorch was built without CUDA: install one that fits your driver"
    return obstacle()


class Argument(NamedTuple):
    """A tensor of a kernel: a part of its signature, as csrc/signature.h reads it."""

    name: str
    dims: list[tuple[int, str]]  # for each dimension a factor, and a size's letter or "1"; empty for any shape
    indices: bool
    optional: bool
    given_with: str  # the input without which an output is not made, or ""
    memory: str  # the input whose memory an output takes, or ""


class Signature(NamedTuple):
    """The number of a kernel, its tensors, and their names."""

    number: int
    inputs: list[Argument]
    outputs: list[Argument]
    names: list[str]  # of all inputs, then all outputs


@cache
def signatures() -> dict[str, Signature]:
    """The signature of every kernel."""
    if C is None:
        raise RuntimeError(obstacle())
    found = {}
    for number, (kernel, *sides) in enumerate(C.signatures()):
        inputs, outputs = ([Argument(*parts) for parts in side] for side in sides)
        found[kernel] = Signature(number, inputs, outputs, [argument.name for argument in (*inputs, *outputs)])
    return found


def in_memory(tensor: Tensor) -> Tensor:
    """Returns the tensor in contiguous memory, also if it is a zero tensor of forward mode or a lazily negated view."""
    if tensor._is_zerotensor():
        tensor = tensor.clone()
    elif tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _run_on_cpu(
    kernel: str,
    dtype: torch.dtype,
    addresses: list[int],
    sizes: tuple[int, ...],
    scalars: Sequence[float],
    device: torch.device,
) -> None:
    number = signatures()[kernel].number
    C.call(number, dtype == torch.float64, addresses, sizes, scalars, torch.get_num_threads(), in_bfloat16.get())


@cache
def _cuda_numbers() -> dict[str, int]:
    if _cuda is None:
        raise RuntimeError(cuda_obstacle())
    return {name: number for number, name in enumerate(_cuda.names())}


def _run_on_gpu(
    kernel: str,
    dtype: torch.dtype,
    addresses: list[int],
    sizes: tuple[int, ...],
    scalars: Sequence[float],
    device: torch.device,
) -> None:
    memory = []  # freed at return: PyTorch reuses it only for later work on the same stream

    def allocate(size: int) -> int:
        memory.append(torch.empty(size, dtype=torch.uint8, device=device))
        return memory[-1].data_ptr()

    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        _cuda.call(_cuda_numbers()[kernel], dtype == torch.bfloat16, addresses, sizes, scalars, stream, allocate)


class _Device(NamedTuple):
    dtypes: frozenset[torch.dtype]
    run: Callable[[str, torch.dtype, list[int], tuple[int, ...], Sequence[float], torch.device], None] | None


_DEVICES = {
    "cpu": _Device(DTYPES, _run_on_cpu),
    "cuda": _Device(CUDA_DTYPES, _run_on_gpu),
    "meta": _Device(DTYPES, None),  # for `arrange` alone
}


@recordable()
def call(kernel: str, *inputs: Tensor | None, scalars: Sequence[float] = ()) -> tuple[Tensor | None, ...]:
    """Runs a kernel on the device of its tensors and returns its outputs.

    Raises ValueError or TypeError, before anything runs, if the inputs do not fit the kernel's signature.

    >>> import pytest
    >>> _ = C or pytest.skip(obstacle())
    >>> call("gelu_tanh_forward", torch.zeros(3))
    (tensor([0., 0., 0.]),)
    """
    arranged = arrange(kernel, *inputs)
    device, run = arranged.device, _DEVICES[arranged.device.type].run
    if run is None:
        raise ValueError(f"{kernel}: tensors must be on the CPU or a GPU, got {device}")
    tensors = (*arranged.inputs, *arranged.outputs)
    addresses = [
        0 if tensor is None else memory.address(kernel, name, tensor)
        for name, tensor in zip(signatures()[kernel].names, tensors, strict=True)
    ]
    run(kernel, arranged.dtype, addresses, arranged.sizes, scalars, device)
    return arranged.outputs


class Arranged(NamedTuple):
    """The checked arguments of a kernel call: contiguous inputs, allocated outputs, and the signature's sizes."""

    inputs: list[Tensor | None]
    outputs: tuple[Tensor | None, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def arrange(kernel: str, *inputs: Tensor | None) -> Arranged:
    """Checks the inputs against the kernel's signature and allocates its outputs. The device may be "meta"."""
    for name, tensor in zip(signatures()[kernel].names, inputs, strict=False):
        if tensor is not None:
            memory.check(kernel, name, tensor)
    layout = _layout(kernel, tuple(None if t is None else (t.shape, t.dtype, t.device) for t in inputs))
    tensors: list[Tensor | None] = []  # they keep the contiguous copies alive
    for indices, tensor in zip(layout.indices, inputs, strict=True):
        tensors.append(None if tensor is None else in_memory(tensor.long() if indices else tensor))

    def output(made: torch.Size | int | None) -> Tensor | None:
        if isinstance(made, int):
            return cast(Tensor, tensors[made]).detach()  # not the input itself, which forward mode takes for a view
        return None if made is None else torch.empty(made, dtype=layout.dtype, device=layout.device)

    return Arranged(tensors, tuple(map(output, layout.outputs)), layout.sizes, layout.dtype, layout.device)


class _Layout(NamedTuple):
    """A checked kernel call without its tensors.

    Each output is given by its shape, by the index of the input whose memory it takes, or by None if it is absent.
    """

    indices: tuple[bool, ...]  # whether an input holds integers
    outputs: tuple[torch.Size | int | None, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@lru_cache(4096)
def _layout(kernel: str, inputs: tuple[tuple[torch.Size, torch.dtype, torch.device] | None, ...]) -> _Layout:
    """Checks the shapes, dtypes and devices of a kernel's inputs. It is cached, as most calls repeat earlier ones."""
    signature = signatures()[kernel]
    if len(inputs) != len(signature.inputs):
        raise TypeError(f"{kernel}: inputs must number {len(signature.inputs)}, got {len(inputs)}")
    name = signature.inputs[0].name
    if inputs[0] is None or inputs[0][2].type not in _DEVICES:
        got = None if inputs[0] is None else inputs[0][2]
        raise ValueError(f"{kernel}: {name} must be on the CPU or a GPU, got {got}")
    first, dtype, device = inputs[0]
    dtypes = _DEVICES[device.type].dtypes
    if dtype not in dtypes:
        names = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise TypeError(f"{kernel}: {name} must be {names}, got {dtype}")
    sizes: dict[str, int] = {}
    fixed = {"1": 1}
    for argument, given in zip(signature.inputs, inputs, strict=True):
        name, dims, indices, optional, *_ = argument
        if given is None:
            if not optional:
                raise TypeError(f"{kernel}: {name} must be a tensor, got None")
            continue
        shape, own_dtype, own_device = given
        if own_dtype != dtype and not indices:
            raise TypeError(f"{kernel}: {name} must be {dtype} like the other tensors, got {own_dtype}")
        if own_device != device:
            where = "the CPU" if device.type == "cpu" else device
            raise ValueError(f"{kernel}: {name} must be on {where}, got {own_device}")
        if not dims:
            fits = shape == first
        else:
            fits = len(shape) == len(dims)
            for (times, dim), size in zip(dims, shape, strict=False):
                fits = fits and times * (fixed if dim in fixed else sizes).setdefault(dim, size // times) == size
        if not fits:
            letters = "".join(f"{times if times > 1 else ''}{dim if dim not in fixed else ''}" for times, dim in dims)
            expected: Any = f"{letters} with {sizes}" if sizes else list(first)
            raise ValueError(f"{kernel}: {name} must have shape {expected}, got {list(shape)}")
    if not sizes:
        sizes["*"] = first.numel()
    # Memory bounds the sizes of tensors with elements, but a tensor without any may have a size of 2**62 beside a 0.
    if 0 in sizes.values() and prod(max(size, 1) for size in sizes.values()) > LARGEST_EMPTY:
        raise ValueError(f"{kernel}: sizes must multiply to at most {LARGEST_EMPTY} beside a size of 0, got {sizes}")
    place = {argument.name: i for i, argument in enumerate(signature.inputs)}

    def output(argument: Argument) -> torch.Size | int | None:
        if argument.memory:
            return place[argument.memory]
        if argument.given_with and inputs[place[argument.given_with]] is None:
            return None
        known = sizes | fixed
        return torch.Size([times * known[dim] for times, dim in argument.dims]) if argument.dims else first

    outputs = tuple(map(output, signature.outputs))
    return _Layout(tuple(a.indices for a in signature.inputs), outputs, tuple(sizes.values()), dtype, device)


def has_fast_products() -> bool:
    """Whether `product` is used in place of torch.bmm on this CPU."""
    return C is not None and products().is_native


def products() -> choice.Choice:
    """Returns which batched matrix product is used on this CPU, and why.

    Raises:
        RuntimeError: The C++ kernels are missing.
        ValueError: METAKERN_PRODUCTS, which is read at the first product, is neither "native" nor "torch".
    """
    if C is None:
        raise RuntimeError(obstacle())
    return _products(C.isa())


@cache
def _products(isa: str) -> choice.Choice:
    return choice.choose(product, isa)


@recordable()
def product(a: Tensor, b: Tensor, add: Tensor | None = None, reuse: bool = False, scale: float = 1.0) -> Tensor:
    """Returns add + scale a b, [T, M, N], for CPU tensors a [T, M, K] and b [T, K, N].

    `add` is expanded to [T, M, N]. With `reuse` the result overwrites it if it is contiguous.

    >>> import pytest
    >>> _ = C or pytest.skip(obstacle())
    >>> product(torch.ones(2, 1, 3), torch.ones(1, 3, 1).expand(2, 3, 1)).flatten()
    tensor([3., 3.])
    """
    arranged = arrange_product(a, b, add, reuse)
    if a.device.type != "cpu":
        raise ValueError(f"product: a must be on the CPU, got {a.device}")
    a, b, add, c = arranged.tensors
    if not c.numel():
        return c
    addresses = [
        memory.address("product", "a", a),
        memory.address("product", "b", b),
        0 if add is None else memory.address("product", "add", add),
        memory.address("product", "the result", c),
    ]
    is_double, threads = a.dtype == torch.float64, torch.get_num_threads()
    C.product(is_double, addresses, arranged.sizes, arranged.strides, scale, threads, in_bfloat16.get())
    return c


class ArrangedProduct(NamedTuple):
    """The checked arguments of `product`: (a, b, add, result), sizes (T, M, N, K), the strides of csrc/product.h."""

    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor]
    sizes: tuple[int, int, int, int]
    strides: tuple[int, ...]


def arrange_product(a: Tensor, b: Tensor, add: Tensor | None = None, reuse: bool = False) -> ArrangedProduct:
    """Checks the operands of `product` and allocates its result. The device may be "meta"."""
    memory.check("product", "a", a)
    memory.check("product", "b", b)
    if a.dim() != 3 or b.dim() != 3:
        raise ValueError(f"product: a and b must be [T, M, K] and [T, K, N], got {list(a.shape)} and {list(b.shape)}")
    (T, M, K), N = a.shape, b.shape[2]
    if b.shape[:2] != (T, K) or a.dtype not in DTYPES or b.dtype != a.dtype:
        raise ValueError(f"product: b must be {[T, K, N]} of {a.dtype}, got {list(b.shape)} of {b.dtype}")
    if b.device != a.device:
        raise ValueError(f"product: b must be on {a.device} like a, got {b.device}")
    a, b = _one_unit_stride(a), _one_unit_stride(b)
    add_strides: tuple[int, ...] = (0, 0)
    if add is not None:
        memory.check("product", "add", add)
        if add.dtype != a.dtype or add.device != a.device:
            raise ValueError(f"product: add must be {a.dtype} on {a.device}, got {add.dtype} on {add.device}")
        add = add.expand(T, M, N)
        if add._is_zerotensor():
            add = None
        else:
            add = add.resolve_neg()
            add = add if add.stride(2) == 1 or N == 1 else add.contiguous()
            add_strides = add.stride()[:2]
    c = add if reuse and add is not None and add.is_contiguous() else a.new_empty(T, M, N)
    return ArrangedProduct((a, b, add, c), (T, M, N, K), (*a.stride(), *b.stride(), *add_strides))


def _one_unit_stride(x: Tensor) -> Tensor:
    x = x.clone() if x._is_zerotensor() else x.resolve_neg()
    return x if 1 in x.stride()[1:] else x.contiguous()
