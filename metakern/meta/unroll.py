"""The inner loop and its exact meta-gradient, by two strategies that give the same numbers.

    phi_0 = theta        phi_{k+1}, s_{k+1} = U(phi_k, grad S(phi_k), s_k; h)        L = sum_t Q_t(phi_K)

store      Keeps the graph of all K steps and differentiates it once: the least arithmetic, and the memory of K steps.
recompute  Keeps phi_k and s_k of some steps (and their gradients, where U needs them) and pulls the cotangent back one
           step at a time: through U, which gives ct_g, and then by one Hessian-vector product, H(phi_k) ct_g. Besides
           what it keeps, it takes the memory of one step. The steps between `snapshots` are computed again when they
           are needed (Griewank, Walther 2000, "Algorithm 799: revolve").

The Hessian-vector product is taken forward over reverse (dual tensors through an ordinary `autograd.grad`), or reverse
over reverse where a model has an operation without forward mode; both are exact. Parameters that the inner loop doesn't
adapt (`shared`) get their cotangents from the same products: the mixed second derivative times ct_g.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import comb
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from metakern.meta.batching import Batching
from metakern.native.record import recordable
from metakern.optim import InnerOptimizer

Gradients = Sequence[Tensor | None]


@dataclass(frozen=True)
class Result:
    """Query losses [T], and the gradients of their sum with respect to theta, shared and hyper-parameters."""

    losses: Tensor
    theta: Gradients
    shared: Gradients
    hyper: Gradients


@dataclass(frozen=True)
class Unroll:
    """An inner loop: its batching, optimizer and number of steps, and how it is differentiated."""

    batching: Batching
    inner: InnerOptimizer
    steps: int
    first_order: bool = False
    hvp: str = "forward"  # or "reverse": the mode of the outer derivative of Hessian-vector products
    python: bool = False  # whether model or loss draw from Python's or NumPy's generators too
    graph: bool = False  # whether the loss takes derivatives itself, and so needs gradients enabled
    snapshots: int | None = None  # the most points that `recompute` keeps besides the first; None for all

    def trajectory(self, theta: Sequence[Tensor], support: Any, steps: int) -> Iterator[list[Tensor]]:
        """Yield phi_0, …, phi_steps, without a graph."""
        point = self._start(theta)
        yield point.phi
        for _ in range(steps):
            _, point = self._step(point, support)
            yield point.phi

    def _start(self, theta: Sequence[Tensor]) -> _Point:
        return _Point(0, list(theta), self.inner.init(theta), Random(theta[0].device, self.python))

    def _step(self, point: _Point, support: Any) -> tuple[list[Tensor], _Point]:
        """Return the gradients at a point, and the point after one inner step from there."""
        grads = self._grads(point.phi, support)
        with torch.no_grad():
            phi, state = self.inner.update(point.phi, grads, point.state)
        return grads, _Point(point.k + 1, phi, state, Random(phi[0].device, self.python))

    def _advance(self, points: list[_Point], support: Any, k: int, keeps_grads: bool) -> _Point:
        """Return point k, computed from the last of `points`, to which it adds points on the way."""
        most = self.steps if self.snapshots is None else self.snapshots
        point, kept = points[-1], points[-1].k
        point.random.restore()
        while point.k < k:
            grads, after = self._step(point, support)
            if keeps_grads and point is points[-1]:
                points[-1] = replace(point, grads=grads)
            point = after
            if point.k < k and point.k == kept + _first_stop(k - kept, most + 1 - len(points)):
                points.append(point)
                kept = point.k
        return point

    def _grads(self, phi: Sequence[Tensor], batch: Any) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in phi]
            return with_zeros(derivatives(self.batching.losses(leaves, batch).sum(), leaves), phi)

    def query(self, phi: Sequence[Tensor], query: Any) -> Tensor:
        """Return Q_t(phi) for each task, [T], without a graph."""
        with torch.set_grad_enabled(self.graph):
            return self.batching.losses(phi, query).detach()

    def store(self, theta: Sequence[Tensor], shared: Sequence[Tensor], support: Any, query: Any) -> Result:
        """Return the meta-gradient by one reverse pass through the graph of the whole inner loop."""
        hyper = self.inner.hyper_parameters()
        with torch.enable_grad():
            theta = [p.detach().requires_grad_() for p in theta]
            phi, state = list(theta), self.inner.init(theta)
            for _ in range(self.steps):
                total = self.batching.losses(phi, support).sum()
                grads = with_zeros(derivatives(total, phi, create_graph=not self.first_order), phi)
                phi, state = self.inner.update(phi, grads, state)
            losses = self.batching.losses(phi, query)
            ct = derivatives(losses.sum(), [*theta, *shared, *hyper])
        return _result(losses, ct, len(theta), len(shared))

    def recompute(self, theta: Sequence[Tensor], shared: Sequence[Tensor], support: Any, query: Any) -> Result:
        """Return the meta-gradient by pulling the cotangent back one step at a time, from the last to the first."""
        n, hyper = len(theta), self.inner.hyper_parameters()
        keeps_grads = not self.inner.affine or (self.first_order and bool(hyper))
        points = [self._start(theta)]
        phi = self._advance(points, support, self.steps, keeps_grads).phi
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in phi]
            losses = self.batching.losses(leaves, query)
            ct = derivatives(losses.sum(), [*leaves, *shared])
        after = Random(phi[0].device, self.python)
        ct_phi, ct_shared = ct[:n], ct[n:]
        ct_state: Gradients = [None] * len(points[0].state)
        ct_hyper: Gradients = [None] * len(hyper)
        for k in reversed(range(self.steps)):
            if all(c is None for c in ct_phi):
                break
            point = points.pop() if points[-1].k == k else self._advance(points, support, k, keeps_grads)
            point.random.restore()
            if point.grads is not None:
                grads = point.grads
            else:  # an affine update's pullback needs no gradients
                grads = self._grads(point.phi, support) if keeps_grads else point.phi
            direct, ct_grads, next_ct_state, _ = self._pullback(point, grads, ct_phi, ct_state)
            if not self.first_order:
                point.random.restore()
                grads, products = self.hessian_vector_product(point.phi, shared, support, ct_grads)
                direct, ct_shared = added(direct, products[:n]), added(ct_shared, products[n:])
            if hyper:
                ct_hyper = added(ct_hyper, self._pullback(point, grads, ct_phi, ct_state)[3])
            ct_phi, ct_state = direct, next_ct_state
        after.restore()
        return _result(losses, [*ct_phi, *ct_shared, *ct_hyper], n, len(shared))

    def _pullback(
        self, point: _Point, grads: Sequence[Tensor], ct_phi: Gradients, ct_state: Gradients
    ) -> tuple[Gradients, Gradients, Gradients, Gradients]:
        """Return the cotangents of phi, grads, state and hyper-parameters, given those of the update's results."""
        before = [[t.detach().requires_grad_() for t in group] for group in (point.phi, grads, point.state)]
        groups: list[list[Tensor]] = [*before, [*self.inner.hyper_parameters()]]
        with torch.enable_grad():
            phi, state = self.inner.update(before[0], before[1], tuple(before[2]))
            pairs = [(y, ct) for y, ct in zip([*phi, *state], [*ct_phi, *ct_state], strict=True) if ct is not None]
            ct = derivatives([y for y, _ in pairs], [t for group in groups for t in group], [ct for _, ct in pairs])
        rest = iter(ct)
        of_phi, of_grads, of_state, of_hyper = ([next(rest) for _ in group] for group in groups)
        return of_phi, of_grads, of_state, of_hyper

    def hessian_vector_product(
        self, phi: Sequence[Tensor], shared: Sequence[Tensor], batch: Any, v: Gradients
    ) -> tuple[list[Tensor], Gradients]:
        """Return the gradient of S with respect to phi, and the products of [∂²S/∂phi², ∂²S/∂shared∂phi] with v."""
        product = self._forward_over_reverse if self.hvp == "forward" else self._reverse_over_reverse
        grads, products = product(phi, shared, batch, v)
        return with_zeros(grads, phi), products

    def _forward_over_reverse(
        self, phi: Sequence[Tensor], shared: Sequence[Tensor], batch: Any, v: Gradients
    ) -> tuple[Gradients, Gradients]:
        with torch.enable_grad(), forward_ad.dual_level():
            # A tangent has its primal's strides, so an expanded theta becomes a copy for each task.
            leaves = [p.detach().contiguous().requires_grad_() for p in phi]
            duals = [p if t is None else forward_ad.make_dual(p, t) for p, t in zip(leaves, v, strict=True)]
            ct = derivatives(self.batching.losses(duals, batch).sum(), [*duals, *shared])
            parts = [(None, None) if c is None else forward_ad.unpack_dual(c) for c in ct]
            return [None if c is None else c.detach() for c, _ in parts[: len(phi)]], [t for _, t in parts]

    def _reverse_over_reverse(
        self, phi: Sequence[Tensor], shared: Sequence[Tensor], batch: Any, v: Gradients
    ) -> tuple[Gradients, Gradients]:
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in phi]
            grads = derivatives(self.batching.losses(leaves, batch).sum(), leaves, create_graph=True)
            pairs = [(g, t) for g, t in zip(grads, v, strict=True) if g is not None and t is not None]
            products = derivatives([g for g, _ in pairs], [*leaves, *shared], [t for _, t in pairs])
        return [None if g is None else g.detach() for g in grads], products


