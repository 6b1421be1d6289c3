"""metakern, keeping the graph of the inner loop, recomputing it, and choosing by itself."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.peers.plain import Gradient
from benchmarks.workloads import Workload

requirements: tuple[str, ...] = ()
shares_torch = True


def strategy(name: str) -> Callable[[Workload], Callable[[], Gradient]]:
    def method(work: Workload) -> Callable[[], Gradient]:
        import metakern as mk

        inner = mk.optim.SGD(lr=work.lr)
        maml = mk.MAML(work.model, work.loss, inner=inner, steps=work.steps, strategy=name)

        def step() -> Gradient:
            work.model.zero_grad()
            maml(work.support, work.query).backward()
            return {name: p.grad for name, p in work.model.named_parameters()}

        return step

    return method


methods = {f"metakern {name}": strategy(name) for name in ("store", "recompute", "auto")}
