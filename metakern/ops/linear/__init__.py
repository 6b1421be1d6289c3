"""Linear layer, with a weight and bias that all tasks share or that each task has for itself.

    y = x Wᵀ + b

    forward   y      = x Wᵀ + b
    jvp       t_y    = t_x Wᵀ + x t_Wᵀ + t_b
    vjp       ct_x   = ct_y W                    ct_W   = ct_yᵀ x                    ct_b   = Σ_n ct_y
    vjp_jvp   t_ct_x = t_ct_y W + ct_y t_W       t_ct_W = t_ct_yᵀ x + ct_yᵀ t_x      t_ct_b = Σ_n t_ct_y

| tensor | shape |
|---|---|
| x | [T, N, in] |
| weight W | [T, out, in] |
| bias b | [T, out], optional |
| y | [T, N, out] |

Residuals: none. With a weight that is expanded over T (stride 0), y and ct_x are one large product each, and ct_W is
one product for each task. Half precision accumulates in float32 inside each product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.ops.core import checks, cpp, matrices, plain, triton_kernels
from metakern.ops.core.autocast import autocast
from metakern.ops.core.autograd import Op
from metakern.ops.core.matrices import Product, products, rows
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Cost, Make, Sample, Spec

_SMALL = 2**22  # multiplications of the product; see core/plain.py


@autocast("lower")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x Wᵀ + b, with one weight or with one for each task; differentiable twice in all arguments.

    Half precision accumulates in float32; `torch.autocast` lowers float32 to the region's dtype.

    Args:
        x: [..., in], or [T, ..., in] for T tasks with weights of their own.
        weight: [out, in], or [T, out, in] with one for each task.
        bias: [out] or [T, out], as the weight is; None for zeros.

    Returns:
        [..., out] or [T, ..., out].

    Raises:
        TypeError: For tensors that are not floating point, or not of one dtype.
        ValueError: Where shapes or devices do not fit.

    >>> import metakern as mk, torch
    >>> x, weight = torch.ones(2, 3, 4), torch.arange(2.0).view(2, 1, 1).expand(2, 5, 4)
    >>> mk.ops.linear(x, weight)[:, 0, 0]
    tensor([0., 4.])
    """
    checks.floating("linear", ("bias",), x=x, weight=weight, bias=bias)
    tasks = checks.tasks("linear", x, "in", weight=(weight, "out, in"))
    if bias is not None:
        checks.shape("linear", "bias", bias, weight.shape[:-1], "[T, out]" if tasks else "[out]")
    if tasks is None and is_small(x, weight):
        return _plain(x, weight, bias)
    if tasks is None:
        weight, bias = weight[None], None if bias is None else bias[None]
    (y,) = OP(rows(x, tasks), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[1])


def is_small(x: Tensor, weight: Tensor) -> bool:
    """Returns whether x Wᵀ is faster as PyTorch's own operation, for a weight [out, in] that all tasks share."""
    return plain.is_faster(x, x.numel() * weight.shape[0], _SMALL)


