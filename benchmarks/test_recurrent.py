"""The rules of the recurrent cells under pytest-benchmark: `pytest benchmarks/test_recurrent.py`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.recurrent import CELLS, QUICK, Problem
from metakern import _native


@pytest.mark.skipif(_native.obstacle() is not None, reason="times the C++ kernels")
@pytest.mark.parametrize("rule", ["forward", "jvp", "vjp", "vjp_jvp"])
@pytest.mark.parametrize("size", QUICK, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("cell", CELLS)
def test_rule(benchmark: Any, cell: str, size: tuple[int, int, int, int], rule: str) -> None:
    benchmark.group = f"{cell} {'x'.join(map(str, size))}"
    benchmark(getattr(Problem(cell, *size), rule))
