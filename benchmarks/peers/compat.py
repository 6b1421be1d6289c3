"""metakern.compat: learn2learn's and higher's loops, letter by letter, on metakern; and on a patched model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

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


methods = {
    f"compat.{library}{suffix}": make(library)
    for library in ("learn2learn", "higher")
    for suffix, make in (("", loop), (", patched", patched))
}
