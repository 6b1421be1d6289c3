"""metakern.compat: the loops of learn2learn and higher, also on patched models, and `MAML.batch`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import higher, learn2learn
from benchmarks.peers.plain import Gradient
from benchmarks.workloads import Workload

requirements: tuple[str, ...] = ()
shares_torch = True


def loop(library: str) -> Callable[[Workload], Callable[[], Gradient]]:
    def prepare(work: Workload) -> Callable[[], Gradient]:
        if library == "learn2learn":
            from metakern.compat.learn2learn import MAML

            return learn2learn.loop(work, MAML)
        from metakern.compat.higher import innerloop_ctx

        return higher.loop(work, innerloop_ctx)

    return prepare


def patched(library: str) -> Callable[[Workload], Callable[[], Gradient]]:
    def prepare(work: Workload) -> Callable[[], Gradient]:
        import metakern as mk

        work = replace(work, model=copy.deepcopy(work.model))
        mk.patch(work.model)
        return loop(library)(work)

    return prepare


def with_loss(library: str) -> Callable[[Workload], Callable[[], Gradient]]:
    """The loop on a patched model, with metakern's op for the loss, which `mk.patch` does not replace."""

    def loss(model: Callable[[Tensor], Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        import metakern as mk

        x, y = data
        return mk.ops.cross_entropy(model(x).flatten(0, -2), y.flatten())

    return lambda work: patched(library)(replace(work, loss=loss))


def batch(work: Workload) -> Callable[[], Gradient]:
    """`MAML.batch`, captured like metakern's own methods."""
    from metakern.compat.learn2learn import MAML

    maml = MAML(work.model, lr=work.lr, allow_nograd=True)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    def step() -> Gradient:
        work.model.zero_grad()
        maml.batch(work.support, work.query, loss, work.steps, capture=True).backward()
        return {name: p.grad for name, p in work.theta.items()}

    return step


methods = {
    f"compat.{library}{suffix}": make(library)
    for library in ("learn2learn", "higher")
    for suffix, make in (("", loop), (", patched", patched), (", patched, ops.cross_entropy", with_loss))
}
methods["compat.learn2learn, batch"] = batch
