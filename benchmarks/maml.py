"""Time and peak memory of one exact second-order meta-gradient: metakern against its peers and the machine's limit.

    python -m benchmarks.maml [--workloads mlp,lstm] [--methods metakern,jax] [--rounds 9] [--threads 2] [--quick]

Every method runs in a process of its own, in an environment that the first run makes under ~/.cache/metakern, on the
same weights and data. Its meta-gradient must agree with plain autograd in float64 to 1e-4, or it is not timed. It is
compiled and warm before the first of the rounds, which interleave the methods; what counts are ratios within a round.
Memory is the peak of one meta-gradient over the idle process with libraries, model and data loaded; "kept" is what
stays between two of them (gradients, plans, compiled code). The limit is the counted FLOP of the products at the rate
of a large product, measured in the same rounds. Each finished workload goes to benchmarks/results/maml.json at once, so
that a run can be interrupted and go on with the others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks import peers
from benchmarks.peers.plain import plain
from benchmarks.peers.products import FLOP
from benchmarks.results import machine
from benchmarks.workloads import WORKLOADS, Workload, make

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "maml.json"
TOLERANCE = 1e-4
PLAIN, AUTO, PRODUCTS = "plain PyTorch", "metakern auto", "products"


class RefusedError(Exception):
    """A method that can't be timed; its message says why."""


@cache
def attempt(peer: str) -> Path | str:
    """A peer's interpreter, or why there is none: it is tried once."""
    try:
        return peers.environment(peer)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return f"not installed: {error}"


def installed(peer: str) -> Path:
    if isinstance(found := attempt(peer), str):
        raise RefusedError(found)
    return found


class Runner:
    """A worker: warm, with what it said of its first call, memory and error; `sample()` is the seconds of one call."""

    def __init__(self, peer: str, method: str, problem: Path, tiny: Path, threads: int, limit: float) -> None:
        python = installed(peer)
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the process
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", peer, method, problem, tiny, str(threads)],
            cwd=ROOT,
            # A compiler's cache on disk would hide what compiling costs.
            env=os.environ
            | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
            | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        start = time.monotonic()
        late = threading.Timer(limit, self._process.kill)
        late.start()
        try:
            self.ready: dict[str, float] = self._answer()
            if self.ready["error"] is not None and not self.ready["error"] <= TOLERANCE:
                raise RefusedError(f"wrong by {self.ready['error']:.0e}")
        except BaseException as error:
            self.close()
            if isinstance(error, RefusedError) and time.monotonic() - start >= limit:
                raise RefusedError(f"not ready after {limit:.0f} s") from None
            raise
        finally:
            late.cancel()

    def _answer(self) -> Any:
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        said = [text.strip() for text in self._errors if text.strip()]
        # An exception's own line, where there is one; what follows it is advice.
        found = [text for text in said if text.partition(":")[0].rpartition(".")[2].endswith(("Error", "Exception"))]
        raise RefusedError((found or said or [f"ended with {self._process.returncode}"])[-1])

    def sample(self) -> float:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


@contextmanager
def progress() -> Iterator[Any]:
    """A function that shows a line in place of the last one."""
    shown = sys.stderr.isatty()
    yield lambda line: print(
        f"\r\x1b[K{line}" if shown else line, end="" if shown else "\n", file=sys.stderr, flush=True
    )
    if shown:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def exact(work: Workload) -> dict[str, torch.Tensor]:
    return plain(work.double())()


def measure(name: str, methods: dict[str, str], args: argparse.Namespace, say: Any) -> dict[str, Any]:
    """Everything about one workload, as it goes into the results."""
    work = make(name, args.tiny)
    runners: dict[str, Runner] = {}
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        problem, tiny = Path(folder) / "problem.npz", Path(folder) / "tiny.npz"
        say(f"{name}: the exact meta-gradient in float64")
        work.problem(name, args.tiny, exact(work)).save(problem)
        replace(make(name, tiny=True), steps=1).problem(name, tiny=True).save(tiny)  # one step: it is compiled too
        try:
            runners[PRODUCTS] = Runner("products", PRODUCTS, problem, tiny, args.threads, args.limit)
            for method, peer in methods.items():
                say(f"{name}: {method} gets ready")
                try:
                    runners[method] = Runner(peer, method, problem, tiny, args.threads, args.limit)
                except RefusedError as reason:
                    refused[method] = str(reason)
            seconds = rounds(runners, args.rounds, lambda i: say(f"{name}: round {i + 1} of {args.rounds}"))
            ready = {method: runner.ready for method, runner in runners.items()}
        finally:
            for runner in runners.values():
                runner.close()
        over_steps = {} if args.quick else memory_over_steps(work, name, methods, args, Path(folder), say)
    return {
        "machine": machine(),
        "threads": args.threads,
        "rounds": args.rounds,
        **summary(seconds, ready, methods, work.flop()),
        "refused": refused,
        "memory_mib": over_steps,
    }


def rounds(runners: dict[str, Runner], count: int, say: Any) -> dict[str, list[float]]:
    """Seconds by method and round; the order within a round is a new one each time, the same in every run."""
    order, shuffle = list(runners), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {method: [] for method in order}
    for i in range(count):
        say(i)
        shuffle(order)
        for method in order:
            seconds[method].append(runners[method].sample())
    return seconds


