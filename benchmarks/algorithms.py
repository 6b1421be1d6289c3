"""Train every algorithm on three small workloads: query losses of test tasks, time and memory of a step.

    python -m benchmarks.algorithms [--workloads sines,intents] [--algorithms MAML,Reptile] [--intents FILE]

`benchmarks.few_shot` has the workloads. On one workload all algorithms see the same tasks in the same order for the
same number of outer steps, from the same initial weights of the model. The inner rate, and then the outer rate, are the
best ones on validation tasks, by the loss after as many inner steps as in training; the search goes on while the best
inner rate is the first or the last that was tried. Of each training, the best of five checkpoints on validation tasks
is taken. Losses are means over test tasks after several numbers of inner steps; the interval is over seeds.

The time of a step is its ratio to a step of MAML that runs in the same process in turn with it: the median, with its
quartiles. Memory is the peak of a step, less what the process holds between steps. Results go to
benchmarks/results/algorithms.json after each algorithm, and a run skips what the same code has measured.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from math import ceil
from typing import Any

import torch
from torch import nn

from benchmarks import results
from benchmarks.few_shot import WORKLOADS, Part, Workload
from benchmarks.options import Parser, kept, positive
from benchmarks.progress import Progress
from benchmarks.recurrent import quartiles
from benchmarks.results import FOLDER
from benchmarks.worker import resident, settle

LOOKS = (0, 1, 3, 5, 10)
SEEDS = 2
CHECKPOINTS, TRIAL_SEED = 5, 1000  # the seed of validation tasks, and of the trainings that choose the rates
MOST_RATES = 9
CLIP = 1.0  # the norm to which meta-gradients are clipped
OUTER_FACTORS = (1 / 3, 1.0, 3.0)  # of the workload's outer rate
ROUNDS, CALLS = 7, 3


@cache
def workload(name: str, file: str | None = None) -> Workload:
    """Return the workload of this name; `file` has the intents, or they are made."""
    return WORKLOADS[name](file) if name == "intents" else WORKLOADS[name]()


def trained(
    of: Workload, name: str, lr: float, outer_lr: float, seed: int, steps: int
) -> tuple[Any, float, Callable[[], None]]:
    """Return an algorithm at its best checkpoint, its validation loss, and a function that takes one more step."""
    torch.manual_seed(seed)
    algorithm, episodes = of.algorithms[name](of.model(), lr), of.draw("train", of.tasks, seed)
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=outer_lr)

    def step() -> None:
        optimizer.zero_grad()
        algorithm(*next(episodes)).backward()
        nn.utils.clip_grad_norm_(algorithm.parameters(), CLIP)
        optimizer.step()

    checkpoints: dict[float, Any] = {}
    for number in range(1, steps + 1):
        step()
        if number % ceil(steps / CHECKPOINTS) == 0 or number == steps:
            loss = losses(of, algorithm, "validation", TRIAL_SEED)[LOOKS.index(of.inner_steps)]
            checkpoints[loss] = deepcopy(algorithm.state_dict())
    best = min(checkpoints)
    algorithm.load_state_dict(checkpoints[best])
    return algorithm, best, step


def losses(of: Workload, algorithm: Any, part: Part, seed: int) -> list[float]:
    """Return the mean query losses of tasks of a part, which depend on the seed, after `LOOKS` inner steps."""
    found = algorithm.evaluate(*next(of.draw(part, of.test_tasks, seed)), steps=LOOKS)
    return found.mean(1).nan_to_num(torch.inf).tolist()


def tuned(of: Workload, name: str, steps: int) -> tuple[float, float]:
    """Return the inner and the outer rate with the least loss on validation tasks after `steps` outer steps."""

    @cache
    def loss(lr: float, outer_lr: float = of.outer_lr) -> float:
        return trained(of, name, lr, outer_lr, TRIAL_SEED, steps)[1]

    rates = list(of.rates[:1] if name in of.rateless else of.rates)
    while 1 < len(rates) < MOST_RATES and (best := min(rates, key=loss)) in (rates[0], rates[-1]):
        rates = [best / 3, *rates] if best == rates[0] else [*rates, best * 3]
    lr = min(rates, key=loss)
    return lr, min((factor * of.outer_lr for factor in OUTER_FACTORS), key=lambda outer_lr: loss(lr, outer_lr))


def measured(of: Workload, name: str, steps: int, seeds: int) -> dict[str, Any]:
    """Return the row of one algorithm."""
    lr, outer_lr = tuned(of, name, steps)
    curves = []
    for seed in range(seeds):
        algorithm, _, step = trained(of, name, lr, outer_lr, seed, steps)
        curves.append(losses(of, algorithm, "test", seed))
    settle()
    idle = resident("VmRSS")
    step()
    peak = resident("VmHWM")
    of_maml = trained(of, "MAML", of.rates[0], of.outer_lr, 0, 20)[-1]
    ratios = []
    for _ in range(ROUNDS):
        took = []
        for call in (step, of_maml):
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            took.append(time.perf_counter() - start)
        ratios.append(took[0] / took[1])
    row = {"lr": None if name in of.rateless else lr, "outer_lr": outer_lr, "losses": curves}
    return row | {"over_maml": quartiles(ratios), "peak_mib": (peak - idle) / 1024}


def alone(workload_name: str, file: str | None, name: str, steps: int, seeds: int) -> dict[str, Any]:
    """Return `measured`, in a process of its own with one thread."""
    torch.set_num_threads(1)
    return measured(workload(workload_name, file), name, steps, seeds)


def main(argv: Sequence[str] = ()) -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", default="", help="their names, comma-separated (default: all)")
    parser.add_argument("--algorithms", default="", help="words in their names, comma-separated (default: all)")
    parser.add_argument("--intents", metavar="FILE", help="intents that `metakern data` reads (default: made ones)")
    parser.add_argument("--steps", type=positive, help="outer steps (default: as each workload says)")
    parser.add_argument("--seeds", type=positive, default=SEEDS, help=f"seeds of weights and tasks (default: {SEEDS})")
    parser.add_argument("--out", type=kept, default=FOLDER / "algorithms.json", help="file for the results")
    args = parser.parse_args(argv)
    wanted = [word.strip() for word in args.workloads.split(",") if word.strip()] or list(WORKLOADS)
    if unknown := [name for name in wanted if name not in WORKLOADS]:
        parser.error(f"--workloads must be among {', '.join(WORKLOADS)}, got {unknown[0]!r}")
    jobs = [(which, name) for which in wanted for name in chosen(workload(which, args.intents), args.algorithms)]
    if not jobs:
        names = dict.fromkeys(name for which in wanted for name in workload(which, args.intents).algorithms)
        parser.error(f"--algorithms must be words in {'; '.join(names)}, got {args.algorithms!r}")
    found = results.load(args.out)
    machine = results.machine()
    with Progress(len(jobs)) as progress, multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for which, name in jobs:
            of = workload(which, args.intents)
            steps = args.steps or of.steps
            conditions = {"machine": machine, "looks": list(LOOKS), "steps": steps, "seeds": args.seeds}
            conditions["about"] = of.about
            if conditions.items() <= found.get(which, {}).get(name, {}).items():
                progress.skip(1)
                continue
            progress.say(f"{which}: {name}")
            row = pool.apply(alone, (which, args.intents, name, steps, args.seeds))
            results.keep(args.out, which, conditions | row, name)
            curve = (f"{statistics.mean(column):.3f}" for column in zip(*row["losses"], strict=True))
            print(which, name, *curve, f"{row['over_maml'][0]:.2f} x MAML", sep="\t", flush=True)


def chosen(of: Workload, words: str) -> list[str]:
    """Return the algorithms whose names contain one of the comma-separated words; all for ""."""
    return [name for name in of.algorithms if any(word.strip().lower() in name.lower() for word in words.split(","))]


if __name__ == "__main__":
    main(sys.argv[1:])
