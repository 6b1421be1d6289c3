"""SiLU, the sigmoid linear unit, element by element.

    y = x σ(x)                    σ = sigmoid,  σ' = σ (1 - σ)
    f'(x)  = σ (1 + x (1 - σ))
    f''(x) = σ' (2 + x (1 - 2σ))

    forward   y = f(x)                jvp       t_y = f' t_x
    vjp       ct_x = f' ct_y          vjp_jvp   t_ct_x = f' t_ct_y + f'' ct_y t_x

| tensor | shape |
|---|---|
| x, y | any |

Residuals: none. Half precision is computed in float32. Elfwing, Uchibe, Doya 2018, "Sigmoid-weighted linear units",
equation 5.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.ops.core import checks, cpp, triton_kernels
from metakern.ops.core.autocast import autocast
from metakern.ops.core.autograd import Op
from metakern.ops.core.matrices import wide
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Cost, Make, Sample, Spec


@autocast("widest")
def silu(x: Tensor) -> Tensor:
    """Returns x sigmoid(x), element by element, differentiable twice.

    Half precision is computed in float32. Elfwing, Uchibe, Doya 2018, "Sigmoid-weighted linear units", equation 5.

    Args:
        x: A floating-point tensor of any shape.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        TypeError: For an x that is not floating point.

    >>> import metakern as mk, torch
    >>> mk.ops.silu(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.7311])
    """
    checks.floating("silu", x=x)
    return OP(x.reshape(1, -1))[0].reshape(x.shape)


def _forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    (x,) = inputs
    return (F.silu(x),), ()


def _jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    (x,), (t_x,) = inputs, t_inputs
    return ((_first(wide(x)) * t_x).to(x.dtype),), ()


def _fused_jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    """Returns f' t_x by PyTorch's backward kernel of SiLU.

    The reference's jvp cannot use it: that kernel has no forward mode, which forward over forward needs.
    """
    return _vjp(c, inputs, r, t_inputs), ()


def _vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    (x,), (ct_y,) = inputs, ct_outputs
    return (torch.ops.aten.silu_backward(ct_y, x),)


def _vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_outputs: Tensors,
    t_ct_outputs: Tensors | None,
) -> Tensors:
    (x,), (t_x,), (ct_y,) = inputs, t_inputs, ct_outputs
    t_ct_x = (_second(wide(x)) * ct_y * t_x).to(x.dtype)
    return (t_ct_x if t_ct_outputs is None else t_ct_x + torch.ops.aten.silu_backward(t_ct_outputs[0], x),)


def _first(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _second(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


_REFERENCE = Rules(_forward, _jvp, _vjp, _vjp_jvp)

OP = Op(
    "silu",
    inputs=("x",),
    kernels={
        "reference": _REFERENCE,
        "cpu": replace(cpp.curvature("silu", _REFERENCE), jvp=_fused_jvp),
        "triton": triton_kernels.rules("silu"),
    },
)


def _samples(make: Make) -> list[Sample]:
    return [Sample("matrix", (make(3, 5, 7),)), Sample("odd", (make(2, 63),)), Sample("empty", (make(2, 0, 3),))]


def _benchmark(make: Make) -> list[Sample]:
    return [Sample("8x512x512", (make(8, 512, 512),))]


def _cost(sample: Sample, order: int) -> Cost:
    n, size = sample.args[0].numel(), sample.args[0].element_size()
    return Cost(flop=(5, 8, 16)[order] * n, bytes=(2, 3, 5)[order] * n * size)


SPEC = Spec(OP, silu, F.silu, _samples, _benchmark, _cost)
