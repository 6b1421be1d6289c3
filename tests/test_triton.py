"""Triton's kernels: they are what runs in the interpreter, and they compile for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import metakern as mk
from metakern.ops import SPECS
from metakern.ops._spec import Make, Spec

pytestmark = pytest.mark.skipif(mk.backends()["triton"] != "available", reason=mk.backends()["triton"])

ROOT = Path(__file__).parent.parent
OPS = [name for name, spec in SPECS.items() if "triton" in spec.op.kernels]
SHARED_BYTES = {"80": 163 << 10, "90": 227 << 10, "100": 227 << 10, "gfx942": 64 << 10}
LARGEST_GRID = (2**31 - 1, 65535, 65535)
# What a thread may keep in memory for want of registers, in bytes, where it is not nothing.
SPILLED: dict[str, int] = {
    # Four tiles of products and their sums, in the prologue and, on sm_100, in the loop.
    "_queries_kernel": 256,
    "_keys_kernel": 1280,
    "_jvp_kernel": 16,
    "_delta_kernel": 8,
}


@pytest.mark.parametrize("spec", [pytest.param(SPECS[name], id=name) for name in OPS])
def test_the_backend_launches_kernels(spec: Spec, launched: list[str]) -> None:
    sample = spec.samples(Make(torch.float32))[0]
    args = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in sample.args]
    with mk.backend("reference"):
        spec.call(*args, **sample.kwargs)
    assert not launched
    with mk.backend("triton"):
        spec.call(*args, **sample.kwargs)
    assert launched


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_for_every_gpu(op: str) -> None:
    """At real sizes and dtypes, within the chip's shared memory and the launch's limits, in registers alone."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = (sys.executable, "tests/ahead_of_time.py", op)
    result = subprocess.run(
        command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout)
    assert {kernel["target"] for kernel in kernels} == set(SHARED_BYTES)
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_BYTES[kernel["target"]], kernel
        assert kernel["spilled"] <= SPILLED.get(kernel["kernel"], 0), kernel
        assert all(size <= limit for size, limit in zip(kernel["grid"], LARGEST_GRID, strict=False)), kernel
