"""Compare metakern.compat with learn2learn and higher: first the numbers, then time and peak memory.

    python -m benchmarks.compat [--libraries learn2learn,higher] [--workloads gpt:medium,lstm] [--rounds 7]

Each library is installed into an environment of its own at the first use. There, for every case of `CASES`, the library
and metakern.compat run 20 outer steps in float64 from the same start. The largest difference of any loss, or of any
parameter at the end, is divided by the largest of these numbers, and must be at most 1e-6.

Then both are timed at the workloads, as `benchmarks.maml` times its peers: the library's own loop, the same loop on
metakern.compat, that loop on a patched model, and `MAML.batch` instead of the loop. Ratios are medians of ratios within
a round, with their quartiles. All results go to benchmarks/results/compat.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import against, maml, peers, results
from benchmarks.options import Parser, kept, positive, seconds
from benchmarks.progress import Progress
from benchmarks.recurrent import quartiles
from benchmarks.results import FOLDER, ROOT
from benchmarks.workloads import make

WORKLOADS = "mlp:small;mlp;lstm:small,tasks=8;lstm;gpt:small;gpt;gpt:large,tasks=1"
OUTER_STEPS, INNER_STEPS, TASKS, TOLERANCE = 20, 3, 2, 1e-6

# The inner loop of one task, by the library's classes.


class Tied(nn.Module):
    """A model with one weight in two places, and a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.first.weight
        self.first.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


class Learn2Learn:
    """MAML and MetaSGD of learn2learn, or of metakern.compat."""

    def __init__(self, original: bool) -> None:
        if original:
            from benchmarks.peers.learn2learn import original as found

            self.classes = {name: found(name) for name in ("MAML", "MetaSGD")}
        else:
            from metakern.compat import learn2learn

            self.classes = {"MAML": learn2learn.MAML, "MetaSGD": learn2learn.MetaSGD}

    def learner(self, model: nn.Module, kind: str = "MAML", **options: Any) -> tuple[list[Tensor], Callable]:
        """Return the learned tensors, and a function that adapts to a task and returns its query loss.

        The function takes `loss(learner, k)`, the loss at inner step k; k = INNER_STEPS is the query loss.
        """
        outer = self.classes[kind](model, lr=0.1, **options)

        def task(loss: Callable[[Any, int], Tensor]) -> Tensor:
            learner = outer.clone()
            for k in range(INNER_STEPS):
                learner.adapt(loss(learner, k))
            return loss(learner.clone(), INNER_STEPS)

        return list(outer.parameters()), task


class Higher:
    """`innerloop_ctx` of higher, or of metakern.compat."""

    def __init__(self, original: bool) -> None:
        if original:
            import higher
        else:
            from metakern.compat import higher
        self.context: Callable[..., AbstractContextManager] = higher.innerloop_ctx

    def learner(
        self, model: nn.Module, kind: str = "SGD", warm: int = 0, learned: tuple[str, ...] = (), **options: Any
    ) -> tuple[list[Tensor], Callable]:
        """Return what `Learn2Learn.learner` returns, for the torch optimizer `kind`.

        warm: the steps that the optimizer takes beforehand. learned: the hyper-parameters that are learned.
        """
        half = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": half[::2]}, {"params": half[1::2], "lr": 0.07}]
        opt = getattr(torch.optim, kind)(groups, **({"lr": 0.05} | options))
        for _ in range(warm):
            sum(p.sin().sum() for p in half).backward()
            opt.step()
        override = {
            name: [torch.tensor(float(g[name]), dtype=half[0].dtype, requires_grad=True) for g in opt.param_groups]
            for name in learned
        }
        rates = [rate for values in override.values() for rate in values]

        def task(loss: Callable[[Any, int], Tensor]) -> Tensor:
            with self.context(model, opt, copy_initial_weights=False, override=override or None) as (fmodel, diffopt):
                for k in range(INNER_STEPS):
                    diffopt.step(loss(fmodel, k))
                return loss(fmodel, INNER_STEPS)

        return [*half, *rates], task


