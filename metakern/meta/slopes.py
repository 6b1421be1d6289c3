"""Checks whether autograd's derivatives of a function are its slopes, by central differences with error estimates.

    s: R^n -> R        g = autograd's gradient of s        along a direction u:

    first order     <g, u>                  against   (s(z + h u) - s(z - h u)) / 2h
    second order    autograd's product      against   (g(z + h u) - g(z - h u)) / 2h

The reference of the second order is thus the slope of what autograd gives for the first. Autograd's product is taken
both reverse over reverse and forward over reverse. Step sizes h are tried in turn until autograd agrees. Where it never
does, neighboring step sizes are extrapolated (Richardson); each element takes the extrapolation of the pair of steps
that agree best, and their difference is its estimated error. A kink (of ReLU, of a maximum) may lie within a large step
but not within a smaller one, and not near every point. So autograd counts as wrong only if it disagrees at two points,
by more than the estimated error of the differences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from metakern.meta.unroll import derivatives, with_zeros

Tensors = Sequence[Tensor]
Scalar = Callable[[Tensors], AbstractContextManager[Tensor]]  # gives s(z) with its graph; differentiate in the block

STEPS = {
    torch.float64: (1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-4, 1e-3),
    torch.float32: (1e-2, 3e-2, 3e-3),
}  # step sizes, relative to the norm of z, in the order in which they are tried
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-2}
SAFETY = 20  # the estimated error of the differences is multiplied by this
NOISE = 0.02  # relative distance of the points of comparison from the model's own parameters


@dataclass
class Verdict:
    """The error of autograd for the first order and for both modes of the second.

    Each value is the error over the allowed error (more than 1 is wrong), the exception that autograd raised, or None
    where there is nothing to compare. The second order is compared only where the first is right: the Jacobian of a
    gradient that is no slope need not be symmetric, so reverse mode would give another product.
    """

    first: float | Exception | None = None
    reverse: float | Exception | None = None
    forward: float | Exception | None = None

    def wrong(self, order: str) -> bool:
        found = getattr(self, order)
        return isinstance(found, float) and not found <= 1

    @property
    def impossible(self) -> bool:
        """Autograd has no gradient, or no second order in either mode."""
        second = [found for found in (self.reverse, self.forward) if found is not None]
        return isinstance(self.first, Exception) or (bool(second) and not any(isinstance(f, float) for f in second))

    @property
    def exact(self) -> bool:
        """Nothing is wrong, and at least one mode of the second order works."""
        return not self.impossible and not any(map(self.wrong, ("first", "reverse", "forward")))

    @property
    def hopeless(self) -> bool:
        """An error is so large that no other step size will make it right."""
        return any(isinstance(found, float) and found > 100 for found in (self.first, self.reverse, self.forward))

    def better(self, other: Verdict) -> Verdict:
        """Return the smaller error of two points, for each order and mode."""

        def least(a: Any, b: Any) -> Any:
            return b if not isinstance(a, float) or (isinstance(b, float) and b < a) else a

        return Verdict(*(least(getattr(self, f), getattr(other, f)) for f in ("first", "reverse", "forward")))


def judge(s: Scalar, z: Tensors, active: Sequence[bool], precision: torch.dtype) -> Verdict:
    """Compare autograd's first order along a random direction, and its second along the `active` part of it.

    Args:
        s: The function.
        z: Its arguments; the comparison takes place at points near it.
        active: For each tensor of z, whether the direction of the second order has a part in it.
        precision: The precision in which s computes, float64 or float32.
    """
    verdict = None
    for point in range(2):
        enough = 1 if verdict and verdict.hopeless else 3  # step sizes after which a hopeless error ends the search
        here = _judge_at(s, z, point, active, precision, enough)
        verdict = here if verdict is None else verdict.better(here)
        if verdict.exact or isinstance(verdict.first, Exception):
            break
    assert verdict is not None
    return verdict


def gradient(s: Scalar, z: Tensors) -> tuple[Tensor, list[Tensor]]:
    """Return s(z) and autograd's gradient."""
    leaves = [t.detach().requires_grad_() for t in z]
    with s(leaves) as value:
        return value.detach(), [g.detach() for g in with_zeros(derivatives(value, leaves), leaves)]


