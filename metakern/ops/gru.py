"""GRU over whole sequences: one layer, one direction, with a weight for each task.

    u = x_t W_ihᵀ + b_ih     p = h_{t-1} W_hhᵀ + b_hh
    r, z = σ(u_r + p_r), σ(u_z + p_z)     n = tanh(u_n + r p_n)     h_t = n + z (h_{t-1} - n)

With a = (u_r + p_r, u_z + p_z, p_n) and the slopes r' = r (1 - r), z' = z (1 - z), n' = 1 - n², the linear map of a
step is t_h = k · t_a + k_n t_u_n + z t_h_{t-1}, with the coefficients

    k_n = (1 - z) n'     k = (k_n p_n r',  (h_{t-1} - n) z',  k_n r)

which are known for all steps before the recurrence starts. Tangents run forward in time, with t_u, v (t_a
without what t_h_{t-1} adds) and s = k_n t_u_n coming from large products over all steps:

    t_a = v + t_h_{t-1} W_hhᵀ     t_h = s + k_r t_a_r + k_z t_a_z + k_p t_a_n + z t_h_{t-1}

Cotangents run backward from the sources s_h = ct_y, s_a = 0:

    ct_h = s_h + z_{t+1} ct_h_{t+1} + ct_a_{t+1} W_hh     ct_a = s_a + k ct_h     ct_u = (ct_a_r, ct_a_z, k_n ct_h)

and the tangents of the cotangents obey the same recurrence from other sources:

    s_h = t_ct_y + t_z_{t+1} ct_h_{t+1} + ct_a_{t+1} t_W_hh     s_a = t_k ct_h     t_ct_u_n = t_k_n ct_h + k_n t_ct_h

Then ct_x = ct_u W_ih, ct_W_ih = Σ ct_uᵀ x, ct_b_ih = Σ ct_u, ct_W_hh = Σ ct_aᵀ h_{t-1}, ct_b_hh = Σ ct_a, and their
tangents by the product rule: large products over all steps.

| tensor | shape |
|---|---|
| x | [T, B, L, I] |
| h, and the final state | [T, B, H] |
| w_ih, w_hh | [T, 3H, I], [T, 3H, H] |
| b_ih, b_hh | [T, 3H] |
| y | [T, B, L, H] |

Residuals: (r, z, n, p_n) [T, B, L, 4H]; y itself. Half precision is computed in float32. Cho et al. 2014, "Learning
phrase representations using RNN encoder-decoder", section 2.3; equations and order of the gates as in torch.nn.GRU.
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


def gru(
    x: Tensor,
    h: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The outputs of a GRU at every step, and its final state.

    x [B, L, I] with weights [3H, I], [3H, H] and biases [3H], or x [T, B, L, I] with weights and biases that are shared
    or have the tasks first, [T, 3H, I]. h is [B, H] or [T, B, H], or None for zeros. Returns the output, [B, L, H] or
    [T, B, L, H], and the final h. The gates stand in torch.nn's order: reset, update, new.

    Raises TypeError or ValueError, naming the argument, where kinds, dtypes, devices or shapes do not fit.

    >>> import metakern as mk, torch
    >>> y, h = mk.ops.gru(torch.ones(2, 3, 4), torch.ones(2, 5), torch.zeros(15, 4), torch.zeros(15, 5))
    >>> y[0, :, 0], h.shape
    (tensor([0.5000, 0.2500, 0.1250]), torch.Size([2, 5]))
    """
    y, h_n = apply(OP, 3, x, {"h": h}, {"w_ih": w_ih, "w_hh": w_hh}, {"b_ih": b_ih, "b_hh": b_hh})
    return y, h_n


def _forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    x, h, w_ih, w_hh, b_ih, b_hh = wide(inputs)
    hidden, w = w_hh.shape[-1], w_hh.mT
    h, u = start(h, x, hidden), affine(x, w_ih, b_ih)
    u_a, u_n = _inputs(u, None if b_hh is None else b_hh[:, None, None])
    outputs, gates = [], []
    for u_a_t, u_n_t in zip(u_a.unbind(2), u_n.unbind(2), strict=True):
        a_r_z, p_n = product(h, w, u_a_t).split((2 * hidden, hidden), -1)
        r_z = torch.sigmoid(a_r_z)
        r, z = r_z.chunk(2, -1)
        n = torch.tanh(torch.addcmul(u_n_t, r, p_n))
        h = torch.addcmul(n, z, h - n)
        outputs.append(h)
        gates.append(torch.cat((r_z, n, p_n), -1))
    y = stack(outputs, x, hidden), h
    return narrow(inputs, y), narrow(inputs, (stack(gates, x, 4 * hidden),))


