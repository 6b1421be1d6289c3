"""Compile the Triton kernels of an op without a GPU: `python tests/ops/ahead_of_time.py OP` prints JSON.

The op runs on meta tensors of the shapes that `compiled` in its `triton.py` gives, at both orders and in both modes.
Each launch is compiled in place of being run, with its argument types, constants and options.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
import torch.autograd.forward_ad as fwd
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import metakern as mk
from metakern.native import memory
from metakern.ops import SPECS
from metakern.ops.core import backend
from metakern.ops.core.spec import Make, Sample, Spec
from metakern.ops.core.triton_kernels import launch, products
from metakern.ops.core.updates import KERNELS

# The GPUs, each with the bytes of shared memory that a program may use. The first compiles all launches.
TARGETS = {
    GPUTarget("cuda", 90, 32): 227 << 10,
    GPUTarget("cuda", 80, 32): 163 << 10,
    GPUTarget("cuda", 100, 32): 227 << 10,
    GPUTarget("hip", "gfx942", 64): 64 << 10,
}
DTYPES = (torch.float32, torch.bfloat16)
ONE_DTYPE = {80: torch.float32, 100: torch.bfloat16, "gfx942": torch.float32}  # the others compile one dtype
UPDATES = {name for name, spec in SPECS.items() if spec.op.kernels is KERNELS}  # they share the kernels in foreach.py


@dataclass(frozen=True)
class Launch:
    kernel: Any
    args: tuple
    options: dict[str, Any]
    grid: tuple[int, ...]

    def bound(self, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
        """Return the source and options that Triton would compile for this launch, as JITFunction.run makes them."""
        backend = make_backend(target)
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        arguments, specialization, options = binder(*self.args, **self.options)
        parsed, signature, constants, attributes = self.kernel._pack_args(
            backend, self.options, arguments, specialization, options
        )
        return ASTSource(self.kernel, signature, constants, attributes), parsed.__dict__


def recorded(op: str, target: GPUTarget) -> list[Launch]:
    """Return every launch of the op on a GPU, at both orders and in both modes."""
    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, args, options, grid))

    spec = SPECS[op]
    module = import_module(f"metakern.ops.{'core.triton_kernels.foreach' if op in UPDATES else f'{op}.triton'}")
    with (
        patch.object(JITFunction, "run", record),
        patch.object(backend, "_obstacle", lambda name: None),
        patch.object(memory, "address", lambda op, name, tensor: 0),
        patch.object(launch, "shared_memory", lambda device: TARGETS[target]),
        patch.object(products, "in_parts", lambda a: a.dtype == torch.float32 and target.backend == "cuda"),
        patch.object(torch.version, "hip", "7.0" if target.backend == "hip" else None),
        mk.backend("triton"),
    ):
        for dtype in DTYPES:
            if ONE_DTYPE.get(target.arch, dtype) != dtype:
                continue
            make = Make(dtype, device="meta")
            for sample in of_update(spec, make, target) if op in UPDATES else module.compiled(make):
                _differentiate(spec.call, sample)
        if target.arch == 90 and op not in UPDATES:  # a small one, too: with one element for each lane of a warp
            _differentiate(spec.call, spec.samples(Make(torch.float32, "meta"))[0])
    kernels = {f for f in vars(module).values() if isinstance(f, JITFunction) and f.__name__.endswith("_kernel")}
    missing = kernels - {each.kernel for each in launches}
    if missing:
        raise AssertionError(f"{op}: compiled() must launch every kernel, got none of {missing}")
    return launches


def of_update(spec: Spec, make: Make, target: GPUTarget) -> list[Sample]:
    """Return samples of an update op: real sizes, and, on one GPU of each maker, hyper-parameters of each task.

    The latter are in float32 alone: a dtype changes the same load in both.
    """
    others = spec.samples(make) if target.arch in (90, "gfx942") and make.dtype == torch.float32 else ()
    return [*spec.benchmark(make), *(s for s in others if s.name.endswith(("rate-per-task", "learned")))]


def _differentiate(call: Any, sample: Sample) -> None:
    """Run reverse over reverse, and forward over reverse with tangents of inputs and cotangents."""

    def leaf(a: Any) -> Any:
        return a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a

    args = [a if i in sample.frozen else leaf(a) for i, a in enumerate(sample.args)]
    x = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    options = {"allow_unused": True, "materialize_grads": True}
    y = torch.utils._pytree.tree_leaves(call(*args, **sample.kwargs))
    ct = [torch.empty_like(yi).requires_grad_() for yi in y]
    ct_x = torch.autograd.grad(y, x, ct, create_graph=True, **options)
    torch.autograd.grad(ct_x, [*x, *ct], [torch.empty_like(c) for c in ct_x], **options)
    with fwd.dual_level():

        def dual(a: Any) -> Any:
            return fwd.make_dual(a, torch.empty_like(a)) if any(a is xi for xi in x) else a

        duals = [dual(a) for a in args]
        y = torch.utils._pytree.tree_leaves(call(*duals, **sample.kwargs))
        ct = [fwd.make_dual(torch.empty_like(c), torch.empty_like(c)) for c in ct]
        torch.autograd.grad(y, [d for a, d in zip(args, duals, strict=True) if d is not a], ct, **options)


def compiled(op: str) -> Iterator[dict[str, Any]]:
    """Yield the resources that each different kernel takes on each GPU."""
    alike = set()  # kernels without a matrix product: their code is about the same on all GPUs of a maker
    for target in TARGETS:
        seen = set()
        for launched in recorded(op, target):
            source, options = launched.bound(target)
            key = (source.hash(), str(options))
            kind = (source.hash(), options["num_warps"], options["num_stages"], target.backend)
            if key in seen or kind in alike:
                continue
            seen.add(key)
            result = triton.compile(source, target=target, options=options)
            if "tt.dot" not in result.asm["ttir"]:
                alike.add(kind)
            registers, spilled = _resources(target, result)
            yield {
                "kernel": launched.kernel.__name__,
                "target": str(target.arch),
                "signature": str(source.signature),
                "constants": {str(k): str(v) for k, v in source.constants.items()},
                "grid": launched.grid,
                "warps": options["num_warps"],
                "shared": result.metadata.shared,
                "tensor_memory": getattr(result.metadata, "tmem_size", 0),
                "registers": registers,
                "spilled": spilled,
                "unequal": unequal(result.asm.get("ptx", "")),
            }


def unequal(ptx: str) -> list[str]:
    """Return the additions of another lane's value to a product that is not rounded before, as the other lane's is.

    Two lanes may then have sums that differ in the last bit, and both write theirs to one place in shared memory.
    """
    found, made = [], dict[str, tuple[str, list[str]]]()

    def shuffled(a: str) -> bool:
        operation, arguments = made.get(a, ("", [a]))
        moved = made.get(arguments[0], ("",))[0] if operation == "mov.b32" else operation
        return moved.startswith("shfl")

    for operation, result, rest in re.findall(r"^\s+(?:@!?%p\d+ )?([\w.]+)\s+(%\w+)\S*\s(.*);", ptx, re.MULTILINE):
        arguments = [a.strip() for a in rest.split(",")]
        of_product = any(made.get(a, ("",))[0] in ("mul.f32", "mul.f64") for a in arguments)
        if any(map(shuffled, arguments)) and (
            operation.startswith("fma.rn.f") or (re.fullmatch(r"(add|sub)\.f\d+", operation) and of_product)
        ):
            found.append(f"{operation} {result}, {rest}")
        made[result] = operation, arguments
    return found


def _resources(target: GPUTarget, result: Any) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes that are spilled to memory."""
    if target.backend == "hip":
        code = result.asm["amdgcn"]

        def number(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", code).group(1))

        return number("vgpr_count"), number("private_segment_fixed_size")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report)
    return int(found.group(1)), int(found.group(2)) + int(found.group(3))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        print(json.dumps(list(compiled(sys.argv[1]))))
