"""RMS norm over the last dimension, with a weight that all tasks share or that each task has for itself.

    x̂ = x ρ                 ρ = (mean(x²) + eps)^(-1/2)
    y = x̂ w
    P a = a - x̂ mean(x̂ a)   (symmetric: J of x̂ is ρ P)

    forward   y      = x̂ w
    jvp       t_x̂    = ρ P t_x               t_ρ = -ρ² mean(x̂ t_x)
              t_y    = t_x̂ w + x̂ t_w
    vjp       g      = w ct_y
              ct_x   = ρ P g                 ct_w = Σ_n ct_y x̂
    vjp_jvp   t_g    = t_w ct_y + w t_ct_y
              t_ct_x = ρ P t_g + t_ρ P g - ρ (t_x̂ mean(x̂ g) + x̂ mean(t_x̂ g))
              t_ct_w = Σ_n t_ct_y x̂ + ct_y t_x̂

| tensor | shape |
|---|---|
| x, y | [T, N, D] |
| weight w | [T, D], optional |
| residual ρ | [T, N], float32 for half precision |

Means are over D. Half precision is computed in float32. Zhang, Sennrich 2019, "Root mean square layer
normalization", equation 4.
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
def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Returns x / √(mean(x²) + eps) over the last dimension of x, times `weight`.

    It is differentiable twice in x and weight. Half precision is computed in float32, to which `torch.autocast` casts.
    Zhang, Sennrich 2019, "Root mean square layer normalization", equation 4.

    Args:
        x: [..., D], or [T, ..., D] for T tasks with weights of their own.
        weight: [D], or [T, D] with one for each task; None for ones.
        eps: Added to the mean square; None, as in torch, for the machine epsilon of the dtype of the computation, which
            is float32 for half precision.

    Returns:
        A tensor of the shape of x.

    Raises:
        TypeError: For tensors that are not floating point, or not of one dtype.
        ValueError: Where shapes or devices do not fit.

    >>> import metakern as mk, torch
    >>> mk.ops.rms_norm(torch.tensor([[1.0, 7.0]]), torch.tensor([1.0, 2.0]))
    tensor([[0.2000, 2.8000]])
    """
    checks.floating("rms_norm", ("weight",), x=x, weight=weight)
    tasks = None
    if weight is not None:
        tasks = checks.tasks("rms_norm", x, "D", weight=(weight, "D"))
    elif x.dim() == 0:
        raise ValueError("rms_norm: x must have shape [..., D], got []")
    if eps is None:
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    if tasks is None and plain.is_faster(x, x.numel(), _SMALL):
        return _plain(x, weight, eps)
    if tasks is None and weight is not None:
        weight = weight[None]
    return OP(rows(x, tasks), weight, eps=eps)[0].view(x.shape)


def _forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    x, weight = inputs
    wide_x = wide(x)
    rstd = (_mean(wide_x * wide_x) + c.eps).rsqrt()
    y = wide_x * rstd
    return ((y if weight is None else y * per_row(weight)).to(x.dtype),), (rstd.squeeze(-1),)


def _jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    (x, weight), (t_x, t_weight) = inputs, t_inputs
    x_hat, rstd = _normal(x, r)
    t_x = wide(t_x)
    slope = _mean(x_hat * t_x)
    t_y = (t_x - x_hat * slope) * rstd
    if weight is not None:
        t_y = torch.addcmul(t_y * per_row(weight), x_hat, per_row(t_weight))
    return (t_y.to(x.dtype),), ((-rstd * rstd * slope).squeeze(-1),)


def _vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    (x, weight), (ct_y,) = inputs, ct_outputs
    x_hat, rstd = _normal(x, r)
    ct_y = wide(ct_y)
    g = ct_y if weight is None else ct_y * per_row(weight)
    ct_x = _projected(g, x_hat).mul_(rstd).to(x.dtype) if c.needs[0] else None
    return ct_x, (ct_y * x_hat).sum(1).to(x.dtype) if c.needs[1] else None


