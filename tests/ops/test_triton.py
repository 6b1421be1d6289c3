"""Triton kernels: the backend launches them, their rules are right, and they compile for GPUs within their limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.utils._pytree import tree_leaves

import metakern as mk
from metakern.ops import SPECS
from metakern.ops.core import selfcheck
from metakern.ops.core.spec import Make, Sample, Spec
from metakern.ops.core.triton_kernels import tables

pytestmark = pytest.mark.skipif(mk.backends()["triton"] != "available", reason=mk.backends()["triton"])

ROOT = Path(__file__).parent.parent.parent
OPS = [name for name, spec in SPECS.items() if "triton" in spec.op.kernels]
SHARED_BYTES = {"80": 163 << 10, "90": 227 << 10, "100": 227 << 10, "gfx942": 64 << 10}
LARGEST_GRID = (2**31 - 1, 65535, 65535)
# Bytes that a thread may spill: ptxas spills a few now and then.
FEW_BYTES = 16
SPILLED = {
    # Two products of large blocks, on an A100.
    "_products_kernel": 192,
    # Attention with wide heads, mostly before and after the loop.
    "_queries_kernel": 256,
    "_keys_kernel": 1280,
    "_jvp_kernel": 16,
    # metalstm_update: both layers and their cotangents.
    "_update_vjp_kernel": 128,
}


@pytest.mark.parametrize("spec", [pytest.param(SPECS[name], id=name) for name in OPS])
def test_the_backend_launches_kernels(spec: Spec, launched: list[str]) -> None:
    sample = next(sample for sample in spec.samples(Make()) if sample.per_task)
    with mk.backend("reference"):
        orders(spec, sample)
    assert not launched
    with mk.backend("triton"):
        orders(spec, sample)
    assert launched


@pytest.mark.parametrize(
    ("spec", "sample"),
    [pytest.param(SPECS[op], s, id=f"{op}-{s.name}") for op in OPS for s in SPECS[op].samples(Make(seed=5))],
)
def test_every_rule_equals_that_of_the_reference(spec: Spec, sample: Sample) -> None:
    """All samples, with tangents of cotangents: the battery takes one sample of an op through all nestings."""
    compare(spec, sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_every_rule_in_half_precision_is_near_float64(op: str, dtype: torch.dtype) -> None:
    assert selfcheck._checked(SPECS[op], SPECS[op].op.kernels["triton"], torch.device("cpu"), dtype) == selfcheck.GOOD


def compare(spec: Spec, sample: Sample) -> None:
    results = []
    for backend in ("triton", "reference"):
        with mk.backend(backend):
            results.append(orders(spec, sample))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_ignored_tokens_are_not_read() -> None:
    logits, target = Make(seed=7)(2, 3, 5), torch.tensor([[1, -100, 4], [-100, 0, 2]])
    logits[target == -100] = float("nan")
    clean = Sample("clean", (logits.nan_to_num(), target))
    with mk.backend("triton"):
        results = [orders(SPECS["cross_entropy"], sample) for sample in (Sample("nan", (logits, target)), clean)]
    torch.testing.assert_close(*results)


SEVERAL_BLOCKS = [
    ("layer_norm", "core.triton_kernels.norm", "LARGEST", {"forward": 2, "jvp": 4, "vjp": 2}),
    ("rms_norm", "core.triton_kernels.norm", "LARGEST", {"forward": 4, "jvp": 2, "vjp": 2}),
    ("cross_entropy", "cross_entropy.triton", "LARGEST", 2),
    ("prototype_log_softmax", "prototype_log_softmax.triton", "LARGEST", 16),
]


@pytest.mark.parametrize(("op", "module", "name", "value"), SEVERAL_BLOCKS)
def test_rows_that_take_several_blocks(
    op: str, module: str, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module(f"metakern.ops.{module}"), name, value)
    for sample in SPECS[op].samples(Make(seed=5)):
        compare(SPECS[op], sample)


def orders(spec: Spec, sample: Sample) -> list[Tensor]:
    """Return outputs, first derivatives, and second ones by reverse over reverse and by forward over reverse."""
    draw, options = Make(seed=6), {"allow_unused": True, "materialize_grads": True}
    args = [a.detach().requires_grad_() if differentiable(a) else a for a in sample.args]
    x = [a for a in args if differentiable(a)]
    y = tree_leaves(spec.call(*args, **sample.kwargs))
    ct = [draw(*yi.shape).requires_grad_() for yi in y]
    ct_x = torch.autograd.grad(y, x, ct, create_graph=True, **options)
    v = [draw(*a.shape) for a in x]
    second = torch.autograd.grad(ct_x, [*x, *ct], v, **options)
    tangents = iter(v)
    with fwd.dual_level():
        duals = [fwd.make_dual(a, next(tangents)) if differentiable(a) else a for a in args]
        y_dual = tree_leaves(spec.call(*duals, **sample.kwargs))
        ct_dual = [fwd.make_dual(c, draw(*c.shape)) for c in ct]
        t_ct = torch.autograd.grad(y_dual, [a for a in duals if differentiable(a)], ct_dual, **options)
        t = [fwd.unpack_dual(a).tangent for a in (*y_dual, *t_ct)]
    return [a.detach() for a in (*y, *ct_x, *second, *t) if a is not None]


def differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_for_every_gpu(op: str) -> None:
    """At real sizes and dtypes, within the limits of shared memory, registers and grids."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = (sys.executable, "tests/ops/ahead_of_time.py", op)
    result = subprocess.run(
        command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout)
    assert {kernel["target"] for kernel in kernels} >= {"90", "gfx942"}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_BYTES[kernel["target"]], kernel
        assert kernel["tensor_memory"] <= 512, kernel
        assert not kernel["unequal"], kernel
        assert kernel["spilled"] <= SPILLED.get(kernel["kernel"], FEW_BYTES), kernel
        assert all(size <= limit for size, limit in zip(kernel["grid"], LARGEST_GRID, strict=False)), kernel


