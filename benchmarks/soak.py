"""Take thousands of outer steps on batches of many shapes, and watch what the process holds.

    python -m benchmarks.soak [--steps 20000] [--shapes 500] [--seed 0]

A model is meta-trained twice, with `capture=True` and with `capture=False`, and evaluated now and then. A step draws
one of the shapes, which differ in the numbers of tasks and of examples. Memory, open files and threads are read at 20
times. By the first quarter of the steps every shape has been drawn, with the defaults ten times on average; from then
on nothing may grow. The numbers go to benchmarks/results/soak.json.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metakern as mk
from benchmarks import results
from benchmarks.options import Parser, kept, positive
from benchmarks.progress import Progress
from benchmarks.results import FOLDER

LOOKS = 20
EVALUATE_EVERY = 50
TASKS = 10  # shapes have 1 to 10 tasks


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


def held() -> dict[str, float]:
    """Return the memory of this process in MiB, and the numbers of its open files and threads."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "python_threads": threading.active_count(),
    }


def soaked(capture: bool, steps: int, shapes: int, seed: int) -> Iterator[dict[str, float]]:
    """Yield what the process holds at times that are equally far apart."""
    torch.manual_seed(seed)
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
    maml = mk.MAML(model, loss, mk.optim.SGD(0.02, learn_lr=True), steps=2, capture=capture)
    optimizer = torch.optim.Adam(maml.parameters(), 1e-3)
    sizes = [(1 + i % TASKS, 2 + i // TASKS) for i in range(shapes)]
    with Progress(LOOKS) as progress:
        for step in range(1, steps + 1):
            shape = draw.choice(sizes)
            support, query = ((x := torch.randn(*shape, 3, generator=generator), x.sum(-1, True)) for _ in range(2))
            optimizer.zero_grad()
            maml(support, query).backward()
            optimizer.step()
            if step % EVALUATE_EVERY == 0:
                maml.evaluate(support, query, steps=(0, 2))
            if step % (steps // LOOKS) == 0:
                yield {"step": step, **held()}
                progress.say("captured" if capture else "not captured")


def main(argv: Sequence[str] = ()) -> None:
    parser = Parser(prog="python -m benchmarks.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=positive, default=20_000, help="outer steps of each training (default: 20000)")
    parser.add_argument("--shapes", type=positive, default=500, help="shapes of batches (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data (default: 0)")
    parser.add_argument("--out", type=kept, default=FOLDER / "soak.json", help="file for the results")
    args = parser.parse_args(argv)
    for name, capture in (("captured", True), ("not captured", False)):
        entry = {"machine": results.machine(), "steps": args.steps, "shapes": args.shapes}
        looks = list[Any]()
        for look in soaked(capture, args.steps, args.shapes, args.seed):
            looks.append(look)
            results.keep(args.out, name, {**entry, "looks": looks})
        print(name, looks[len(looks) // 4], looks[-1], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
