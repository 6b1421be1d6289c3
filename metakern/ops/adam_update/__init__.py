"""The inner update of Adam and AdamW, over all parameters and tasks of a model in one call.

    g  = grad + λ phi                      b₁ = 1 - β₁^step        b₂ = 1 - β₂^step
    m' = β₁ m + (1 - β₁) g                 v' = β₂ v + (1 - β₂) g²
    r  = √(v' / b₂)        q = 1 / (r + eps)        u = q m' / b₁        s = dr/dv' = 1 / (2 b₂ r), 0 where v' = 0

    forward   phi'     = phi - h d                      d = u + ω phi
    jvp       t_g      = t_grad + λ t_phi               t_m' = β₁ t_m + (1 - β₁) t_g
              t_v'     = β₂ t_v + 2 (1 - β₂) g t_g      t_r  = s t_v'       t_u = q (t_m' / b₁ - u t_r)
              t_phi'   = t_phi - h t_d - t_h d          t_d  = t_u + ω t_phi
    vjp       ct_u     = -h ct_phi'                     ct_r = -q u ct_u
              M        = ct_m' + q ct_u / b₁            V    = ct_v' + s ct_r
              ct_grad  = (1 - β₁) M + 2 (1 - β₂) g V
              ct_m     = β₁ M         ct_v = β₂ V       ct_phi = (1 - h ω) ct_phi' + λ ct_grad
              ct_h     = -Σ ct_phi' d
    vjp_jvp   the tangent of the vjp, with t_q = -q² t_r and t_s = -s t_r / r

| tensor | shape |
|---|---|
| phi_i, grad_i, m_i, v_i and the results | [T, ...], each parameter its own |
| rates h | one number; one [T] for all parameters; or for each parameter [T] or [T, ...] |

λ is the weight decay of Adam, ω that of AdamW. Where v' = 0, g and its history are zero, dv'/dg = 0 too, and the update
as a function of g has the slope that m' gives it; so the root's slope is taken as zero there: exact, and no NaN. Half
precision is computed in float32. Residuals: none. Kingma, Ba 2015, algorithm 1; Loshchilov, Hutter 2019, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from metakern.ops import _triton, _updates
from metakern.ops._rules import Op, Rules, Tensors
from metakern.ops._spec import Cost, Make, Sample, Spec
from metakern.ops._tensors import wide
from metakern.ops._updates import Rate

Updated = tuple[list[Tensor], list[Tensor], list[Tensor]]


def adam_update(
    phi: Sequence[Tensor],
    grad: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    lr: Rate | Sequence[Rate],
    *,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> Updated:
    """The parameters and both moments after step number `step` (the first is 1), differentiable in all five arguments.

    lr as in `sgd_update`. `decoupled` takes the weight decay as AdamW does. Raises TypeError for tensors that are not
    of one floating-point dtype, ValueError where lengths, shapes or devices differ or step is below 1.

    >>> import metakern as mk, torch
    >>> zero = torch.zeros(2, 1)
    >>> (w,), _, _ = mk.ops.adam_update([zero], [torch.tensor([[3.0], [0.0]])], [zero], [zero], 0.1, step=1)
    >>> w
    tensor([[-0.1000],
            [ 0.0000]])
    """
    if step < 1:
        raise ValueError(f"adam_update: step must be at least 1, got {step}")
    lists = {"phi": list(phi), "grad": list(grad), "m": list(m), "v": list(v)}
    if not any(lists.values()):
        return [], [], []
    given, count = _updates.arguments("adam_update", lr, **lists), len(lists["phi"])
    y = given.restored(
        _op(count, len(given.rates))(
            *given.tensors,
            *given.rates,
            count=count,
            lr=given.lr,
            betas=betas,
            biases=(1 - betas[0] ** step, 1 - betas[1] ** step),
            eps=eps,
            coupled=0.0 if decoupled else weight_decay,
            decoupled=weight_decay if decoupled else 0.0,
        )
    )
    return y[:count], y[count : 2 * count], y[2 * count :]


def _parts(c: SimpleNamespace, phi: Tensor, grad: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """g, m', v', q, u, s and d."""
    (beta1, beta2), (bias1, bias2) = c.betas, c.biases
    g = grad + c.coupled * phi
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    r = root(v / bias2)
    q = 1 / (r + c.eps)
    u = q * m / bias1
    return g, m, v, q, u, torch.where(v > 0, 0.5 / (bias2 * torch.where(v > 0, r, 1)), 0), u + c.decoupled * phi


def _t_parts(
    c: SimpleNamespace, parts: tuple[Tensor, ...], t_phi: Tensor, t_grad: Tensor, t_m: Tensor, t_v: Tensor
) -> tuple[Tensor, ...]:
    """Their tangents: t_g, t_m', t_v', t_r, t_u and t_d."""
    (beta1, beta2), (g, _, _, q, u, s, _) = c.betas, parts
    t_g = t_grad + c.coupled * t_phi
    t_m, t_v = beta1 * t_m + (1 - beta1) * t_g, beta2 * t_v + 2 * (1 - beta2) * g * t_g
    t_r = s * t_v
    t_u = q * (t_m / c.biases[0] - u * t_r)
    return t_g, t_m, t_v, t_r, t_u, t_u + c.decoupled * t_phi


def _forward_one(c: SimpleNamespace, h: Rate, *x: Tensor) -> tuple[Tensor, ...]:
    _, m, v, *_, d = _parts(c, *x)
    return x[0] - h * d, m, v


def _jvp_one(c: SimpleNamespace, h: Rate, t_h: Rate, *both: Tensor) -> tuple[Tensor, ...]:
    x, t_x = both[:4], both[4:]
    parts = _parts(c, *x)
    _, t_m, t_v, *_, t_d = _t_parts(c, parts, *t_x)
    return t_x[0] - h * t_d - t_h * parts[-1], t_m, t_v


def _vjp_one(c: SimpleNamespace, h: Rate, *both: Tensor) -> tuple[Tensor, ...]:
    """The cotangents of phi, grad, m, v, and of h before it is summed."""
    (phi, *rest), (ct_phi, ct_m, ct_v) = both[:4], both[4:]
    (beta1, beta2), (g, _, _, q, u, s, d) = c.betas, _parts(c, phi, *rest)
    ct_u = -h * ct_phi
    ct_m, ct_v = ct_m + q * ct_u / c.biases[0], ct_v - s * q * u * ct_u
    ct_g = (1 - beta1) * ct_m + 2 * (1 - beta2) * g * ct_v
    return (1 - h * c.decoupled) * ct_phi + c.coupled * ct_g, ct_g, beta1 * ct_m, beta2 * ct_v, -ct_phi * d


def _vjp_jvp_one(c: SimpleNamespace, h: Rate, t_h: Rate, *all_: Tensor) -> tuple[Tensor, ...]:
    x, t_x, (ct_phi, _, ct_v), (t_ct_phi, t_ct_m, t_ct_v) = all_[:4], all_[4:8], all_[8:11], all_[11:]
    (beta1, beta2), bias1 = c.betas, c.biases[0]
    g, _, _, q, u, s, d = parts = _parts(c, *x)
    t_g, _, _, t_r, t_u, t_d = _t_parts(c, parts, *t_x)
    t_q, t_s = -q * q * t_r, -2 * c.biases[1] * s * s * t_r
    ct_u, t_ct_u = -h * ct_phi, -h * t_ct_phi - t_h * ct_phi
    ct_r, t_ct_r = -q * u * ct_u, -t_q * u * ct_u - q * (t_u * ct_u + u * t_ct_u)
    total_v = ct_v + s * ct_r
    t_ct_m = t_ct_m + (q * t_ct_u + t_q * ct_u) / bias1
    t_ct_v = t_ct_v + s * t_ct_r + t_s * ct_r
    t_ct_g = (1 - beta1) * t_ct_m + 2 * (1 - beta2) * (g * t_ct_v + t_g * total_v)
    t_ct_x = (1 - h * c.decoupled) * t_ct_phi - t_h * c.decoupled * ct_phi + c.coupled * t_ct_g
    return t_ct_x, t_ct_g, beta1 * t_ct_m, beta2 * t_ct_v, -t_ct_phi * d - ct_phi * t_d


def root(v: Tensor) -> Tensor:
    """The square root, with slope zero at zero."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1).sqrt(), 0)


