"""Time one exact second-order meta-gradient, and measure its peak memory: metakern, its peers, the machine's peak.

    python -m benchmarks.maml [--workloads gpt:medium,lstm] [--methods metakern,jax] [--rounds 9] [--threads 2]
    python -m benchmarks.maml --quick                    takes two minutes, and only prints
    python -m benchmarks.maml --sweep K,length [--workloads gpt;llama-lora]
    python -m benchmarks.maml --cores 1                  as on a machine with one core
    python -m benchmarks.maml --against REV              metakern beside another commit of it; only prints

Every method runs in a process of its own, in an environment that the first run makes under ~/.cache/metakern, on the
same weights and data. A method is timed only if its meta-gradient agrees with one in float64 to 1e-4; of one in
bfloat16, the error and the cosine are reported instead. It is compiled and warm before the rounds begin. Each round
runs every method once, and ratios are taken within a round. Memory is the peak of one meta-gradient, less the memory of
the idle process with libraries, model and data loaded; "kept" is what stays between two meta-gradients (gradients,
plans, compiled code). The peak is the rate of multiply-adds in registers, on all threads; "of peak" is the counted FLOP
of the workload's matrix products over the time and the peak. The peak and the rate of a large torch.mm are measured in
the same rounds, and the best round gives the peak. First-order methods are separate rows, checked against the first-
order gradient.

Each finished workload goes to the machine's file in benchmarks/results at once: to its part "maml", or in a sweep to
"sweep". A run can be interrupted and started again; it skips what the same code and versions have measured. A run with
`--cores` has another file, as it stands for another machine. A run with `--methods` only prints, unless `--out` names a
file.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import against, peers, results
from benchmarks.options import Parser, kept, positive, seconds
from benchmarks.peers.products import FLOP, PEAKS, PRODUCTS
from benchmarks.progress import Progress
from benchmarks.recurrent import quartiles
from benchmarks.results import ROOT
from benchmarks.runner import LATE, RefusedError, Runner
from benchmarks.tables import is_exact
from benchmarks.truth import with_truth
from benchmarks.workloads import Workload, WorkloadName, families, family, make

PLAIN, DEFAULT, AUTO, FIRST = "plain PyTorch", "metakern default", "metakern auto", "metakern, first order"
JAX = "JAX, task loop, forward over reverse"  # JAX's method in a sweep of a workload that was not measured itself
QUICK = "mlp:small;gru:small;gpt:small"
MORE = "gpt:medium,length=1024,tasks=1;gpt:medium,length=2048,tasks=1;gpt:medium,tasks=64;lstm:medium,tasks=64"
OTHER = " @ "  # in a method's name, stands before the commit whose metakern it runs
ROUNDS = 9


def measure(
    spec: WorkloadName, methods: dict[str, str], args: argparse.Namespace, progress: Progress
) -> dict[str, Any]:
    """Measure one workload; return its entry in the results, or raise RuntimeError with the reason."""
    work = make(spec.name)
    seconds, ready, refused = timed(spec, work, methods, args, progress)
    return {**conditions(args), **summary(seconds, ready, methods, work), "refused": refused}


def steps(methods: dict[str, str], args: argparse.Namespace) -> int:
    """Return how many steps of progress the methods and the machine's rates take: getting ready, and each round."""
    return (len(methods) + 1 + len(PEAKS)) * (1 + args.rounds)


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    return {"machine": results.machine(), "threads": args.threads, "rounds": args.rounds, "limit_s": args.limit}


