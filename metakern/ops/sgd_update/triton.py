"""The update of gradient descent in Triton: every rule is one launch over all parameters and tasks.

The sums that are the rates' cotangents are PyTorch's, as in the reference.
"""

from __future__ import annotations

from types import SimpleNamespace

import triton

from metakern.ops._rules import Rules, Tensors
from metakern.ops._spec import Make, Sample
from metakern.ops._triton.foreach import Input, foreach
from metakern.ops._updates import each_rate
from metakern.ops.sgd_update import SPEC, rate_cotangents


@triton.jit
def _descended(phi, grad, h):
    return (phi - h * grad,)


@triton.jit
def _t_descended(t_phi, grad, t_grad, h, t_h):
    t_y = t_phi - h * t_grad
    if t_h is not None:
        t_y -= t_h * grad
    return (t_y,)


@triton.jit
def _pulled_back(v, ct_y, h, t_h):
    ct_phi = 0.0 if v is None else v
    ct_grad = 0.0 if v is None else -h * v
    if t_h is not None:
        ct_grad -= t_h * ct_y
    return ct_phi, ct_grad


def _rates(c: SimpleNamespace, inputs: Tensors) -> Input:
    """The number, or a rate for each parameter."""
    return c.lr if c.lr is not None else each_rate(inputs[2 * c.count :], None, c.count)


def forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    phi, grad = inputs[: c.count], inputs[c.count : 2 * c.count]
    (y,) = foreach(_descended, (phi, grad, _rates(c, inputs)), phi)
    return y or (), ()


def jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    grad, t_phi, t_grad = inputs[c.count : 2 * c.count], t_inputs[: c.count], t_inputs[c.count : 2 * c.count]
    t_h = None if c.lr is not None else _rates(c, t_inputs)
    (t_y,) = foreach(_t_descended, (t_phi, grad, t_grad, _rates(c, inputs), t_h), grad)
    return t_y or (), ()


def vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_y: Tensors) -> Tensors:
    grad = inputs[c.count : 2 * c.count]
    pulled = _cotangents(c, inputs, ct_y, None, None)
    return (*pulled, *rate_cotangents(c, inputs, (ct_y, grad)))


def vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_y: Tensors,
    t_ct_y: Tensors | None,
) -> Tensors:
    grad, t_grad = inputs[c.count : 2 * c.count], t_inputs[c.count : 2 * c.count]
    pulled = _cotangents(c, inputs, t_ct_y, ct_y, None if c.lr is not None else _rates(c, t_inputs))
    pairs = ((ct_y, t_grad),) if t_ct_y is None else ((ct_y, t_grad), (t_ct_y, grad))
    return (*pulled, *rate_cotangents(c, inputs, *pairs))


def _cotangents(c: SimpleNamespace, inputs: Tensors, v: Tensors | None, ct_y: Tensors | None, t_h: Input) -> Tensors:
    """Those of phi and grad: v and -h v - t_h ct_y, None where they are zero or not wanted."""
    wanted = (
        v is not None and any(c.needs[: c.count]),
        (v is not None or t_h is not None) and any(c.needs[c.count : 2 * c.count]),
    )
    nothing = (None,) * c.count
    if not any(wanted):
        return (*nothing, *nothing)
    x = (v, ct_y if t_h is not None else None, _rates(c, inputs), t_h)
    ct_phi, ct_grad = foreach(_pulled_back, x, inputs[: c.count], wanted)
    return (*(ct_phi or nothing), *(ct_grad or nothing))


RULES = Rules(forward, jvp, vjp, vjp_jvp)


def compiled(make: Make) -> list[Sample]:
    return [*SPEC.benchmark(make), *(sample for sample in SPEC.samples(make) if sample.name == "rate-per-task")]