@dataclass(frozen=True)
class _Point:
    """An inner loop before step k: parameters, optimizer state and random state, and maybe the gradients of step k."""

    k: int
    phi: list[Tensor]
    state: tuple[Tensor, ...]
    random: Random
    grads: list[Tensor] | None = None


def _first_stop(steps: int, snapshots: int) -> int:
    """Return after how many of `steps` steps a point is to be kept next, so that the fewest steps are computed again.

    The first point is kept, and so can be `snapshots` more. With s points and at most r computations of any step, a
    cotangent can be pulled back through binomial(s + r, s) steps (Griewank, Walther 2000, section 2).

    >>> _first_stop(16, 15), _first_stop(16, 3), _first_stop(16, 0)
    (1, 6, 16)
    """
    if snapshots <= 0 or steps <= 1:
        return steps
    s, r = snapshots + 1, 1
    while comb(s + r, s) < steps:
        r += 1
    return min(comb(s + r - 1, s), steps - comb(s + r - 2, s - 1))


def fewest_snapshots(steps: int) -> int:
    """Return the fewest points, besides the first, with which `recompute` computes no step more than three times.

    They are about the square root of twice the number of steps.

    >>> [fewest_snapshots(steps) for steps in (3, 6, 16, 64)]
    [0, 1, 4, 9]
    """
    return next(s for s in count() if comb(s + 3, 2) >= steps)


