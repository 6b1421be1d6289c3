"""Measure times, peak memory, and the two limits of a GPU: a copy's bandwidth and the rate of a matrix product."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.pool import Row
from benchmarks.gpu.problems import device


def milliseconds(f: Callable[[], Any], calls: int = 4, replays: int = 15) -> float:
    """Return the time of a call: the median over replays of a CUDA graph that holds several calls."""
    if not torch.cuda.is_available():
        return eager_milliseconds(f, 1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            f()
    graph.replay()
    return statistics.median(_events(graph.replay, replays)) / calls


def eager_milliseconds(f: Callable[[], Any], calls: int = 7, warm_up: int = 2) -> float:
    """Return the median time of a call without a CUDA graph."""
    for _ in range(warm_up):
        f()
    return statistics.median((_events if torch.cuda.is_available() else _seconds)(f, calls))


def _events(f: Callable[[], Any], calls: int) -> Iterator[float]:
    for _ in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        end.synchronize()
        yield start.elapsed_time(end)


def _seconds(f: Callable[[], Any], calls: int) -> Iterator[float]:
    for _ in range(calls):
        start = time.perf_counter()
        f()
        yield 1e3 * (time.perf_counter() - start)


def peak_mib(f: Callable[[], Any]) -> float:
    """Return the peak memory of a call beyond what was allocated before; 0 without a GPU."""
    if not torch.cuda.is_available():
        f()
        return 0.0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    f()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def limits(tiny: bool) -> Row:
    """Return the GB/s of a copy (reads and writes count) and the TFLOP/s of a bfloat16 product of random matrices."""
    size, square = (1 << 10, 16) if tiny else (1 << 30, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=device()).random_()
    target = torch.empty_like(source)
    a, b = torch.randn(2, square, square, device=device(), dtype=torch.bfloat16)
    copy, product = milliseconds(lambda: target.copy_(source)), milliseconds(lambda: a @ b)
    return {"copy_gb_per_s": 2 * size / copy / 1e6, "bf16_tflop_per_s": 2 * square**3 / product / 1e9}