def timed(
    spec: WorkloadName, work: Workload, methods: dict[str, str], args: argparse.Namespace, progress: Progress
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]], dict[str, str]]:
    """Time all methods, and what gives the machine's rates.

    Returns seconds by method and round; the first call, memory and error of each method; the reasons of methods that
    were not timed.
    """
    runners: dict[str, Runner] = {}
    refused: dict[str, str] = {}
    rates = dict.fromkeys((PRODUCTS, *PEAKS.values()), "products")
    with tempfile.TemporaryDirectory() as folder:
        problem, tiny = Path(folder) / "problem.npz", Path(folder) / "tiny.npz"
        progress.say(f"{spec.name}: the meta-gradient in float64")
        with_truth(work.problem(spec.name)).save(problem)
        small = WorkloadName(spec.family, "tiny", {"K": 1}).name  # one inner step, which is quick to compile
        make(small).problem(small).save(tiny)
        try:
            for method, peer in (methods | rates).items():
                progress.say(f"{spec.name}: {method} gets ready")
                name, _, rev = method.partition(OTHER)
                folder = args.folder if rev else ROOT
                try:
                    runners[method] = Runner(peer, name, problem, tiny, args.threads, args.limit, folder)
                except RefusedError as reason:
                    refused[method] = str(reason)
                    progress.skip(args.rounds)
            if PRODUCTS in refused:
                raise RuntimeError(f"the rate of products: {refused[PRODUCTS]}")
            seconds = rounds(spec.name, runners, args.rounds, refused, progress)
            refused = {method: reason for method, reason in refused.items() if method not in rates}
            return seconds, {method: runners[method].ready for method in seconds}, refused
        finally:
            for runner in runners.values():
                runner.close()


def rounds(
    name: str, runners: dict[str, Runner], count: int, refused: dict[str, str], progress: Progress
) -> dict[str, list[float]]:
    """Return seconds by method and round. Each round has another order of the methods, the same in every run.

    A method that fails in a round is moved to `refused`.
    """
    order, shuffle = list(runners), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {method: [] for method in order}
    for i in range(count):
        shuffle(order)
        for method in list(order):
            progress.say(f"{name}: round {i + 1} of {count}, {method}")
            try:
                seconds[method].append(runners[method].sample())
            except RefusedError as reason:
                refused[method] = f"{reason}, in round {i + 1}"
                order.remove(method)
                del seconds[method]
                progress.skip(count - i - 1)
    return seconds


def summary(
    seconds: dict[str, list[float]], ready: dict[str, dict[str, float]], methods: dict[str, str], work: Workload
) -> dict[str, Any]:
    """Return medians, spreads and ratios; a ratio is the median of the ratios within a round."""

    def ratio(above: list[float], below: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(above, below, strict=True))

    flop = {order: work.flop(order) for order in (1, 2)}
    peaks = {dtype: FLOP / min(seconds[method]) / 1e9 for dtype, method in PEAKS.items() if method in seconds}
    rows = {}
    for method in methods:
        if method not in seconds:
            continue
        times, counted = seconds[method], flop[peers.order(method)]
        row = rows[method] = {
            "peer": methods[method],
            **ready[method],
            "median_ms": statistics.median(times) * 1e3,
            "min_ms": min(times) * 1e3,
            "max_ms": max(times) * 1e3,
            "gflop_per_s": counted / statistics.median(times) / 1e9,
        }
        if peak := peaks.get(peers.precision(method)):
            row["of_peak"] = row["gflop_per_s"] / peak
        if PLAIN in seconds:
            row["speedup"] = ratio(seconds[PLAIN], times)
        for ours, key in ((DEFAULT, "over_default"), (AUTO, "over_auto")):
            if ours in seconds:
                row[key] = ratio(times, seconds[ours])
        if FIRST in seconds and peers.order(method) == 2:
            row["over_first_order"] = ratio(times, seconds[FIRST])
        this = method.partition(OTHER)[0]
        if this != method and this in seconds:
            row["over_this"] = quartiles([a / b for a, b in zip(times, seconds[this], strict=True)])
    return {
        "gflop": flop[2] / 1e9,
        "gflop_per_s": FLOP / statistics.median(seconds[PRODUCTS]) / 1e9,
        "peak_gflop_per_s": peaks,
        "methods": rows,
    }


