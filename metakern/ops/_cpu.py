"""The rules of an op on the backend "cpu": calls of its C++ kernels, which are named `<op>_<rule>`."""

from __future__ import annotations

from collections.abc import Callable
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
