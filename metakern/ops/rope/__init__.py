"""Rotary position embedding, in the half-rotation form of Hugging Face's Llama.

    y = x cos + R x sin               R (a, b) = (-b, a) for the halves a, b of the last dimension
    y is linear in x; its transpose   z ↦ z cos - R (z sin)     since Rᵀ = -R

    forward   y    = x cos + R x sin              jvp       t_y    = t_x cos + R t_x sin
    vjp       ct_x = ct_y cos - R (ct_y sin)      vjp_jvp   t_ct_x = t_ct_y cos - R (t_ct_y sin),  zero where t_ct_y is

| tensor | shape |
|---|---|
| x, y | [T, H, L, D], D even |
| cos, sin | [T, L, D] |

Residuals: none. Half precision is computed in float32. Su et al. 2021, "RoFormer", section 3.4.2.
"""

from __future__ import annotations

from math import prod
from types import SimpleNamespace

import torch
from torch import Tensor

from metakern.ops.core import checks, cpp, plain, triton_kernels
from metakern.ops.core.autocast import autocast
from metakern.ops.core.autograd import Op
from metakern.ops.core.matrices import wide
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Cost, Make, Sample, Spec

_SMALL = 2**17  # elements; see core/plain.py


@autocast("widest")
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns x with each pair (x[i], x[i + D/2]) of its last dimension rotated by a given angle.

    It is differentiable twice in x; cos and sin are constants. Half precision is computed in float32. Su et al. 2021,
    "RoFormer", section 3.4.2, with the layout of Hugging Face's Llama.

    Args:
        x: [..., L, D] with D even, such as [B, H, L, D].
        cos: The cosines of the angles, [L, D] or [1, L, D]; or [B, L, D] with x [B, ..., L, D], for positions that
            differ between sequences. A rotation has the same angles in both halves of D.
        sin: The sines, shaped like `cos` and of its dtype, which may differ from that of x.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        TypeError: For tensors that are not floating point, or cos and sin of different dtypes.
        ValueError: Where D is odd, shapes or devices do not fit, or cos or sin requires a gradient.

    >>> import metakern as mk, torch
    >>> mk.ops.rope(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), torch.ones(1, 2))  # a quarter turn
    tensor([[-2.,  1.]])
    """
    checks.floating("rope", x=x)
    checks.floating("rope", cos=cos, sin=sin)
    if cos.device != x.device:
        raise ValueError(f"rope: cos must be on {x.device} like the other arguments, got {cos.device}")
    if x.dim() < 2 or x.shape[-1] % 2:
        raise ValueError(f"rope: x must have shape [..., L, D] with D even, got {list(x.shape)}")
    own = cos.dim() == 3 and cos.shape[0] != 1
    lead = x.shape[:1] if own and x.dim() > 2 else (1,)
    expected, names = (x.shape[-2:], "[L, D]") if cos.dim() == 2 else ((*lead, *x.shape[-2:]), "[B, L, D]")
    for name, value in {"cos": cos, "sin": sin}.items():
        checks.shape("rope", name, value, expected, names)
    learned = cos.requires_grad or sin.requires_grad  # which the op refuses
    if not learned and plain.is_faster(x, x.numel(), _SMALL):
        return _plain(x, cos, sin)
    if cos.dim() == 2:
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
    folded = x.reshape(*lead, prod(x.shape[len(lead) if own else 0 : -2]), *x.shape[-2:])
    return OP(folded, cos=cos, sin=sin)[0].view(x.shape)


def _forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    (x,) = inputs
    return ((wide(x) * c.cos.unsqueeze(1) + _turned(wide(x)) * c.sin.unsqueeze(1)).to(x.dtype),), ()


def _jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    return _forward(c, t_inputs)


def _vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    (ct_y,) = ct_outputs
    ct_x = wide(ct_y) * c.cos.unsqueeze(1) - _turned(wide(ct_y) * c.sin.unsqueeze(1))
    return (ct_x.to(ct_y.dtype),)


def _vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_outputs: Tensors,
    t_ct_outputs: Tensors | None,
) -> Tensors:
    return (None,) if t_ct_outputs is None else _vjp(c, inputs, r, t_ct_outputs)


def _turned(x: Tensor) -> Tensor:
    """Returns R x: (a, b) -> (-b, a)."""
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


OP = Op(
    "rope",
    inputs=("x",),
    constants=("cos", "sin"),
    kernels={
        "reference": Rules(_forward, _jvp, _vjp, _vjp_jvp),
        "cpu": cpp.linear_rules("rope", ("cos", "sin")),
        "triton": triton_kernels.rules("rope"),
    },
)


def _plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Follows transformers.models.llama.modeling_llama.apply_rotary_pos_emb."""
    if cos.dim() == 3:
        cos, sin = (a.view(len(a), *(1,) * (x.dim() - 3), *a.shape[1:]) for a in (cos, sin))
    half = x.shape[-1] // 2
    return (x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin).to(x.dtype)


def angles(make: Make, *shape: int) -> dict[str, Tensor]:
    """Draws cosines and sines of angles that differ between the two halves, which is more general than a rotation."""
    angle = make(*shape)
    return {"cos": angle.cos(), "sin": angle.sin()}


def _samples(make: Make) -> list[Sample]:
    return [
        Sample("heads", (make(2, 3, 4, 6),), angles(make, 4, 6)),
        Sample("positions", (make(2, 3, 5, 4),), angles(make, 2, 5, 4), per_task=False),
        Sample("flat-positions", (make(3, 2, 4),), angles(make, 3, 2, 4), per_task=False),
        Sample("one-batch", (make(2, 2, 3, 2),), angles(make, 1, 3, 2)),
        Sample("matrix", (make(3, 8),), angles(make, 3, 8), per_task=False),
        Sample("empty", (make(2, 0, 3, 4),), angles(make, 3, 4)),
    ]


def _benchmark(make: Make) -> list[Sample]:
    return [Sample("32x12x512x64", (make(32, 12, 512, 64),), angles(make, 512, 64))]


def _cost(sample: Sample, order: int) -> Cost:
    n, size = sample.args[0].numel(), sample.args[0].element_size()
    return Cost(flop=3 * n, bytes=2 * n * size)


SPEC = Spec(OP, rope, _plain, _samples, _benchmark, _cost)
