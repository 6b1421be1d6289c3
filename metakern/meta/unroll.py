"""The inner loop and its exact meta-gradient, by two strategies that give the same numbers.

    phi_0 = theta        phi_{k+1}, s_{k+1} = U(phi_k, grad S(phi_k), s_k; h)        L = sum_t sum_k w_tk Q_t(phi_k)

store      Keeps the graph of all K steps and differentiates it once: the least arithmetic, and the memory of K steps.
recompute  Keeps phi_k and s_k of some steps (and their gradients, where U needs them) and pulls the cotangent back one
           step at a time: through U, which gives ct_g, and then by one Hessian-vector product, H(phi_k) ct_g. Where
           U reads the losses S too, the same pass adds their gradients, weighted by ct_S. Besides what it keeps, it
           takes the memory of one step. The steps between `snapshots` are computed again when they are needed
           (Griewank, Walther 2000, "Algorithm 799: revolve").

The Hessian-vector product is taken forward over reverse (dual tensors through an ordinary `autograd.grad`), or reverse
over reverse where a model has an operation without forward mode; both are exact. Parameters that the inner loop doesn't
adapt (`shared`) get their cotangents from the same products: the mixed second derivative times ct_g.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import count
from math import comb
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from metakern.meta.batches import Outer, at_step
from metakern.meta.batching import Batching
from metakern.native.record import in_cuda_graph, recordable
from metakern.optim import InnerOptimizer
from metakern.optim.base import State

Gradients = Sequence[Tensor | None]


@dataclass(frozen=True)
class Result:
    """Outer losses [T], and the gradients of their sum with respect to theta, shared and hyper-parameters.

    Those of theta are one for each task, [T, *shape], or the sum over the tasks, [1, *shape].
    """

    losses: Tensor
    theta: Gradients
    shared: Gradients
    hyper: Gradients

    @property
    def summed(self) -> Gradients:
        """The gradients of theta, summed over the tasks, which share it."""
        return [None if c is None else c[0] if len(c) == 1 else c.sum(0) for c in self.theta]


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

    def trajectory(
        self, theta: Sequence[Tensor], support: Any, steps: int, start: Sequence[Tensor] | None = None
    ) -> Iterator[list[Tensor]]:
        """Yield phi_0, …, phi_steps, without a graph.

        phi_0 is `start`, or theta, which the optimizer's first state is made from in either case.
        """
        point = self._start(self.initial(theta, steps))
        if start is not None:
            point = replace(point, phi=list(start))
        yield point.phi
        for _ in range(steps):
            _, point = self._step(point, support)
            yield point.phi

    def initial(self, theta: Sequence[Tensor], steps: int) -> list[Tensor]:
        """Return phi_0 of an inner loop of so many steps, given the value of each adapted parameter, [T, *shape]."""
        return list(theta)

    def formed(self, phi: Sequence[Tensor]) -> list[Tensor]:
        """Return the value of each adapted parameter at phi, [T, *shape]."""
        return list(phi)

    def _start(self, phi: list[Tensor]) -> Point:
        return Point(0, phi, self.inner.init(phi), Random(phi[0].device, self.python))

    def _step(self, point: Point, support: Any) -> tuple[Slope, Point]:
        """Return the slope at a point, and the point after one inner step from there."""
        slope = self.slope(point.phi, at_step(support, point.k))
        with torch.no_grad():
            phi, state = self._updated(point.phi, slope, point.state)
        return slope, Point(point.k + 1, phi, state, Random(phi[0].device, self.python))

    def _updated(self, phi: Sequence[Tensor], slope: Slope, state: State) -> tuple[list[Tensor], State]:
        losses = (slope.losses,) if self.inner.takes_losses else ()
        return self.inner.update(phi, slope.grads, state, *losses)

    def _advance(self, points: list[Point], support: Any, k: int, keeps_slopes: bool) -> Point:
        """Return point k, computed from the last of `points`, to which it adds points on the way."""
        most = self.steps if self.snapshots is None else self.snapshots
        point, kept = points[-1], points[-1].k
        point.random.restore()
        while point.k < k:
            slope, after = self._step(point, support)
            if keeps_slopes and point is points[-1]:
                points[-1] = replace(point, slope=slope)
            point = after
            if point.k < k and point.k == kept + _first_stop(k - kept, most + 1 - len(points)):
                points.append(point)
                kept = point.k
        return point

    def slope(self, phi: Sequence[Tensor], batch: Any) -> Slope:
        """Return the slope at phi, without a graph."""
        with torch.enable_grad():
            return self._differentiated([p.detach().requires_grad_() for p in phi], batch, create_graph=False)

    def _differentiated(self, phi: Sequence[Tensor], batch: Any, create_graph: bool) -> Slope:
        """Return the slope at phi, with its graph or without."""
        losses = self.batching.losses(phi, batch)
        grads = with_zeros(derivatives(losses.sum(), phi, create_graph=create_graph), phi)
        return Slope(grads, losses if create_graph else losses.detach())

    def query(self, phi: Sequence[Tensor], query: Any) -> Tensor:
        """Return Q_t(phi) for each task, [T], without a graph."""
        with torch.set_grad_enabled(self.graph):
            return self.batching.losses(phi, query).detach()

    def store(self, theta: Sequence[Tensor], shared: Sequence[Tensor], support: Any, outer: Outer) -> Result:
        """Return the meta-gradient by one reverse pass through the graph of the whole inner loop."""
        hyper, taken = self.inner.hyper_parameters(), list[Tensor]()
        with torch.enable_grad():
            theta = [p.detach().requires_grad_() for p in self.initial(theta, outer.last)]
            phi, state = list(theta), self.inner.init(theta)
            for k in range(outer.last + 1):
                if k in outer.steps:
                    taken.append(outer.weighted(self.batching.losses(phi, at_step(outer.batch, k)), k))
                if k < outer.last:
                    slope = self._differentiated(phi, at_step(support, k), create_graph=not self.first_order)
                    phi, state = self._updated(phi, slope, state)
            losses = reduce(torch.add, taken)
            ct = derivatives(losses.sum(), [*theta, *shared, *hyper])
        n, m = len(theta), len(theta) + len(shared)
        return Result(losses.detach(), ct[:n], ct[n:m], ct[m:])

    def recompute(self, theta: Sequence[Tensor], shared: Sequence[Tensor], support: Any, outer: Outer) -> Result:
        """Return the meta-gradient by pulling the cotangent back one step at a time, from the last to the first."""
        n, hyper = len(theta), self.inner.hyper_parameters()
        keeps_slopes = not self.inner.affine or self.inner.takes_losses or (self.first_order and bool(hyper))
        start = self.initial(theta, outer.last)
        points = [self._start(start)]
        phi = self._advance(points, support, outer.last, keeps_slopes).phi
        losses, ct = self.of_query(phi, shared, outer, outer.last)
        after = Random(phi[0].device, self.python)
        ct_phi, ct_shared = ct[: len(phi)], ct[len(phi) :]
        ct_state: Gradients = [None] * len(points[0].state)
        ct_hyper: Gradients = [None] * len(hyper)
        for k in reversed(range(outer.last)):
            reached = any(c is not None for c in (*ct_phi, *ct_state))
            if not reached and k < outer.steps[0]:
                break
            point = points.pop() if points[-1].k == k else self._advance(points, support, k, keeps_slopes)
            m = len(point.phi)
            if reached:
                batch = at_step(support, k)
                point.random.restore()
                if point.slope is not None:
                    slope = point.slope
                else:  # an affine update's pullback needs no gradients
                    slope = self.slope(point.phi, batch) if keeps_slopes else Slope(point.phi, losses)
                direct, ct_slope, next_ct_state, _ = self._pullback(point, slope, ct_phi, ct_state)
                if not self.first_order and any(c is not None for c in ct_slope):
                    point.random.restore()
                    grads, products = self.hessian_vector_product(point.phi, shared, batch, ct_slope[:n], *ct_slope[n:])
                    slope = replace(slope, grads=grads)
                    direct, ct_shared = added(direct, products[:m]), added(ct_shared, products[m:])
                if hyper:
                    ct_hyper = added(ct_hyper, self._pullback(point, slope, ct_phi, ct_state)[3])
                ct_phi, ct_state = direct, next_ct_state
            if k in outer.steps:
                after.restore()
                found, ct = self.of_query(point.phi, shared, outer, k)
                after = Random(phi[0].device, self.python)
                losses, ct_phi, ct_shared = losses + found, added(ct_phi, ct[:m]), added(ct_shared, ct[m:])
        direct, of_hyper = self._initial_pullback(start, ct_state)
        after.restore()
        return Result(losses.detach(), added(ct_phi, direct), ct_shared, added(ct_hyper, of_hyper))

    def of_query(
        self, phi: Sequence[Tensor], shared: Sequence[Tensor], outer: Outer, k: int
    ) -> tuple[Tensor, Gradients]:
        """Return the weighted query losses after k steps, [T], and the gradients of their sum (phi, then shared)."""
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in phi]
            losses = outer.weighted(self.batching.losses(leaves, at_step(outer.batch, k)), k)
            ct = derivatives(losses.sum(), [*leaves, *shared])
        return losses.detach(), ct

    def _pullback(
        self, point: Point, slope: Slope, ct_phi: Gradients, ct_state: Gradients
    ) -> tuple[Gradients, Gradients, Gradients, Gradients]:
        """Return the cotangents of phi, the slope, state and hyper-parameters, given those of the update's results.

        The slope's are those of the gradients, and then, if the optimizer takes losses, that of the losses.
        """
        n, read = len(slope.grads), [*slope.grads, *([slope.losses] if self.inner.takes_losses else [])]
        before = [[t.detach().requires_grad_() for t in group] for group in (point.phi, read, point.state)]
        groups: list[list[Tensor]] = [*before, [*self.inner.hyper_parameters()]]
        with torch.enable_grad():
            phi, state = self.inner.update(before[0], before[1][:n], tuple(before[2]), *before[1][n:])
            ct = pulled_back([*phi, *state], [*ct_phi, *ct_state], [t for group in groups for t in group])
        rest = iter(ct)
        of_phi, of_slope, of_state, of_hyper = ([next(rest) for _ in group] for group in groups)
        return of_phi, of_slope, of_state, of_hyper

    def _initial_pullback(self, theta: Sequence[Tensor], ct_state: Gradients) -> tuple[Gradients, Gradients]:
        """Return the cotangents of theta and of the hyper-parameters, given those of the initial state."""
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in theta]
            ct = pulled_back(self.inner.init(leaves), ct_state, [*leaves, *self.inner.hyper_parameters()])
        return ct[: len(leaves)], ct[len(leaves) :]

    def hessian_vector_product(
        self, phi: Sequence[Tensor], shared: Sequence[Tensor], batch: Any, v: Gradients, *ct_read: Tensor | None
    ) -> tuple[list[Tensor], Gradients]:
        """Return the gradient of S with respect to phi, and the products of [∂²S/∂phi², ∂²S/∂shared∂phi] with v.

        With the cotangents `ct_read` of what else an update reads, the losses [T], the gradients of the losses weighted
        by them are added to the products.
        """
        product = self._forward_over_reverse if self.hvp == "forward" else self._reverse_over_reverse
        grads, products = product(phi, shared, batch, v, *ct_read)
        return with_zeros(grads, phi[: len(v)]), products

    def _forward_over_reverse(
        self, phi: Sequence[Tensor], shared: Sequence[Tensor], batch: Any, v: Gradients, ct_losses: Tensor | None = None
    ) -> tuple[Gradients, Gradients]:
        with torch.enable_grad(), forward_ad.dual_level():
            # A tangent has its primal's strides, so an expanded theta becomes a copy for each task.
            leaves = [p.detach().contiguous().requires_grad_() for p in phi]
            duals = [p if t is None else forward_ad.make_dual(p, t) for p, t in zip(leaves, v, strict=True)]
            losses = self.batching.losses(duals, batch)
            if ct_losses is None:
                ct = derivatives(losses.sum(), [*duals, *shared])
            else:  # gradients are linear in the losses' cotangents, so that the tangents of these add the weighted ones
                ones = forward_ad.make_dual(torch.ones_like(ct_losses), ct_losses)
                ct = derivatives([losses], [*duals, *shared], [ones])
            parts = [(None, None) if c is None else forward_ad.unpack_dual(c) for c in ct]
            return [None if c is None else c.detach() for c, _ in parts[: len(phi)]], [t for _, t in parts]

    def _reverse_over_reverse(
        self, phi: Sequence[Tensor], shared: Sequence[Tensor], batch: Any, v: Gradients, ct_losses: Tensor | None = None
    ) -> tuple[Gradients, Gradients]:
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in phi]
            losses = self.batching.losses(leaves, batch)
            grads = derivatives(losses.sum(), leaves, create_graph=True)
            known = [(g, t) for g, t in zip([*grads, losses], [*v, ct_losses], strict=True) if g is not None]
            products = pulled_back([g for g, _ in known], [t for _, t in known], [*leaves, *shared])
        return [None if g is None else g.detach() for g in grads], products


@dataclass(frozen=True)
class Slope:
    """What an update reads of the support losses: their gradients, and their values [T].

    Where weights are implicit, also the pairs of an inner step (`implicit.py`).
    """

    grads: Sequence[Tensor]
    losses: Tensor
    pairs: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Point:
    """An inner loop before step k: parameters, optimizer state and random state, and maybe the slope of step k."""

    k: int
    phi: list[Tensor]
    state: State
    random: Random
    slope: Slope | None = None


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
    """Return the states of a device's generators; none while a CUDA graph is recorded, as it draws no numbers."""
    if device.type != "cuda":
        return (torch.get_rng_state(),)
    return () if in_cuda_graph(device) else (torch.get_rng_state(), torch.cuda.get_rng_state(device))


@recordable(has_side_effects=True)
def set_random_states(device: torch.device, *states: Tensor) -> None:
    for state, of in zip(states, ("cpu", device), strict=False):
        torch.set_rng_state(state) if of == "cpu" else torch.cuda.set_rng_state(state, device)


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


def pulled_back(outputs: Sequence[Tensor], ct: Gradients, inputs: Sequence[Tensor]) -> Gradients:
    """Return the cotangents of the inputs, given those of the outputs, of which some may be None."""
    pairs = [(y, c) for y, c in zip(outputs, ct, strict=True) if c is not None]
    return derivatives([y for y, _ in pairs], inputs, [c for _, c in pairs])


def with_zeros(values: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Return the values, with zeros shaped as in `like` in place of None."""
    return [torch.zeros_like(b) if a is None else a for a, b in zip(values, like, strict=True)]


def added(a: Gradients, b: Gradients) -> Gradients:
    """Return the sums of gradients, in which None counts as zero."""
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]
