"""What the Triton kernels share: the checked launch, helpers of launchers, and the dtype of accumulation."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from metakern.native import in_memory, memory
from metakern.native.record import recorder
from metakern.ops.core.rules import Tensors

# In the interpreter, blocks are so small that the tensors of tests have several blocks, the last one partly filled.
INTERPRETED = triton.knobs.runtime.interpret

if INTERPRETED:
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
        """Patches tensors for Triton 3.6, whose scalars are arrays of one element; NumPy 2.4 takes none as an index."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def _call(self: Any, *args: Any, **options: Any) -> Any:
        """Calls a function from a kernel. Patching the language at each call would take most of the kernel's time."""
        if tl.core.is_builtin(tl.core.full):
            interpreter._patch_lang(tl.zeros.fn)  # the module of this function has tl.core
        return self.rewrite()(*args, **options)

    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter.InterpretedFunction.__call__ = _call


# The option of kernels that sum products over the lanes of a warp. By default the compiler contracts a lane's product
# with the addition of the next lane's: its own product is then not rounded, and the other's is. So the sums of two
# lanes may differ in the last bit, and both write theirs to one place in shared memory.
ROUNDED = {"enable_fp_fusion": False}


def jit(kernel: Any) -> Any:
    """Compiles a kernel as triton.jit does, under a name that tells it from others: metakern_attention_forward."""
    of = kernel.__module__.removesuffix(".triton").rpartition(".")[2]
    name = f"metakern_{of}{kernel.__name__.removesuffix('_kernel')}"
    return triton.jit(kernel, repr=lambda specialization: name)


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, tables: Any = False, **options: Any
) -> None:
    """Checks the arguments and runs kernel[grid](*args, **options) on the device; does nothing for an empty grid."""
    if all(grid):
        check(kernel, device, *args, tables=tables)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](*args, **options)


def check(kernel: Any, device: torch.device, *args: Any, tables: Any = False) -> None:
    """Raises ValueError for a tensor whose memory was freed, or whose device is not `device`.

    A recorder is told what the kernel reads. If the arguments are `tables` of addresses, `addresses` has told it.
    """
    tensors: list[torch.Tensor] = []

    def look(name: str, value: Any) -> None:
        if isinstance(value, tuple):
            for part in value:
                look(name, part)
        elif isinstance(value, torch.Tensor):
            memory.check(op, name, value)
            memory.address(op, name, value)
            if value.device != device:
                raise ValueError(f"{op}: {name} must be on {device} like the other arguments, got {value.device}")
            tensors.append(value)

    op = kernel.__name__.strip("_")
    for name, value in zip(kernel.arg_names, args, strict=False):
        look(name, value)
    if not tables and (mode := recorder()) is not None:
        mode.reads(tensors)


def addresses(op: str, tensors: Tensors) -> tuple[int, ...]:
    """Returns where the tensors are, for a kernel that gets a table of addresses."""
    if (mode := recorder()) is not None:
        mode.reads(tensors)
    return tuple(memory.address(op, "every tensor", t) for t in tensors)


def shared_memory(device: torch.device) -> int:
    """Returns the bytes of shared memory that a program may use on a GPU; 0 on another device."""
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


@cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Returns the compute capability of an NVIDIA GPU; None for another device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and not torch.version.hip else None


def precision() -> str:
    """Returns the `input_precision` of float32 products: full precision, unless PyTorch's settings allow TF32."""
    if torch.version.hip:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    chosen = getattr(matmul, "fp32_precision", None)  # since PyTorch 2.9; where it is used, reading allow_tf32 raises
    return "tf32" if chosen == "tf32" or (chosen is None and matmul.allow_tf32) else "tf32x3"


def contiguous(*tensors: torch.Tensor | None) -> Tensors:
    """Checks the tensors and returns them contiguous; None stays None."""
    for tensor in tensors:
        if tensor is not None:
            memory.check("triton", "every tensor of a kernel", tensor)
    return tuple(None if tensor is None else in_memory(tensor) for tensor in tensors)


def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up."""
    return -(-a // b)


@triton.jit
def wide(x):
    """Returns x in the dtype of its accumulation: float64 for float64, else float32."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def quotient(a, b):
    """Returns a / b, rounded correctly. Near the start of Adam, derivatives are differences of nearly equal terms."""
    y = a / b
    if y.dtype == tl.float32:
        y = tl.div_rn(a, b)
    return y