def _jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    x, h, w_ih, w_hh, *_ = wide(inputs)
    t_x, t_h, t_w_ih, t_w_hh, t_b_ih, t_b_hh = wide(t_inputs)
    gates, y, _ = wide(r)
    hidden, w, before = w_hh.shape[-1], w_hh.mT, previous(h, y)
    k, k_n = _coefficients(gates, before)
    t_u = total(t_affine(x, w_ih, t_x, t_w_ih, t_b_ih), k)
    v, t_u_n = _inputs(t_u, *t_affine(before, w_hh, None, t_w_hh, t_b_hh))
    z = gates.chunk(4, -1)[1]
    t_h, t_outputs, t_as = start(t_h, x, hidden), [], []
    steps = zip(*(t.unbind(2) for t in (v, k_n * t_u_n, k, z)), strict=True)
    for v_t, s_t, k_t, z_t in steps:
        t_a = product(t_h, w, v_t)
        t_r, t_z, t_p = (k_t * t_a).chunk(3, -1)
        t_h = torch.addcmul(s_t + t_r + t_z + t_p, z_t, t_h)
        t_outputs.append(t_h)
        t_as.append(t_a)
    t_gates = _t_gates(gates, stack(t_as, x, 3 * hidden), t_u_n)
    return narrow(inputs, (stack(t_outputs, x, hidden), t_h)), narrow(inputs, (t_gates,))


def _vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    x, h, w_ih, w_hh, *_ = wide(inputs)
    (gates, y, _), (ct_y, ct_h) = wide(r), wide(ct_outputs)
    before, hidden = previous(h, y), w_hh.shape[-1]
    k, k_n = _coefficients(gates, before)
    ct_as, ct_hs, ct_h = _backward(gates, k, w_hh, previous(None, ct_y), last(ct_h, ct_y))
    ct_a = stack(ct_as, x, 3 * hidden)
    ct_u = torch.cat((ct_a[..., : 2 * hidden], k_n * stack(ct_hs, x, hidden)), -1)
    ct_x, *ct_p = cotangents(c.needs, x, before, w_ih, ct_u, ct_a)
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
    (gates, y, _), (t_gates, t_y, _), (ct_y, ct_h) = wide(r), wide(t_r), wide(ct_outputs)
    t_ct_y, t_ct_h = wide(t_ct_outputs or [torch.zeros_like(ct) for ct in (ct_y, ct_h)])
    before, t_before, hidden = previous(h, y), previous(t_h, t_y), w_hh.shape[-1]
    k, k_n = _coefficients(gates, before)
    t_k, t_k_n = _t_coefficients(gates, before, t_gates, t_before)
    ct_as, ct_hs, _ = _backward(gates, k, w_hh, previous(None, ct_y), last(ct_h, ct_y))
    ct_a, ct_state = stack(ct_as, x, 3 * hidden), stack(ct_hs, x, hidden)
    ct_u = torch.cat((ct_a[..., : 2 * hidden], k_n * ct_state), -1)

    through_z = t_gates.chunk(4, -1)[1] * ct_state
    s_h = total((previous(None, t_ct_y), through_z, None if t_w_hh is None else times(ct_a, t_w_hh)), y)
    s_a = t_k * torch.cat((ct_state, ct_state, ct_state), -1)
    t_ct_as, t_ct_hs, t_ct_h = _backward(gates, k, w_hh, s_h, last(t_ct_h, t_ct_y), s_a)
    t_ct_a = stack(t_ct_as, x, 3 * hidden)
    t_ct_u_n = torch.addcmul(t_k_n * ct_state, k_n, stack(t_ct_hs, x, hidden))
    t_ct_u = torch.cat((t_ct_a[..., : 2 * hidden], t_ct_u_n), -1)
    tangents = t_x, t_before, t_w_ih, t_ct_u, t_ct_a
    t_ct_x, *t_ct_p = t_cotangents(c.needs, x, before, w_ih, ct_u, ct_a, *tangents)
    return narrow(inputs, (t_ct_x, t_ct_h, *t_ct_p))


