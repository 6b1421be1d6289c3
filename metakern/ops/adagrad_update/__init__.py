"""One step of Adagrad for all parameters and tasks of a model in one call.

    g = grad + λ phi        v' = v + g²        phi' = phi - h g / (√v' + eps)

| tensor | shape |
|---|---|
| phi_i, grad_i, sums of squares v_i and the results | [T, ...], a shape for each parameter |
| rate h, eps, decay λ | a number; one tensor [T]; or for each parameter a tensor [T] or [T, ...] |

The slope of the root at zero is taken as zero, for the reason that `adam_update` gives. The four rules are derived from
the formula (`formula.py`). Half precision is computed in float32. Residuals: none. Duchi, Hazan, Singer 2011,
"Adaptive subgradient methods", figure 1, with the equations of torch.optim.Adagrad.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from metakern.ops.core import updates
from metakern.ops.core.formula import Node, root
from metakern.ops.core.spec import Make, Sample, Spec
from metakern.ops.core.updates import Hyper, Update


def adagrad_update(
    phi: Sequence[Tensor],
    grad: Sequence[Tensor],
    v: Sequence[Tensor],
    lr: Hyper,
    *,
    eps: Hyper = 1e-10,
    weight_decay: Hyper = 0.0,
) -> tuple[list[Tensor], ...]:
    """Returns the parameters and the sums of squares after one step of Adagrad; differentiable twice in all arguments.

    The equations are those of torch.optim.Adagrad without lr_decay (Duchi, Hazan, Singer 2011, figure 1). Half
    precision is computed in float32.

    Args:
        phi: A tensor for each parameter, [T, ...] for T tasks, or of any shape.
        grad: The gradients, shaped like `phi`.
        v: The sums of squared gradients before the step, shaped like `phi`.
        lr: The learning rate, in any form that `sgd_update` takes.
        eps: Added to the root of `v`; the same forms.
        weight_decay: weight_decay phi is added to the gradient; the same forms.

    Returns:
        (parameters, sums of squares), a list each.

    Raises:
        TypeError: For tensors that are not floating point, or not of one dtype.
        ValueError: Where lengths, shapes or devices do not fit.

    >>> import metakern as mk, torch
    >>> mk.ops.adagrad_update([torch.ones(1)], [torch.full((1,), 3.0)], [torch.full((1,), 16.0)], 0.5)
    ([tensor([0.7000])], [tensor([25.])])
    """
    return _UPDATE((phi, grad, v), (lr, eps, weight_decay))


def _adagrad(phi: Node, grad: Node, v: Node, lr: Node, eps: Node, weight_decay: Node) -> tuple[Node, ...]:
    g = grad + weight_decay * phi
    v = v + g * g
    return phi - lr * (g / (root(v) + eps)), v


_UPDATE = Update("adagrad_update", ("phi", "grad", "v"), ("lr", "eps", "weight_decay"), _adagrad)


def _plain(
    phi: Sequence[Tensor],
    grad: Sequence[Tensor],
    v: Sequence[Tensor],
    lr: Hyper,
    *,
    eps: Hyper,
    weight_decay: Hyper,
) -> tuple[list[Tensor], ...]:
    rates, epsilons, decays = (updates.plain_rates(phi, h) for h in (lr, eps, weight_decay))
    g = [gi + decay * p for gi, decay, p in zip(grad, decays, phi, strict=True)]
    v = [vi + gi**2 for vi, gi in zip(v, g, strict=True)]
    moved = [
        p - h * gi / (updates.plain_root(vi) + epsilon)
        for p, h, gi, vi, epsilon in zip(phi, rates, g, v, epsilons, strict=True)
    ]
    return moved, v


def _samples(make: Make) -> list[Sample]:
    kinds = updates.samples(make, 3, ("eps", "weight_decay"), eps=0.1, weight_decay=0.2)
    return updates.squared(updates.some(kinds, *updates.SOME), 2)


def _benchmark(make: Make) -> list[Sample]:
    return updates.squared(updates.benchmark(make, 3, eps=1e-10, weight_decay=0.0), 2)


_COST = updates.cost((6, 11, 28), (5, 7, 10))
_CALLS = (updates.flat(adagrad_update, 3), updates.flat(_plain, 3))
SPEC = Spec(_UPDATE.op(2, (1, 0, 0)), *_CALLS, _samples, _benchmark, _COST)
