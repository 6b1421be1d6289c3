"""Time and peak memory of one exact second-order meta-gradient: metakern against plain PyTorch.

    python -m benchmarks.maml [--workloads mlp,lstm,gpt] [--rounds 9] [--threads 2]

Every method runs in a process of its own on the same weights and data. Its meta-gradient must agree with plain autograd
in float64 to 1e-4 before it is timed. Rounds are interleaved; what counts is the ratio within a round. Memory is the
peak resident size of one meta-gradient over that of the idle process with model and data loaded. Results go to
benchmarks/results/maml.json with the machine, versions and commit.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import metakern as mk
from benchmarks.workloads import WORKLOADS, Workload, make

RESULTS = Path(__file__).parent / "results" / "maml.json"
Method = Callable[[Workload], Callable[[], None]]


def plain(work: Workload) -> Callable[[], None]:
    """Ordinary autograd, a task at a time; attention in its twice differentiable form."""
    parameters = dict(work.model.named_parameters())

    class Functional:
        def __init__(self, phi: dict[str, Tensor]) -> None:
            self.phi = phi

        def __call__(self, *args: Tensor) -> Tensor:
            return functional_call(work.model, self.phi, args)

    def step() -> None:
        tasks = len(work.support[0])
        for t in range(tasks):
            support, query = (tuple(a[t] for a in batch) for batch in (work.support, work.query))
            phi = parameters
            with sdpa_kernel(SDPBackend.MATH):
                for _ in range(work.steps):
                    loss = work.loss(Functional(phi), support)
                    grads = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
                    phi = {name: p - work.lr * g for (name, p), g in zip(phi.items(), grads, strict=True)}
                (work.loss(Functional(phi), query) / tasks).backward()

    return step


def metakern(**options: str) -> Method:
    def method(work: Workload) -> Callable[[], None]:
        maml = mk.MAML(work.model, work.loss, inner=mk.optim.SGD(lr=work.lr), steps=work.steps, **options)
        return lambda: maml(work.support, work.query).backward()

    return method


METHODS: dict[str, Method] = {
    "plain PyTorch": plain,
    "metakern store": metakern(strategy="store"),
    "metakern recompute": metakern(strategy="recompute"),
    "metakern auto": metakern(),
}


def gradient(method: Method, work: Workload) -> list[Tensor]:
    work.model.zero_grad()
    method(work)()
    return [p.grad.double() for p in work.model.parameters()]


def error(method: Method, work: Workload) -> float:
    """The relative error of the meta-gradient against plain autograd in float64."""
    exact = copy.deepcopy(work)
    exact.model.double()
    wide = Workload(
        exact.model,
        work.loss,
        *(tuple(a.double() if a.is_floating_point() else a for a in b) for b in (work.support, work.query)),
        work.steps,
        work.lr,
    )
    truth, found = gradient(plain, wide), gradient(method, work)
    distance = sum((a - b).square().sum() for a, b in zip(found, truth, strict=True))
    return (distance / sum(b.square().sum() for b in truth)).sqrt().item()


def resident(field: str) -> int:
    """Kilobytes from /proc/self/status: VmRSS now, VmHWM at its peak."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if field in line)


def worker(method: str, workload: str, threads: int, steps: int | None) -> None:
    """Answers each line on standard input with the seconds of one meta-gradient."""
    torch.set_num_threads(threads)
    work = make(workload)
    work = work if steps is None else replace(work, steps=steps)
    torch.ones(512, 512) @ torch.ones(512, 512)  # the library's own buffers belong to the idle process
    idle = resident("VmRSS")
    step = METHODS[method](work)
    first = time.perf_counter()
    step()
    first = time.perf_counter() - first
    work.model.zero_grad()
    ctypes.CDLL(None).malloc_trim(0)  # what the first call (planning, loading) left behind is not this step's
    Path("/proc/self/clear_refs").write_text("5")
    step()
    print(json.dumps({"first_s": first, "peak_mib": (resident("VmHWM") - idle) / 1024}), flush=True)
    for _ in sys.stdin:
        work.model.zero_grad()
        start = time.perf_counter()
        step()
        print(json.dumps(time.perf_counter() - start), flush=True)


def start(method: str, workload: str, threads: int, *more: str) -> tuple[subprocess.Popen, dict[str, float]]:
    """A worker, warm, and what it says of its first call and its memory."""
    command = [sys.executable, "-m", "benchmarks.maml", "--threads", str(threads), *more, "--worker", method, workload]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, json.loads(process.stdout.readline())


def memory_over_steps(workload: str, threads: int) -> dict[str, dict[int, float]]:
    """Peak memory in MiB over the idle process, for K = 1, 4, 16 inner steps."""
    peaks: dict[str, dict[int, float]] = {}
    for method in ("plain PyTorch", "metakern store", "metakern recompute"):
        for steps in (1, 4, 16):
            process, ready = start(method, workload, threads, "--steps", str(steps))
            process.stdin.close()
            process.wait()
            peaks.setdefault(method, {})[steps] = ready["peak_mib"]
    return peaks


def measure(workload: str, rounds: int, threads: int) -> dict:
    errors = {name: error(method, make(workload)) for name, method in METHODS.items()}
    right = [name for name in METHODS if errors[name] <= 1e-4]
    started = {name: start(name, workload, threads) for name in right}
    processes = {name: process for name, (process, _) in started.items()}
    seconds: dict[str, list[float]] = {name: [] for name in right}
    for i in range(rounds):
        for name, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            seconds[name].append(json.loads(process.stdout.readline()))
        print(f"\r{workload}: round {i + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    base = seconds["plain PyTorch"]
    return {
        name: {
            "error": errors[name],
            "median_ms": statistics.median(times) * 1e3,
            "min_ms": min(times) * 1e3,
            "max_ms": max(times) * 1e3,
            "speedup": statistics.median(b / t for b, t in zip(base, times, strict=True)),
            **started[name][1],
        }
        for name, times in seconds.items()
    }


def machine() -> dict[str, str | int]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "metakern": mk.__version__,
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="comma-separated: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes (default: %(default)s)")
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=2, metavar=("METHOD", "WORKLOAD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker, args.threads, args.steps)
        return
    results, over_steps = {}, {}
    for name in args.workloads.split(","):
        if name not in WORKLOADS:
            parser.error(f"workloads must be among {', '.join(WORKLOADS)}, got {name!r}")
        results[name] = measure(name, args.rounds, args.threads)
        over_steps[name] = memory_over_steps(name, args.threads)
        print(f"\n{name}: {WORKLOADS[name].__doc__}")
        for method, row in results[name].items():
            spread = f"{row['min_ms']:.0f}-{row['max_ms']:.0f}"
            time_, gain, memory = row["median_ms"], row["speedup"], row["peak_mib"]
            print(f"  {method:20} {time_:7.0f} ms ({spread:>11})  {gain:5.2f} x  {memory:6.0f} MiB")
    args.out.write_text(
        json.dumps(
            {"machine": machine(), "threads": args.threads, "results": results, "memory_mib": over_steps}, indent=1
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
