"""One step of gradient descent for all parameters and tasks of a model in one call.

    g = grad + λ phi        b' = μ b + g        d = g + μ b' (Nesterov), b' (momentum), or g (without momentum)
    phi' = phi - h d

| tensor | shape |
|---|---|
| phi_i, grad_i, b_i and the results | [T, ...], a shape for each parameter |
| rate h, decay λ, momentum μ | a number; one tensor [T]; or for each parameter a tensor [T] or [T, ...] |

The cotangent of h, λ or μ is a sum over all elements that share its value: those of one task, and those of all
parameters where one tensor serves all. The four rules are derived from the formula (`formula.py`). Half precision is
computed in float32. Residuals: none. A rate for each element is that of Meta-SGD (Li et al. 2017, equation 2), a rate
for each layer that of MAML++ (Antoniou et al. 2019, section 4). Momentum is that of torch.optim.SGD, from b = 0 on
(Sutskever et al. 2013, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from metakern.ops.core import updates
from metakern.ops.core.formula import Node
from metakern.ops.core.spec import Cost, Make, Sample, Spec
from metakern.ops.core.updates import Hyper, Update


def sgd_update(
    phi: Sequence[Tensor],
    grad: Sequence[Tensor],
    lr: Hyper,
    b: Sequence[Tensor] | None = None,
    *,
    momentum: Hyper = 0.0,
    nesterov: bool = False,
    weight_decay: Hyper = 0.0,
) -> Any:
    """Returns the parameters after one step of gradient descent; differentiable twice in all arguments.

    The equations are those of torch.optim.SGD (Sutskever et al. 2013, section 2). Half precision is computed in
    float32.

    Args:
        phi: A tensor for each parameter, [T, ...] for T tasks, or of any shape.
        grad: The gradients, shaped like `phi`.
        lr: The learning rate: a number; a tensor [] or [T]; or a list with an entry for each parameter, which is a
            number, a tensor [] or [T], or a tensor of the parameter's shape. [T] needs every parameter to be [T, ...].
        b: The momentum buffers before the step, shaped like `phi`, zeros before the first; None without momentum.
        momentum: The factor of the buffers; in the forms of `lr`. Needs `b` unless it is the number 0.
        nesterov: Whether the momentum is Nesterov's; has no effect without `b`.
        weight_decay: weight_decay phi is added to the gradient; in the forms of `lr`.

    Returns:
        The parameters, a list; with `b` given, the pair (parameters, buffers), a list each.

    Raises:
        TypeError: For tensors that are not floating point, or not of one dtype.
        ValueError: Where lengths, shapes or devices do not fit, or for momentum without `b`.

    >>> import metakern as mk, torch
    >>> w, b = mk.ops.sgd_update([torch.ones(2, 3), torch.zeros(2)], [torch.ones(2, 3), torch.ones(2)], lr=0.5)
    >>> b
    tensor([-0.5000, -0.5000])
    >>> (w,), (buffer,) = mk.ops.sgd_update([w], [torch.ones(2, 3)], 0.5, [torch.ones(2, 3)], momentum=0.9)
    >>> buffer[0]
    tensor([1.9000, 1.9000, 1.9000])
    """
    if b is None:
        if isinstance(momentum, float | int) and not momentum:
            return DESCENT((phi, grad), (lr, weight_decay))[0]
        raise ValueError("sgd_update: b must be given with momentum, got None")
    return (NESTEROV if nesterov else MOMENTUM)((phi, grad, b), (lr, weight_decay, momentum))


def _descended(phi: Node, grad: Node, lr: Node, weight_decay: Node) -> tuple[Node, ...]:
    return (phi - lr * (grad + weight_decay * phi),)


def _with_momentum(phi: Node, grad: Node, b: Node, lr: Node, weight_decay: Node, momentum: Node) -> tuple[Node, ...]:
    b = momentum * b + (grad + weight_decay * phi)
    return phi - lr * b, b


def _with_nesterov(phi: Node, grad: Node, b: Node, lr: Node, weight_decay: Node, momentum: Node) -> tuple[Node, ...]:
    g = grad + weight_decay * phi
    b = momentum * b + g
    return phi - lr * (g + momentum * b), b


DESCENT = Update("sgd_update", ("phi", "grad"), ("lr", "weight_decay"), _descended)
MOMENTUM, NESTEROV = (
    Update("sgd_update", ("phi", "grad", "b"), ("lr", "weight_decay", "momentum"), formula)
    for formula in (_with_momentum, _with_nesterov)
)


def _plain(
    phi: Sequence[Tensor],
    grad: Sequence[Tensor],
    b: Sequence[Tensor] = (),
    *,
    lr: Hyper,
    momentum: Hyper = 0.0,
    nesterov: bool = False,
    weight_decay: Hyper = 0.0,
) -> Any:
    rates, decays, momenta = (updates.plain_rates(phi, h) for h in (lr, weight_decay, momentum))
    g = [gi + decay * p for gi, decay, p in zip(grad, decays, phi, strict=True)]
    b = [mu * bi + gi for mu, bi, gi in zip(momenta, b, g, strict=True)] if b else []
    ahead = [gi + mu * bi for gi, mu, bi in zip(g, momenta, b, strict=True)] if nesterov else b or g
    moved = [p - h * d for p, h, d in zip(phi, rates, ahead, strict=True)]
    return (moved, b) if b else moved


def _call(phi: Sequence[Tensor], grad: Sequence[Tensor], *b: Sequence[Tensor], lr: Hyper, **options: Any) -> Any:
    return sgd_update(phi, grad, lr, *b, **options)


def _flat(f: Any) -> Any:
    """Returns `f` for samples, whose option `buffers` says whether their tensors include momentum buffers."""

    def call(*tensors: Tensor, buffers: bool = False, **options: Any) -> Any:
        return updates.flat(f, 3 if buffers else 2)(*tensors, **options)

    return call


def _samples(make: Make) -> list[Sample]:
    momentum = {"buffers": True, "momentum": 0.6, "weight_decay": 0.2}
    learned = ("momentum", "weight_decay")
    with_buffers = updates.samples(make, 3, learned, nesterov=False, **momentum)
    nesterov = updates.samples(make, 3, learned, nesterov=True, **momentum)
    return [
        *updates.samples(make, 2),
        *updates.some(with_buffers, "learned", prefix="momentum-"),
        *updates.some(nesterov, "learned", prefix="nesterov-"),
    ]


def _benchmark(make: Make) -> list[Sample]:
    return updates.benchmark(make, 2)


def _cost(sample: Sample, order: int) -> Cost:
    constant = sample.kwargs.get("lr") is not None  # a constant rate has no tangent, whose terms would cost more
    flop, moved = ((2, 1, 1), (3, 3, 3)) if constant else ((2, 3, 7), (3, 4, 6))
    return updates.cost(flop, moved)(sample, order)


SPEC = Spec(DESCENT.op(2, (1, 0)), _flat(_call), _flat(_plain), _samples, _benchmark, _cost)
