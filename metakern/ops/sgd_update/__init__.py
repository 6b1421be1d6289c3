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
from typing import Any

import torch
from torch import Tensor

from metakern.ops import _checks, _triton
from metakern.ops._rules import Op, Rules, Tensors
from metakern.ops._spec import Cost, Make, Sample, Spec
from metakern.ops._tensors import wide

Rate = float | Tensor


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
    _same_number("grad", grad, phi)
    if not phi:
        return []
    _checks.floating("sgd_update", **_named("phi", phi), **_named("grad", grad))
    for i, (p, g) in enumerate(zip(phi, grad, strict=True)):
        _checks.shape("sgd_update", f"grad[{i}]", g, p.shape, f"that of phi[{i}]")
    tasks: torch.Size | None = phi[0].shape[:1]
    if any(p.dim() == 0 or p.shape[:1] != tasks for p in phi):
        tasks = None

    def tasks_first(tensors: list[Tensor]) -> list[Tensor]:
        return [t.unsqueeze(0) for t in tensors] if tasks is None else tensors

    if isinstance(lr, float | int):
        y = _op(len(phi), 0)(*tasks_first(phi), *tasks_first(grad), count=len(phi), lr=lr)
    else:
        if isinstance(lr, Tensor):
            rates = [_rate("lr", lr, None, phi[0], tasks)]
        else:
            _same_number("lr", lr, phi)
            rates = [_rate(f"lr[{i}]", h, p.shape, p, tasks) for i, (h, p) in enumerate(zip(lr, phi, strict=True))]
        y = _op(len(phi), len(rates))(*tasks_first(phi), *tasks_first(grad), *rates, count=len(phi), lr=None)
    return [yi.squeeze(0) for yi in y] if tasks is None else list(y)


def _same_number(name: str, values: Sequence[Any], phi: list[Tensor]) -> None:
    if len(values) != len(phi):
        raise ValueError(f"sgd_update: {name} must have an entry for each of phi's {len(phi)}, got {len(values)}")


def _named(name: str, values: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name}[{i}]": value for i, value in enumerate(values)}


def _rate(name: str, rate: Rate, own: torch.Size | None, phi: Tensor, tasks: torch.Size | None) -> Tensor:
    """A rate as the rules want it: [T], or [T, ...] where it has its own value for each element of phi."""
    if not isinstance(rate, Tensor):
        return phi.new_full(tasks or (1,), rate)
    _checks.floating("sgd_update", phi=phi, **{name: rate})
    if rate.dim() == 0:
        return rate.expand(tasks or (1,))
    if rate.shape == own:
        return rate.unsqueeze(0) if tasks is None else rate
    if rate.shape != tasks:
        allowed = [
            "[]",
            *([] if tasks is None else [f"[T] = {list(tasks)}"]),
            *([] if own is None else [str(list(own))]),
        ]
        raise ValueError(f"sgd_update: {name} must have shape {' or '.join(allowed)}, got {list(rate.shape)}")
    return rate


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
    if not rates:
        return phi, grad, (c.lr,) * c.count
    each = rates * c.count if len(rates) < c.count else rates
    return phi, grad, tuple(h.view(*h.shape, *(1,) * (p.dim() - h.dim())) for h, p in zip(each, phi, strict=True))


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
    sums: list[Any] = [None] * len(rates)
    for a, b in pairs:
        for i, (ai, bi) in enumerate(zip(a, b, strict=True)):
            i %= len(rates)
            term = wide(ai) * wide(bi)
            term = term if rates[i].dim() == term.dim() else term.flatten(1).sum(1)
            sums[i] = -term if sums[i] is None else sums[i] - term
    return tuple(s.to(h.dtype) for s, h in zip(sums, rates, strict=True))


KERNELS = {"reference": Rules(_forward, _jvp, _vjp, _vjp_jvp), "triton": _triton.rules("sgd_update")}


@cache
def _op(count: int, rates: int) -> Op:
    """The op on `count` parameters with no rate tensor, one for all, or one each."""
    names = [f"{name}_{i}" for name, n in (("phi", count), ("grad", count), ("lr", rates)) for i in range(n)]
    return Op("sgd_update", inputs=tuple(names), kernels=KERNELS, outputs=count)


def _flat(f: Any) -> Any:
    """`f` for arguments as shared tests draw them: phi, grad, rates in a row, and how many of them there are."""

    def call(*tensors: Tensor, count: int, lr: float | None = None) -> list[Tensor]:
        phi, grad, rates = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        return f(phi, grad, lr if lr is not None else rates[0] if len(rates) < count else rates)

    return call


def _plain(phi: Sequence[Tensor], grad: Sequence[Tensor], lr: Rate | Sequence[Rate]) -> list[Tensor]:
    each = lr if isinstance(lr, Sequence) else [lr] * len(phi)

    def spread(h: Rate, p: Tensor) -> Rate:
        own = isinstance(h, Tensor) and h.dim() == 1 and p.dim() > 1
        return h.view(-1, *(1,) * (p.dim() - 1)) if own and isinstance(h, Tensor) else h

    return [p - spread(h, p) * g for p, g, h in zip(phi, grad, each, strict=True)]


def _samples(make: Make) -> list[Sample]:
    def pair(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(make(*shape) for shape in (*shapes, *shapes))

    two = pair((3, 2, 4), (3, 5))
    return [
        Sample("number", two, {"count": 2, "lr": 0.3}),
        Sample("one-rate", (*two, make()), {"count": 2}, per_task=False),
        Sample("rate-per-task", (*two, make(3)), {"count": 2}),
        Sample("rates-per-parameter", (*two, make(3), make(3)), {"count": 2}),
        Sample("rate-per-element", (*two, make(3, 2, 4), make(3, 5)), {"count": 2}),
        Sample("mixed-rates", (*two, make(), make(3, 5)), {"count": 2}, per_task=False),
        Sample("no-tasks-in-common", (*pair((2, 3), (), (4,)), make()), {"count": 3}, per_task=False),
        Sample("own-shapes", (*pair((2, 3), ()), make(2, 3), make()), {"count": 2}, per_task=False),
        Sample("empty", (*pair((2, 0), (2, 3)), make(2)), {"count": 2}),
    ]


def _benchmark(make: Make) -> list[Sample]:
    shapes = [(8, 512, 128), (8, 512)] * 12
    return [Sample("8x24", tuple(make(*s) for s in (*shapes, *shapes)), {"count": len(shapes), "lr": 0.1})]


def _cost(sample: Sample, order: int) -> Cost:
    n = sum(t.numel() for t in sample.args[: sample.kwargs["count"]])
    return Cost(flop=(2, 1, 2)[order] * n, bytes=(3, 3, 4)[order] * n * sample.args[0].element_size())


SPEC = Spec(_op(2, 1), _flat(sgd_update), _flat(_plain), _samples, _benchmark, _cost)
