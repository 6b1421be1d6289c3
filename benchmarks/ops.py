"""Time every rule of every op on every backend, beside the machine's limit and plain PyTorch.

    metakern bench ops [--ops silu,lstm] [--backends cpu] [--dtype float32] [--threads 2] [--rounds 9] [--quick]
    metakern bench ops --against REV      (in a clone of metakern: beside another commit of it; only prints)

    forward, jvp, vjp, vjp_jvp   milliseconds of a rule with all of its inputs differentiated, at the sizes of SPECS
    GB/s, GFLOP/s    the bytes and operations that the op's SPEC counts, over the time
    of limit         the limit over the time. The limit is the time of a copy of as many bytes, or of a torch.mm of as
                     many operations, whichever is longer. Above 100%, our own products are faster than torch.mm
    plain / ours     the time of plain PyTorch over that of the public op, of forward (in the row forward), of forward
                     and backward (vjp), and of a Hessian-vector product, reverse over reverse (vjp_jvp)

Each round runs everything once, in another order. Ratios are medians of ratios within a round; a spread is half the
distance between the quartiles. Each finished op goes to results/<machine>.json at once, so that a run can be stopped.
`pytest benchmarks/test_ops.py` runs the rules under pytest-benchmark, which compares saved runs.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

import metakern as mk
from benchmarks import against, results
from benchmarks.calls import ORDERS, Call, Shapes, orders, recorded
from benchmarks.options import Parser, kept, positive
from benchmarks.progress import Progress
from benchmarks.recurrent import quartiles
from metakern.ops import SPECS
from metakern.ops.core.spec import Cost, Make, Sample

if TYPE_CHECKING:
    from rich.table import Table

BACKENDS = {"cpu": ("reference", "cpu"), "cuda": ("reference", "triton", "cuda")}
DTYPES = ("float32", "float64", "bfloat16", "float16")
SQUARE = {"cpu": 1024, "cuda": 4096}  # size of the matrices whose product gives the machine's rate
PUBLIC = {"forward": 0, "vjp": 1, "vjp_jvp": 2}  # rule -> the order at which the public op is compared
Times = dict[str, list[float]]
Timed = Callable[..., Any]  # calls a method of a Timer, by its name, in this process or in another one


def names(op: str) -> list[str]:
    """The samples that an op's SPEC gives to benchmarks."""
    return [sample.name for sample in SPECS[op].benchmark(Shapes())]


def draw(op: str, name: str, dtype: torch.dtype, device: str = "cpu") -> Sample:
    return next(sample for sample in SPECS[op].benchmark(Make(dtype, device)) if sample.name == name)


def available(device: str) -> dict[str, str]:
    """Return {backend of the device: why it can't be timed, or ""}; times in Triton's interpreter mean nothing."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    why = mk.backends() | ({"triton": "TRITON_INTERPRET is set"} if interpreted else {})
    return {name: "" if why[name] == "available" else why[name] for name in BACKENDS[device]}


def has_kernels(op: str, backend: str, dtype: torch.dtype) -> bool:
    rules = SPECS[op].op.kernels.get(backend)
    return rules is not None and (rules.dtypes is None or dtype in rules.dtypes)


class Timer:
    """Times the rules, the public op, plain PyTorch, copies and a product, for one sample after the other."""

    def __init__(self, dtype: str, device: str, threads: int, least: float) -> None:
        torch.set_num_threads(threads)
        self.dtype, self.device, self.least = getattr(torch, dtype), device, least
        self.runs: dict[str, tuple[Call, int]] = {}

    def prepare(self, op: str, name: str, backends: list[str], alone: bool) -> list[str]:
        """Warm up all that `seconds` can time for a sample, and return its names; alone: only what metakern runs."""
        self.runs = {}
        torch.manual_seed(0)
        spec, sample = SPECS[op], draw(op, name, self.dtype, self.device)
        for backend in backends:
            for rule, call in recorded(op, sample, backend).items():
                self._add(f"{backend} {rule}", call)
            for order, call in enumerate(orders(on(backend, spec.call), sample)):
                self._add(f"{backend} order {order}", call)
        if not alone:
            for order, call in enumerate(orders(spec.plain, sample)):
                try:
                    self._add(f"plain order {order}", call)
                except RuntimeError:  # PyTorch has no second derivative for it
                    continue
            for order in range(3):
                self._add(f"copy {order}", self._copy(spec.cost(sample, order)))
            a, b = torch.randn(2, SQUARE[self.device], SQUARE[self.device], dtype=self.dtype, device=self.device)
            self._add("product", lambda: a @ b)
        return list(self.runs)

    def _copy(self, cost: Cost) -> Call:
        source = torch.ones(math.ceil(cost.bytes / 2 / self.dtype.itemsize), dtype=self.dtype, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def _add(self, name: str, call: Call) -> None:
        call()
        self.runs[name] = call, math.ceil(self.least / self._time(call, 1))

    def _time(self, call: Call, count: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        self._wait()
        return (time.perf_counter() - start) / count

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, name: str) -> float:
        """Return the seconds of one call: the mean over as many calls as take `least` seconds."""
        return self._time(*self.runs[name])


def on(backend: str, f: Callable[..., Any]) -> Callable[..., Any]:
    """Return f, called with this backend."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with mk.backend(backend):
            return f(*args, **kwargs)

    return call


