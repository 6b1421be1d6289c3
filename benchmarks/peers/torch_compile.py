"""PyTorch's compiler: of the loss under autograd (it refuses second order), and of torch.func's whole meta-gradient.

The whole is traced either by torch.compile from its Python code, or by make_fx from the operations that it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers._modules import differentiable
from benchmarks.peers.plain import Gradient, plain
from benchmarks.peers.torch_func import reverse
from benchmarks.workloads import Workload

requirements: tuple[str, ...] = ()
shares_torch = True


def loss(work: Workload) -> Callable[[], Gradient]:
    torch.compiler.reset()
    return plain(replace(work, loss=torch.compile(work.loss, dynamic=False)))


def whole(work: Workload) -> Callable[[], Gradient]:
    torch.compiler.reset()
    theta = {name: p.detach() for name, p in work.theta.items()}
    meta_gradient = torch.compile(reverse(work, differentiable(work.model)), dynamic=False)

    def step() -> Gradient:
        with sdpa_kernel(SDPBackend.MATH):
            return meta_gradient(theta, work.support, work.query)

    return step


def traced(work: Workload) -> Callable[[], Gradient]:
    from torch._inductor import compile as inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    theta = {name: p.detach() for name, p in work.theta.items()}
    with sdpa_kernel(SDPBackend.MATH):
        graph = make_fx(reverse(work, differentiable(work.model)))(theta, work.support, work.query)
    compiled = inductor(graph, [theta, work.support, work.query])
    return lambda: compiled(theta, work.support, work.query)


methods = {
    "torch.compile of the loss": loss,
    "torch.compile of torch.func": whole,
    "make_fx of torch.func, Inductor": traced,
}
