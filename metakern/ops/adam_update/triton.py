"""The update of Adam and AdamW in Triton: every rule is one launch over all parameters and tasks.

The names and formulas are the room's. The sums that are the rates' cotangents are PyTorch's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl

from metakern.ops._spec import Make, Sample
from metakern.ops._triton.foreach import foreach
from metakern.ops.adam_update import SPEC, rules


@triton.jit
def _parts(phi, grad, m, v, beta1, beta2, bias1, bias2, eps, coupled, decoupled):
    g = grad + coupled * phi
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    r = tl.sqrt(tl.where(v > 0, v / bias2, 0.0))
    q = 1 / (r + eps)
    u = q * m / bias1
    s = tl.where(v > 0, 0.5 / (bias2 * tl.where(v > 0, r, 1.0)), 0.0)
    return g, m, v, q, u, s, u + decoupled * phi


@triton.jit
def _t_parts(g, q, u, s, t_phi, t_grad, t_m, t_v, beta1, beta2, bias1, coupled, decoupled):
    t_g = t_grad + coupled * t_phi
    t_m = beta1 * t_m + (1 - beta1) * t_g
    t_v = beta2 * t_v + 2 * (1 - beta2) * g * t_g
    t_r = s * t_v
    t_u = q * (t_m / bias1 - u * t_r)
    return t_g, t_m, t_v, t_r, t_u, t_u + decoupled * t_phi


@triton.jit
def _forward(h, phi, grad, m, v, beta1, beta2, bias1, bias2, eps, coupled, decoupled):
    _, m, v, _, _, _, d = _parts(phi, grad, m, v, beta1, beta2, bias1, bias2, eps, coupled, decoupled)
    return phi - h * d, m, v


@triton.jit
def _jvp(h, t_h, phi, grad, m, v, t_phi, t_grad, t_m, t_v, beta1, beta2, bias1, bias2, eps, coupled, decoupled):
    g, m, v, q, u, s, d = _parts(phi, grad, m, v, beta1, beta2, bias1, bias2, eps, coupled, decoupled)
    _, t_m, t_v, _, _, t_d = _t_parts(g, q, u, s, t_phi, t_grad, t_m, t_v, beta1, beta2, bias1, coupled, decoupled)
    return t_phi - h * t_d - t_h * d, t_m, t_v


@triton.jit
def _vjp(h, phi, grad, m, v, ct_phi, ct_m, ct_v, beta1, beta2, bias1, bias2, eps, coupled, decoupled):
    g, m, v, q, u, s, d = _parts(phi, grad, m, v, beta1, beta2, bias1, bias2, eps, coupled, decoupled)
    ct_u = -h * ct_phi
    ct_m += q * ct_u / bias1
    ct_v -= s * q * u * ct_u
    ct_g = (1 - beta1) * ct_m + 2 * (1 - beta2) * g * ct_v
    return (1 - h * decoupled) * ct_phi + coupled * ct_g, ct_g, beta1 * ct_m, beta2 * ct_v, -ct_phi * d


@triton.jit
def _vjp_jvp(
    h,
    t_h,
    phi,
    grad,
    m,
    v,
    t_phi,
    t_grad,
    t_m,
    t_v,
    ct_phi,
    ct_m,
    ct_v,
    t_ct_phi,
    t_ct_m,
    t_ct_v,
    beta1,
    beta2,
    bias1,
    bias2,
    eps,
    coupled,
    decoupled,
):
    g, m, v, q, u, s, d = _parts(phi, grad, m, v, beta1, beta2, bias1, bias2, eps, coupled, decoupled)
    t_g, _, _, t_r, t_u, t_d = _t_parts(g, q, u, s, t_phi, t_grad, t_m, t_v, beta1, beta2, bias1, coupled, decoupled)
    t_q, t_s = -q * q * t_r, -2 * bias2 * s * s * t_r
    ct_u, t_ct_u = -h * ct_phi, -h * t_ct_phi - t_h * ct_phi
    ct_r, t_ct_r = -q * u * ct_u, -t_q * u * ct_u - q * (t_u * ct_u + u * t_ct_u)
    t_ct_m += (q * t_ct_u + t_q * ct_u) / bias1
    t_ct_v += s * t_ct_r + t_s * ct_r
    t_ct_g = (1 - beta1) * t_ct_m + 2 * (1 - beta2) * (g * t_ct_v + t_g * (ct_v + s * ct_r))
    t_ct_x = (1 - h * decoupled) * t_ct_phi - t_h * decoupled * ct_phi + coupled * t_ct_g
    return t_ct_x, t_ct_g, beta1 * t_ct_m, beta2 * t_ct_v, -t_ct_phi * d - ct_phi * t_d


_FORMULAS = {"forward": _forward, "jvp": _jvp, "vjp": _vjp, "vjp_jvp": _vjp_jvp}


def _run(rule: str, c: SimpleNamespace, inputs: list[Any], outputs: tuple[bool, ...]) -> list[Any]:
    numbers = (*c.betas, *c.biases, c.eps, c.coupled, c.decoupled)
    like = inputs[-1] if isinstance(inputs[-1], tuple) else inputs[-4]
    return foreach(_FORMULAS[rule], (*inputs, *numbers), like, outputs)


RULES = rules(_run)


def compiled(make: Make) -> list[Sample]:
    return [*SPEC.benchmark(make), *(sample for sample in SPEC.samples(make) if sample.name == "rate-per-task")]
