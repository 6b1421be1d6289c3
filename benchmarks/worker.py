"""One method in a process of its own: a line of JSON once it is warm, then the seconds of one call for each line read.

    python -m benchmarks.worker PEER METHOD PROBLEM.npz TINY.npz THREADS

Before memory is called idle, the method has run on a tiny instance of the same workload: what a library loads at its
first use, and torch.func and XLA load a lot, is no one's working memory. Nothing here needs PyTorch: JAX's has none.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import peers
from benchmarks.problem import Problem

SAMPLE = 0.2  # seconds: a faster call is repeated, and the mean counts


def resident(field: str) -> int:
    """Kilobytes from /proc/self/status: VmRSS now, VmHWM at its peak."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if field in line)


def settle() -> None:
    """Gives back what is free, and has the peak of memory count from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def wanted(module: ModuleType, problem: Problem) -> Any:
    """The problem in the form that the peer asks for."""
    if not module.shares_torch:
        return problem
    from benchmarks.workloads import of

    return of(problem)


def main(peer: str, name: str, file: str, tiny: str, threads: str) -> None:
    answer, sys.stdout = sys.stdout, sys.stderr  # libraries may talk
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, it is this process that ends
    # Every library takes what the process may use; a variable or a call that all of them know does not exist.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
    module = peers.load(peer)
    method = module.methods[name]
    if module.shares_torch:
        import torch

        torch.set_num_threads(int(threads))
    method(wanted(module, Problem.load(Path(tiny))))()
    problem = Problem.load(Path(file))
    work = wanted(module, problem)
    settle()
    idle = resident("VmRSS")
    start = time.perf_counter()
    step = method(work)
    gradient = step()
    first = time.perf_counter() - start
    error = problem.error(gradient, peers.order(name)) if gradient is not None and problem.truth else None
    del gradient
    settle()
    kept = resident("VmRSS")
    step()  # a captured one is checked here
    start = time.perf_counter()
    step()
    repeats = max(1, math.ceil(SAMPLE / (time.perf_counter() - start)))
    peak = resident("VmHWM")
    hello = {"error": error, "first_s": first, "peak_mib": (peak - idle) / 1024, "kept_mib": (kept - idle) / 1024}
    print(json.dumps(hello), file=answer, flush=True)
    for _ in sys.stdin:
        if repeats > 1:  # what the processes in between took from the caches is no part of a short call
            step()
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        print(json.dumps((time.perf_counter() - start) / repeats), file=answer, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
