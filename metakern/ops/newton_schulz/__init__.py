"""Newton-Schulz iteration, which brings the singular values of matrices near one, for a batch of them at once.

    X₀ = X / max(|X|, eps)                                  |X|: the Frobenius norm
    A = X Xᵀ        B = b A + c A²        X' = a X + B X    `steps` times; X is transposed where it is taller than wide

With sym(M) = M + Mᵀ and g(S, A) = b S + c (S A + A S), the rules of one step are

    jvp       t_A  = sym(t_X Xᵀ)            t_B = g(t_A, A)        t_X' = a t_X + t_B X + B t_X
    vjp       S    = sym(ct Xᵀ)             P   = g(S, A)          ct_X = a ct + B ct + P X
    vjp_jvp   t_S  = sym(t_ct Xᵀ + ct t_Xᵀ)    t_P = g(t_S, A) + c (S t_A + t_A S)
              t_ct_X = a t_ct + t_B ct + B t_ct + t_P X + P t_X

| tensor | shape |
|---|---|
| x, y | [..., M, N] |

Residuals: none. Each rule computes the iterates again, so that no iterate is kept between rules. Half precision is
computed in float32. Bernstein, Newhouse 2024, "Old optimizer, new norm"; the coefficients are those of Jordan et al.
2024, "Muon". Five steps with them take singular values above 0.004 |X| to between 0.68 and 1.21, not to one.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from metakern.ops.core import checks
from metakern.ops.core.autograd import Op
from metakern.ops.core.matrices import wide
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Cost, Make, Sample, Spec

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(
    x: Tensor, steps: int = 5, coefficients: tuple[float, float, float] = COEFFICIENTS, eps: float = 1e-7
) -> Tensor:
    """Returns x with the singular values of each of its matrices brought near one; differentiable twice in x.

    Five steps with the default coefficients take singular values above 0.004 times the Frobenius norm of their matrix
    to between 0.68 and 1.21. Half precision is computed in float32. Bernstein, Newhouse 2024, "Old optimizer, new
    norm"; Jordan et al. 2024, "Muon".

    Args:
        x: A matrix, or a batch of matrices, [..., M, N].
        steps: The number of steps X <- a X + (b A + c A²) X with A = X Xᵀ.
        coefficients: (a, b, c).
        eps: The least norm by which a matrix is divided before the first step.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        TypeError: For an x that is not floating point.
        ValueError: For an x of fewer than two dimensions, negative `steps`, or an `eps` that is not positive.

    >>> import metakern as mk, torch
    >>> y = mk.ops.newton_schulz(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    >>> bool(torch.linalg.svdvals(y).sub(1).abs().max() < 0.35)
    True
    """
    checks.floating("newton_schulz", x=x)
    if x.dim() < 2:
        raise ValueError(f"newton_schulz: x must have shape [..., M, N], got {list(x.shape)}")
    if steps < 0:
        raise ValueError(f"newton_schulz: steps must be at least 0, got {steps}")
    if not eps > 0:
        raise ValueError(f"newton_schulz: eps must be positive, got {eps}")
    matrices = x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    (y,) = _OP(matrices.mT if tall else matrices, steps=steps, coefficients=coefficients, eps=eps)
    return (y.mT if tall else y).reshape(x.shape)


def _start(c: SimpleNamespace, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns X₀, s = 1 / max(|X|, eps), and the factor that is 1 where |X| >= eps and 0 elsewhere, [T, 1, 1]."""
    n = x.square().sum((1, 2), keepdim=True).sqrt()
    larger = n >= c.eps
    s = 1 / torch.where(larger, n, c.eps)
    return s * x, s, larger.to(x.dtype)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)


