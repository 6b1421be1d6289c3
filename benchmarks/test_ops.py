"""Time every rule of every op on every backend of the CPU by pytest-benchmark, which saves and compares runs.

    pytest benchmarks/test_ops.py -k "lstm and cpu" --benchmark-autosave
    pytest benchmarks/test_ops.py -k "lstm and cpu" --benchmark-compare

`extra_info` has GB/s and GFLOP/s, by the counts of the op's SPEC. The tests of metakern do not collect this file.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.calls import ORDERS, recorded
from benchmarks.ops import available, draw, has_kernels, names
from metakern.ops import SPECS

BACKENDS = [name for name, why in available("cpu").items() if not why]
CASES = [
    (op, sample, rule, backend)
    for op in SPECS
    for sample in names(op)
    for rule in ORDERS
    for backend in BACKENDS
    if has_kernels(op, backend, torch.float32)
]


@pytest.mark.parametrize(("op", "sample", "rule", "backend"), CASES, ids=["-".join(case) for case in CASES])
def test_rule(benchmark: Any, op: str, sample: str, rule: str, backend: str) -> None:
    drawn = draw(op, sample, torch.float32)
    benchmark.group = f"{op} {sample} {rule}"
    benchmark(recorded(op, drawn, backend)[rule])
    if benchmark.stats is not None:
        cost, seconds = SPECS[op].cost(drawn, ORDERS[rule]), benchmark.stats.stats.median
        benchmark.extra_info["gb_per_s"] = cost.bytes / seconds / 1e9
        benchmark.extra_info["gflop_per_s"] = cost.flop / seconds / 1e9
