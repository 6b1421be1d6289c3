"""higher: `innerloop_ctx`, one task at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.plain import Gradient, by_backward
from benchmarks.workloads import Workload

requirements = ("--no-deps higher==0.2.1",)
shares_torch = True


def loop(work: Workload, innerloop_ctx: Any) -> Callable[[], Gradient]:
    optimizer = torch.optim.SGD(work.theta.values(), lr=work.lr)

    def one(support: tuple[Tensor, ...], query: tuple[Tensor, ...]) -> Tensor:
        with innerloop_ctx(work.model, optimizer, copy_initial_weights=False) as (model, inner):
            for _ in range(work.steps):
                inner.step(work.loss(model, support))
            return work.loss(model, query)

    return by_backward(work, one)


def higher(work: Workload) -> Callable[[], Gradient]:
    from higher import innerloop_ctx

    return loop(work, innerloop_ctx)


methods = {"higher": higher}
