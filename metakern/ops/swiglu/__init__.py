"""SwiGLU, the element-wise part of a gated linear unit, without its matrix products.

    y = f(g) u                        f = SiLU,  s = sigmoid(g)
    f'  = s (1 + g (1 - s))
    f'' = s (1 - s) (2 + g (1 - 2 s))

    forward   y      = f u
    jvp       t_y    = f' u t_g + f t_u
    vjp       ct_g   = f' u ct_y      ct_u   = f ct_y
    vjp_jvp   t_ct_g = f'' t_g u ct_y + f' (t_u ct_y + u t_ct_y)
              t_ct_u = f' t_g ct_y + f t_ct_y

| tensor | shape |
|---|---|
| gate g, up u, y | any, the same for all |

Residuals: none. Half precision is computed in float32. Shazeer 2020, "GLU variants improve Transformer", equation 5.
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
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) up, element by element, differentiable twice in both arguments.

    Half precision is computed in float32. Shazeer 2020, "GLU variants improve Transformer", equation 5.

    Args:
        gate: A floating-point tensor of any shape.
        up: A tensor of the shape, dtype and device of `gate`.

    Returns:
        A tensor of the shape and dtype of `gate`.

    Raises:
        TypeError: For tensors that are not floating point, or not of one dtype.
        ValueError: Where shapes or devices differ.

    >>> import metakern as mk, torch
    >>> mk.ops.swiglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
    tensor([0.0000, 1.4621])
    """
    checks.floating("swiglu", gate=gate, up=up)
    checks.shape("swiglu", "up", up, gate.shape, "that of gate")
    return OP(gate.reshape(1, -1), up.reshape(1, -1))[0].reshape(gate.shape)


def _forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    gate, up = (wide(x) for x in inputs)
    return ((F.silu(gate) * up).to(inputs[0].dtype),), ()


def _jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    gate, up, t_gate, t_up = (wide(x) for x in (*inputs, *t_inputs))
    value, first = _orders(gate)
    return ((first * up * t_gate + value * t_up).to(inputs[0].dtype),), ()


def _vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    gate, up, ct_y = (wide(x) for x in (*inputs, *ct_outputs))
    value, first = _orders(gate)
    return tuple(ct.to(inputs[0].dtype) for ct in (first * up * ct_y, value * ct_y))


def _vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_outputs: Tensors,
    t_ct_outputs: Tensors | None,
) -> Tensors:
    gate, up, t_gate, t_up, ct_y = (wide(x) for x in (*inputs, *t_inputs, *ct_outputs))
    value, first = _orders(gate)
    s = torch.sigmoid(gate)
    second = s * (1 - s) * (2 + gate * (1 - 2 * s))
    t_ct_gate = (second * t_gate * up + first * t_up) * ct_y
    t_ct_up = first * t_gate * ct_y
    if t_ct_outputs is not None:
        t_ct_y = wide(t_ct_outputs[0])
        t_ct_gate, t_ct_up = t_ct_gate + first * up * t_ct_y, t_ct_up + value * t_ct_y
    return t_ct_gate.to(inputs[0].dtype), t_ct_up.to(inputs[0].dtype)


def _orders(gate: Tensor) -> tuple[Tensor, Tensor]:
    """Returns f and f'."""
    s = torch.sigmoid(gate)
    value = gate * s
    return value, s + value * (1 - s)


OP = Op(
    "swiglu",
    inputs=("gate", "up"),
    kernels={
        "reference": Rules(_forward, _jvp, _vjp, _vjp_jvp),
        "cpu": replace(cpp.rules("swiglu"), forward=_forward),
        "triton": triton_kernels.rules("swiglu"),
    },
)


def _plain(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _samples(make: Make) -> list[Sample]:
    return [
        Sample("matrix", (make(3, 4, 5), make(3, 4, 5))),
        Sample("odd", (2 * make(2, 31), make(2, 31))),
        Sample("empty", (make(2, 0, 3), make(2, 0, 3))),
    ]


def _benchmark(make: Make) -> list[Sample]:
    return [Sample("8x512x512", (make(8, 512, 512), make(8, 512, 512)))]


def _cost(sample: Sample, order: int) -> Cost:
    n, size = sample.args[0].numel(), sample.args[0].element_size()
    return Cost(flop=(6, 11, 24)[order] * n, bytes=(3, 5, 8)[order] * n * size)


SPEC = Spec(OP, swiglu, _plain, _samples, _benchmark, _cost)