def _vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_outputs: Tensors,
    t_ct_outputs: Tensors | None,
) -> Tensors:
    (x, weight), (t_x, t_weight), (t_rstd,), (ct_y,) = inputs, t_inputs, t_r, ct_outputs
    x_hat, rstd = _normal(x, r)
    t_rstd, ct_y = t_rstd.unsqueeze(-1), wide(ct_y)
    t_x_hat = torch.addcmul(wide(t_x) * rstd, x_hat, t_rstd / rstd)
    t_ct_y = None if t_ct_outputs is None else wide(t_ct_outputs[0])
    t_ct_x = t_ct_weight = None
    if c.needs[0]:
        g, t_g = ct_y, t_ct_y
        if weight is not None:
            g, t_g = ct_y * per_row(weight), ct_y * per_row(t_weight)
            t_g = t_g if t_ct_y is None else t_g.addcmul_(t_ct_y, per_row(weight))
        turn = torch.addcmul(x_hat * _mean(t_x_hat * g), t_x_hat, _mean(x_hat * g))
        turned = turn.neg_() if t_g is None else _projected(t_g, x_hat).sub_(turn)
        t_ct_x = _projected(g, x_hat).mul_(t_rstd).addcmul_(rstd, turned).to(x.dtype)
    if c.needs[1]:
        t_ct_weight = ct_y * t_x_hat
        t_ct_weight = t_ct_weight if t_ct_y is None else t_ct_weight.addcmul_(t_ct_y, x_hat)
        t_ct_weight = t_ct_weight.sum(1).to(x.dtype)
    return t_ct_x, t_ct_weight


def _mean(a: Tensor) -> Tensor:
    return a.mean(-1, keepdim=True)


def _normal(x: Tensor, r: Tensors) -> tuple[Tensor, Tensor]:
    """Returns x̂ [T, N, D] and ρ [T, N, 1]."""
    rstd = r[0].unsqueeze(-1)
    return wide(x) * rstd, rstd


def _projected(a: Tensor, x_hat: Tensor) -> Tensor:
    """Returns P a = a - x̂ mean(x̂ a)."""
    return torch.addcmul(a, x_hat, _mean(x_hat * a), value=-1)


OP = Op(
    "rms_norm",
    inputs=("x", "weight"),
    kernels={
        "reference": Rules(_forward, _jvp, _vjp, _vjp_jvp),
        "cpu": cpp.rules("rms_norm", scalars=lambda c: (c.eps,)),
        "triton": triton_kernels.rules("rms_norm"),
    },
)


def _plain(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    y = F.rms_norm(x, x.shape[-1:], eps=eps)
    if weight is None:
        return y
    return y * (weight if weight.dim() == 1 else weight.view(len(weight), *(1,) * (x.dim() - 2), weight.shape[1]))


def _samples(make: Make) -> list[Sample]:
    return [
        Sample("shared", (make(2, 3, 5), make(5)), per_task=False),
        Sample("tasks", (make(3, 4, 5), make(3, 5)), {"eps": 0.1}),
        Sample("deep", (make(2, 2, 3, 4), make(2, 4)), {"eps": 1e-3}),
        Sample("rows", (make(3, 7), make(3, 7)), {"eps": 1e-6}),
        Sample("no-weight", (make(2, 3, 5),), {"eps": 0.5}),
        Sample("no-rows", (make(2, 0, 3), make(2, 3))),
    ]


def _benchmark(make: Make) -> list[Sample]:
    return [Sample("8x2048x768", (make(8, 2048, 768), make(8, 768)))]


def _cost(sample: Sample, order: int) -> Cost:
    n, size = sample.args[0].numel(), sample.args[0].element_size()
    return Cost(flop=(4, 8, 24)[order] * n, bytes=(2, 3, 5)[order] * n * size)


SPEC = Spec(OP, rms_norm, _plain, _samples, _benchmark, _cost)
