"""One step of RMSprop for all parameters and tasks of a model in one call.

    g    = grad + λ phi                    v' = α v + (1 - α) g²
    a'   = α a + (1 - α) g                 r  = √(v' - a'²) (centered), or √v'
    b'   = μ b + g / (r + eps)             phi' = phi - h b'

| tensor | shape |
|---|---|
| phi_i, grad_i, v_i, averages a_i, buffers b_i and the results | [T, ...], a shape for each parameter |
| rate h, α, eps, decay λ, momentum μ | a number; one tensor [T]; or for each parameter a tensor [T] or [T, ...] |

The slope of the root at zero is taken as zero, for the reason that `adam_update` gives. The four rules are derived from
the formula (`formula.py`). Half precision is computed in float32. Residuals: none. Tieleman, Hinton 2012, lecture 6.5;
centered: Graves 2013, "Generating sequences with recurrent neural networks", equations 38 to 45; with the equations of
torch.optim.RMSprop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from metakern.ops.core import updates
from metakern.ops.core.formula import Node, root
from metakern.ops.core.spec import Make, Sample, Spec
from metakern.ops.core.updates import Hyper, Update


def rmsprop_update(
    phi: Sequence[Tensor],
    grad: Sequence[Tensor],
    v: Sequence[Tensor],
    lr: Hyper,
    a: Sequence[Tensor] | None = None,
    b: Sequence[Tensor] | None = None,
    *,
    alpha: Hyper = 0.99,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    momentum: Hyper = 0.0,
) -> tuple[list[Tensor], ...]:
    """Returns the parameters and the state after one step of RMSprop; differentiable twice in all arguments.

    The equations are those of torch.optim.RMSprop (Tieleman, Hinton 2012, lecture 6.5; centered: Graves 2013, equations
    38 to 45). Half precision is computed in float32.

    Args:
        phi: A tensor for each parameter, [T, ...] for T tasks, or of any shape.
        grad: The gradients, shaped like `phi`.
        v: The averages of squared gradients before the step, shaped like `phi`.
        lr: The learning rate, in any form that `sgd_update` takes.
        a: The averages of gradients before the step, shaped like `phi`, for the centered form; None for the other.
        b: The momentum buffers before the step, shaped like `phi`; None without momentum.
        alpha: The decay rate of the averages; in the forms of `lr`.
        eps: Added to the root; the same forms.
        weight_decay: weight_decay phi is added to the gradient; the same forms.
        momentum: The factor of the buffers; the same forms. Needs `b` unless it is the number 0.

    Returns:
        (parameters, v), with a and b after them where they were given; a list each.

    Raises:
        TypeError: For tensors that are not floating point, or not of one dtype.
        ValueError: Where lengths, shapes or devices do not fit, or for momentum without `b`.

    >>> import metakern as mk, torch
    >>> (w,), (v,) = mk.ops.rmsprop_update([torch.ones(1)], [torch.ones(1)], [torch.zeros(1)], 0.1, alpha=0.75)
    >>> w, v
    (tensor([0.8000]), tensor([0.2500]))
    """
    if b is None and not (isinstance(momentum, float | int) and not momentum):
        raise ValueError("rmsprop_update: b must be given with momentum, got None")
    states = [state for state in (a, b) if state is not None]
    return _UPDATES[a is not None, b is not None]((phi, grad, v, *states), (lr, alpha, eps, weight_decay, momentum))


def _rmsprop(
    phi: Node,
    grad: Node,
    v: Node,
    a: Node | None,
    b: Node | None,
    hyper: tuple[Node, ...],
) -> tuple[Node, ...]:
    lr, alpha, eps, weight_decay, momentum = hyper
    g = grad + weight_decay * phi
    v = alpha * v + (1 - alpha) * (g * g)
    if a is not None:
        a = alpha * a + (1 - alpha) * g
    d = g / (root(v if a is None else v - a * a) + eps)
    if b is not None:
        d = b = momentum * b + d
    return phi - lr * d, v, *(state for state in (a, b) if state is not None)


def _simple(phi: Node, grad: Node, v: Node, *hyper: Node) -> tuple[Node, ...]:
    return _rmsprop(phi, grad, v, None, None, hyper)


def _centered(phi: Node, grad: Node, v: Node, a: Node, *hyper: Node) -> tuple[Node, ...]:
    return _rmsprop(phi, grad, v, a, None, hyper)


def _with_momentum(phi: Node, grad: Node, v: Node, b: Node, *hyper: Node) -> tuple[Node, ...]:
    return _rmsprop(phi, grad, v, None, b, hyper)


def _centered_with_momentum(phi: Node, grad: Node, v: Node, a: Node, b: Node, *hyper: Node) -> tuple[Node, ...]:
    return _rmsprop(phi, grad, v, a, b, hyper)


_UPDATES = {
    (centered, momentum): Update(
        "rmsprop_update",
        ("phi", "grad", "v", *("a" * centered), *("b" * momentum)),
        ("lr", "alpha", "eps", "weight_decay", "momentum"),
        formula,
    )
    for centered, momentum, formula in (
        (False, False, _simple),
        (True, False, _centered),
        (False, True, _with_momentum),
        (True, True, _centered_with_momentum),
    )
}


def _plain(
    phi: Sequence[Tensor],
    grad: Sequence[Tensor],
    v: Sequence[Tensor],
    lr: Hyper,
    a: Sequence[Tensor] | None,
    b: Sequence[Tensor] | None,
    *,
    alpha: Hyper,
    eps: Hyper,
    weight_decay: Hyper,
    momentum: Hyper,
) -> tuple[list[Tensor], ...]:
    results = []
    every = [updates.plain_rates(phi, h) for h in (lr, alpha, eps, weight_decay, momentum)]
    for i, (p, h, al, epsilon, decay, mu) in enumerate(zip(phi, *every, strict=True)):
        g = grad[i] + decay * p
        result = [al * v[i] + (1 - al) * g**2]
        square = result[0]
        if a is not None:
            result.append(al * a[i] + (1 - al) * g)
            square = square - result[1] ** 2
        d = g / (updates.plain_root(square) + epsilon)
        if b is not None:
            d = mu * b[i] + d
            result.append(d)
        results.append([p - h * d, *result])
    return tuple(map(list, zip(*results, strict=True)))


def _flat(f: Any) -> Any:
    def call(*tensors: Tensor, centered: bool, buffers: bool, **options: Any) -> Any:
        def of_states(*lists: Sequence[Tensor], lr: Hyper, **others: Any) -> Any:
            states = iter(lists[3:])
            return f(*lists[:3], lr, next(states) if centered else None, next(states) if buffers else None, **others)

        return updates.flat(of_states, 3 + centered + buffers)(*tensors, **options)

    return call


def _samples(make: Make) -> list[Sample]:
    options = {"alpha": 0.7, "eps": 0.1, "weight_decay": 0.2, "centered": False, "buffers": False}
    simple = updates.samples(make, 3, ("alpha", "eps", "weight_decay"), **options, momentum=0.0)
    both = options | {"centered": True, "buffers": True, "momentum": 0.6}
    centered = updates.samples(make, 5, ("alpha", "eps", "weight_decay", "momentum"), **both)
    kinds = updates.some(simple, *updates.SOME)
    return updates.squared([*kinds, *updates.some(centered, "learned", prefix="centered-")], 2)


def _benchmark(make: Make) -> list[Sample]:
    options = {"alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0, "centered": False, "buffers": False}
    return updates.squared(updates.benchmark(make, 3, **options), 2)


_COST = updates.cost((8, 14, 36), (5, 7, 10))
_OP = _UPDATES[False, False].op(2, (1, 0, 0, 0, 0))
SPEC = Spec(_OP, _flat(rmsprop_update), _flat(_plain), _samples, _benchmark, _COST)
