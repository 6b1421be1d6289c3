"""The rules of an op on the backend "cpu": calls of its C++ kernels, which are named `<op>_<rule>`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

from metakern import _native
from metakern.ops._rules import Rules, Tensors


def rules(
    op: str, constants: tuple[str, ...] = (), scalars: Callable[[SimpleNamespace], tuple[float, ...]] = lambda c: ()
) -> Rules:
    """The four rules, by kernels that take x, the named constants, r, t_x, t_r, ct_y and t_ct_y in this order.

    `scalars` takes them from the op's constants. A kernel has one output y, with the residuals after it.
    """

    def call(rule: str, c: SimpleNamespace, x: Tensors, *rest: Tensors) -> Tensors:
        inputs = (*x, *(getattr(c, name) for name in constants), *(tensor for group in rest for tensor in group))
        return _native.call(f"{op}_{rule}", *inputs, scalars=scalars(c))

    def forward(c: SimpleNamespace, x: Tensors) -> tuple[Tensors, Tensors]:
        y, *r = call("forward", c, x)
        return (y,), tuple(r)

    def jvp(c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors) -> tuple[Tensors, Tensors]:
        t_y, *t_r = call("jvp", c, x, r, t_x)
        return (t_y,), tuple(t_r)

    def vjp(c: SimpleNamespace, x: Tensors, r: Tensors, ct_y: Tensors) -> Tensors:
        return call("vjp", c, x, r, ct_y)

    def vjp_jvp(
        c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors, t_r: Tensors, ct_y: Tensors, t_ct_y: Tensors | None
    ) -> Tensors:
        return call("vjp_jvp", c, x, r, t_x, t_r, ct_y, t_ct_y or (None,))

    return Rules(forward, jvp, vjp, vjp_jvp, _native.DTYPES)


def curvature(op: str, reference: Rules) -> Rules:
    """The reference's first-order rules, where they are PyTorch's own kernels, with `<op>_vjp_jvp`."""
    return replace(reference, vjp_jvp=rules(op).vjp_jvp, dtypes=_native.DTYPES)


def linear_rules(op: str, constants: tuple[str, ...]) -> Rules:
    """The four rules of an op that is linear in its one input: `<op>_forward` and its transpose `<op>_vjp`."""

    def call(rule: str, c: SimpleNamespace, x: Tensors) -> Tensors:
        dtype = x[0].dtype
        return _native.call(f"{op}_{rule}", *x, *(getattr(c, name).to(dtype) for name in constants))

    def forward(c: SimpleNamespace, x: Tensors) -> tuple[Tensors, Tensors]:
        return call("forward", c, x), ()

    def jvp(c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors) -> tuple[Tensors, Tensors]:
        return forward(c, t_x)

    def vjp(c: SimpleNamespace, x: Tensors, r: Tensors, ct_y: Tensors) -> Tensors:
        return call("vjp", c, ct_y)

    def vjp_jvp(
        c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors, t_r: Tensors, ct_y: Tensors, t_ct_y: Tensors | None
    ) -> Tensors:
        return (None,) if t_ct_y is None else vjp(c, x, r, t_ct_y)

    return Rules(forward, jvp, vjp, vjp_jvp, _native.DTYPES)