def measure(
    op: str, name: str, backends: list[str], ours: Timed, other: Timed | None, rounds: int, say: Callable[[str], None]
) -> Times:
    """Return seconds by name and round; names of the other commit end with " @". Each round has another order."""
    runs = {run: (ours, run) for run in ours("prepare", op, name, backends, False)}
    if other:
        try:
            runs |= {f"{run} @": (other, run) for run in other("prepare", op, name, backends, True)}
        except RuntimeError as error:
            print(f"{op} {name}, the other commit: {error}", file=sys.stderr)
    order, shuffle = list(runs), random.Random(0).shuffle
    times: Times = {run: [] for run in runs}
    for i in range(rounds):
        say(f"{op} {name}, round {i + 1} of {rounds}")
        shuffle(order)
        for run in order:
            timed, asked = runs[run]
            times[run].append(timed("seconds", asked))
    return times


def ratio(above: list[float], below: list[float]) -> list[float]:
    return quartiles([a / b for a, b in zip(above, below, strict=True)])


def row(times: Times, backend: str, rule: str, cost: Cost, square: int) -> dict[str, Any]:
    """Return the results of a rule on a backend."""
    own = times[f"{backend} {rule}"]
    median = statistics.median(own)
    copy = times[f"copy {ORDERS[rule]}"]
    limit = [max(c, cost.flop * p / (2 * square**3)) for c, p in zip(copy, times["product"], strict=True)]
    found: dict[str, Any] = {
        "ms": [1e3 * t for t in quartiles(own)],
        "gb_per_s": cost.bytes / median / 1e9,
        "gflop_per_s": cost.flop / median / 1e9,
        "of_limit": ratio(limit, own),
    }
    public = f"order {PUBLIC.get(rule)}"
    if rule in PUBLIC and f"plain {public}" in times:
        found["plain_over_ours"] = ratio(times[f"plain {public}"], times[f"{backend} {public}"])
    if f"{backend} {rule} @" in times:
        found["other_over_ours"] = ratio(times[f"{backend} {rule} @"], own)
        if rule in PUBLIC:
            found["other_over_ours_through_op"] = ratio(times[f"{backend} {public} @"], times[f"{backend} {public}"])
    return found


def entry(op: str, name: str, dtype: torch.dtype, device: str, backends: list[str], times: Times) -> dict[str, Any]:
    """Return a sample's entry in the results."""
    sample, square = next(s for s in SPECS[op].benchmark(Shapes(dtype)) if s.name == name), SQUARE[device]
    costs = {rule: SPECS[op].cost(sample, order) for rule, order in ORDERS.items()}
    rows = {b: {rule: row(times, b, rule, cost, square) for rule, cost in costs.items()} for b in backends}
    return {"gflop_per_s": 2e-9 * square**3 / statistics.median(times["product"]), "backends": rows}


def number(value: float) -> str:
    """Format a number with three significant digits, and at most three decimals."""
    return f"{value:.{max(0, min(3, 2 - math.floor(math.log10(value)))) if value > 0 else 0}f}"