FORMULAS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "forward": _forward_one,
    "jvp": _jvp_one,
    "vjp": _vjp_one,
    "vjp_jvp": _vjp_jvp_one,
}


def rules(run: Callable[..., list[Any]]) -> Rules:
    """The four rules, by run(rule, c, inputs, outputs): FORMULAS[rule] of every parameter.

    An input is a tensor for each parameter, its rates, or a number; `outputs` says which ones are wanted. The results
    are a tuple of tensors for each output, None where it is not wanted.
    """

    def rate(c: SimpleNamespace, inputs: Tensors) -> Any:
        return _updates.each_rate(inputs[4 * c.count :], None, c.count) if c.lr is None else c.lr

    def lists(c: SimpleNamespace, tensors: Tensors, number: int) -> list[Tensors]:
        return [tensors[i * c.count : (i + 1) * c.count] for i in range(number)]

    def t_rate(c: SimpleNamespace, t_inputs: Tensors) -> Any:
        return rate(c, t_inputs) if c.lr is None else 0.0

    def cotangents(c: SimpleNamespace, inputs: Tensors, rule: str, arguments: list[Any]) -> Tensors:
        rates = inputs[4 * c.count :]
        outputs = (*(any(needs) for needs in lists(c, c.needs, 4)), any(c.needs[4 * c.count :]))
        *pulled, terms = run(rule, c, arguments, outputs)
        flat = (ct for cts in pulled for ct in (cts or (None,) * c.count))
        return (*flat, *((None,) * len(rates) if terms is None else _updates.rate_cotangents(rates, terms)))

    def forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
        outputs = run("forward", c, [rate(c, inputs), *lists(c, inputs, 4)], (True,) * 3)
        return tuple(y for ys in outputs for y in ys), ()

    def jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
        arguments = [rate(c, inputs), t_rate(c, t_inputs), *lists(c, inputs, 4), *lists(c, t_inputs, 4)]
        return tuple(t_y for t_ys in run("jvp", c, arguments, (True,) * 3) for t_y in t_ys), ()

    def vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_y: Tensors) -> Tensors:
        return cotangents(c, inputs, "vjp", [rate(c, inputs), *lists(c, inputs, 4), *lists(c, ct_y, 3)])

    def vjp_jvp(
        c: SimpleNamespace,
        inputs: Tensors,
        r: Tensors,
        t_inputs: Tensors,
        t_r: Tensors,
        ct_y: Tensors,
        t_ct_y: Tensors | None,
    ) -> Tensors:
        arguments = [rate(c, inputs), t_rate(c, t_inputs), *lists(c, inputs, 4), *lists(c, t_inputs, 4)]
        arguments += [*lists(c, ct_y, 3), *([0.0] * 3 if t_ct_y is None else lists(c, t_ct_y, 3))]
        return cotangents(c, inputs, "vjp_jvp", arguments)

    return Rules(forward, jvp, vjp, vjp_jvp)


