"""Make the rules of an op on the backend "cpu", which call its C++ kernels, named `<op>_<rule>`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from metakern import native
from metakern.ops.core import matrices
from metakern.ops.core.rules import Rules, Tensors

# With fewer rows than this, packing the right operand costs more than it gains.
_FEW = 4


def product(a: Tensor, b: Tensor, add: Tensor | None = None, reuse: bool = False) -> Tensor:
    """Returns add + a b for a [T, M, K] and b [T, K, N], by the faster of torch.bmm and csrc/cpu/matrix.cpp.

    With `reuse` the result may take the memory of `add`.
    """
    tasks, rows = a.shape[:2]
    if a.dtype not in native.DTYPES or a.device.type != "cpu" or not native.has_fast_products():
        return matrices.product(a, b, add)
    columns = b.shape[2]
    full = None if add is None else add.expand(tasks, rows, columns)
    one_row = full is not None and full.stride()[:2] == (0, 0)
    if tasks > 1 and matrices.shared(b) and (full is None or one_row or full.is_contiguous()):
        size = tasks * rows
        if full is not None:
            full = full[:1, :1].expand(1, size, -1) if one_row else full.view(1, size, columns)
        return product(a.reshape(1, size, a.shape[2]), b[:1], full, reuse).view(tasks, rows, columns)
    return matrices.product(a, b, add) if rows < _FEW else native.product(a, b, full, reuse)


def rules(
    op: str, constants: tuple[str, ...] = (), scalars: Callable[[SimpleNamespace], tuple[float, ...]] = lambda c: ()
) -> Rules:
    """Returns four rules that call `<op>_forward`, `<op>_jvp`, `<op>_vjp` and `<op>_vjp_jvp`.

    A kernel takes those of x, the named constants, r, t_x, t_r, ct_y and t_ct_y that its rule has, in this order.
    `scalars` computes its scalars from the op's constants. The op has one output, after which `forward` returns the
    residuals and `jvp` their tangents.
    """

    def call(rule: str, c: SimpleNamespace, x: Tensors, *rest: Tensors) -> Tensors:
        inputs = (*x, *(getattr(c, name) for name in constants), *(tensor for group in rest for tensor in group))
        return native.call(f"{op}_{rule}", *inputs, scalars=scalars(c))

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

    return Rules(forward, jvp, vjp, vjp_jvp, native.DTYPES)


def through_float32(rules: Rules) -> Rules:
    """Returns the rules extended to half precision: they compute in float32, and their residuals are float32."""

    def wide(group: Tensors | None) -> Tensors | None:
        return group and tuple(None if t is None else matrices.wide(t) for t in group)

    def like(x: Tensors, group: Tensors) -> Tensors:
        return tuple(t.to(x[0].dtype) for t in group)

    def forward(c: SimpleNamespace, x: Tensors) -> tuple[Tensors, Tensors]:
        y, r = rules.forward(c, wide(x))
        return like(x, y), r

    def jvp(c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors) -> tuple[Tensors, Tensors]:
        t_y, t_r = rules.jvp(c, wide(x), wide(r), wide(t_x))
        return like(x, t_y), t_r

    def vjp(c: SimpleNamespace, x: Tensors, r: Tensors, ct_y: Tensors) -> Tensors:
        return like(x, rules.vjp(c, wide(x), wide(r), wide(ct_y)))

    def vjp_jvp(c: SimpleNamespace, x: Tensors, *groups: Tensors | None) -> Tensors:
        return like(x, rules.vjp_jvp(c, wide(x), *map(wide, groups)))

    return Rules(forward, jvp, vjp, vjp_jvp, native.DTYPES | {torch.bfloat16, torch.float16})


def curvature(op: str, reference: Rules) -> Rules:
    """Returns the reference rules with the kernel `<op>_vjp_jvp` as the fourth.

    For ops whose first-order rules are PyTorch's own kernels.
    """
    return replace(reference, vjp_jvp=rules(op).vjp_jvp, dtypes=native.DTYPES)


def linear_rules(op: str, constants: tuple[str, ...]) -> Rules:
    """Returns the rules of an op that is linear in its one input: `<op>_forward` and its transpose `<op>_vjp`."""

    def call(rule: str, c: SimpleNamespace, x: Tensors) -> Tensors:
        dtype = x[0].dtype
        return native.call(f"{op}_{rule}", *x, *(getattr(c, name).to(dtype) for name in constants))

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

    return Rules(forward, jvp, vjp, vjp_jvp, native.DTYPES)
