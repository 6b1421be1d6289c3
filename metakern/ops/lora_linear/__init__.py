"""Linear layer with a low-rank correction (LoRA): a frozen base that all tasks share, and factors A, B for each task.

    y = x Wᵀ + b + s (x Aᵀ) Bᵀ

    h = s x Aᵀ               (h and g have R columns; g is s times the cotangent of h)
    g = s ct_y B

    forward   y      = x Wᵀ + b + h Bᵀ
    jvp       t_h    = s (t_x Aᵀ + x t_Aᵀ)
              t_y    = t_x Wᵀ + t_h Bᵀ + h t_Bᵀ
    vjp       ct_x   = ct_y W + g A         ct_A   = gᵀ x                   ct_B   = ct_yᵀ h
    vjp_jvp   t_g    = s (t_ct_y B + ct_y t_B)
              t_ct_x = t_ct_y W + t_g A + g t_A
              t_ct_A = t_gᵀ x + gᵀ t_x      t_ct_B = t_ct_yᵀ h + ct_yᵀ t_h

| tensor | shape |
|---|---|
| x | [T, N, in] |
| weight W, bias b | [out, in], [out] (optional), constants |
| A, B | [T, R, in], [T, out, R] |
| y | [T, N, out] |
| residual h, and g of the vjp | [T, N, R] |

Only x, t_x, ct_y and t_ct_y are multiplied by W, each in one product over the rows of all tasks, with N·in·out
multiplications for each task. Nothing of W's size is kept, for any task at any order. What belongs to a task goes
through the R columns, with N·R·(in + out) multiplications for a pair of products. Other orders of association cost more
for each task: W + s B A takes in·out·R more multiplications, the gradient ct_yᵀ x before its product with A or B takes
N·in·out more, and both take in·out numbers of memory. Half precision accumulates in float32 inside each product.

Hu et al. 2021, "LoRA: low-rank adaptation of large language models", section 4.1.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.ops.core import checks, cpp, matrices
from metakern.ops.core.autocast import autocast
from metakern.ops.core.autograd import Op
from metakern.ops.core.matrices import Product, products, rows
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Cost, Make, Sample, Spec


@autocast("lower")
def lora_linear(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """Returns x Wᵀ + b + scale (x Aᵀ) Bᵀ, a frozen linear layer with one low-rank correction or one for each task.

    It is differentiable twice in x, A and B; weight and bias are constants. Half precision accumulates in float32;
    `torch.autocast` lowers float32 to the region's dtype. Hu et al. 2021, "LoRA", section 4.1.

    Args:
        x: [..., in], or [T, ..., in] for T tasks with factors of their own.
        weight: The frozen weight that all tasks share, [out, in].
        A: [R, in], or [T, R, in] with one for each task; R is the rank.
        B: [out, R], or [T, out, R] with one for each task.
        scale: The factor of the correction, alpha / rank in LoRA.
        bias: The frozen bias that all tasks share, [out]; None for zeros.

    Returns:
        [..., out] or [T, ..., out].

    Raises:
        TypeError: For tensors that are not floating point, or not of one dtype.
        ValueError: Where shapes or devices do not fit, or where weight or bias requires a gradient.

    >>> import metakern as mk, torch
    >>> x, weight, A = torch.ones(2, 3, 4), torch.zeros(5, 4), torch.ones(2, 1, 4)
    >>> B = torch.tensor([1.0, 2.0]).view(2, 1, 1).expand(2, 5, 1)
    >>> mk.ops.lora_linear(x, weight, A, B, scale=0.5)[:, 0, 0]
    tensor([2., 4.])
    """
    name = "lora_linear"
    if not isinstance(scale, int | float):
        raise TypeError(f"{name}: scale must be a number, got {type(scale).__name__}")
    checks.floating(name, ("bias",), x=x, weight=weight, A=A, B=B, bias=bias)
    tasks = checks.tasks(name, x, "in", A=(A, "R, in"))
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{name}: weight must have shape [out, in] = [..., {x.shape[-1]}], got {list(weight.shape)}")
    size = weight.shape[0]
    checks.shape(name, "B", B, (*A.shape[:-2], size, A.shape[-2]), "[T, out, R]" if A.dim() == 3 else "[out, R]")
    if bias is not None:
        checks.shape(name, "bias", bias, (size,), "[out]")
    A, B = (A[None], B[None]) if tasks is None else (A, B)
    base, offset = (None if c is None else c.expand(A.shape[0], *c.shape) for c in (weight, bias))
    (y,) = OP(rows(x, tasks), A, B, weight=base, bias=offset, scale=scale)
    return y.view(*x.shape[:-1], size)


def _rules(product: Product) -> Rules:
    """Returns the four rules, given a product."""

    def forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
        x, A, B = inputs
        h = product(x, A.mT) * c.scale
        y = product(x, c.weight.mT, None if c.bias is None else c.bias.unsqueeze(1))
        return (product(h, B.mT, y, reuse=True),), (h,)

    def jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
        (x, A, B), (h,), (t_x, t_A, t_B) = inputs, r, t_inputs
        t_h = _scaled(products(product, (t_x, A.mT), (x, None if t_A is None else t_A.mT)), c.scale)
        t_y = products(product, (t_x, c.weight.mT), (t_h, B.mT), (h, None if t_B is None else t_B.mT))
        return (t_y,), (torch.zeros_like(h) if t_h is None else t_h,)

    def vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
        (x, A, B), (h,), (ct_y,), needs = inputs, r, ct_outputs, c.needs
        g = product(ct_y, B) * c.scale
        return (
            products(product, (ct_y, c.weight), (g, A)) if needs[0] else None,
            product(g.mT, x) if needs[1] else None,
            product(ct_y.mT, h) if needs[2] else None,
            g,
        )

    def vjp_jvp(
        c: SimpleNamespace,
        inputs: Tensors,
        r: Tensors,
        t_inputs: Tensors,
        t_r: Tensors,
        ct_outputs: Tensors,
        t_ct_outputs: Tensors | None,
    ) -> Tensors:
        (x, A, B), (t_x, t_A, t_B), (h,), (t_h,), (ct_y,) = inputs, t_inputs, r, t_r, ct_outputs
        (t_ct_y,), needs = t_ct_outputs or (None,), c.needs
        (g,) = c.from_vjp or (product(ct_y, B) * c.scale,)
        t_g = _scaled(products(product, (t_ct_y, B), (ct_y, t_B)), c.scale)
        t_ct_y_mT, t_g_mT = (None if t is None else t.mT for t in (t_ct_y, t_g))
        return (
            products(product, (t_ct_y, c.weight), (t_g, A), (g, t_A)) if needs[0] else None,
            products(product, (t_g_mT, x), (g.mT, t_x)) if needs[1] else None,
            products(product, (t_ct_y_mT, h), (ct_y.mT, t_h)) if needs[2] else None,
        )

    return Rules(forward, jvp, vjp, vjp_jvp)


def _scaled(value: Tensor | None, scale: float) -> Tensor | None:
    return None if value is None else value * scale


OP = Op(
    "lora_linear",
    inputs=("x", "A", "B"),
    constants=("weight", "bias"),
    kernels={"reference": _rules(matrices.product), "cpu": _rules(cpp.product)},
    zero_tangents=False,
    vjp_residuals=1,
)


def _plain(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
    if A.dim() == 2:
        return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, A), B)
    return F.linear(x, weight, bias) + scale * torch.einsum("t...i,tri,tor->t...o", x, A, B)


def _samples(make: Make) -> list[Sample]:
    def sample(name: str, rows: tuple[int, ...], R: int, out: int, T: int | None = None, bias: bool = True) -> Sample:
        tasks = () if T is None else (T,)
        args = make(*tasks, *rows), make(out, rows[-1]), make(*tasks, R, rows[-1]), make(*tasks, out, R)
        return Sample(name, (*args, 0.7, *(make(out),) * bias), per_task=T is not None, frozen=(1, 5))

    return [
        sample("shared", (2, 3, 5), 2, 4),
        sample("vector", (5,), 3, 2),
        sample("tasks", (4, 5), 2, 3, T=3),
        sample("no-bias", (3, 4), 2, 6, T=2, bias=False),
        sample("rows", (5,), 2, 3, T=3),
        sample("deep", (2, 3, 4), 3, 2, T=2),
        sample("rank-1", (6, 5), 1, 4, T=2),
        sample("no-rows", (0, 3), 2, 4, T=2),
        sample("no-tasks", (2, 3), 2, 4, T=0),
    ]


def _benchmark(make: Make) -> list[Sample]:
    def sample(name: str, T: int, N: int, size: int, out: int, R: int) -> Sample:
        args = make(T, N, size), make(out, size), make(T, R, size), make(T, out, R), 1.0
        return Sample(name, args, frozen=(1,))

    return [sample("8x256x576-1536-r8", 8, 256, 576, 1536, 8), sample("8x512x1024-1024-r16", 8, 512, 1024, 1024, 16)]


def _cost(sample: Sample, order: int) -> Cost:
    x, weight, A, B, *_ = sample.args
    (out, size), R, element = weight.shape, A.shape[-2], x.element_size()
    n = x.numel() // x.shape[-1]
    wide, narrow, factors = n * size * out, n * R * (size + out), A.numel() + B.numel()
    return Cost(
        flop=2 * (wide + (1, 2, 4)[order] * narrow),
        bytes=((1, 2, 3)[order] * (n * size + factors) + (1, 1, 2)[order] * n * out + weight.numel()) * element,
    )


SPEC = Spec(OP, lora_linear, _plain, _samples, _benchmark, _cost)
