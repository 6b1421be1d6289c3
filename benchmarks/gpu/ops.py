"""Time every rule of every op but attention, beside the limits of the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.calls import ORDERS, recorded
from benchmarks.gpu.checks import DTYPES
from benchmarks.gpu.measure import milliseconds
from benchmarks.gpu.pool import Job, Row
from benchmarks.gpu.problems import OPS, Random, cast, enlarged, samples
from metakern.ops import SPECS

BYTES = 1 << 28  # size of the arguments: several times that of the caches


def times(op: str, name: str, dtype: str, limits: Row, tiny: bool) -> Row:
    """Return each rule's milliseconds, and its GB/s and FLOP/s as shares of the limits."""
    kind = getattr(torch, dtype)
    sample = cast(samples(op, tiny)[name](Random(kind, seed=1)), kind)
    sample = enlarged(sample, 0 if tiny else BYTES)
    rows: Row = {}
    for rule, call in recorded(op, sample, "triton").items():
        ms, cost = milliseconds(call), SPECS[op].cost(sample, ORDERS[rule])
        rows[rule] = {
            "ms": ms,
            "of_copy": cost.bytes / ms / 1e6 / limits["copy_gb_per_s"],
            "of_product": cost.flop / ms / 1e9 / limits["bf16_tflop_per_s"],
        }
    return rows


def jobs(limits: Row, tiny: bool) -> Iterator[Job]:
    for dtype in DTYPES if not tiny else ("float32",):
        for op in OPS:
            for name in list(samples(op, tiny))[: 2 if tiny else None] if op != "attention" else ():
                yield Job({"op": op, "sample": name, "dtype": dtype}, partial(times, op, name, dtype, limits, tiny))