def _backward(
    gates: Tensor, k: Tensor, w_hh: Tensor, s_h: Tensor, ct_h: Tensor, s_a: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """From ct_h of the last state back to that of the first: ct_a and ct_h of each step, and ct_h.

    The source s_h of a step belongs to the state that it finds, s_a to the step itself.
    """
    z = gates.chunk(4, -1)[1]
    s_a_steps = (None,) * k.shape[2] if s_a is None else s_a.unbind(2)
    steps = list(zip(s_h.unbind(2), s_a_steps, k.unbind(2), z.unbind(2), strict=True))
    ct_as, ct_hs = [], []
    for s_h_t, s_a_t, k_t, z_t in reversed(steps):
        ct_state = torch.cat((ct_h, ct_h, ct_h), -1)
        ct_a = k_t * ct_state if s_a_t is None else torch.addcmul(s_a_t, k_t, ct_state)
        ct_as.append(ct_a)
        ct_hs.append(ct_h)
        ct_h = product(ct_a, w_hh, torch.addcmul(s_h_t, z_t, ct_h))
    return ct_as[::-1], ct_hs[::-1], ct_h


def _inputs(u: Tensor, *hidden_terms: Tensor | None) -> tuple[Tensor, Tensor]:
    """a without the state's part, (u_r, u_z, 0) plus what the hidden side adds, and u_n."""
    u_r, u_z, u_n = u.chunk(3, -1)
    a = torch.cat((u_r, u_z, torch.zeros_like(u_n)), -1)
    return total((a, *hidden_terms), u), u_n


def _coefficients(gates: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """k and k_n, from h_{t-1} = before."""
    r, z, n, p_n = gates.chunk(4, -1)
    k_n = (1 - z) * (1 - n * n)
    return torch.cat((k_n * p_n * r * (1 - r), (before - n) * z * (1 - z), k_n * r), -1), k_n


def _t_coefficients(gates: Tensor, before: Tensor, t_gates: Tensor, t_before: Tensor) -> tuple[Tensor, Tensor]:
    """The tangents of `_coefficients`."""
    r, z, n, p_n = gates.chunk(4, -1)
    t_r, t_z, t_n, t_p_n = t_gates.chunk(4, -1)
    k_n = (1 - z) * (1 - n * n)
    t_k_n = -t_z * (1 - n * n) - 2 * (1 - z) * n * t_n
    t_k_r = (t_k_n * p_n + k_n * t_p_n) * r * (1 - r) + k_n * p_n * (1 - 2 * r) * t_r
    t_k_z = (t_before - t_n) * z * (1 - z) + (before - n) * (1 - 2 * z) * t_z
    return torch.cat((t_k_r, t_k_z, t_k_n * r + k_n * t_r), -1), t_k_n


def _t_gates(gates: Tensor, t_a: Tensor, t_u_n: Tensor) -> Tensor:
    """The tangents of (r, z, n, p_n)."""
    r, z, n, p_n = gates.chunk(4, -1)
    t_a_r, t_a_z, t_p_n = t_a.chunk(3, -1)
    t_r = r * (1 - r) * t_a_r
    return torch.cat((t_r, z * (1 - z) * t_a_z, (1 - n * n) * (t_u_n + r * t_p_n + t_r * p_n), t_p_n), -1)


OP = Op(
    "gru",
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
) -> tuple[Tensor, Tensor]:
    h = x.new_zeros(*x.shape[:-2], w_hh.shape[-1]) if h is None else h
    outputs = [h]
    for x_t in x.unbind(-2):
        u, p = x_t @ w_ih.mT, h @ w_hh.mT
        u = u if b_ih is None else u + b_ih.unsqueeze(-2)
        p = p if b_hh is None else p + b_hh.unsqueeze(-2)
        (u_r, u_z, u_n), (p_r, p_z, p_n) = u.chunk(3, -1), p.chunk(3, -1)
        r, z = torch.sigmoid(u_r + p_r), torch.sigmoid(u_z + p_z)
        h = (1 - z) * torch.tanh(u_n + r * p_n) + z * h
        outputs.append(h)
    return torch.stack(outputs, -2)[..., 1:, :], h


def _samples(make: Make) -> list[Sample]:
    def weights(*lead: int, features: int = 2, hidden: int = 2) -> tuple[Tensor, ...]:
        shapes = (3 * hidden, features), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,)
        return tuple(make(*lead, *shape) for shape in shapes)

    return [
        Sample("per_task", (make(2, 2, 3, 2), make(2, 2, 2), *weights(2))),
        Sample("per_task_no_state_no_bias", (make(2, 1, 3, 3), None, *weights(2, features=3)[:2])),
        Sample("shared", (make(3, 2, 2), make(3, 2), *weights()), per_task=False),
        Sample("shared_of_tasks", (make(2, 2, 3, 2), make(2, 2, 2), *weights()), per_task=False),
        Sample("odd_one_bias", (make(1, 3, 5, 1), None, *weights(1, features=1, hidden=3)[:3]), per_task=False),
        Sample("no_sequences", (make(2, 0, 3, 2), None, *weights(2))),
        Sample("no_tasks", (make(0, 2, 3, 2), None, *weights(0))),
    ]


def _benchmark(make: Make) -> list[Sample]:
    def sample(name: str, T: int, B: int, L: int, D: int, H: int) -> Sample:
        scale = H**-0.5
        weights = make(T, 3 * H, D) * scale, make(T, 3 * H, H) * scale, make(T, 3 * H) * scale, make(T, 3 * H) * scale
        return Sample(name, (make(T, B, L, D), make(T, B, H), *weights))

    return [sample("8x8x20x128-256", 8, 8, 20, 128, 256), sample("32x2x32x64-64", 32, 2, 32, 64, 64)]


def _cost(sample: Sample, order: int) -> Cost:
    x, w_hh = sample.args[0], sample.args[3]
    tokens, hidden, size = x.shape[:-1].numel(), w_hh.shape[-1], x.element_size()
    products = 6 * tokens * hidden * (x.shape[-1] + hidden)
    inputs, kept = sum(t.numel() for t in sample.args if t is not None), 5 * tokens * hidden
    moved = (inputs + kept, 2 * (inputs + kept), 4 * (inputs + kept))
    return Cost(flop=(1, 2, 6)[order] * products, bytes=moved[order] * size)


SPEC = Spec(OP, gru, _plain, _samples, _benchmark, _cost)