def chosen(wanted: str) -> dict[str, str]:
    """Return {method: peer} for methods whose name, or whose peer's name, contains one of the comma-separated words."""
    known = {method: peer for peer in peers.PEERS for method in peers.load(peer).methods}
    words = [word.strip().lower() for word in wanted.split(",")]
    for word in words:
        if not any(word in f"{method} {peer}".lower() for method, peer in known.items()):
            raise ValueError(f"methods must be among {'; '.join(known)}, got {word!r}")
    return {m: peer for m, peer in known.items() if any(word in f"{m} {peer}".lower() for word in words)}


def beside(methods: dict[str, str], rev: str) -> dict[str, str]:
    """Return the methods, with each exact method of metakern also as of commit `rev`."""
    ours = [method for method, peer in methods.items() if peer == "metakern" and is_exact(method)]
    return methods | {f"{method}{OTHER}{rev}": "metakern" for method in ours}


def of_sweep(spec: WorkloadName, found: dict[str, Any]) -> dict[str, str]:
    """Return a sweep's methods: metakern, plain PyTorch, and the JAX form that was fastest at the workload itself."""
    rows = found.get("maml", {}).get(spec.name, {}).get("methods", {})
    forms = {method: row["median_ms"] for method, row in rows.items() if row["peer"] == "jax"}
    jax = min(forms, key=lambda method: forms[method]) if forms else JAX
    return chosen("metakern") | {PLAIN: "plain", jax: "jax"}


def finished(entry: dict[str, Any] | None, methods: dict[str, str], args: argparse.Namespace) -> bool:
    """Whether the same code and versions have measured all these methods on this machine, in as many rounds.

    A method that was not ready in time is measured again if it is given more time.
    """
    if entry is None:
        return False

    def known(where: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in where.items() if key != "date"}

    here = results.machine()
    same = known(entry["machine"]) == known(here) and str(here["commit"])[-1:] not in ("", "+")
    enough = entry["threads"] == args.threads and entry["rounds"] >= args.rounds
    done = entry["methods"].keys() | entry["refused"].keys()
    if entry.get("limit_s", args.limit) < args.limit:
        done -= {method for method, reason in entry["refused"].items() if reason.startswith(LATE)}
    return same and enough and methods.keys() <= done


def parsed(text: str) -> list[WorkloadName]:
    """Parse workloads that are separated by ; or by a comma, unless key=value follows the comma."""
    names: list[str] = []
    for part in text.split(";"):
        for i, word in enumerate(part.split(",")):
            if i and "=" in word:
                names[-1] += f",{word}"
            else:
                names.append(word.strip())
    return [WorkloadName.parse(name) for name in names]


def swept(text: str, specs: Sequence[WorkloadName]) -> list[tuple[WorkloadName, WorkloadName]]:
    """Return (workload, the workload at one value of a key) for each value that its family sweeps."""
    keys = {key for name in families() for key in family(name)["sweep"]}
    for key in text.split(","):
        if key not in keys:
            raise ValueError(f"sweep must be of {', '.join(sorted(keys))}, got {key!r}")
    return [(spec, point) for spec in specs for key in text.split(",") for point in spec.sweep(key)]


