"""The inner update of gradient descent, over all parameters and tasks of a model in one call.

    y_i = phi_i - h_i grad_i          for every parameter i; h_i: its rate

    forward   y        = phi - h grad
    jvp       t_y      = t_phi - h t_grad - t_h grad
    vjp       ct_phi   = ct_y             ct_grad   = -h ct_y                  ct_h   = -Σ ct_y grad
    vjp_jvp   t_ct_phi = t_ct_y           t_ct_grad = -h t_ct_y - t_h ct_y     t_ct_h = -Σ t_ct_y grad + ct_y t_grad

| tensor | shape |
|---|---|
| phi_i, grad_i, y_i | [T, ...], each parameter its own |
| rates h | one number; one [T] for all parameters; or for each parameter [T] or [T, ...] |

Σ runs over what a rate is shared by: the elements of a task, and the parameters where there is one rate for all.
Residuals: none. The rates per parameter are those of Meta-SGD (Li et al. 2017, equation 2), per layer those of MAML++
(Antoniou et al. 2019, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from metakern.ops import _triton, _updates
from metakern.ops._rules import Op, Rules, Tensors
from metakern.ops._spec import Cost, Make, Sample, Spec
from metakern.ops._tensors import wide
from metakern.ops._updates import Rate


def sgd_update(phi: Sequence[Tensor], grad: Sequence[Tensor], lr: Rate | Sequence[Rate]) -> list[Tensor]:
    """[phi_i - lr_i grad_i], differentiable in phi, grad and lr.

    lr is a number, a tensor [] or [T], or a list of one rate per parameter: a number, a tensor [], [T] or of the
    parameter's shape. Rates [T] need every parameter to be [T, ...]; otherwise any shapes will do. Raises TypeError for
    tensors that are not of one floating-point dtype, ValueError where lengths, shapes or devices differ.

    >>> import metakern as mk, torch
    >>> w, b = mk.ops.sgd_update([torch.ones(2, 3), torch.zeros(2)], [torch.ones(2, 3), torch.ones(2)], lr=0.5)
    >>> b
    tensor([-0.5000, -0.5000])
    """
    phi, grad = list(phi), list(grad)
    if not phi and not grad:
        return []
    given = _updates.arguments("sgd_update", lr, phi=phi, grad=grad)
    y = _op(len(phi), len(given.rates))(*given.tensors, *given.rates, count=len(phi), lr=given.lr)
    return given.restored(y)


def _forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    phi, grad, h = _parts(c, inputs)
    return _descended(phi, h, grad), ()


def _jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    (_, grad, h), (t_phi, t_grad, t_h) = _parts(c, inputs), _parts(c, t_inputs)
    t_y = _descended(t_phi, h, t_grad)
    return t_y if c.lr is not None else _descended(t_y, t_h, grad), ()


def _vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    _, grad, h = _parts(c, inputs)
    ct_grad = (-hi * ct for hi, ct in zip(h, ct_outputs, strict=True))
    return (*(ct.clone() for ct in ct_outputs), *ct_grad, *rate_cotangents(c, inputs, (ct_outputs, grad)))


def _vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_outputs: Tensors,
    t_ct_outputs: Tensors | None,
) -> Tensors:
    (_, grad, h), (_, t_grad, t_h) = _parts(c, inputs), _parts(c, t_inputs)
    t_ct_grad: Tensors = (None,) * c.count
    if c.lr is None:
        t_ct_grad = tuple(-t_hi * ct for t_hi, ct in zip(t_h, ct_outputs, strict=True))
    if t_ct_outputs is None:
        return (*(None,) * c.count, *t_ct_grad, *rate_cotangents(c, inputs, (ct_outputs, t_grad)))
    scaled = (-hi * t_ct for hi, t_ct in zip(h, t_ct_outputs, strict=True))
    t_ct_grad = tuple(b if a is None else a + b for a, b in zip(t_ct_grad, scaled, strict=True))
    t_ct_rates = rate_cotangents(c, inputs, (ct_outputs, t_grad), (t_ct_outputs, grad))
    return (*(t_ct.clone() for t_ct in t_ct_outputs), *t_ct_grad, *t_ct_rates)


def _parts(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """phi, grad, and a factor for each parameter: the number, or its rate spread over its elements."""
    phi, grad, rates = inputs[: c.count], inputs[c.count : 2 * c.count], inputs[2 * c.count :]
    return phi, grad, _updates.spread(_updates.each_rate(rates, c.lr, c.count), phi)


def _descended(a: Tensors, h: Tensors, b: Tensors) -> Tensors:
    """a_i - h_i b_i."""
    if not isinstance(h[0], Tensor):
        return tuple(torch._foreach_add(a, b, alpha=-h[0]))
    return tuple(torch.addcmul(ai, hi, bi, value=-1) for ai, hi, bi in zip(a, h, b, strict=True))


def rate_cotangents(c: SimpleNamespace, inputs: Tensors, *pairs: tuple[Tensors, Tensors]) -> Tensors:
    """-Σ a_i b_i over all that a rate is shared by, added up over the pairs (a, b)."""
    rates = inputs[2 * c.count :]
    if not any(c.needs[2 * c.count :]):
        return (None,) * len(rates)
    products = (-wide(ai) * wide(bi) for a, b in pairs for ai, bi in zip(a, b, strict=True))
    return _updates.rate_cotangents(rates, tuple(products))


KERNELS = {"reference": Rules(_forward, _jvp, _vjp, _vjp_jvp), "triton": _triton.rules("sgd_update")}


@cache
def _op(count: int, rates: int) -> Op:
    """The op on `count` parameters with no rate tensor, one for all, or one each."""
    names = [f"{name}_{i}" for name, n in (("phi", count), ("grad", count), ("lr", rates)) for i in range(n)]
    return Op("sgd_update", inputs=tuple(names), kernels=KERNELS, outputs=count)


def _plain(phi: Sequence[Tensor], grad: Sequence[Tensor], lr: Rate | Sequence[Rate]) -> list[Tensor]:
    return [p - h * g for p, g, h in zip(phi, grad, _updates.plain_rates(phi, lr), strict=True)]


def _samples(make: Make) -> list[Sample]:
    return _updates.samples(make, 2)


def _benchmark(make: Make) -> list[Sample]:
    return _updates.benchmark(make, 2)


def _cost(sample: Sample, order: int) -> Cost:
    n = sum(t.numel() for t in sample.args[: sample.kwargs["count"]])
    constant = sample.kwargs.get("lr") is not None  # then a tangent of the rate adds no terms
    flop, moved = ((2, 1, 1), (3, 3, 3)) if constant else ((2, 3, 7), (3, 4, 6))
    return Cost(flop=flop[order] * n, bytes=moved[order] * n * sample.args[0].element_size())


SPEC = Spec(_op(2, 1), _updates.flat(sgd_update, 2), _updates.flat(_plain, 2), _samples, _benchmark, _cost)
