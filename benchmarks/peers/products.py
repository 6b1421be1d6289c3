"""A large matrix product, torch.mm of 1024 x 1024 float32 matrices, which gives the machine's rate."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.workloads import Workload

requirements: tuple[str, ...] = ()
shares_torch = True
FLOP = 2 * 1024**3


def products(work: Workload) -> Callable[[], None]:
    a, b, out = torch.randn(3, 1024, 1024).unbind()

    def step() -> None:
        torch.mm(a, b, out=out)

    return step


methods = {"products": products}
