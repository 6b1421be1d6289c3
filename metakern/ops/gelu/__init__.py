"""GELU, the Gaussian error linear unit, element by element, exactly or by its tanh approximation.

    exactly   y = x Φ(x)                      Φ, φ: the standard normal distribution function and density
              f'  = Φ + x φ
              f'' = φ (2 - x²)
    tanh      y = x (1 + τ) / 2               τ = tanh(u),  u = k (x + a x³),  k = sqrt(2 / π),  a = 0.044715
              f'  = (1 + τ + x σ u') / 2      σ = 1 - τ²,   u' = k (1 + 3 a x²),  u'' = 6 k a x
              f'' = σ (u' + x (u'' / 2 - τ u'²))

    forward   y = f(x)                        jvp       t_y = f' t_x
    vjp       ct_x = f' ct_y                  vjp_jvp   t_ct_x = f' t_ct_y + f'' ct_y t_x

| tensor | shape |
|---|---|
| x, y | any |

Residuals: none. Half precision is computed in float32. Hendrycks, Gimpel 2016, "Gaussian error linear units",
section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.ops.core import checks, cpp, plain, triton_kernels
from metakern.ops.core.autocast import autocast
from metakern.ops.core.autograd import Op
from metakern.ops.core.matrices import wide
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Cost, Make, Sample, Spec

_K, _A = sqrt(2 / pi), 0.044715

_SMALL = {"none": 2**18, "tanh": 2**14}  # elements; see core/plain.py


@autocast("widest")
def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Returns x Φ(x), element by element, differentiable twice; Φ is the standard normal distribution function.

    Half precision is computed in float32. Hendrycks, Gimpel 2016, "Gaussian error linear units", section 2.

    Args:
        x: A floating-point tensor of any shape.
        approximate: "none" for the exact function, or "tanh" for its tanh approximation.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        TypeError: For an x that is not floating point.
        ValueError: For any other `approximate`.

    >>> import metakern as mk, torch
    >>> mk.ops.gelu(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.8413])
    """
    checks.floating("gelu", x=x)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    if plain.is_faster(x, x.numel(), _SMALL[approximate]):
        return F.gelu(x, approximate=approximate)
    return OP(x.reshape(1, -1), approximate=approximate)[0].reshape(x.shape)


def _forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    return (F.gelu(inputs[0], approximate=c.approximate),), ()


def _jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    return _vjp(c, inputs, r, t_inputs), ()


def _vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    return (torch.ops.aten.gelu_backward(ct_outputs[0], inputs[0], approximate=c.approximate),)


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
    t_ct_x = (_second(wide(x), c.approximate) * ct_y * t_x).to(x.dtype)
    return (t_ct_x,) if t_ct_outputs is None else (t_ct_x + _vjp(c, inputs, r, t_ct_outputs)[0],)


def _second(x: Tensor, approximate: str) -> Tensor:
    square = x * x
    if approximate == "none":
        return torch.exp(-square / 2) * (2 - square) / sqrt(2 * pi)
    tau, slope = torch.tanh(_K * x * (1 + _A * square)), _K * (1 + 3 * _A * square)
    return (1 - tau * tau) * (slope + x * (3 * _K * _A * x - tau * slope * slope))


def by_approximation(**rules: Rules) -> Rules:
    """Returns rules that run those given for `c.approximate`; all support the dtypes of those for "tanh"."""

    def rule(name: str) -> Callable[..., Any]:
        return lambda c, *tensors: getattr(rules[c.approximate], name)(c, *tensors)

    return Rules(rule("forward"), rule("jvp"), rule("vjp"), rule("vjp_jvp"), rules["tanh"].dtypes)


_REFERENCE = Rules(_forward, _jvp, _vjp, _vjp_jvp)

OP = Op(
    "gelu",
    inputs=("x",),
    kernels={
        "reference": _REFERENCE,
        "cpu": by_approximation(none=cpp.curvature("gelu", _REFERENCE), tanh=cpp.rules("gelu_tanh")),
        "triton": triton_kernels.rules("gelu"),
    },
)


def _plain(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "none":
        return x * 0.5 * (1 + torch.erf(x / sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))


def _samples(make: Make) -> list[Sample]:
    tanh = {"approximate": "tanh"}
    return [
        Sample("matrix", (make(3, 5, 7),)),
        Sample("odd", (make(2, 63),)),
        Sample("empty", (make(2, 0, 3),)),
        Sample("tanh", (make(3, 5, 3),), tanh),
        Sample("tanh-odd", (2 * make(2, 31),), tanh),
        Sample("tanh-empty", (make(0, 2),), tanh),
    ]


def _benchmark(make: Make) -> list[Sample]:
    return [Sample("8x512x512", (make(8, 512, 512),)), Sample("tanh", (make(8, 512, 512),), {"approximate": "tanh"})]


def _cost(sample: Sample, order: int) -> Cost:
    n, size = sample.args[0].numel(), sample.args[0].element_size()
    return Cost(flop=(8, 14, 24)[order] * n, bytes=(2, 3, 5)[order] * n * size)


SPEC = Spec(OP, gelu, _plain, _samples, _benchmark, _cost)
