"""Layer norm over the last dimension, with a weight and bias that all tasks share or that each task has for itself.

    x̂ = (x - mean(x)) ρ                 ρ = (var(x) + eps)^(-1/2)
    y = x̂ w + b
    P a = a - mean(a) - x̂ mean(x̂ a)     (symmetric: J of x̂ is ρ P)

    forward   y      = x̂ w + b
    jvp       t_x̂    = ρ P t_x           t_mean = mean(t_x)      t_ρ = -ρ² mean(x̂ t_x)
              t_y    = t_x̂ w + x̂ t_w + t_b
    vjp       g      = w ct_y
              ct_x   = ρ P g             ct_w = Σ_n ct_y x̂       ct_b = Σ_n ct_y
    vjp_jvp   t_g    = t_w ct_y + w t_ct_y
              t_ct_x = ρ P t_g + t_ρ P g - ρ (t_x̂ mean(x̂ g) + x̂ mean(t_x̂ g))
              t_ct_w = Σ_n t_ct_y x̂ + ct_y t_x̂                   t_ct_b = Σ_n t_ct_y

| tensor | shape |
|---|---|
| x, y | [T, N, D] |
| weight w, bias b | [T, D], both optional |
| residuals mean, ρ | [T, N], float32 for half precision |

Means are over D. Half precision is computed in float32. Ba, Kiros, Hinton 2016, "Layer normalization", equation 4.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.ops.core import checks, cpp, plain, triton_kernels
from metakern.ops.core.autocast import autocast
from metakern.ops.core.autograd import Op
from metakern.ops.core.matrices import per_row, rows, wide
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Cost, Make, Sample, Spec

_SMALL = 2**16  # elements; see core/plain.py


@autocast("float32")
def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Returns (x - mean) / √(variance + eps) over the last dimension of x, times `weight`, plus `bias`.

    It is differentiable twice in x, weight and bias. Half precision is computed in float32, to which `torch.autocast`
    casts. Ba, Kiros, Hinton 2016, "Layer normalization", equation 4.

    Args:
        x: [..., D], or [T, ..., D] for T tasks with weights of their own.
        weight: [D], or [T, D] with one for each task; None for ones.
        bias: Shaped like `weight`; None for zeros.
        eps: Added to the variance, which is the mean of squared deviations.

    Returns:
        A tensor of the shape of x.

    Raises:
        TypeError: For tensors that are not floating point, or not of one dtype.
        ValueError: Where shapes or devices do not fit.

    >>> import metakern as mk, torch
    >>> mk.ops.layer_norm(torch.tensor([[1.0, 2.0, 3.0]]), eps=0.0)
    tensor([[-1.2247,  0.0000,  1.2247]])
    """
    checks.floating("layer_norm", ("weight", "bias"), x=x, weight=weight, bias=bias)
    tasks = None
    if weight is not None:
        tasks = checks.tasks("layer_norm", x, "D", weight=(weight, "D"))
    elif bias is not None:
        tasks = checks.tasks("layer_norm", x, "D", bias=(bias, "D"))
    elif x.dim() == 0:
        raise ValueError("layer_norm: x must have shape [..., D], got []")
    if weight is not None and bias is not None:
        checks.shape("layer_norm", "bias", bias, weight.shape, "[D]" if tasks is None else "[T, D]")
    if tasks is None and plain.is_faster(x, x.numel(), _SMALL):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if tasks is None:
        weight, bias = (None if p is None else p[None] for p in (weight, bias))
    return OP(rows(x, tasks), weight, bias, eps=eps)[0].view(x.shape)


def _forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    x, weight, bias = inputs
    wide_x = wide(x)
    mean = _mean(wide_x)
    centered = wide_x - mean
    rstd = (_mean(centered * centered) + c.eps).rsqrt()
    y = centered * rstd
    if weight is not None:
        y = y * per_row(weight) if bias is None else torch.addcmul(per_row(bias), y, per_row(weight))
    elif bias is not None:
        y = y + per_row(bias)
    return (y.to(x.dtype),), (mean.squeeze(-1), rstd.squeeze(-1))


def _jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    (x, weight, _), (t_x, t_weight, t_bias) = inputs, t_inputs
    x_hat, rstd = _normal(x, r)
    t_x = wide(t_x)
    t_mean, slope = _mean(t_x), _mean(x_hat * t_x)
    t_y = (t_x - t_mean - x_hat * slope) * rstd
    if weight is not None:
        t_y = torch.addcmul(t_y * per_row(weight), x_hat, per_row(t_weight))
    if t_bias is not None:
        t_y = t_y + per_row(t_bias)
    return (t_y.to(x.dtype),), (t_mean.squeeze(-1), (-rstd * rstd * slope).squeeze(-1))