def test_numbers_of_an_update_are_combined_in_float64():
    grad = torch.tensor([0.3, -2.0, 1e-3])
    zeros = torch.zeros(3)
    with mk.backend("triton"):
        phi, m, v = mk.ops.adam_update([zeros], [grad], [zeros], [zeros], 0.1, step=1, betas=(0.9, 0.999))
    exact = grad.double()
    torch.testing.assert_close(v[0].double(), 0.001 * exact**2, rtol=3e-7, atol=0)  # 1 - 0.999 in float32: 5e-5
    torch.testing.assert_close(m[0].double(), 0.1 * exact, rtol=3e-7, atol=0)
    torch.testing.assert_close(phi[0].double(), -0.1 * exact.sign(), rtol=1e-4, atol=0)  # eps is not 0


TABLES = (2**47 + 1, 0, 16), (0.999, 1e-30), (1,), (1.0,)


def all_tables(sizes: tuple[int, ...]) -> list[torch.Tensor]:
    cpu = torch.device("cpu")
    return [*tables.blocks(sizes, 8, cpu), *(tables.table(values, cpu) for values in TABLES)]


@pytest.mark.parametrize("sizes", [(5,), (40, 0, 7, 16), (0, 3), (8, 8, 1)], ids=str)
@pytest.mark.parametrize("kept", [False, True], ids=["by-kernels", "after-it"])
def test_tables_made_in_a_cuda_graph_are_those_of_an_ordinary_call(monkeypatch, sizes, kept):
    ordinary = all_tables(sizes)
    monkeypatch.setattr(tables, "in_cuda_graph", lambda device: True)
    of_graph = tables.Kept(torch.device("cpu"))
    with of_graph if kept else nullcontext():
        in_graph = all_tables(sizes)
        for a in in_graph if kept else ():
            a.zero_()
        assert all(a is b for a, b in zip(in_graph, all_tables(sizes), strict=True)) == kept
    of_graph.fill()
    assert not tables.Kept.recording
    for a, b in zip(ordinary, in_graph, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_table_of_integers_is_not_taken_for_one_of_equal_numbers() -> None:
    with mk.backend("triton"):  # the table of the sizes, (1,), equals that of the rate, (1.0,)
        for rate in (2.0, 1.0):
            (phi,) = mk.ops.sgd_update([torch.ones(1)], [torch.ones(1)], rate)
            assert phi.item() == 1 - rate


def test_sums_over_coordinates_in_parts_are_those_in_one(monkeypatch):
    module = import_module("metakern.ops.metalstm_update")
    a, b = torch.randn(2, 3, 18, dtype=torch.float64), torch.randn(2, 5, 18, dtype=torch.float64)
    for part in (4, 9, 18, 100):
        monkeypatch.setattr(module, "PART", part)
        torch.testing.assert_close(module.summed(a, b), a @ b.mT)