def summary(
    seconds: dict[str, list[float]], ready: dict[str, dict[str, float]], methods: dict[str, str], flop: float
) -> dict[str, Any]:
    """Medians and spreads; ratios are medians of ratios within a round."""

    def ratio(above: list[float], below: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(above, below, strict=True))

    products = seconds[PRODUCTS]
    limit = [flop * t / FLOP for t in products]
    rows = {}
    for method in methods:
        if method not in seconds:
            continue
        times = seconds[method]
        rows[method] = {
            "peer": methods[method],
            **ready[method],
            "median_ms": statistics.median(times) * 1e3,
            "min_ms": min(times) * 1e3,
            "max_ms": max(times) * 1e3,
            "of_limit": ratio(limit, times),
        }
        if PLAIN in seconds:
            rows[method]["speedup"] = ratio(seconds[PLAIN], times)
        if AUTO in seconds:
            rows[method]["over_auto"] = ratio(times, seconds[AUTO])
    return {
        "gflop": flop / 1e9,
        "gflop_per_s": FLOP / statistics.median(products) / 1e9,
        "limit_ms": statistics.median(limit) * 1e3,
        "methods": rows,
    }


def memory_over_steps(
    work: Workload, name: str, methods: dict[str, str], args: argparse.Namespace, folder: Path, say: Any
) -> dict[str, dict[int, float]]:
    """Peak memory in MiB over the idle process, for K = 1, 4, 16 inner steps."""
    peaks: dict[str, dict[int, float]] = {}
    tiny, file = folder / "tiny.npz", folder / "steps.npz"
    for steps in (1, 4, 16):
        replace(work, steps=steps).problem(name, args.tiny).save(file)
        for method in (PLAIN, "metakern store", "metakern recompute"):
            if method in methods:
                say(f"{name}: memory of {method} at K = {steps}")
                runner = Runner(methods[method], method, file, tiny, args.threads, args.limit)
                runner.close()
                peaks.setdefault(method, {})[steps] = runner.ready["peak_mib"]
    return peaks


def chosen(wanted: str) -> dict[str, str]:
    """Peers by method, where the method's name or its peer's holds one of the comma-separated words."""
    known = {method: peer for peer in peers.PEERS for method in peers.load(peer).methods}
    words = [word.strip().lower() for word in wanted.split(",")]
    for word in words:
        if not any(word in f"{method} {peer}".lower() for method, peer in known.items()):
            raise ValueError(f"methods must be among {'; '.join(known)}, got {word!r}")
    return {m: peer for m, peer in known.items() if any(word in f"{m} {peer}".lower() for word in words)}


def show(name: str, found: dict[str, Any]) -> None:
    limit, rate = found["limit_ms"], found["gflop_per_s"]
    print(f"\n{name}: {found['gflop']:.2f} GFLOP of products, {limit:.1f} ms at {rate:.0f} GFLOP/s")
    print(
        f"  {'':64}{'ms (min-max)':>22}{'of limit':>10}{'/ auto':>8}{'MiB':>7}{'kept':>7}{'first, s':>10}{'error':>9}"
    )
    for method, row in sorted(found["methods"].items(), key=lambda item: item[1]["median_ms"]):
        spread = f"{row['median_ms']:.1f} ({row['min_ms']:.1f}-{row['max_ms']:.1f})"
        auto = f"{row['over_auto']:.2f}" if "over_auto" in row else ""
        print(f"  {method:64}{spread:>22}{row['of_limit']:>10.0%}{auto:>8}", end="")
        print(f"{row['peak_mib']:>7.0f}{row['kept_mib']:>7.0f}{row['first_s']:>10.1f}{row['error']:>9.0e}")
    for method, reason in found["refused"].items():
        print(f"  {method}: not timed: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", help=f"comma-separated (default: {','.join(WORKLOADS)})")
    parser.add_argument("--methods", help="comma-separated words that names hold, e.g. jax,metakern (default: all)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default: 9)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (default: %(default)s)")
    parser.add_argument(
        "--limit", type=float, default=600, help="seconds until a method is warm (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help=f"where the JSON goes (default: {RESULTS.relative_to(ROOT)})")
    parser.add_argument("--quick", action="store_true", help="mlp and lstm, plain and metakern, 3 rounds; printed only")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rounds = args.rounds or (3 if args.quick else 9)
    names = (args.workloads or ("mlp,lstm" if args.quick else ",".join(WORKLOADS))).split(",")
    if unknown := [name for name in names if name not in WORKLOADS]:
        parser.error(f"workloads must be among {', '.join(WORKLOADS)}, got {unknown[0]!r}")
    try:
        methods = chosen(args.methods or ("plain,metakern" if args.quick else ""))
    except ValueError as error:
        parser.error(str(error))
    out = args.out or (None if args.quick or args.tiny else RESULTS)
    results = json.loads(out.read_text()) if out and out.exists() else {}
    try:
        for name in names:
            with progress() as say:
                results[name] = measure(name, methods, args, say)
            show(name, results[name])
            if out:
                out.write_text(json.dumps(results, indent=1) + "\n")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
