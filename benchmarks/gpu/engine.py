"""Check the engine on a GPU: meta-gradients of the workloads by every method, and of every algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import algorithms, peers, truth
from benchmarks.gpu.checks import errors
from benchmarks.gpu.pool import Job, Row
from benchmarks.gpu.problems import device
from benchmarks.workloads import FAMILIES, Workload, make

# Method of metakern -> how often it is called: the default captures a program at its third call, and then audits it.
METHODS = {
    "metakern default": 4,
    "metakern store": 1,
    "metakern recompute": 1,
    "metakern auto, not captured": 1,
    "metakern, first order": 1,
}


def moved(work: Workload) -> Workload:
    support, query = (tuple(t.to(device()) for t in batch) for batch in (work.support, work.query))
    return replace(work, model=work.model.to(device()), support=support, query=query)


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient[name].detach().flatten().double() for name in sorted(gradient)])


def workload(name: str, method: str) -> Row:
    """Compare a method's meta-gradient with that of float64, and its error with plain PyTorch's in float32."""
    work, first = moved(make(name)), method.endswith("first order")
    right = [flat(truth.exact(work)[first])]
    plain = peers.load("plain").methods["plain PyTorch, first order" if first else "plain PyTorch"]
    with torch.backends.cudnn.flags(enabled=False):  # its recurrent layers have no second derivative
        theirs = errors([flat(plain(work)())], right).item()
    step = peers.load("metakern").methods[method](work)
    for _ in range(METHODS[method]):
        ours = errors([flat(step())], right).item()
    return {"error": ours, "plain": theirs, "good": ours <= 2 * theirs + 4 * torch.finfo(torch.float32).eps}


def algorithm(name: str) -> Row:
    """Compare the loss and all gradients of an algorithm in float64 with those of a CPU."""

    def found(where: torch.device) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
        made = algorithms.ALGORITHMS[name](model, 0.01).to(where, torch.float64)
        support, query = algorithms.waves(5, torch.Generator().manual_seed(1))
        made(*(tuple(x.to(where, torch.float64) for x in batch) for batch in (support, query))).backward()
        return torch.cat([p.grad.flatten().cpu() for p in made.parameters() if p.grad is not None])

    error = errors([found(device())], [found(torch.device("cpu"))]).item()
    return {"error": error, "good": error < 1e-9}


def checks(tiny: bool) -> Iterator[Job]:
    for family in FAMILIES[:1] if tiny else FAMILIES:
        for method in METHODS:
            name = f"{family}:{'tiny' if tiny else 'small'}"
            yield Job({"op": "meta-gradient", "sample": name, "method": method}, partial(workload, name, method))
    for name in list(algorithms.ALGORITHMS)[: 1 if tiny else None]:
        yield Job({"op": "algorithm", "sample": name, "dtype": "float64"}, partial(algorithm, name))
