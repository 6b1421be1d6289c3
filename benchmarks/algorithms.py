"""Train every algorithm on the sine waves of the MAML paper: errors of new waves, time and memory of a step.

    python -m benchmarks.algorithms [--steps 3000] [--seeds 3] [--algorithms MAML,Reptile]

All algorithms see the same waves in the same order for the same number of outer steps, from the same initial weights:
a perceptron 1-40-40-1, 25 waves a step with ten points each in support and query, 5 inner steps (Finn et al. 2017,
section 5.1, has 1). The inner rate is the best of a few on other waves, by the error after 5 inner steps. Errors are
mean squared errors on 500 new waves after several numbers of inner steps; the interval is over seeds.

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
from typing import Any

import torch
from torch import Tensor, nn

import metakern as mk
from benchmarks import results
from benchmarks.options import Parser, kept, positive
from benchmarks.progress import Progress
from benchmarks.recurrent import quartiles
from benchmarks.results import FOLDER
from benchmarks.worker import resident, settle
from metakern.optim import SGD

LOOKS = (0, 1, 3, 5, 10)
INNER_STEPS, TASKS, POINTS = 5, 25, 10
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 0.9)
TRIAL_SHARE = 0.2  # of the steps, for the choice of the inner rate
ROUNDS, CALLS = 15, 10
Batch = tuple[Tensor, Tensor]


def waves(tasks: int, generator: torch.Generator) -> tuple[Batch, Batch]:
    """Return support and query of sine waves of random amplitude and phase, `[tasks, POINTS, 1]`."""
    amplitude, phase = (torch.rand(tasks, 1, 1, generator=generator) for _ in range(2))
    x = 10 * torch.rand(tasks, 2 * POINTS, 1, generator=generator) - 5
    y = (0.1 + 4.9 * amplitude) * (x + torch.pi * phase).sin()
    return (x[:, :POINTS], y[:, :POINTS]), (x[:, POINTS:], y[:, POINTS:])


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def hypernetwork(model: nn.Module, lr: float, steps: int) -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64))
    encoder = mk.nn.SetEncoder(lambda batch: net(torch.cat(batch, -1)), modules=[net])
    return mk.HyperNetwork(model, loss, encoder, size=64, inner=SGD(lr), steps=steps)


def cavia(model: nn.Module, lr: float) -> nn.Module:
    first, *others = model.children()
    contextual = nn.Sequential(mk.nn.Contextual(first, size=5), *others)
    return mk.CAVIA(contextual, loss, inner=SGD(lr), steps=INNER_STEPS)


def imaml(model: nn.Module, lr: float) -> nn.Module:
    """Return iMAML with a learned penalty that starts so strong that a few inner steps come near a minimum."""
    penalty: dict[str, Any] = {"strength": 30.0, "learn_strength": True, "tolerance": 1.0}
    return mk.IMAML(model, loss, SGD(lr), INNER_STEPS, solver_steps=INNER_STEPS, **penalty)


# Algorithm -> a function of the model and the inner rate.
ALGORITHMS: dict[str, Callable[[nn.Module, float], Any]] = {
    "MAML": lambda model, lr: mk.MAML(model, loss, SGD(lr), INNER_STEPS),
    "MAML, learned rates": lambda model, lr: mk.MAML(model, loss, SGD(lr, learn_lr=True, per="parameter"), INNER_STEPS),
    "MAML++": lambda model, lr: mk.MAMLPlusPlus(model, loss, steps=INNER_STEPS, lr=lr),
    "Meta-SGD": lambda model, lr: mk.MetaSGD(model, loss, lr=lr, steps=INNER_STEPS),
    "Meta-Curvature": lambda model, lr: mk.MAML(model, loss, mk.optim.MetaCurvature(lr), INNER_STEPS),
    "Meta-LSTM": lambda model, lr: mk.MetaLSTM(model, loss, lr=lr, steps=INNER_STEPS),
    "iMAML": imaml,
    "ANIL": lambda model, lr: mk.ANIL(model, loss, inner=SGD(lr), steps=INNER_STEPS),
    "BOIL": lambda model, lr: mk.BOIL(model, loss, inner=SGD(lr), steps=INNER_STEPS),
    "CAVIA": cavia,
    "FOMAML": lambda model, lr: mk.FOMAML(model, loss, inner=SGD(lr), steps=INNER_STEPS),
    "Reptile": lambda model, lr: mk.Reptile(model, loss, inner=SGD(lr), steps=INNER_STEPS),
    "hypernetwork": lambda model, lr: hypernetwork(model, lr, 0),
    "hypernetwork, then MAML": lambda model, lr: hypernetwork(model, lr, INNER_STEPS),
    "plain training": lambda model, lr: mk.MAML(model, loss, SGD(lr), 0),
}


def trained(name: str, lr: float, seed: int, steps: int) -> tuple[Any, Callable[[], None]]:
    """Return an algorithm after a number of outer steps, and a function that takes one more."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    algorithm, generator = ALGORITHMS[name](model, lr), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=2e-3)

    def step() -> None:
        optimizer.zero_grad()
        algorithm(*waves(TASKS, generator)).backward()
        nn.utils.clip_grad_norm_(algorithm.parameters(), 10.0)
        optimizer.step()

    for _ in range(steps):
        step()
    return algorithm, step


