"""Plain PyTorch: ordinary autograd, one task at a time, with PyTorch's twice differentiable attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.workloads import Workload

requirements: tuple[str, ...] = ()
shares_torch = True
Gradient = dict[str, Any]  # {name of a parameter: tensor}


def bound(model: nn.Module, phi: Gradient) -> Callable[..., Tensor]:
    """Return a function that calls the model with the weights phi."""
    return lambda *args: functional_call(model, phi, args)


def by_backward(
    work: Workload, one: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]
) -> Callable[[], Gradient]:
    """Return a function that computes the meta-gradient by backward. `one(support, query)` is a task's query loss."""

    def step() -> Gradient:
        work.model.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            for t in range(work.tasks):
                support, query = (tuple(a[t] for a in batch) for batch in (work.support, work.query))
                (one(support, query) / work.tasks).backward()
        return {name: p.grad for name, p in work.theta.items()}

    return step


def loop(work: Workload, create_graph: bool) -> Callable[[], Gradient]:
    theta = work.theta

    def one(support: tuple[Tensor, ...], query: tuple[Tensor, ...]) -> Tensor:
        phi = theta
        for _ in range(work.steps):
            loss = work.loss(bound(work.model, phi), support)
            grads = torch.autograd.grad(loss, list(phi.values()), create_graph=create_graph)
            phi = {name: p - work.lr * g for (name, p), g in zip(phi.items(), grads, strict=True)}
        return work.loss(bound(work.model, phi), query)

    return by_backward(work, one)


def plain(work: Workload) -> Callable[[], Gradient]:
    return loop(work, create_graph=True)


def first_order(work: Workload) -> Callable[[], Gradient]:
    return loop(work, create_graph=False)


methods = {"plain PyTorch": plain, "plain PyTorch, first order": first_order}
