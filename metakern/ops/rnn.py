"""Elman's recurrent layer over whole sequences: one layer, one direction, with a weight for each task.

    h_t = f(x_t W_ihᵀ + b_ih + h_{t-1} W_hhᵀ + b_hh)      f = tanh or relu,    k = 1 - h² or [h > 0]

Tangents run forward in time, v = t_x W_ihᵀ + x t_W_ihᵀ + h_{t-1} t_W_hhᵀ + t_b being large products over all steps:

    t_h = k (v + t_h_{t-1} W_hhᵀ)

Cotangents run backward from the sources s_h = ct_y, s_z = 0:

    ct_h = s_h + ct_z_{t+1} W_hh     ct_z = s_z + k ct_h

and the tangents of the cotangents obey the same recurrence from s_h = t_ct_y + ct_z_{t+1} t_W_hh and s_z = t_k ct_h.
Then ct_x = ct_z W_ih, ct_W_ih = Σ ct_zᵀ x, ct_W_hh = Σ ct_zᵀ h_{t-1}, ct_b = Σ ct_z, and their tangents by the product
rule: large products over all steps.

| tensor | shape |
|---|---|
| x | [T, B, L, I] |
| h, and the final state | [T, B, H] |
| w_ih, w_hh | [T, H, I], [T, H, H] |
| b_ih, b_hh | [T, H] |
| y | [T, B, L, H] |

Residuals: y. Half precision is computed in float32. Elman 1990, "Finding structure in time", with the equations of
torch.nn.RNN.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from metakern.ops._recurrent import (
    affine,
    apply,
    cotangents,
    last,
    narrow,
    previous,
    stack,
    start,
    t_affine,
    t_cotangents,
    times,
    total,
    wide,
)
from metakern.ops._rules import Op, Rules, Tensors
from metakern.ops._spec import Cost, Make, Sample, Spec
from metakern.ops._tensors import product


def rnn(
    x: Tensor,
    h: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """The outputs of a recurrent layer at every step, and its final state.

    x [B, L, I] with weights [H, I], [H, H] and biases [H], or x [T, B, L, I] with weights and biases that are shared or
    have the tasks first, [T, H, I]. h is [B, H] or [T, B, H], or None for zeros. nonlinearity is "tanh" or "relu".
    Returns the output, [B, L, H] or [T, B, L, H], and the final h.

    Raises TypeError or ValueError, naming the argument, where kinds, dtypes, devices or shapes do not fit.

    >>> import metakern as mk, torch
    >>> y, h = mk.ops.rnn(torch.ones(1, 3, 1), None, torch.ones(1, 1), torch.ones(1, 1), nonlinearity="relu")
    >>> y.flatten(), h.flatten()
    (tensor([1., 2., 3.]), tensor([3.]))
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    weights, biases = {"w_ih": w_ih, "w_hh": w_hh}, {"b_ih": b_ih, "b_hh": b_hh}
    y, h_n = apply(OP, 1, x, {"h": h}, weights, biases, nonlinearity=nonlinearity)
    return y, h_n


def _forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    x, h, w_ih, w_hh, b_ih, b_hh = wide(inputs)
    hidden, w, f = w_hh.shape[-1], w_hh.mT, getattr(torch, c.nonlinearity)
    h, outputs = start(h, x, hidden), []
    for u_t in affine(x, w_ih, b_ih, b_hh).unbind(2):
        h = f(product(h, w, u_t))
        outputs.append(h)
    return narrow(inputs, (stack(outputs, x, hidden), h)), ()


def _jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    x, h, w_ih, w_hh, *_ = wide(inputs)
    t_x, t_h, t_w_ih, t_w_hh, t_b_ih, t_b_hh = wide(t_inputs)
    y, _ = wide(r)
    hidden, w = w_hh.shape[-1], w_hh.mT
    terms = t_affine(x, w_ih, t_x, t_w_ih, t_b_ih), t_affine(previous(h, y), w_hh, None, t_w_hh, t_b_hh)
    v, k = total((*terms[0], *terms[1]), y), _slope(c, y)
    t_h, t_outputs = start(t_h, x, hidden), []
    for v_t, k_t in zip(v.unbind(2), k.unbind(2), strict=True):
        t_h = k_t * product(t_h, w, v_t)
        t_outputs.append(t_h)
    return narrow(inputs, (stack(t_outputs, x, hidden), t_h)), ()


def _vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    x, h, w_ih, w_hh, *_ = wide(inputs)
    (y, _), (ct_y, ct_h) = wide(r), wide(ct_outputs)
    ct_zs, _, ct_h = _backward(_slope(c, y), w_hh, previous(None, ct_y), last(ct_h, ct_y))
    ct_z = stack(ct_zs, x, w_hh.shape[1])
    ct_x, *ct_p = cotangents(c.needs, x, previous(h, y), w_ih, ct_z, ct_z)
    return narrow(inputs, (ct_x, ct_h, *ct_p))