LIBRARIES: dict[str, type[Learn2Learn] | type[Higher]] = {"learn2learn": Learn2Learn, "higher": Higher}
CASES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    # Case -> a model, and options of the learner. Where the release of higher differs from today's PyTorch there is no
    # case here; the tests compare these with torch.optim: AdamW, which higher lacks; Adam's eps, which it adds before
    # the bias correction; the bias correction of a carried-over step, which it computes in float32; and a
    # centered RMSprop without a gradient, where it has NaN.
    "learn2learn": {
        "MLP": ("mlp", {}),
        "MLP, first order": ("mlp", {"first_order": True}),
        "LSTM": ("lstm", {}),
        "GPT": ("gpt", {}),
        "tied and frozen weights": ("tied", {"allow_nograd": True}),
        "Meta-SGD": ("mlp", {"kind": "MetaSGD"}),
        "Meta-SGD, first order": ("lstm", {"kind": "MetaSGD", "first_order": True}),
    },
    "higher": {
        "SGD, LSTM": ("lstm", {}),
        "SGD, GPT": ("gpt", {}),
        "SGD, tied and frozen weights": ("tied", {"warm": 2}),
        "SGD, momentum, dampening": ("mlp", {"momentum": 0.7, "dampening": 0.3, "weight_decay": 0.01, "warm": 2}),
        "SGD, Nesterov": ("mlp", {"momentum": 0.7, "nesterov": True}),
        "SGD, learned": ("mlp", {"momentum": 0.7, "weight_decay": 0.01, "learned": ("lr", "momentum", "weight_decay")}),
        "Adam": ("tied", {"kind": "Adam", "eps": 0.0, "weight_decay": 0.01}),
        "Adam, AMSGrad": ("tied", {"kind": "Adam", "eps": 0.0, "amsgrad": True}),
        "Adam, learned": (
            "tied",
            {"kind": "Adam", "eps": 0.0, "weight_decay": 0.01, "learned": ("lr", "weight_decay")},
        ),
        "RMSprop": ("tied", {"kind": "RMSprop", "eps": 1e-3, "momentum": 0.5, "warm": 2}),
        "RMSprop, centered": ("tied", {"kind": "RMSprop", "eps": 1e-2, "centered": True}),
        "Adagrad": ("mlp", {"kind": "Adagrad", "lr_decay": 0.1, "initial_accumulator_value": 0.1, "warm": 2}),
    },
}


def trajectory(library: str, case: str, original: bool) -> list[Tensor]:
    """Run one case; return the losses of the outer steps, [OUTER_STEPS, TASKS], then the learned tensors."""
    name, options = CASES[library][case]
    torch.manual_seed(0)
    if name == "tied":
        model: nn.Module = Tied().double()
        x, y = torch.randn(2, INNER_STEPS + 1, TASKS, 5, 6, dtype=torch.float64)
        of = F.mse_loss
    else:
        work = make(f"{name}:tiny").double()
        model, (x, y) = (
            work.model,
            (torch.stack([s[:TASKS] for s in (a, b, a, b)]) for a, b in zip(work.support, work.query, strict=True)),
        )
        of = lambda logits, y: F.cross_entropy(logits.flatten(0, -2), y.flatten())  # noqa: E731
    learned, task = LIBRARIES[library](original).learner(model, **options)
    outer = torch.optim.SGD(learned, lr=0.02, momentum=0.9)
    losses = []
    for _ in range(OUTER_STEPS):
        outer.zero_grad()
        for t in range(TASKS):
            with sdpa_kernel(SDPBackend.MATH):
                value = task(lambda model, k, t=t: of(model(x[k, t]), y[k, t]))
                value.backward()
            losses.append(value.detach())
        outer.step()
    return [torch.stack(losses), *(p.detach() for p in learned)]


