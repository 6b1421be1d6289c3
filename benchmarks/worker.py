"""Run one method: print a line of JSON when it is warm, then the seconds of one call for each line of input.

    python -m benchmarks.worker PEER METHOD PROBLEM.npz TINY.npz THREADS

The memory of the idle process is taken after the method has run on a tiny instance of the workload, because what a
library loads at its first use (torch.func and XLA load a lot) is not the memory of a meta-gradient. Nothing here needs
PyTorch, which is absent from JAX's environment.
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

SAMPLE = 0.2  # seconds; a faster call is repeated, and its mean is taken


def resident(field: str) -> int:
    """Return kilobytes from /proc/self/status: VmRSS is the present memory, VmHWM its peak."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if field in line)


def settle() -> None:
    """Give free memory back to the system, and reset the peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def wanted(module: ModuleType, problem: Problem) -> Any:
    """Return the problem as a `Workload` of tensors if the peer has PyTorch, else as it is."""
    if not module.shares_torch:
        return problem
    from benchmarks.workloads import of

    return of(problem)


def main(peer: str, name: str, file: str, tiny: str, threads: str) -> None:
    answer, sys.stdout = sys.stdout, sys.stderr  # so that what libraries print stays out of the answers
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, the system ends this process
    # Every library uses the cores that the process may use; no variable or call works for all of them.
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
    calls = getattr(module, "calls_until_steady", {}).get(name, 1)
    start = time.perf_counter()
    step = method(work)
    for _ in range(max(1, calls - 1)):
        gradient = step()
    first = time.perf_counter() - start
    compared = gradient is not None and problem.truth
    error = problem.error(gradient, peers.order(name)) if compared else None
    cosine = problem.cosine(gradient, peers.order(name)) if compared else None
    del gradient
    settle()
    kept = resident("VmRSS")
    start = time.perf_counter()
    step()  # a captured program is checked here
    if calls > 1:
        first += time.perf_counter() - start
    start = time.perf_counter()
    step()
    repeats = max(1, math.ceil(SAMPLE / (time.perf_counter() - start)))
    peak = resident("VmHWM")
    memory = {"peak_mib": (peak - idle) / 1024, "kept_mib": (kept - idle) / 1024}
    hello = {"error": error, "cosine": cosine, "first_s": first, **memory}
    print(json.dumps(hello), file=answer, flush=True)
    for _ in sys.stdin:
        if repeats > 1:  # fills the caches again, which other processes have used
            step()
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        print(json.dumps((time.perf_counter() - start) / repeats), file=answer, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