class Random:
    """The state of the random generators, so that a step that is computed again draws the same dropout masks.

    With `python`, it holds the states of Python's and NumPy's generators too.
    """

    def __init__(self, device: torch.device, python: bool = False) -> None:
        self.device, self.states = device, random_states(device)
        self.python = (random.getstate(), np.random.get_state()) if python else None

    def restore(self) -> None:
        set_random_states(self.device, *self.states)
        if self.python:
            random.setstate(self.python[0])
            np.random.set_state(self.python[1])


@recordable(has_side_effects=True)
def random_states(device: torch.device) -> tuple[Tensor, ...]:
    return torch.get_rng_state(), *((torch.cuda.get_rng_state(device),) if device.type == "cuda" else ())


@recordable(has_side_effects=True)
def set_random_states(device: torch.device, cpu: Tensor, *cuda: Tensor) -> None:
    torch.set_rng_state(cpu)
    for state in cuda:
        torch.cuda.set_rng_state(state, device)


def derivatives(
    outputs: Tensor | list[Tensor],
    inputs: Sequence[Tensor],
    ct: list[Tensor] | None = None,
    create_graph: bool = False,
) -> Gradients:
    """Return `torch.autograd.grad`, with None for inputs that no output depends on or that require no gradient."""
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    cts: list[Tensor | None] = list(ct) if ct is not None else [None] * len(outputs)
    live = [(y, c) for y, c in zip(outputs, cts, strict=True) if y.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    if not live or not wanted:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            [y for y, _ in live], wanted, [c for _, c in live], create_graph=create_graph, allow_unused=True
        )
    )
    return [next(found) if x.requires_grad else None for x in inputs]


def with_zeros(values: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Return the values, with zeros shaped as in `like` in place of None."""
    return [torch.zeros_like(b) if a is None else a for a, b in zip(values, like, strict=True)]


def added(a: Gradients, b: Gradients) -> Gradients:
    """Return the sums of gradients, in which None counts as zero."""
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


def _result(losses: Tensor, ct: Gradients, n: int, shared: int) -> Result:
    """Return the result; theta's gradients, one for each task of the chunk, are summed over the tasks."""
    theta = [None if c is None else c.sum(0) for c in ct[:n]]
    return Result(losses.detach(), theta, ct[n : n + shared], ct[n + shared :])