def differences(library: str) -> dict[str, float]:
    """Return {case: the largest relative difference from the original}; the environment must have the library."""
    found = {}
    for case in CASES[library]:
        ours, theirs = trajectory(library, case, original=False), trajectory(library, case, original=True)
        gap = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
        found[case] = gap / max(float(b.abs().max()) for b in theirs)
    return found


def check(library: str) -> dict[str, float]:
    """Call `differences` in the library's environment; raise RuntimeError if there is none, or if a case differs."""
    command = [peers.environment(library), "-W", "ignore", "-m", "benchmarks.compat", "--differences", library]
    done = subprocess.run(command, cwd=ROOT, env=against.environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{library}: {against.last_line(done.stderr)}")
    found = json.loads(done.stdout)
    for case, difference in found.items():
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"{library}: {case} differs from the original by {difference:.0e} after {OUTER_STEPS} outer steps"
            )
    return found


def measure(library: str, name: str, args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Return the results of one workload: times, memory, and the original's time over that of each method."""
    (spec,) = maml.parsed(name)
    ours = {method: "compat" for method in peers.load("compat").methods if f".{library}" in method}
    seconds, ready, refused = maml.timed(spec, make(spec.name), {library: library} | ours, args, progress)
    if refused:
        raise RuntimeError("; ".join(f"{method}: {reason}" for method, reason in refused.items()))
    rows = {
        method: {
            **ready[method],
            "median_ms": statistics.median(seconds[method]) * 1e3,
            "original_over_it": quartiles([a / b for a, b in zip(seconds[library], seconds[method], strict=True)]),
        }
        for method in (library, *ours)
    }
    return {**maml.conditions(args), "methods": rows}


def show(library: str, name: str, found: dict[str, Any]) -> None:
    for method, row in found["methods"].items():
        middle, low, high = row["original_over_it"]
        print(
            f"{name:12} {method:30}{row['median_ms']:10.1f} ms {row['peak_mib']:7.0f} MiB   "
            f"{library} / it: {middle:.2f} ({low:.2f}-{high:.2f})   error {row['error']:.0e}",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = Parser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--libraries", default=",".join(LIBRARIES), help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--workloads", default=WORKLOADS, help="as for benchmarks.maml (default: %(default)s); '' for none"
    )
    parser.add_argument("--rounds", type=positive, default=7, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=2, help="threads of each process (default: %(default)s)")
    parser.add_argument(
        "--limit", type=seconds, default=600, help="seconds that a method may take to get ready (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=kept,
        default=FOLDER / "compat.json",
        help="file for the results (default: benchmarks/results/compat.json)",
    )
    parser.add_argument("--differences", metavar="LIBRARY", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.differences:
        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print(json.dumps(differences(args.differences)))
        return
    libraries = args.libraries.split(",")
    if unknown := set(libraries) - set(LIBRARIES):
        parser.error(f"libraries must be among {', '.join(LIBRARIES)}, got {', '.join(sorted(unknown))}")
    args.folder = ROOT
    try:
        names = [spec.name for spec in maml.parsed(args.workloads)] if args.workloads else []
        with Progress(len(libraries) * len(names) * (5 + 5 * args.rounds)) as progress:
            for library in libraries:
                found = check(library)
                print(
                    f"{library}: {len(found)} cases agree over {OUTER_STEPS} outer steps, to {max(found.values()):.0e}"
                )
                entry = {"machine": results.machine(), "outer_steps": OUTER_STEPS, "differences": found}
                results.keep(args.out, "numbers", entry, library)
                for name in names:
                    entry = measure(library, name, args, progress)
                    stored = results.load(args.out).get(library, {})
                    results.keep(args.out, library, stored | {name: entry})
                    show(library, name, entry)
    except (ValueError, RuntimeError) as error:
        print(f"compat: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
