"""torch.func: vmap over tasks. Layers of torch.nn for which vmap has no rule or a wrong one are rewritten by hand."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers._modules import differentiable
from benchmarks.peers.plain import Gradient, bound
from benchmarks.workloads import Workload

requirements: tuple[str, ...] = ()
shares_torch = True
Step = Callable[[], Gradient]


def reverse(work: Workload, model: nn.Module) -> Callable[..., Gradient]:
    """Return the meta-gradient as a function of theta, support and query, reverse over reverse."""

    def support_loss(phi: Gradient, support: tuple[Tensor, ...]) -> Tensor:
        return work.loss(bound(model, phi), support)

    def query_loss(theta: Gradient, support: tuple[Tensor, ...], query: tuple[Tensor, ...]) -> Tensor:
        phi = theta
        for _ in range(work.steps):
            phi = {name: phi[name] - work.lr * g for name, g in grad(support_loss)(phi, support).items()}
        return work.loss(bound(model, phi), query)

    return grad(lambda theta, *batches: vmap(query_loss, (None, 0, 0))(theta, *batches).sum() / work.tasks)


def forward(work: Workload, model: nn.Module) -> Callable[..., Gradient]:
    """Return the same function, forward over reverse: from the last step to the first, v -= lr * H(phi_k) v."""

    def one(theta: Gradient, support: tuple[Tensor, ...], query: tuple[Tensor, ...]) -> Gradient:
        support_grad = grad(lambda phi: work.loss(bound(model, phi), support))
        phis = [theta]
        for _ in range(work.steps):
            phis.append({name: phis[-1][name] - work.lr * g for name, g in support_grad(phis[-1]).items()})
        v = grad(lambda phi: work.loss(bound(model, phi), query))(phis.pop())
        for phi in reversed(phis):
            v = {name: v[name] - work.lr * hv for name, hv in jvp(support_grad, (phi,), (v,))[1].items()}
        return v

    def batch(theta: Gradient, *batches: tuple[Tensor, ...]) -> Gradient:
        return {name: g.sum(0) / work.tasks for name, g in vmap(one, (None, 0, 0))(theta, *batches).items()}

    return batch


def method(
    mode: Callable[..., Callable[..., Gradient]], chunks: int = 1, stock: bool = False
) -> Callable[[Workload], Step]:
    def prepare(work: Workload) -> Step:
        model = work.model if stock else differentiable(work.model)
        theta = {name: p.detach() for name, p in work.theta.items()}
        meta_gradient = mode(work, model)
        parts = [(a.chunk(chunks) for a in batch) for batch in (work.support, work.query)]
        batches = list(zip(*(zip(*part, strict=True) for part in parts), strict=True))

        def step() -> Gradient:
            with sdpa_kernel(SDPBackend.MATH):
                total = meta_gradient(theta, *batches[0])
                for batch in batches[1:]:
                    total = {name: total[name] + g for name, g in meta_gradient(theta, *batch).items()}
            return total

        return step

    return prepare


methods = {
    "torch.func, reverse over reverse": method(reverse),
    "torch.func, reverse over reverse, tasks in 4 chunks": method(reverse, chunks=4),
    "torch.func, forward over reverse": method(forward),
    "torch.func, forward over reverse, tasks in 4 chunks": method(forward, chunks=4),
    "torch.func, torch.nn's own layers": method(reverse, stock=True),
}
