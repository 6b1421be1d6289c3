"""Compute meta-gradients in float64, exact and first-order ones, with which every method must agree to be timed.

    v_K = grad Q(phi_K), the first-order one        v_k = v_{k+1} - lr H(phi_k) v_{k+1}        mean over tasks of v_0

Only PyTorch's own operations are used, on one task and a few sequences at a time: losses are means over sequences, and
so are their gradients and Hessian-vector products. So long sequences need neither the memory of K steps nor that of a
whole batch. The result is stored in float32 (a relative error of 3e-8, far below any tolerance), in
~/.cache/metakern/benchmarks/truth, under a digest of the problem and of the models' code.

    python -m benchmarks.truth WORKLOAD FILE.npz
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers
from benchmarks.peers import _modules
from benchmarks.peers.plain import Gradient, bound
from benchmarks.problem import Problem
from benchmarks.results import ROOT
from benchmarks.workloads import Workload, make, models

TOKENS = 1024  # computed at once


def exact(work: Workload) -> tuple[Gradient, Gradient]:
    """Return the exact meta-gradient and the first-order one."""
    work = work.double()
    model = _modules.differentiable(work.model)
    theta = {name: p.detach() for name, p in work.theta.items()}

    def mean(f: Callable[[tuple[Tensor, ...]], Gradient], batch: tuple[Tensor, ...]) -> Gradient:
        """Return the mean of f over the sequences of a batch."""
        total: Gradient = {}
        B = len(batch[0])
        for part in zip(*(a.split(max(1, TOKENS * B // batch[1].numel())) for a in batch), strict=True):
            add(total, f(part), len(part[0]) / B)
        return total

    def gradient(phi: Gradient, batch: tuple[Tensor, ...]) -> Gradient:
        return mean(lambda part: grad(lambda phi: work.loss(bound(model, phi), part))(phi), batch)

    def hvp(phi: Gradient, v: Gradient, batch: tuple[Tensor, ...]) -> Gradient:
        def product(part: tuple[Tensor, ...]) -> Gradient:
            return jvp(grad(lambda phi: work.loss(bound(model, phi), part)), (phi,), (v,))[1]

        return mean(product, batch)

    total: tuple[Gradient, Gradient] = {}, {}
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        for support, query in tasks(work):
            phis = [theta]
            for _ in range(work.steps):
                phis.append(add(dict(phis[-1]), gradient(phis[-1], support), -work.lr))
            v = gradient(phis.pop(), query)
            add(total[1], v, 1 / work.tasks)
            while phis:
                v = add(dict(v), hvp(phis.pop(), v, support), -work.lr)
            add(total[0], v, 1 / work.tasks)
    return total


def tasks(work: Workload) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    for t in range(work.tasks):
        yield tuple(a[t] for a in work.support), tuple(a[t] for a in work.query)


def add(total: Gradient, gradient: Gradient, times: float) -> Gradient:
    for name, g in gradient.items():
        total[name] = total[name] + times * g if name in total else times * g
    return total


def with_truth(problem: Problem) -> Problem:
    """Return the problem with both meta-gradients; raise RuntimeError if they can't be computed."""
    file = peers.cache() / "truth" / f"{digest(problem)}.npz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        # In a process of its own, which may run out of memory.
        command = [sys.executable, "-m", "benchmarks.truth", problem.name, file]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
            raise RuntimeError(f"no meta-gradient in float64: {said[-1]}")
    with np.load(file) as stored:
        found = {part: {name: stored[f"{part}/{name}"] for name in problem.theta} for part in ("truth", "first")}
    return replace(problem, **found)


def digest(problem: Problem) -> str:
    found = hashlib.sha256()
    for module in (models, _modules):
        found.update(Path(str(module.__file__)).read_bytes())
    found.update(Path(__file__).read_bytes() + repr(problem.settings).encode())
    for part in (problem.theta, problem.frozen, dict(enumerate(problem.support)), dict(enumerate(problem.query))):
        for name, array in part.items():
            found.update(f"{name} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()[:20]


def main(name: str, file: str) -> None:
    parts = zip(("truth", "first"), exact(make(name)), strict=True)
    arrays = {f"{part}/{key}": g.float().numpy() for part, gradient in parts for key, g in gradient.items()}
    draft = Path(f"{file}.{os.getpid()}.npz")
    np.savez(draft, **arrays)
    draft.replace(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
