"""Choose the inner rates of an algorithm for each number of inner steps: a factor that multiplies all of them.

So no algorithm is judged with rates that were meant for another number of steps, or that nobody has tuned.

A factor that is best on validation tasks can be too high for a task that is unlike all of them, such as one in a script
that training had never seen: its loss rises instead. Therefore, each test task adapts with this factor and with
`LOWER` of it, and takes the one of the two that leaves the lower loss on its support.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from metakern.dialogue.tasks import EpisodeSource, curve, measured
from metakern.optim.base import Stepwise

__all__ = ["adapted", "at_factors", "best_factors", "optimizers", "scaled", "tuned"]

Tell = Callable[[int, int], None]  # is told how many factors were tried, and how many are known to be left
LOWER = 10**-0.5  # of a factor: the half decade below it
REACH = 6  # how many half decades above and below 1 the factor of the inner rates is searched


def optimizers(algorithm: Any) -> list[Stepwise]:
    """Return the inner optimizers of an algorithm whose rates can be scaled."""
    inner = getattr(algorithm, "inner", None)
    return [module for module in inner.modules() if isinstance(module, Stepwise)] if inner is not None else []


@contextmanager
def scaled(algorithm: Any, factor: float) -> Iterator[None]:
    """Within the block, all inner rates of an algorithm, learned or not, are multiplied by a factor."""
    rates = [optimizer.lr for optimizer in optimizers(algorithm)]
    before = [([p.detach().clone() for p in rate.parameters()], rate.initial) for rate in rates]
    try:
        with torch.no_grad():
            for rate in rates:
                rate.initial *= factor
                for p in rate.parameters():
                    p.mul_(factor)
        yield
    finally:
        with torch.no_grad():
            for rate, (values, initial) in zip(rates, before, strict=True):
                rate.initial = initial
                for p, value in zip(rate.parameters(), values, strict=True):
                    p.copy_(value)


def _at_factor(algorithm: Any, factor: float, source: EpisodeSource, steps: tuple[int, ...], limit: int) -> Tensor:
    """Return the losses `[len(steps), T]` of an algorithm whose inner rates are multiplied by a factor."""
    with scaled(algorithm, factor):
        return curve(algorithm, source, steps, limit)[1]


def _on_both(algorithm: Any, factor: float, source: EpisodeSource, steps: tuple[int, ...], limit: int) -> Tensor:
    """Return the losses on query and support, `[2, len(steps), T]`, with a factor of the inner rates."""
    with scaled(algorithm, factor):
        return measured(lambda s, q: algorithm.curves(s, [q, s], steps), algorithm, source, limit)[1]


def at_factors(
    algorithm: Any,
    factors: Sequence[float],
    source: EpisodeSource,
    steps: tuple[int, ...],
    limit: int = 0,
    tell: Tell | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the query losses of the first `limit` tasks of `source` (0: all), and which tasks took lower rates.

    There is a factor of the algorithm's inner rates for each number of steps. Both results are `[len(steps), T]`.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    each = list(dict.fromkeys(factors))
    for n, factor in enumerate(each, 1):
        numbers = tuple(k for k, own in zip(steps, factors, strict=True) if own == factor)
        if optimizers(algorithm) and any(numbers):
            both = [_on_both(algorithm, f, source, numbers, limit) for f in (factor, LOWER * factor)]
            (query, lower_query), supports = zip(*both, strict=True)
            lowered = _lower(*supports)
            query = torch.where(lowered, lower_query, query)
        else:
            query = _at_factor(algorithm, factor, source, numbers, limit)
            lowered = torch.zeros_like(query, dtype=torch.bool)
        found |= zip(numbers, zip(query, lowered, strict=True), strict=True)
        if tell:
            tell(n, len(each) - n)
    losses, lowered = (torch.stack([found[k][i] for k in steps]) for i in range(2))
    return losses, lowered


def adapted(algorithm: Any, support: Any, steps: int, factor: float) -> dict[str, Tensor]:
    """Return the parameters `[T, *shape]` that are adapted to a support, with a factor of the inner rates.

    Each task takes this factor or `LOWER` of it, as in `at_factors`. Of `PromptTuning`, the parameter is the prompt.
    """
    adapt = getattr(algorithm, "adapt_trained", algorithm.adapt)
    if not steps or not optimizers(algorithm):
        return adapt(support, steps=steps)
    found, losses = [], []
    for f in (factor, LOWER * factor):
        with scaled(algorithm, f):
            found.append(adapt(support, steps=steps))
        losses.append(algorithm.evaluate(support, support, steps=(0,), start=found[-1])[0])
    lowered, (phi, lower) = _lower(*losses), found
    return {name: torch.where(lowered.view(-1, *[1] * (p.ndim - 1)), lower[name], p) for name, p in phi.items()}


def _lower(high: Tensor, low: Tensor) -> Tensor:
    """Return where lower rates leave the lower loss; NaN counts as infinite."""
    return low < high.nan_to_num(math.inf, math.inf)


def best_factors(
    algorithm: Any, validation: EpisodeSource, steps: tuple[int, ...], limit: int = 0, tell: Tell | None = None
) -> list[float]:
    """Return the factor of the inner rates with the lowest mean loss on validation tasks, for each number of steps.

    The tasks are the first `limit` of `validation` (0: all). The search goes in half decades from the rates as they
    are, until both neighbors of each best factor are worse; where all losses are infinite, it goes to smaller rates. An
    algorithm without inner rates has the factor 1.
    """
    return tuned(algorithm, validation, steps, limit, tell)[0] if optimizers(algorithm) else [1.0] * len(steps)


def tuned(
    algorithm: Any, validation: EpisodeSource, steps: tuple[int, ...], limit: int = 0, tell: Tell | None = None
) -> tuple[list[float], Tensor]:
    """Return `best_factors`, and the losses `[len(steps), T]` on the validation tasks at these factors."""
    reach = REACH if optimizers(algorithm) else 0
    losses: dict[int, Tensor] = {}
    means: dict[int, Tensor] = {}
    best = [0] * len(steps)
    while untried := {e for b in best for e in (b - 1, b, b + 1) if abs(e) <= reach} - means.keys():
        for n, exponent in enumerate(sorted(untried), 1):
            losses[exponent] = _at_factor(algorithm, 10 ** (exponent / 2), validation, steps, limit)
            means[exponent] = losses[exponent].mean(1).nan_to_num(math.inf, math.inf)
            if tell:
                tell(len(losses), len(untried) - n)
        best = [min(means, key=lambda e: _rank(means[e][i].item(), e)) for i in range(len(steps))]
    return [10 ** (e / 2) for e in best], torch.stack([losses[e][i] for i, e in enumerate(best)])


def _rank(mean: float, exponent: int) -> tuple[float, int]:
    """Return what orders factors: the lower loss first, then the factor near 1 or, of infinite losses, the smaller."""
    return mean, abs(exponent) if math.isfinite(mean) else exponent