def _vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_outputs: Tensors,
    t_ct_outputs: Tensors | None,
) -> Tensors:
    x, h, w_ih, w_hh, *_ = wide(inputs)
    t_x, t_h, t_w_ih, t_w_hh, *_ = wide(t_inputs)
    (y, _), (t_y, _), (ct_y, ct_h) = wide(r), wide(t_r), wide(ct_outputs)
    t_ct_y, t_ct_h = wide(t_ct_outputs or [torch.zeros_like(ct) for ct in (ct_y, ct_h)])
    k, hidden = _slope(c, y), w_hh.shape[1]
    ct_zs, ct_hs, _ = _backward(k, w_hh, previous(None, ct_y), last(ct_h, ct_y))
    ct_z = stack(ct_zs, x, hidden)

    s_h = total((previous(None, t_ct_y), None if t_w_hh is None else times(ct_z, t_w_hh)), y)
    s_z = -2 * y * t_y * stack(ct_hs, x, hidden) if c.nonlinearity == "tanh" else None
    t_ct_zs, _, t_ct_h = _backward(k, w_hh, s_h, last(t_ct_h, t_ct_y), s_z)
    t_ct_z = stack(t_ct_zs, x, hidden)
    tangents = t_x, previous(t_h, t_y), t_w_ih, t_ct_z, t_ct_z
    t_ct_x, *t_ct_p = t_cotangents(c.needs, x, previous(h, y), w_ih, ct_z, ct_z, *tangents)
    return narrow(inputs, (t_ct_x, t_ct_h, *t_ct_p))


def _backward(
    k: Tensor, w_hh: Tensor, s_h: Tensor, ct_h: Tensor, s_z: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """From ct_h of the last state back to that of the first: ct_z and ct_h of each step, and ct_h.

    The source s_h of a step belongs to the state that it finds, s_z to the step itself.
    """
    s_z_steps = (None,) * k.shape[2] if s_z is None else s_z.unbind(2)
    steps = list(zip(s_h.unbind(2), s_z_steps, k.unbind(2), strict=True))
    ct_zs, ct_hs = [], []
    for s_h_t, s_z_t, k_t in reversed(steps):
        ct_z = k_t * ct_h if s_z_t is None else torch.addcmul(s_z_t, k_t, ct_h)
        ct_zs.append(ct_z)
        ct_hs.append(ct_h)
        ct_h = product(ct_z, w_hh, s_h_t)
    return ct_zs[::-1], ct_hs[::-1], ct_h


def _slope(c: SimpleNamespace, y: Tensor) -> Tensor:
    """k, by the value of h."""
    return 1 - y * y if c.nonlinearity == "tanh" else (y > 0).to(y.dtype)


OP = Op(
    "rnn",
    inputs=("x", "h", "w_ih", "w_hh", "b_ih", "b_hh"),
    kernels={"reference": Rules(_forward, _jvp, _vjp, _vjp_jvp)},
    outputs=2,
    saves_output=True,
    zero_tangents=False,
)


def _plain(
    x: Tensor,
    h: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> tuple[Tensor, Tensor]:
    h = x.new_zeros(*x.shape[:-2], w_hh.shape[-1]) if h is None else h
    outputs = [h]
    for x_t in x.unbind(-2):
        z = x_t @ w_ih.mT + h @ w_hh.mT
        for b in (b_ih, b_hh):
            z = z if b is None else z + b.unsqueeze(-2)
        h = torch.tanh(z) if nonlinearity == "tanh" else torch.clamp(z, min=0)
        outputs.append(h)
    return torch.stack(outputs, -2)[..., 1:, :], h


def _samples(make: Make) -> list[Sample]:
    def weights(*lead: int, features: int = 2, hidden: int = 2) -> tuple[Tensor, ...]:
        return make(*lead, hidden, features), make(*lead, hidden, hidden), make(*lead, hidden), make(*lead, hidden)

    relu = {"nonlinearity": "relu"}
    return [
        Sample("per_task", (make(2, 2, 3, 2), make(2, 2, 2), *weights(2))),
        Sample("relu", (make(2, 2, 3, 2), make(2, 2, 3), *weights(2, hidden=3)), relu),
        Sample("per_task_no_state_no_bias", (make(2, 1, 3, 3), None, *weights(2, features=3)[:2])),
        Sample("shared", (make(3, 2, 2), make(3, 2), *weights()), per_task=False),
        Sample("shared_of_tasks", (make(2, 2, 3, 2), make(2, 2, 2), *weights()), per_task=False),
        Sample("odd_one_bias", (make(1, 3, 5, 1), None, *weights(1, features=1, hidden=3)[:3]), per_task=False),
        Sample("no_sequences", (make(2, 0, 3, 2), None, *weights(2))),
        Sample("no_tasks", (make(0, 2, 3, 2), None, *weights(0)), relu),
    ]


def _benchmark(make: Make) -> list[Sample]:
    def sample(name: str, T: int, B: int, L: int, D: int, H: int) -> Sample:
        scale = H**-0.5
        weights = make(T, H, D) * scale, make(T, H, H) * scale, make(T, H) * scale, make(T, H) * scale
        return Sample(name, (make(T, B, L, D), make(T, B, H), *weights))

    return [sample("8x8x20x128-256", 8, 8, 20, 128, 256), sample("32x2x32x64-64", 32, 2, 32, 64, 64)]


def _cost(sample: Sample, order: int) -> Cost:
    x, w_hh = sample.args[0], sample.args[3]
    tokens, hidden, size = x.shape[:-1].numel(), w_hh.shape[-1], x.element_size()
    products = 2 * tokens * hidden * (x.shape[-1] + hidden)
    inputs, kept = sum(t.numel() for t in sample.args if t is not None), tokens * hidden
    moved = (inputs + kept, 2 * (inputs + kept), 4 * (inputs + kept))
    return Cost(flop=(1, 2, 6)[order] * products, bytes=moved[order] * size)


SPEC = Spec(OP, rnn, _plain, _samples, _benchmark, _cost)