def reverse_over_reverse(s: Scalar, z: Tensors, v: Tensors) -> list[Tensor]:
    """Return autograd's Hessian-vector product with v, by reverse mode over reverse mode."""
    leaves = [t.detach().requires_grad_() for t in z]
    with s(leaves) as value:
        grads = derivatives(value, leaves, create_graph=True)
        pairs = [(g, t) for g, t in zip(grads, v, strict=True) if g is not None]
        return with_zeros(derivatives([g for g, _ in pairs], leaves, [t for _, t in pairs]), leaves)


def forward_over_reverse(s: Scalar, z: Tensors, u: Tensors, active: Sequence[bool]) -> list[Tensor]:
    """Return autograd's Hessian-vector product with the `active` part of u, by forward mode over reverse mode."""
    with forward_ad.dual_level():
        leaves = [t.detach().contiguous().requires_grad_() for t in z]
        duals = [forward_ad.make_dual(x, t) if on else x for x, t, on in zip(leaves, u, active, strict=True)]
        with s(duals) as value:
            grads = derivatives(value, duals)
        tangents = [None if g is None else forward_ad.unpack_dual(g).tangent for g in grads]
    return with_zeros(tangents, z)


class Differences:
    """Central differences at z along u of a function that returns tensors, for a growing number of step sizes."""

    def __init__(self, function: Callable[[Tensors], Tensors], z: Tensors, u: Tensors, precision: torch.dtype) -> None:
        self.function, self.z, self.u, self.steps = function, z, u, STEPS[precision]
        self.found: dict[float, list[Tensor]] = {}

    def more(self) -> bool:
        """Compute the differences of the next step size. Returns False if there is none left."""
        todo = self.steps[len(self.found) :]
        for h in todo[:1]:
            up, down = (self._at(sign * h) for sign in (1, -1))
            self.found[h] = [(a - b) / (2 * h) for a, b in zip(up, down, strict=True)]
        return len(todo) > 0

    def _at(self, h: float) -> Tensors:
        return self.function([z + h * u for z, u in zip(self.z, self.u, strict=True)])

    def best(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the best estimates of the slopes and of their errors, which are zero while there is one step size."""
        steps = sorted(self.found)
        truths, errors = list(self.found[steps[0]]), [torch.zeros_like(t) for t in self.found[steps[0]]]
        for n, (fine, coarse) in enumerate(pairwise(steps)):
            factor = (coarse / fine) ** 2
            for i, (a, b) in enumerate(zip(self.found[fine], self.found[coarse], strict=True)):
                error = (a - b).abs()
                better = error < errors[i] if n else torch.ones_like(error, dtype=torch.bool)
                truths[i] = torch.where(better, (factor * a - b) / (factor - 1), truths[i])
                errors[i] = torch.where(better, error, errors[i])
        return truths, errors


def slope(function: Callable[[Tensors], Tensors], z: Tensors, u: Tensors) -> list[Tensor]:
    """Return the slopes at z along u, of any norm, from the first two or more step sizes that agree."""
    scale = norm(z) / norm(u) if norm(u) else 1.0
    differences = Differences(function, z, [t * scale for t in u], z[0].dtype)
    while differences.more():
        truths, errors = differences.best()
        if len(differences.found) > 1 and norm(errors) <= 1e-4 * norm(truths):
            break
    return [t / scale for t in truths]


def _judge_at(s: Scalar, z: Tensors, seed: int, active: Sequence[bool], precision: torch.dtype, enough: int) -> Verdict:
    try:
        z, value, g = _point(s, z, seed)
    except Exception as error:  # a model may raise anything; it is reported
        return Verdict(first=error)
    u = direction(z, 10 + seed)
    partial = [t if on else torch.zeros_like(t) for t, on in zip(u, active, strict=True)]

    def both(z: Tensors) -> Tensors:
        value, g = gradient(s, z)
        return [value, *g]

    along_all = Differences(both, z, u, precision)
    along = along_all if all(active) else Differences(both, z, partial, precision)
    claims: dict[str, list[Tensor] | Exception] = {}
    if any(active):
        claims["reverse"] = _attempt(lambda: reverse_over_reverse(s, z, partial))
        claims["forward"] = _attempt(lambda: forward_over_reverse(s, z, partial, active))
    sizes = [norm([t]) / max(t.numel(), 1) ** 0.5 for t in u]  # derivatives count in proportion to the size of z
    whole = sum((size * norm([t])) ** 2 for t, size in zip(g, sizes, strict=True)) ** 0.5
    slope = sum((a * b).sum() for a, b in zip(g, u, strict=True))

    def compare(safety: float) -> Verdict:
        (truth, *_), (doubt, *_) = along_all.best()
        noise = 10 * torch.finfo(precision).eps * value.abs().item() / min(along_all.found)
        bound = TOLERANCE[precision] * max(abs(truth.item()), whole) + safety * doubt.item() + noise
        verdict = Verdict(first=_ratio(abs(float(slope - truth)), bound))
        (_, *truths), (_, *errors) = along.best()
        for mode, claim in claims.items():
            if isinstance(claim, Exception):
                setattr(verdict, mode, claim)
            elif not verdict.wrong("first"):
                setattr(
                    verdict,
                    mode,
                    _excess(claim, truths, [safety * e for e in errors], sizes, whole, TOLERANCE[precision]),
                )
        return verdict

    while along.more() | (along is not along_all and along_all.more()):
        if compare(0.0).exact:
            return compare(0.0)
        if len(along.found) >= enough and compare(SAFETY).hopeless:
            break
    return compare(SAFETY)


def _attempt(product: Callable[[], list[Tensor]]) -> list[Tensor] | Exception:
    try:
        return product()
    except Exception as error:
        return error


def _excess(
    claims: Tensors, truths: Tensors, errors: Tensors, sizes: Sequence[float], whole: float, tolerance: float
) -> float:
    """Return the greatest error of a tensor over its allowed error."""
    norms = [size * norm([t]) for t, size in zip(truths, sizes, strict=True)]
    floor = 1e-2 * max(*norms, whole)
    worst = 0.0
    for claim, truth, error, size, length in zip(claims, truths, errors, sizes, norms, strict=True):
        bound = tolerance * max(length, floor) + size * norm([error])
        worst = max(worst, _ratio(size * norm([claim - truth]), bound))
    return worst


def _ratio(distance: float, bound: float) -> float:
    return 0.0 if distance == 0 else distance / bound if bound and isfinite(distance) else inf


def norm(tensors: Tensors) -> float:
    return sum(t.double().square().sum().item() for t in tensors) ** 0.5


def direction(z: Tensors, seed: int) -> list[Tensor]:
    """Return a random direction in which each tensor has about the norm of its tensor in z."""
    generator = torch.Generator().manual_seed(seed)
    typical = max((norm([t]) / max(t.numel(), 1) ** 0.5 for t in z), default=0.0) or 1.0
    direction = []
    for t in z:
        size = norm([t]) / max(t.numel(), 1) ** 0.5 or 0.1 * typical
        direction.append(size * torch.randn(t.shape, generator=generator, dtype=torch.float32, device="cpu").to(t))
    return direction


def _point(s: Scalar, z: Tensors, seed: int) -> tuple[Tensors, Tensor, list[Tensor]]:
    """Return a point near z where s and its gradient are finite, with both.

    All elements are moved; if that leaves the domain of s, only those that are not zero; else z itself is taken.
    """
    noise = [NOISE * n for n in direction(z, seed)]
    for at in (
        [t + n for t, n in zip(z, noise, strict=True)],
        [t * (1 + NOISE / 2 * n.sign()) for t, n in zip(z, noise, strict=True)],
    ):
        with suppress(Exception):  # if z itself raises too, that is not suppressed
            value, g = gradient(s, at)
            if all(t.isfinite().all() for t in (value, *g)):
                return at, value, g
    return z, *gradient(s, z)
