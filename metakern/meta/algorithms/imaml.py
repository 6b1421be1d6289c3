"""Implicit MAML: the meta-gradient at a minimum of the inner problem, whatever path led there.

    phi* = argmin S_t(phi) + (lambda / 2) |phi - theta|²
    dL/dtheta = mean_t lambda (H_t + lambda I)^-1 grad Q_t(phi*)

with H_t the Hessian of S_t at phi*. Memory does not grow with the number of inner steps. Rajeswaran, Finn, Kakade,
Levine 2019, "Meta-learning with implicit gradients", section 3; the Neumann series is that of Lorraine, Vicol, Duvenaud
2020, "Optimizing millions of hyperparameters by implicit differentiation", section 3.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metakern.meta.algorithms.maml import MAML
from metakern.meta.batches import Outer, PerStep, tasks_of
from metakern.meta.batching import Loss
from metakern.meta.engine import Prepared
from metakern.meta.unroll import Gradients, added, with_zeros
from metakern.optim import SGD, InnerOptimizer
from metakern.optim.base import State, Tensors, norms, positive, scaled

SOLVERS = ("cg", "neumann")


class IMAML(MAML):
    """MAML with implicit gradients, for inner loops that run close to a minimum.

    The inner loss is the loss of the support plus `strength / 2 * |phi - theta|²`, which `adapt` and `evaluate`
    minimise too. The gradient is exact at a minimum of it; away from one it is biased. Parameters that are not adapted
    get the implicit gradient too. A linear system is solved for each task, with a Hessian-vector product in each of
    `solver_steps` iterations.

    Args:
        model: The model, as `metakern.MAML` takes it.
        loss: `loss(model, batch)` returns the loss of one task, a scalar tensor.
        inner: The optimizer of the inner loop; by default `metakern.optim.SGD()`. Its hyper-parameters are fixed: the
            gradient does not depend on the path.
        steps: The number of inner steps.
        strength: The paper's lambda, positive.
        solver: "cg" (conjugate gradients, which needs H + lambda I to be positive definite), or "neumann" (the Neumann
            series, which converges where lambda exceeds the largest eigenvalue of H in size).
        solver_steps: The number of iterations of the solver.
        tolerance: The relative residual above which a call warns that the solver did not converge.
        **options: The other arguments of `metakern.MAML`, except `first_order`, `strategy` and `query_weights`.

    Attributes:
        residuals: The relative residual of each task's linear system at the last call, `[T]`; None before the first.

    Raises:
        TypeError: As `metakern.MAML` raises it.
        ValueError: As `metakern.MAML` raises it; also if a hyper-parameter of `inner` is learned, `strength` or
            `tolerance` is not positive, or `solver` or `solver_steps` has another value; at a call, if the inner steps
            have batches of their own.

    >>> import torch, metakern as mk
    >>> model = torch.nn.Linear(8, 4)
    >>> imaml = mk.IMAML(model, mk.losses.classification, mk.optim.SGD(lr=0.1), steps=50, strength=2.0)
    >>> x, y = torch.randn(5, 10, 8), torch.randint(4, (5, 10))
    >>> imaml((x, y), (x, y)).backward()
    >>> bool((imaml.residuals < 1e-3).all())
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        inner: InnerOptimizer | None = None,
        steps: int = 16,
        strength: float = 2.0,
        solver: str = "cg",
        solver_steps: int = 10,
        tolerance: float = 0.1,
        **options: Any,
    ) -> None:
        positive("IMAML", strength=strength, tolerance=tolerance)
        if solver not in SOLVERS:
            raise ValueError(f"IMAML: solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
        if not isinstance(solver_steps, int) or isinstance(solver_steps, bool) or solver_steps < 1:
            raise ValueError(f"IMAML: solver_steps must be an integer of at least 1, got {solver_steps!r}")
        inner = SGD() if inner is None else inner
        if isinstance(inner, InnerOptimizer) and any(p.requires_grad for p in inner.parameters()):
            raise ValueError(
                "IMAML: inner must have fixed hyper-parameters, as the gradient does not depend on the path"
            )
        super().__init__(model, loss, inner, steps, **options | {"strategy": "recompute"})
        self.strength, self.solver, self.solver_steps, self.tolerance = strength, solver, solver_steps, tolerance
        self.residuals: Tensor | None = None  # [T]

    def _gradients(self, support: Any, outer: Outer, *start: list[Tensor]) -> tuple[Tensor, Gradients, list[Tensor]]:
        if isinstance(support, PerStep):
            raise ValueError(
                "IMAML: support must be one batch for all inner steps, whose minimum is sought, got several"
            )
        found, gradients, leaves = super()._gradients(support, outer, *start)
        losses, self.residuals = found.unbind(1)
        if not (worst := self.residuals.max().item()) <= self.tolerance:
            warnings.warn(
                f"IMAML: the solver must reach a relative residual of {self.tolerance:g}, got {worst:.1e} after"
                f" {self.solver_steps} steps: raise strength, or solver_steps with solver='cg'",
                stacklevel=4,
            )
        return losses, gradients, leaves

    def _others(self) -> dict[str, Any]:
        return {"strength": self.strength, "solver": self.solver, "solver_steps": self.solver_steps}

    def _optimizer(self) -> InnerOptimizer:
        """Return the inner optimizer with the penalty; the same object as long as neither changes."""
        kept = self.__dict__.get("_proximal")
        if kept is None or (kept.inner, kept.strength) != (self.inner, self.strength):
            kept = self.__dict__["_proximal"] = Proximal(self.inner, self.strength)
        return kept

    def _meta_gradient(
        self, prepared: Prepared, support: Any, outer: Outer, *start: list[Tensor]
    ) -> list[Tensor | None]:
        unroll, strength = prepared.unroll, self.strength
        theta = prepared.theta(tasks_of(support))
        *_, phi = unroll.trajectory(theta, support, self.steps)
        losses, ct = unroll.of_query(phi, prepared.shared, outer, outer.last)
        n = len(phi)

        def products(v: Sequence[Tensor]) -> Gradients:
            return unroll.hessian_vector_product(phi, prepared.shared, support, v)[1]

        solve = _conjugate_gradients if self.solver == "cg" else _neumann
        of_phi = lambda v: with_zeros(products(v)[:n], phi)  # noqa: E731
        x, residuals = solve(of_phi, with_zeros(ct[:n], phi), strength, self.solver_steps)
        mixed = [None if t is None else -t for t in products(x)[n:]] if prepared.shared else []
        of_theta = [strength * t.sum(0) for t in x]
        return [torch.stack([losses, residuals], 1), *of_theta, *added(ct[n:], mixed)]


class Proximal(InnerOptimizer):
    """An inner optimizer whose gradients are those of the loss plus (strength / 2) |phi - phi_0|²."""

    def __init__(self, inner: InnerOptimizer, strength: float) -> None:
        super().__init__()
        self.inner, self.strength, self.takes_losses = inner, float(strength), inner.takes_losses

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        self.inner.prepare(adapted)

    def init(self, phi: Tensors) -> State:
        """Returns phi_0, then the state of the inner optimizer."""
        return (*phi, *self.inner.init(phi))

    def update(self, phi: Tensors, grads: Tensors, state: State, *losses: Tensor) -> tuple[list[Tensor], State]:
        start, rest = state[: len(phi)], state[len(phi) :]
        pulled = [g + self.strength * (p - p0) for p, g, p0 in zip(phi, grads, start, strict=True)]
        phi, rest = self.inner.update(phi, pulled, rest, *losses)
        return list(phi), (*start, *rest)


Product = Callable[[Sequence[Tensor]], list[Tensor]]


def _conjugate_gradients(product: Product, b: list[Tensor], shift: float, steps: int) -> tuple[list[Tensor], Tensor]:
    """Return x with (H + shift I) x = b for each task, and the relative residuals `[T]` (Hestenes, Stiefel 1952).

    `product(v)` returns H v. A task stands still once its residual is at rounding, or where H + shift I turns out not
    to be positive definite.
    """
    x, r, p = [torch.zeros_like(t) for t in b], b, b
    size = rr = norms(b).square()
    least = size * torch.finfo(size.dtype).eps ** 2
    zero = torch.zeros_like(size)
    for _ in range(steps):
        q = [h + shift * t for h, t in zip(product(p), p, strict=True)]
        curvature = _dot(p, q)
        goes = (rr > least) & (curvature > 0)
        alpha = torch.where(goes, rr / torch.where(goes, curvature, 1), zero)
        x = [s + t for s, t in zip(x, scaled(p, alpha), strict=True)]
        r = [s - t for s, t in zip(r, scaled(q, alpha), strict=True)]
        after = norms(r).square()
        beta = torch.where(goes, after / torch.where(goes, rr, 1), zero)
        p = [s + t for s, t in zip(r, scaled(p, beta), strict=True)]
        rr = after
    return x, (rr / torch.where(size > 0, size, 1)).sqrt()


def _neumann(product: Product, b: list[Tensor], shift: float, steps: int) -> tuple[list[Tensor], Tensor]:
    """Return x = sum_j (-H / shift)^j b / shift for each task, and the size `[T]` of the last term relative to b."""
    term, total = b, b
    for _ in range(steps):
        term = [h / -shift for h in product(term)]
        total = [s + t for s, t in zip(total, term, strict=True)]
    size = norms(b)
    return [t / shift for t in total], norms(term) / torch.where(size > 0, size, 1)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the scalar product over all tensors for each task, [T]."""
    return torch.stack([(x * y).flatten(1).sum(1) for x, y in zip(a, b, strict=True)]).sum(0)