def errors(algorithm: Any, seed: int) -> list[float]:
    """Return the mean squared errors after `LOOKS` inner steps, on 500 waves that depend on the seed."""
    found = algorithm.evaluate(*waves(500, torch.Generator().manual_seed(seed)), steps=LOOKS)
    return found.mean(1).nan_to_num(torch.inf).tolist()


def measured(name: str, steps: int, seeds: int) -> dict[str, Any]:
    """Return the row of one algorithm; it runs in a process of its own."""
    torch.set_num_threads(1)
    at = LOOKS.index(INNER_STEPS)
    trials = {lr: errors(trained(name, lr, -1, int(TRIAL_SHARE * steps))[0], 10_001)[at] for lr in RATES}
    lr = min(trials, key=lambda rate: trials[rate])
    curves = []
    for seed in range(seeds):
        algorithm, step = trained(name, lr, seed, steps)
        curves.append(errors(algorithm, 10_000 + seed))
    settle()
    idle = resident("VmRSS")
    step()
    peak = resident("VmHWM")
    of_maml = trained("MAML", 0.01, 0, 20)[1]
    ratios = []
    for _ in range(ROUNDS):
        took = []
        for call in (step, of_maml):
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            took.append(time.perf_counter() - start)
        ratios.append(took[0] / took[1])
    return {"lr": lr, "errors": curves, "over_maml": quartiles(ratios), "peak_mib": (peak - idle) / 1024}


def main(argv: Sequence[str] = ()) -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=positive, default=3000, help="outer steps (default: 3000)")
    parser.add_argument("--seeds", type=positive, default=3, help="seeds of weights and waves (default: 3)")
    parser.add_argument("--algorithms", default="", help="words in their names, comma-separated (default: all)")
    parser.add_argument("--out", type=kept, default=FOLDER / "algorithms.json", help="file for the results")
    args = parser.parse_args(argv)
    names = chosen(args.algorithms)
    if not names:
        parser.error(f"--algorithms must be words in {'; '.join(ALGORITHMS)}, got {args.algorithms!r}")
    found = results.load(args.out)
    conditions = {"machine": results.machine(), "looks": list(LOOKS), "steps": args.steps, "seeds": args.seeds}
    with Progress(len(names)) as progress, multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in names:
            if conditions.items() <= found.get(name, {}).items():
                progress.skip(1)
                continue
            progress.say(name)
            row = pool.apply(measured, (name, args.steps, args.seeds))
            results.keep(args.out, name, conditions | row)
            curve = (f"{statistics.mean(column):.3f}" for column in zip(*row["errors"], strict=True))
            print(name, *curve, f"{row['over_maml'][0]:.2f} x MAML", sep="\t", flush=True)


def chosen(words: str) -> list[str]:
    """Return the algorithms whose names contain one of the comma-separated words; all for ""."""
    return [name for name in ALGORITHMS if any(word.strip().lower() in name.lower() for word in words.split(","))]


if __name__ == "__main__":
    main(sys.argv[1:])
