"""TorchOpt: its functional SGD, one task at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.plain import Gradient, bound, by_backward
from benchmarks.workloads import Workload

requirements = ("torchopt==0.7.3",)
shares_torch = True


def torchopt(work: Workload) -> Callable[[], Gradient]:
    from torchopt import apply_updates, sgd

    theta = work.theta
    inner = sgd(lr=work.lr)

    def one(support: tuple[Tensor, ...], query: tuple[Tensor, ...]) -> Tensor:
        phi, state = theta, inner.init(theta)
        for _ in range(work.steps):
            loss = work.loss(bound(work.model, phi), support)
            grads = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            updates, state = inner.update(dict(zip(phi, grads, strict=True)), state, inplace=False)
            phi = apply_updates(phi, updates, inplace=False)
        return work.loss(bound(work.model, phi), query)

    return by_backward(work, one)


methods = {"TorchOpt": torchopt}
