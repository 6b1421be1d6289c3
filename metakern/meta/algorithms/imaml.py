"""Implicit MAML: the meta-gradient at a minimum of the inner problem, whatever path led there.

    phi* = argmin S_t(phi) + (lambda / 2) |phi - theta|²
    dL/dtheta = mean_t lambda (H_t + lambda I)^-1 grad Q_t(phi*)

with H_t the Hessian of S_t at phi*. Memory does not grow with the number of inner steps. Rajeswaran, Finn, Kakade,
Levine 2019, "Meta-learning with implicit gradients", section 3; the Neumann series is that of Lorraine, Vicol, Duvenaud
2020, "Optimizing millions of hyperparameters by implicit differentiation", section 3.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metakern.meta.algorithms.maml import MAML, refuse
from metakern.meta.batches import Outer, PerStep, tasks_of
from metakern.meta.batching import Loss
from metakern.meta.engine import Prepared
from metakern.meta.parameters import Parameters
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

    Gradient descent reaches the minimum if its rate is below 2 / (h + lambda), with h the largest eigenvalue of the
    Hessian, and if rate times lambda times `steps` is at least about 3; a larger `strength` needs fewer steps.
    `inner_residuals` and `residuals` say how close the inner loop and the solver came.

    Args:
        model: The model, as `metakern.MAML` takes it.
        loss: `loss(model, batch)` returns the loss of one task, a scalar tensor.
        inner: The optimizer of the inner loop; by default SGD with the rate min(0.1, 1 / (2 strength)). Its
            hyper-parameters are fixed: the gradient does not depend on the path.
        steps: The number of inner steps.
        strength: The paper's lambda, positive.
        learn_strength: Whether the outer loop learns lambda, by its logarithm, from `strength` on.
        solver: "cg" (conjugate gradients, which needs H + lambda I to be positive definite), or "neumann" (the Neumann
            series, which converges where lambda exceeds the largest eigenvalue of H in size).
        solver_steps: The number of iterations of the solver.
        tolerance: The residual of the inner loop or of the solver above which a call warns, once for each of them.
        keep_solutions: Whether a call keeps the minimum of each task in `solutions`, for the `start` of a later one.
        **options: The other arguments of `metakern.MAML`, except `first_order`, `strategy` and `query_weights`.

    Attributes:
        inner_residuals: How far from a minimum each inner loop ended at the last call, `[T]`, from 0 (at a minimum) to
            1 (at theta): `|g + d| / (|g| + |d|)`, with g the gradient of the support loss and d that of the penalty.
        residuals: The relative residual of each task's linear system at the last call, `[T]`; None before the first.
        solutions: The minimum of each task at the last call, as `adapt` returns it, with `keep_solutions`; or None.
        log_strength: The logarithm of lambda, a parameter, with `learn_strength`; or None.

    Raises:
        TypeError: As `metakern.MAML` raises it.
        ValueError: As `metakern.MAML` raises it; also if a hyper-parameter of `inner` is learned, `strength` or
            `tolerance` is not positive, `solver` or `solver_steps` has another value, or `query_weights` is not None;
            at a call, if the inner steps have batches of their own.

    >>> import torch, metakern as mk
    >>> model = torch.nn.Linear(8, 4)
    >>> imaml = mk.IMAML(model, mk.losses.classification, steps=30)
    >>> x, y = torch.randn(5, 10, 8), torch.randint(4, (5, 10))
    >>> imaml((x, y), (x, y)).backward()
    >>> bool((imaml.residuals < 1e-3).all()), bool((imaml.inner_residuals < 0.05).all())
    (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        inner: InnerOptimizer | None = None,
        steps: int = 16,
        strength: float = 2.0,
        learn_strength: bool = False,
        solver: str = "cg",
        solver_steps: int = 10,
        tolerance: float = 0.1,
        keep_solutions: bool = False,
        **options: Any,
    ) -> None:
        positive("IMAML", strength=strength, tolerance=tolerance)
        if solver not in SOLVERS:
            raise ValueError(f"IMAML: solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
        if not isinstance(solver_steps, int) or isinstance(solver_steps, bool) or solver_steps < 1:
            raise ValueError(f"IMAML: solver_steps must be an integer of at least 1, got {solver_steps!r}")
        for name, value in (("learn_strength", learn_strength), ("keep_solutions", keep_solutions)):
            if not isinstance(value, bool):
                raise ValueError(f"IMAML: {name} must be True or False, got {value!r}")
        inner = SGD(min(0.1, 0.5 / strength)) if inner is None else inner
        _without(options.get("query_weights"))
        refuse("IMAML", options, "first_order", "strategy")
        super().__init__(model, loss, inner, steps, **options | {"strategy": "recompute"})
        if any(p.requires_grad for p in inner.parameters()):  # which values for each parameter have only now
            raise ValueError(
                "IMAML: inner must have fixed hyper-parameters, as the gradient does not depend on the path"
            )
        like = next(model.parameters())
        self.log_strength = nn.Parameter(like.new_tensor(math.log(strength))) if learn_strength else None
        self.strength, self.solver, self.solver_steps, self.tolerance = strength, solver, solver_steps, tolerance
        self.keep_solutions = keep_solutions
        self.residuals: Tensor | None = None  # [T]
        self.inner_residuals: Tensor | None = None  # [T]
        self.solutions: dict[str, Tensor] | None = None
        self._warned: set[str] = set()

    @property
    def strength(self) -> float:
        """The paper's lambda; it may be set between calls."""
        return self._strength if self.log_strength is None else self.log_strength.exp().item()

    @strength.setter
    def strength(self, value: float) -> None:
        positive("IMAML", strength=value)
        self._strength = float(value)
        if self.log_strength is not None:
            self.log_strength.data.fill_(math.log(value))

    def forward(self, support: Any, query: Any, start: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the mean query loss over the tasks, as `metakern.MAML` does.

        Args:
            support: The batch of the inner loop, a tree of tensors `[T, ...]`.
            query: The batch of the outer loss, a tree of tensors `[T, ...]`, with the same tasks.
            start: Where the inner loop begins in place of theta, for each task (a warm start), as `adapt` returns it:
                such as `solutions` of an earlier call with the same tasks. The penalty is that around theta, so the
                minimum stays the same, and fewer steps reach it.

        Raises:
            ValueError: As `metakern.MAML` and its `adapt` raise it, or as the class says.
        """
        _without(self.query_weights)
        return self._mean(support, query, start)

    def _gradients(self, support: Any, outer: Outer, *start: list[Tensor]) -> tuple[Tensor, Gradients, list[Tensor]]:
        if isinstance(support, PerStep):
            raise ValueError(
                "IMAML: support must be one batch for all inner steps, whose minimum is sought, got several"
            )
        found, gradients, leaves = super()._gradients(support, outer, *start)
        losses, self.residuals, self.inner_residuals = found[:, :3].unbind(1)
        self.solutions = self._unpacked(found[:, 3:]) if self.keep_solutions else None
        self._judge("inner loop", self.inner_residuals, f"{self.steps} steps: raise strength, steps or the inner rate")
        cure = f"{self.solver_steps} steps: raise strength, or solver_steps with solver='cg'"
        self._judge("solver", self.residuals, cure)
        return losses, gradients, leaves

    def _judge(self, what: str, residuals: Tensor, cure: str) -> None:
        """Warn where a task's residual exceeds the tolerance, the first time."""
        if what not in self._warned and not (worst := residuals.max().item()) <= self.tolerance:
            self._warned.add(what)
            warnings.warn(
                f"IMAML: the {what} must reach a relative residual of {self.tolerance:g}, got {worst:.1e} after {cure}",
                stacklevel=7,
            )

    def _unpacked(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the adapted parameters `[T, *shape]` by name, given all their numbers in a row for each task."""
        adapted = Parameters(self.model, self._engine.adapt).adapted
        parts = zip(adapted.items(), rows.split([p.numel() for p in adapted.values()], 1), strict=True)
        return {name: part.reshape(-1, *p.shape).to(p.dtype) for (name, p), part in parts}

    def _others(self) -> dict[str, Any]:
        fixed = self.strength if self.log_strength is None else None
        own = {"solver": self.solver, "solver_steps": self.solver_steps, "keep_solutions": self.keep_solutions}
        return {"strength": fixed, **own}

    def _optimizer(self) -> InnerOptimizer:
        """Return the inner optimizer with the penalty; the same object as long as neither changes."""
        strength = self._strength if self.log_strength is None else self.log_strength
        kept = self.__dict__.get("_proximal")
        if kept is None or (kept.inner, kept.given) != (self.inner, strength):
            kept = self.__dict__["_proximal"] = Proximal(self.inner, strength)
        return kept

    def _trajectory(self, prepared: Prepared, support: Any, steps: int, *start: list[Tensor]) -> Iterator[list[Tensor]]:
        return self._loop(prepared, *start).trajectory(prepared.theta(tasks_of(support)), support, steps, *start)

    def _meta_gradient(
        self, prepared: Prepared, support: Any, outer: Outer, *start: list[Tensor]
    ) -> list[Tensor | None]:
        unroll, inner = prepared.unroll, prepared.unroll.inner
        assert isinstance(inner, Proximal)
        theta = prepared.theta(tasks_of(support))
        *_, phi = self._trajectory(prepared, support, self.steps, *start)
        losses, ct = unroll.of_query(phi, prepared.shared, outer, outer.last)
        n, slope = len(phi), list[Tensor]()

        def products(v: Sequence[Tensor]) -> Gradients:
            slope[:], found = unroll.hessian_vector_product(phi, prepared.shared, support, v)
            return found

        solve = _conjugate_gradients if self.solver == "cg" else _neumann
        of_phi = lambda v: with_zeros(products(v)[:n], phi)  # noqa: E731
        with torch.no_grad():
            strength = inner.strength(phi[0])
        x, residuals = solve(of_phi, with_zeros(ct[:n], phi), strength, self.solver_steps)
        mixed = [None if t is None else -t for t in products(x)[n:]] if prepared.shared else []
        moved = [p - p0 for p, p0 in zip(phi, theta, strict=True)]
        pull = [strength * t for t in moved]
        size = norms(slope) + norms(pull)
        rest = norms([g + t for g, t in zip(slope, pull, strict=True)])
        rounding = self.steps * torch.finfo(size.dtype).eps * strength * norms(phi)  # each step rounds phi
        rest = torch.where(rest > rounding, rest / torch.where(size > 0, size, 1), 0)
        kept = [p.flatten(1) for p in phi] if self.keep_solutions else []
        of_strength = [-strength * _dot(x, moved).sum()] * len(inner.hyper_parameters())
        return [
            torch.cat([torch.stack([losses, residuals, rest], 1), *kept], 1),
            *(strength * t.sum(0) for t in x),
            *added(ct[n:], mixed),
            *of_strength,
        ]


class Proximal(InnerOptimizer):
    """An inner optimizer whose gradients are those of the loss plus (strength / 2) |phi - phi_0|².

    `strength`: a number, or a parameter with its logarithm.
    """

    def __init__(self, inner: InnerOptimizer, strength: float | nn.Parameter) -> None:
        super().__init__()
        self.inner, self.given, self.takes_losses = inner, strength, inner.takes_losses

    def strength(self, like: Tensor) -> float | Tensor:
        """Returns lambda; a learned one is a scalar tensor with the dtype and device of `like`."""
        return self.given.exp().to(like) if isinstance(self.given, Tensor) else self.given

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        self.inner.prepare(adapted)

    def init(self, phi: Tensors) -> State:
        """Returns phi_0, then the state of the inner optimizer."""
        return (*phi, *self.inner.init(phi))

    def update(self, phi: Tensors, grads: Tensors, state: State, *losses: Tensor) -> tuple[list[Tensor], State]:
        start, rest = state[: len(phi)], state[len(phi) :]
        pulled = [g + self.strength(p) * (p - p0) for p, g, p0 in zip(phi, grads, start, strict=True)]
        phi, rest = self.inner.update(phi, pulled, rest, *losses)
        return list(phi), (*start, *rest)


def _without(query_weights: Any) -> None:
    if query_weights is not None:
        raise ValueError(
            f"IMAML: query_weights must be None, as the query loss at the minimum alone counts, got {query_weights!r}"
        )


Product = Callable[[Sequence[Tensor]], list[Tensor]]


def _conjugate_gradients(
    product: Product, b: list[Tensor], shift: float | Tensor, steps: int
) -> tuple[list[Tensor], Tensor]:
    """Return x with (H + shift I) x = b for each task, and the relative residuals `[T]` (Hestenes, Stiefel 1952).

    `product(v)` returns H v. A task stands still once its residual is at rounding, or H + shift I turns out not to be
    positive definite.
    """
    x, r, p = [torch.zeros_like(t) for t in b], b, b
    size = rr = norms(b).square()
    least = size * torch.finfo(size.dtype).eps ** 2
    zero, goes = torch.zeros_like(size), torch.ones_like(size, dtype=torch.bool)
    for _ in range(steps):
        q = [h + shift * t for h, t in zip(product(p), p, strict=True)]
        curvature = _dot(p, q)
        goes = goes & (rr > least) & (curvature > 0)
        alpha = torch.where(goes, rr / torch.where(goes, curvature, 1), zero)
        x = [s + t for s, t in zip(x, scaled(p, alpha), strict=True)]
        r = [s - t for s, t in zip(r, scaled(q, alpha), strict=True)]
        after = norms(r).square()
        beta = torch.where(goes, after / torch.where(goes, rr, 1), zero)
        p = [s + t for s, t in zip(r, scaled(p, beta), strict=True)]
        rr = after
    return x, (rr / torch.where(size > 0, size, 1)).sqrt()


def _neumann(product: Product, b: list[Tensor], shift: float | Tensor, steps: int) -> tuple[list[Tensor], Tensor]:
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