def rules(
    product: Product,
    total: Callable[..., Tensor | None],
    total_and_sums: Callable[..., tuple[Tensor | None, Tensor | None]] | None = None,
) -> Rules:
    """Returns the four rules, given a product and totals.

    total(*pairs, add=None) adds the products of the pairs that hold no None to `add`, [T, 1, out]. It returns `add`
    itself where there is no such pair. total_and_sums(*pairs) returns the total, and the sums of the first tensor over
    its last dimension, None if it is None.
    """

    def of_parameters(needs: Sequence[bool], *pairs: tuple[Tensor | None, Tensor | None]) -> Tensors:
        """Returns the cotangents of weight and bias that are needed: ctᵀ x for all pairs, and sums of the first ct."""
        ct, transposed = pairs[0][0], [(None if a is None else a.mT, x) for a, x in pairs]
        if needs[1] and needs[2] and total_and_sums is not None:
            return total_and_sums(*transposed)
        return total(*transposed) if needs[1] else None, ct.sum(1) if needs[2] and ct is not None else None

    def forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
        x, weight, bias = inputs
        return (product(x, weight.mT, None if bias is None else bias.unsqueeze(1)),), ()

    def jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
        (x, weight, _), (t_x, t_weight, t_bias) = inputs, t_inputs
        if t_x is None and t_weight is None:
            return (t_bias.unsqueeze(1).expand(*x.shape[:2], -1).clone(),), ()
        add = None if t_bias is None else t_bias.unsqueeze(1)
        return (total((t_x, weight.mT), (x, None if t_weight is None else t_weight.mT), add=add),), ()

    def vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
        (x, weight, _), (ct_y,), needs = inputs, ct_outputs, c.needs
        return product(ct_y, weight) if needs[0] else None, *of_parameters(needs, (ct_y, x))

    def vjp_jvp(
        c: SimpleNamespace,
        inputs: Tensors,
        r: Tensors,
        t_inputs: Tensors,
        t_r: Tensors,
        ct_outputs: Tensors,
        t_ct_outputs: Tensors | None,
    ) -> Tensors:
        (x, weight, _), (t_x, t_weight, _), (ct_y,) = inputs, t_inputs, ct_outputs
        (t_ct_y,), needs = t_ct_outputs or (None,), c.needs
        t_ct_x = total((t_ct_y, weight), (ct_y, t_weight)) if needs[0] else None
        return t_ct_x, *of_parameters(needs, (t_ct_y, x), (ct_y, t_x))

    return Rules(forward, jvp, vjp, vjp_jvp)


OP = Op(
    "linear",
    inputs=("x", "weight", "bias"),
    kernels={
        "reference": rules(matrices.product, partial(products, matrices.product)),
        "cpu": rules(cpp.product, partial(products, cpp.product)),
        "triton": triton_kernels.rules("linear"),
    },
    zero_tangents=False,
)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    y = torch.einsum("t...i,toi->t...o", x, weight)
    return y if bias is None else y + bias.view(len(bias), *(1,) * (x.dim() - 2), bias.shape[1])


def _samples(make: Make) -> list[Sample]:
    return [
        Sample("shared", (make(2, 3, 5), make(4, 5), make(4)), per_task=False),
        Sample("vector", (make(5), make(3, 5)), per_task=False),
        Sample("tasks", (make(3, 4, 5), make(3, 2, 5), make(3, 2))),
        Sample("no-bias", (make(2, 3, 7), make(2, 3, 7))),
        Sample("rows", (make(3, 5), make(3, 2, 5), make(3, 2))),
        Sample("deep", (make(2, 2, 3, 4), make(2, 3, 4), make(2, 3))),
        Sample("no-rows", (make(2, 0, 3), make(2, 4, 3), make(2, 4))),
        Sample("no-tasks", (make(0, 2, 3), make(0, 4, 3), make(0, 4))),
        Sample("no-features", (make(2, 3, 0), make(2, 4, 0), make(2, 4)), per_task=False),
    ]


def _benchmark(make: Make) -> list[Sample]:
    return [
        Sample("8x256x128-512", (make(8, 256, 128), make(8, 512, 128), make(8, 512))),
        Sample("32x10x128-128", (make(32, 10, 128), make(32, 128, 128), make(32, 128))),
        Sample("shared-2048x512-512", (make(2048, 512), make(512, 512), make(512)), per_task=False),
    ]


def _cost(sample: Sample, order: int) -> Cost:
    x, weight, *_ = sample.args
    y = x.numel() // x.shape[-1] * weight.shape[-2]
    moved = x.numel() + weight.numel()
    return Cost(
        flop=2 * (1, 2, 4)[order] * y * x.shape[-1],
        bytes=((1, 2, 3)[order] * moved + (1, 1, 2)[order] * y) * x.element_size(),
    )


SPEC = Spec(OP, linear, _plain, _samples, _benchmark, _cost)