def show(spec: WorkloadName, found: dict[str, Any]) -> None:
    peaks = ", ".join(f"{rate:.0f} in {dtype}" for dtype, rate in found["peak_gflop_per_s"].items()) or "not measured"
    print(f"\n{spec.name}: {spec.title}\n{found['gflop']:.2f} GFLOP of products")
    print(f"peak GFLOP/s: {peaks}; torch.mm: {found['gflop_per_s']:.0f}")
    print(f"{'':52}{'ms (min-max)':>22}{'GFLOP/s':>9}{'peak':>7}{'/auto':>7}{'MiB':>7}{'first, s':>9}{'error':>8}")
    for method, row in sorted(found["methods"].items(), key=lambda item: item[1]["median_ms"]):
        spread = f"{row['median_ms']:.1f} ({row['min_ms']:.1f}-{row['max_ms']:.1f})"
        auto = f"{row['over_auto']:.2f}" if "over_auto" in row else ""
        peak = f"{row['of_peak']:.0%}" if "of_peak" in row else "-"
        print(f"{method:52}{spread:>22}{row['gflop_per_s']:>9.1f}{peak:>7}{auto:>7}", end="")
        print(f"{row['peak_mib']:>7.0f}{row['first_s']:>9.1f}{row['error']:>8.0e}")
    for method, row in found["methods"].items():
        if "over_this" in row:
            middle, low, high = row["over_this"]
            print(f"{method} / this: {middle:.3f} ({low:.3f}-{high:.3f})")
    for method, reason in found["refused"].items():
        print(f"{method}: not timed: {reason}")


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    every = [f"{name}:{size}" for size in ("small", "medium", "large") for name in families()] + [MORE]
    parser = Parser(
        prog=prog,
        description=(__doc__ or "").splitlines()[0],
        epilog=f"A workload is family[:size][,key=value...]; families: {', '.join(families())}; sizes: small, medium "
        "(the default), large; keys: those of the family's file in benchmarks/workloads. For example "
        "gpt:large or gpt,length=1024,tasks=1.",
    )
    parser.add_argument(
        "--workloads",
        help="separated by , or ; (default: every family in every size, and some with changes; see below)",
    )
    parser.add_argument("--methods", help="comma-separated words in their names, e.g. jax,metakern (default: all)")
    parser.add_argument(
        "--sweep", help="comma-separated keys: run each workload at all values that its family has for a key"
    )
    parser.add_argument("--rounds", type=positive, help=f"interleaved rounds (default: {ROUNDS}; 7 with --quick)")
    parser.add_argument("--threads", type=positive, help="threads of each process (default: 2, or 1 on a single core)")
    parser.add_argument("--cores", type=positive, help="run on so many of the machine's cores (default: all)")
    parser.add_argument(
        "--limit", type=seconds, default=1800, help="seconds that a method may take to get ready (default: %(default)s)"
    )
    parser.add_argument("--against", metavar="REV", help="also time metakern as of another commit; only prints")
    parser.add_argument("--again", action="store_true", help="repeat workloads that are measured")
    parser.add_argument(
        "--out", type=kept, help="file for the results (default: the machine's file in benchmarks/results)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="plain PyTorch and metakern on small workloads; only prints"
    )
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (7 if args.quick else ROUNDS)
    if args.cores:
        if args.cores > results.cores():
            parser.error(f"--cores must be at most {results.cores()} here, got {args.cores}")
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    args.threads = args.threads or min(2, results.cores())
    args.out = args.out or (None if args.quick or args.methods or args.against else results.file(results.machine()))
    stored = results.load(args.out) if args.out else {}
    try:
        specs = parsed(args.workloads or (QUICK if args.quick else ";".join(families() if args.sweep else every)))
        methods = chosen(args.methods or ("metakern" if args.against else "plain,metakern" if args.quick else ""))
        points = swept(args.sweep, specs) if args.sweep else [(spec, spec) for spec in specs]
        args.folder = against.checkout(args.against) if args.against else ROOT
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    part = "sweep" if args.sweep else "maml"
    todo = []
    for base, spec in points:
        wanted = methods if args.methods or args.against or not args.sweep else of_sweep(base, stored)
        wanted = beside(wanted, args.against) if args.against else wanted
        if args.again or not finished(stored.get(part, {}).get(spec.name), wanted, args):
            todo.append((spec, wanted))
    if len(todo) < len(points):
        print(
            f"{len(points) - len(todo)} of {len(points)} workloads are measured: --again repeats them", file=sys.stderr
        )
    failed = False
    try:
        with Progress(sum(1 + steps(wanted, args) for _, wanted in todo)) as progress:
            for spec, wanted in todo:
                try:
                    found = measure(spec, wanted, args, progress)
                except RuntimeError as reason:
                    failed = True
                    progress.skip(steps(wanted, args))
                    print(f"\n{spec.name}: not measured: {reason}")
                    continue
                if args.out:
                    results.keep(args.out, part, found, spec.name)
                show(spec, found)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