def _vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    (x, weight, _), (ct_y,) = inputs, ct_outputs
    x_hat, rstd = _normal(x, r)
    ct_y = wide(ct_y)
    g = ct_y if weight is None else ct_y * per_row(weight)
    ct_x = _projected(g, x_hat).mul_(rstd) if c.needs[0] else None
    ct_weight = (ct_y * x_hat).sum(1) if c.needs[1] else None
    ct_bias = ct_y.sum(1) if c.needs[2] else None
    return tuple(None if ct is None else ct.to(x.dtype) for ct in (ct_x, ct_weight, ct_bias))


def _vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_outputs: Tensors,
    t_ct_outputs: Tensors | None,
) -> Tensors:
    (x, weight, _), (t_x, t_weight, _), (t_mean, t_rstd), (ct_y,) = inputs, t_inputs, t_r, ct_outputs
    x_hat, rstd = _normal(x, r)
    t_rstd, ct_y = t_rstd.unsqueeze(-1), wide(ct_y)
    t_x_hat = torch.addcmul((wide(t_x) - t_mean.unsqueeze(-1)) * rstd, x_hat, t_rstd / rstd)
    t_ct_y = None if t_ct_outputs is None else wide(t_ct_outputs[0])
    t_ct_x = t_ct_weight = t_ct_bias = None
    if c.needs[0]:
        g, t_g = ct_y, t_ct_y
        if weight is not None:
            g, t_g = ct_y * per_row(weight), ct_y * per_row(t_weight)
            t_g = t_g if t_ct_y is None else t_g.addcmul_(t_ct_y, per_row(weight))
        t_ct_x = _projected(g, x_hat).mul_(t_rstd)
        turn = torch.addcmul(x_hat * _mean(t_x_hat * g), t_x_hat, _mean(x_hat * g))
        t_ct_x.addcmul_(rstd, turn.neg_() if t_g is None else _projected(t_g, x_hat).sub_(turn))
    if c.needs[1]:
        t_ct_weight = ct_y * t_x_hat
        t_ct_weight = (t_ct_weight if t_ct_y is None else t_ct_weight.addcmul_(t_ct_y, x_hat)).sum(1)
    if c.needs[2] and t_ct_y is not None:
        t_ct_bias = t_ct_y.sum(1)
    return tuple(None if t is None else t.to(x.dtype) for t in (t_ct_x, t_ct_weight, t_ct_bias))


def _mean(a: Tensor) -> Tensor:
    return a.mean(-1, keepdim=True)


def _normal(x: Tensor, r: Tensors) -> tuple[Tensor, Tensor]:
    """Returns x̂ [T, N, D] and ρ [T, N, 1]."""
    mean, rstd = (a.unsqueeze(-1) for a in r)
    return (wide(x) - mean) * rstd, rstd


def _projected(a: Tensor, x_hat: Tensor) -> Tensor:
    """Returns P a = a - mean(a) - x̂ mean(x̂ a)."""
    return torch.addcmul(a - _mean(a), x_hat, _mean(x_hat * a), value=-1)


OP = Op(
    "layer_norm",
    inputs=("x", "weight", "bias"),
    kernels={
        "reference": Rules(_forward, _jvp, _vjp, _vjp_jvp),
        "cpu": cpp.rules("layer_norm", scalars=lambda c: (c.eps,)),
        "triton": triton_kernels.rules("layer_norm"),
    },
)


def _plain(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    def spread(p: Tensor) -> Tensor:
        return p if p.dim() == 1 else p.view(len(p), *(1,) * (x.dim() - 2), p.shape[1])

    y = F.layer_norm(x, x.shape[-1:], eps=eps)
    y = y if weight is None else y * spread(weight)
    return y if bias is None else y + spread(bias)


def _samples(make: Make) -> list[Sample]:
    return [
        Sample("shared", (make(2, 3, 5), make(5), make(5)), per_task=False),
        Sample("tasks", (make(3, 4, 5), make(3, 5), make(3, 5)), {"eps": 0.1}),
        Sample("deep", (make(2, 2, 3, 4), make(2, 4), make(2, 4))),
        Sample("rows", (make(3, 7), make(3, 7), make(3, 7))),
        Sample("no-bias", (make(2, 3, 5), make(2, 5))),
        Sample("no-weight", (make(2, 3, 5), None, make(2, 5))),
        Sample("neither", (make(2, 3, 5),), {"eps": 0.5}),
        Sample("no-rows", (make(2, 0, 3), make(2, 3), make(2, 3))),
    ]


def _benchmark(make: Make) -> list[Sample]:
    return [Sample("8x2048x768", (make(8, 2048, 768), make(8, 768), make(8, 768)))]


def _cost(sample: Sample, order: int) -> Cost:
    n, size = sample.args[0].numel(), sample.args[0].element_size()
    return Cost(flop=(8, 11, 30)[order] * n, bytes=(2, 3, 5)[order] * n * size)


SPEC = Spec(OP, layer_norm, _plain, _samples, _benchmark, _cost)