def shown(op: str, samples: dict[str, Any], rev: str | None) -> Table:
    """Return the table of an op's samples, at most 100 characters wide."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = ("of limit", "GB/s", "GFLOP/s", "plain / ours")
    if rev:
        columns = (f"{rev} / this: rule", "through the op")
    table = Table(box=SIMPLE_HEAD, title=f"[bold]{op}", title_justify="left", padding=0, collapse_padding=True)
    for column, width in (("sample", 20), ("backend", 10), ("rule", 9)):
        table.add_column(column, min_width=width)
    for column in ("ms", *columns):
        table.add_column(column, justify="right", min_width=13 if column == "ms" else max(len(column) + 1, 8))
    for name, sample in samples.items():
        for backend, rules in sample["backends"].items():
            for rule, found in rules.items():
                first = rule == "forward"
                where = (name if first and backend == next(iter(sample["backends"])) else "", backend if first else "")
                table.add_row(*where, rule, *cells(found, rev is not None))
    return table


def cells(found: dict[str, Any], rev: bool) -> list[str]:
    median, low, high = found["ms"]
    cells = [f"{number(median)} ±{(high - low) / 2 / median:>4.0%}"]
    if rev:
        keys = "other_over_ours", "other_over_ours_through_op"
        return [*cells, *(colored(*found[key], spread=True) if key in found else "" for key in keys)]
    cells += [f"{found['of_limit'][0]:.0%}", number(found["gb_per_s"]), number(found["gflop_per_s"])]
    return [*cells, colored(*found["plain_over_ours"]) if "plain_over_ours" in found else ""]


def colored(median: float, low: float, high: float, spread: bool = False) -> str:
    """Format a ratio: green if both quartiles are above 1, red if both are below."""
    text = f"{median:.2f} ({low:.2f}-{high:.2f})" if spread else f"{median:.2f} x"
    return f"[green]{text}[/]" if low > 1 else f"[red]{text}[/]" if high < 1 else text


def parsed(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", metavar="NAMES", help="comma-separated (default: all)")
    parser.add_argument("--backends", metavar="NAMES", help="comma-separated (default: all of the device)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    parser.add_argument("--device", choices=tuple(BACKENDS), help="(default: cuda if PyTorch finds a GPU)")
    parser.add_argument(
        "--threads", type=positive, default=2, metavar="N", help="threads of the CPU (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=positive, metavar="N", help="interleaved rounds (default: 9; 3 with --quick)")
    parser.add_argument("--quick", action="store_true", help="one sample of each op on one backend; only prints")
    parser.add_argument("--against", metavar="REV", help="also time another commit; only prints")
    parser.add_argument(
        "--out", type=kept, metavar="FILE", help="file for the results (default: results/<machine>.json)"
    )
    args = parser.parse_args(arguments)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu here, where PyTorch finds no GPU, got cuda")
    args.rounds = args.rounds or (3 if args.quick else 9)
    args.ops = args.ops.split(",") if args.ops else list(SPECS)
    if unknown := [op for op in args.ops if op not in SPECS]:
        parser.error(f"--ops must be among {', '.join(SPECS)}, got {unknown[0]!r}")
    why = available(args.device)
    here = [name for name in why if not why[name]]
    last = -1 if args.quick and not args.backends else None  # the fastest, as BACKENDS is in the order of speed
    args.backends = args.backends.split(",") if args.backends else here
    if unknown := [name for name in args.backends if name not in here]:
        reason = f" ({why[unknown[0]]})" if unknown[0] in why else ""
        parser.error(f"--backends must be among {', '.join(here)} here, got {unknown[0]!r}{reason}")
    dtype = getattr(torch, args.dtype)
    kernels = {op: [b for b in args.backends if has_kernels(op, b, dtype)][last:] for op in args.ops}
    args.kernels = {op: backends for op, backends in kernels.items() if backends}
    if not args.kernels:
        parser.error(f"--backends must have kernels of {', '.join(args.ops)}, got {', '.join(args.backends)}")
    try:
        args.folder = args.against and against.checkout(args.against)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    return args


@contextmanager
def timers(args: argparse.Namespace) -> Iterator[tuple[Timed, Timed | None]]:
    """Yield the Timer of this tree and, with --against, that of the other commit; each has then its own process."""
    settings = args.dtype, args.device, args.threads, 0.005 if args.quick else 0.02
    if not args.folder:
        timer = Timer(*settings)
        yield lambda method, *given: getattr(timer, method)(*given), None
        return
    with ExitStack() as stack:
        processes = [against.Process(f, "benchmarks.ops:Timer", *settings) for f in (against.HOME, args.folder)]
        for process in processes:
            stack.callback(process.close)
        yield processes[0], processes[1]


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    from rich.console import Console

    args = parsed(arguments, prog)
    dtype, where = getattr(torch, args.dtype), results.machine()
    out = args.out or (None if args.quick or args.against else results.file(where))
    about = {"machine": where, "device": args.device, "dtype": args.dtype, "rounds": args.rounds}
    about |= {"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {"threads": args.threads}
    todo = {op: names(op)[: 1 if args.quick else None] for op in args.kernels}
    console = Console(width=None if sys.stdout.isatty() else 100)
    done: list[str] = []
    try:
        with timers(args) as (ours, other), Progress(sum(map(len, todo.values())) * args.rounds) as progress:
            for op, wanted in todo.items():
                samples = {}
                for name in wanted:
                    times = measure(op, name, args.kernels[op], ours, other, args.rounds, progress.say)
                    samples[name] = entry(op, name, dtype, args.device, args.kernels[op], times)
                console.print(shown(op, samples, args.against))
                if out:
                    results.keep(out, "ops", about | {"samples": samples}, f"{args.device} {args.dtype} {op}")
                done.append(op)
    except KeyboardInterrupt:
        kept = f"; {', '.join(done)}: kept in {out}" if out and done else ""
        print(f"stopped{kept}", file=sys.stderr)
        raise SystemExit(130) from None
    if out:
        print(f"written: {out}")


if __name__ == "__main__":
    main()