def _polynomials(c: SimpleNamespace, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns A and B."""
    gram = torch.bmm(x, x.mT)
    return gram, torch.baddbmm(gram, gram, gram, beta=c.coefficients[1], alpha=c.coefficients[2])


def _slope(c: SimpleNamespace, s: Tensor, gram: Tensor) -> Tensor:
    """Returns g(S, A), for symmetric S and A."""
    return c.coefficients[1] * s + c.coefficients[2] * _symmetric(torch.bmm(s, gram))


def _symmetric(m: Tensor) -> Tensor:
    return m + m.mT


def _step(c: SimpleNamespace, b: Tensor, x: Tensor) -> Tensor:
    """Returns a x + B x."""
    return torch.baddbmm(x, b, x, beta=c.coefficients[0])


def _iterates(c: SimpleNamespace, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Returns (X, A, B) of each step, and last the result, as (X, X, X)."""
    found = []
    for _ in range(c.steps):
        gram, b = _polynomials(c, x)
        found.append((x, gram, b))
        x = _step(c, b, x)
    return [*found, (x, x, x)]


def _tangents(c: SimpleNamespace, iterates: list[tuple[Tensor, Tensor, Tensor]], t_x: Tensor) -> list[tuple]:
    """Returns (t_X, t_A, t_B) of each step, and last the tangent of the result, three times."""
    found = []
    for x, gram, b in iterates[:-1]:
        t_gram = _symmetric(torch.bmm(t_x, x.mT))
        t_b = _slope(c, t_gram, gram)
        found.append((t_x, t_gram, t_b))
        t_x = torch.baddbmm(_step(c, b, t_x), t_b, x)
    return [*found, (t_x, t_x, t_x)]


def _normalized(x: Tensor, s: Tensor, larger: Tensor, v: Tensor) -> Tensor:
    """Returns the derivative of X₀ = s X in the direction v; the derivative is symmetric, so this is its VJP too."""
    return s * (v - larger * _inner(x, v) * x)


def _forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    x, _, _ = _start(c, wide(inputs[0]))
    for _ in range(c.steps):
        x = _step(c, _polynomials(c, x)[1], x)
    return (x.to(inputs[0].dtype),), ()


def _jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    x, s, larger = _start(c, wide(inputs[0]))
    t_x = _normalized(x, s, larger, wide(t_inputs[0]))
    return (_tangents(c, _iterates(c, x), t_x)[-1][0].to(inputs[0].dtype),), ()


def _vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_y: Tensors) -> Tensors:
    start, s, larger = _start(c, wide(inputs[0]))
    ct = wide(ct_y[0])
    for x, gram, b in reversed(_iterates(c, start)[:-1]):
        p = _slope(c, _symmetric(torch.bmm(ct, x.mT)), gram)
        ct = torch.baddbmm(_step(c, b, ct), p, x)
    return (_normalized(start, s, larger, ct).to(inputs[0].dtype),)


def _vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_y: Tensors,
    t_ct_y: Tensors | None,
) -> Tensors:
    start, s, larger = _start(c, wide(inputs[0]))
    t_start = _normalized(start, s, larger, wide(t_inputs[0]))
    ct = wide(ct_y[0])
    t_ct = torch.zeros_like(ct) if t_ct_y is None else wide(t_ct_y[0])
    iterates = _iterates(c, start)
    steps = zip(iterates[:-1], _tangents(c, iterates, t_start)[:-1], strict=True)
    for (x, gram, b), (t_x, t_gram, t_b) in reversed(list(steps)):
        m = _symmetric(torch.bmm(ct, x.mT))
        t_m = _symmetric(torch.baddbmm(torch.bmm(t_ct, x.mT), ct, t_x.mT))
        p = _slope(c, m, gram)
        t_p = _slope(c, t_m, gram) + c.coefficients[2] * _symmetric(torch.bmm(m, t_gram))
        t_ct = torch.baddbmm(torch.baddbmm(_step(c, b, t_ct), t_b, ct), t_p, x) + torch.bmm(p, t_x)
        ct = torch.baddbmm(_step(c, b, ct), p, x)
    t_s = -larger * s * _inner(start, wide(t_inputs[0]))  # divided by s
    bent = _inner(t_start, ct) * start + _inner(start, ct) * t_start
    t_ct_x = t_s * _normalized(start, s, larger, ct) + _normalized(start, s, larger, t_ct) - larger * s * bent
    return (t_ct_x.to(inputs[0].dtype),)


_OP = Op("newton_schulz", inputs=("x",), kernels={"reference": Rules(_forward, _jvp, _vjp, _vjp_jvp)})


def _plain(x: Tensor, steps: int, coefficients: tuple[float, float, float], eps: float) -> Tensor:
    a, b, c = coefficients
    x = x.mT if (tall := x.shape[-2] > x.shape[-1]) else x
    x = x / x.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _samples(make: Make) -> list[Sample]:
    options = {"steps": 2, "coefficients": (1.9, -1.2, 0.4), "eps": 1e-7}
    return [
        Sample("wide", (make(3, 3, 5),), options),
        Sample("tall", (make(2, 4, 3),), options | {"steps": 3}),
        Sample("small", (make(2, 3, 3),), options | {"eps": 20.0}),
        Sample("none", (make(2, 2, 3),), options | {"steps": 0}),
        Sample("batches", (make(2, 2, 2, 3),), options),
        Sample("empty", (make(2, 0, 3),), options),
    ]


def _benchmark(make: Make) -> list[Sample]:
    return [Sample("8x512x128", (make(8, 512, 128),), {"steps": 5, "coefficients": COEFFICIENTS, "eps": 1e-7})]


def _cost(sample: Sample, order: int) -> Cost:
    x, (small, large) = sample.args[0], sorted(sample.args[0].shape[-2:])
    products, grams = ((2, 5, 14)[order], (1, 2, 5)[order])  # the numbers of products of N M² and of M³ multiplications
    flop = 2 * sample.kwargs["steps"] * x.numel() * small * (products + grams * small / max(large, 1))
    return Cost(flop=flop, bytes=(2, 3, 4)[order] * x.numel() * x.element_size())


SPEC = Spec(_OP, newton_schulz, _plain, _samples, _benchmark, _cost)
