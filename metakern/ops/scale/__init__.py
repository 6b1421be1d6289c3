"""Multiplication of all tensors of a model by a factor, for all tasks in one call.

    y_i = s x_i

| tensor | shape |
|---|---|
| x_i, y_i | [T, ...], a shape for each tensor |
| factor s | a number; one tensor [T]; or for each x_i a tensor [T] or [T, ...] |

The four rules are derived from the formula (`formula.py`). Half precision is computed in float32. Residuals: none.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from metakern.ops.core import updates
from metakern.ops.core.formula import Node
from metakern.ops.core.spec import Make, Sample, Spec
from metakern.ops.core.updates import Hyper, Update


def scale(x: Sequence[Tensor], s: Hyper) -> list[Tensor]:
    """Returns [s_i x_i for each i], differentiable twice in both arguments.

    Half precision is computed in float32.

    Args:
        x: Tensors [T, ...] for T tasks, or of any shapes.
        s: The factor, in any form that `sgd_update` takes for `lr`.

    Returns:
        A list of tensors shaped like those of x.

    Raises:
        TypeError: For tensors that are not floating point, or not of one dtype.
        ValueError: Where lengths, shapes or devices do not fit.

    >>> import metakern as mk, torch
    >>> mk.ops.scale([torch.ones(2, 2), torch.ones(2)], torch.tensor([2.0, 3.0]))
    [tensor([[2., 2.],
            [3., 3.]]), tensor([2., 3.])]
    """
    return SCALE((x,), (s,))[0]


def _scaled(x: Node, s: Node) -> tuple[Node, ...]:
    return (x * s,)


SCALE = Update("scale", ("x",), ("s",), _scaled)


def _plain(x: Sequence[Tensor], lr: Hyper) -> list[Tensor]:
    return [xi * s for xi, s in zip(x, updates.plain_rates(x, lr), strict=True)]


def _call(x: Sequence[Tensor], lr: Hyper) -> list[Tensor]:
    return scale(x, lr)


def _samples(make: Make) -> list[Sample]:
    kinds = ("number", "rate-per-task", "rate-per-element")
    return updates.some(updates.samples(make, 1), *kinds)


def _benchmark(make: Make) -> list[Sample]:
    return updates.benchmark(make, 1)


_COST = updates.cost((1, 1, 1), (2, 2, 2))
SPEC = Spec(SCALE.op(2, (1,)), updates.flat(_call, 1), updates.flat(_plain, 1), _samples, _benchmark, _COST)