def _run(rule: str, c: SimpleNamespace, inputs: list[Any], outputs: tuple[bool, ...]) -> list[Any]:
    """A parameter at a time."""
    phi, results = inputs[-1] if isinstance(inputs[-1], tuple) else inputs[-4], []
    spread = [_updates.spread(x, phi) if isinstance(x, tuple) else (x,) * c.count for x in inputs]
    for p, *x in zip(phi, *spread, strict=True):
        y = FORMULAS[rule](c, *(wide(a) if isinstance(a, Tensor) else a for a in x))
        results.append([yi.to(p.dtype) for yi in y])
    return [ys if wanted else None for ys, wanted in zip(zip(*results, strict=True), outputs, strict=True)]


KERNELS = {"reference": rules(_run), "triton": _triton.rules("adam_update")}


@cache
def _op(count: int, rates: int) -> Op:
    """The op on `count` parameters with no rate tensor, one for all, or one each."""
    sizes = (*((name, count) for name in ("phi", "grad", "m", "v")), ("lr", rates))
    names = tuple(f"{name}_{i}" for name, n in sizes for i in range(n))
    return Op("adam_update", inputs=names, kernels=KERNELS, outputs=3 * count)


def _plain(
    phi: Sequence[Tensor],
    grad: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    lr: Rate | Sequence[Rate],
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> Updated:
    grad = [g if decoupled else g + weight_decay * p for g, p in zip(grad, phi, strict=True)]
    m = [betas[0] * a + (1 - betas[0]) * g for a, g in zip(m, grad, strict=True)]
    v = [betas[1] * a + (1 - betas[1]) * g**2 for a, g in zip(v, grad, strict=True)]
    rates = _updates.plain_rates(phi, lr)
    if decoupled:
        phi = [p * (1 - h * weight_decay) for p, h in zip(phi, rates, strict=True)]
    bias1, bias2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    moved = [p - h * (a / bias1) / (root(b / bias2) + eps) for p, h, a, b in zip(phi, rates, m, v, strict=True)]
    return moved, m, v


def _positive(samples: list[Sample]) -> list[Sample]:
    """Second moments are not negative."""

    def second_moments(sample: Sample) -> Sample:
        count = sample.kwargs["count"]
        args = (a.square() if 3 * count <= i < 4 * count else a for i, a in enumerate(sample.args))
        return replace(sample, args=tuple(args))

    return [second_moments(sample) for sample in samples]


def _samples(make: Make) -> list[Sample]:
    adam = {"step": 2, "betas": (0.6, 0.8), "eps": 0.1, "weight_decay": 0.2, "decoupled": False}
    kinds = _updates.samples(make, 4, **adam)
    adamw = _updates.samples(make, 4, **adam | {"step": 3, "decoupled": True})
    return _positive(
        [*kinds, *(replace(s, name=f"adamw-{s.name}") for s in adamw if s.name in ("number", "mixed-rates"))]
    )


def _benchmark(make: Make) -> list[Sample]:
    adam = {"step": 2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "decoupled": False}
    return _positive(_updates.benchmark(make, 4, **adam))


def _cost(sample: Sample, order: int) -> Cost:
    n = sum(t.numel() for t in sample.args[: sample.kwargs["count"]])
    return Cost(flop=(14, 24, 60)[order] * n, bytes=(7, 10, 15)[order] * n * sample.args[0].element_size())


SPEC = Spec(_op(2, 1), _updates.flat(adam_update, 4), _updates.flat(_plain, 4), _samples, _benchmark, _cost)
