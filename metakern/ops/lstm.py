"""LSTM over whole sequences: one layer, one direction, with a weight for each task.

    z_t = x_t W_ihᵀ + b_ih + h_{t-1} W_hhᵀ + b_hh         i, f, g, o = σ(z_i), σ(z_f), tanh(z_g), σ(z_o)
    c_t = f c_{t-1} + i g                                 h_t = o tanh(c_t)

With the slopes i' = i (1 - i), f' and o' alike, g' = 1 - g², and e = tanh(c_t), the linear map of a step has the
coefficients

    k_i = g i',   k_f = c_{t-1} f',   k_g = i g',   k_o = e o',   k_h = o (1 - e²)

which are known for all steps before the recurrence starts. Tangents run forward in time, with
v = t_x W_ihᵀ + x t_W_ihᵀ + h_{t-1} t_W_hhᵀ + t_b being large products over all steps:

    t_z = v + t_h_{t-1} W_hhᵀ     t_c = f t_c_{t-1} + k_i t_z_i + k_f t_z_f + k_g t_z_g     t_h = k_h t_c + k_o t_z_o

Cotangents run backward from sources s, which are s_h = ct_y, s_c = 0, s_z = 0:

    ct_h = s_h + ct_z_{t+1} W_hh
    ct_c = s_c + f_{t+1} ct_c_{t+1} + k_h ct_h
    ct_z = s_z + k ct             ct = (ct_c, ct_c, ct_c, ct_h)

and the tangents of the cotangents obey the same recurrence from other sources:

    s_h = t_ct_y + ct_z_{t+1} t_W_hh
    s_c = t_f_{t+1} ct_c_{t+1} + t_k_h ct_h
    s_z = t_k ct

Then ct_x = ct_z W_ih, ct_W_ih = Σ ct_zᵀ x, ct_W_hh = Σ ct_zᵀ h_{t-1}, ct_b = Σ ct_z, and their tangents by the product
rule: large products over all steps.

| tensor | shape |
|---|---|
| x | [T, B, L, I] |
| h, c, and the final states | [T, B, H] |
| w_ih, w_hh | [T, 4H, I], [T, 4H, H] |
| b_ih, b_hh | [T, 4H] |
| y | [T, B, L, H] |

Residuals: the gates (i, f, g, o) [T, B, L, 4H] and the cells [T, B, L, H]; y itself. Half precision is computed in
float32. Hochreiter, Schmidhuber 1997, "Long short-term memory"; the forget gate of Gers, Schmidhuber, Cummins 2000,
section 3; equations and order of the gates as in torch.nn.LSTM.
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


def lstm(
    x: Tensor,
    state: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The outputs of an LSTM at every step, and its final state (h, c).

    x [B, L, I] with weights [4H, I], [4H, H] and biases [4H], or x [T, B, L, I] with weights and biases that are shared
    or have the tasks first, [T, 4H, I]. state is (h, c), each [B, H] or [T, B, H], or None for zeros. Returns the
    output, [B, L, H] or [T, B, L, H], and (h, c). The gates stand in torch.nn's order: input, forget, cell, output.

    Raises TypeError or ValueError, naming the argument, where kinds, dtypes, devices or shapes do not fit.

    >>> import metakern as mk, torch
    >>> x, w_ih, w_hh = torch.ones(2, 3, 4), torch.zeros(20, 4), torch.zeros(20, 5)
    >>> y, (h, c) = mk.ops.lstm(x, None, w_ih, w_hh)
    >>> y.shape, h.shape
    (torch.Size([2, 3, 5]), torch.Size([2, 5]))
    """
    if state is not None and (not isinstance(state, tuple | list) or len(state) != 2):
        raise TypeError(f"lstm: state must be None or a pair (h, c), got {type(state).__name__}")
    h, c = (None, None) if state is None else state
    y, h_n, c_n = apply(OP, 4, x, {"h": h, "c": c}, {"w_ih": w_ih, "w_hh": w_hh}, {"b_ih": b_ih, "b_hh": b_hh})
    return y, (h_n, c_n)


def _forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    x, h, cell, w_ih, w_hh, b_ih, b_hh = wide(inputs)
    hidden, w = w_hh.shape[-1], w_hh.mT
    h, cell, u = start(h, x, hidden), start(cell, x, hidden), affine(x, w_ih, b_ih, b_hh)
    outputs, gates, cells = [], [], []
    for u_t in u.unbind(2):
        z_i_f, z_g, z_o = product(h, w, u_t).split((2 * hidden, hidden, hidden), -1)
        i_f, g, o = torch.sigmoid(z_i_f), torch.tanh(z_g), torch.sigmoid(z_o)
        i, f = i_f.chunk(2, -1)
        cell = torch.addcmul(f * cell, i, g)
        h = o * torch.tanh(cell)
        outputs.append(h)
        gates.append(torch.cat((i_f, g, o), -1))
        cells.append(cell)
    y = stack(outputs, x, hidden), h, cell
    return narrow(inputs, y), narrow(inputs, (stack(gates, x, 4 * hidden), stack(cells, x, hidden)))


def _jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    x, h, cell, w_ih, w_hh, *_ = wide(inputs)
    t_x, t_h, t_cell, t_w_ih, t_w_hh, t_b_ih, t_b_hh = wide(t_inputs)
    gates, cells, y, *_ = wide(r)
    hidden, w = w_hh.shape[-1], w_hh.mT
    k, k_h = _coefficients(gates, previous(cell, cells), torch.tanh(cells))
    terms = t_affine(x, w_ih, t_x, t_w_ih, t_b_ih), t_affine(previous(h, y), w_hh, None, t_w_hh, t_b_hh)
    v = total((*terms[0], *terms[1]), gates)
    t_h, t_cell, forget = start(t_h, x, hidden), start(t_cell, x, hidden), gates.chunk(4, -1)[1]
    t_outputs, t_zs, t_cells = [], [], []
    for v_t, k_t, k_h_t, f in zip(v.unbind(2), k.unbind(2), k_h.unbind(2), forget.unbind(2), strict=True):
        t_z = product(t_h, w, v_t)
        t_i, t_f, t_g, t_o = (k_t * t_z).chunk(4, -1)
        t_cell = torch.addcmul(t_i + t_f + t_g, f, t_cell)
        t_h = torch.addcmul(t_o, k_h_t, t_cell)
        t_outputs.append(t_h)
        t_zs.append(t_z)
        t_cells.append(t_cell)
    t_gates = _slopes(gates) * stack(t_zs, x, 4 * hidden)
    t_y = stack(t_outputs, x, hidden), t_h, t_cell
    return narrow(inputs, t_y), narrow(inputs, (t_gates, stack(t_cells, x, hidden)))


def _vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    x, h, cell, w_ih, w_hh, *_ = wide(inputs)
    gates, cells, y, *_ = wide(r)
    ct_y, ct_h, ct_c = wide(ct_outputs)
    k, k_h = _coefficients(gates, previous(cell, cells), torch.tanh(cells))
    ct_zs, _, ct_h, ct_c = _backward(gates, k, k_h, w_hh, previous(None, ct_y), last(ct_h, ct_y), ct_c.clone())
    ct_z = stack(ct_zs, x, w_hh.shape[1])
    ct_x, *ct_p = cotangents(c.needs, x, previous(h, y), w_ih, ct_z, ct_z)
    return narrow(inputs, (ct_x, ct_h, ct_c, *ct_p))


def _vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_outputs: Tensors,
    t_ct_outputs: Tensors | None,
) -> Tensors:
    x, h, cell, w_ih, w_hh, *_ = wide(inputs)
    t_x, t_h, t_cell, t_w_ih, t_w_hh, *_ = wide(t_inputs)
    gates, cells, y, *_ = wide(r)
    t_gates, t_cells, t_y, *_ = wide(t_r)
    ct_y, ct_h, ct_c = wide(ct_outputs)
    t_ct_y, t_ct_h, t_ct_c = wide(t_ct_outputs or [torch.zeros_like(ct) for ct in (ct_y, ct_h, ct_c)])
    e, before, gate_size = torch.tanh(cells), previous(cell, cells), w_hh.shape[1]
    k, k_h = _coefficients(gates, before, e)
    t_k, t_k_h = _t_coefficients(gates, before, e, t_gates, previous(t_cell, t_cells), t_cells)
    ct_zs, ct_states, *_ = _backward(gates, k, k_h, w_hh, previous(None, ct_y), last(ct_h, ct_y), ct_c)
    ct_z, ct_state = stack(ct_zs, x, gate_size), stack(ct_states, x, gate_size)

    _, _, ct_cells, ct_hs = ct_state.chunk(4, -1)
    through_k_h = t_k_h * ct_hs
    s_h = total((previous(None, t_ct_y), None if t_w_hh is None else times(ct_z, t_w_hh)), y)
    s_c = torch.addcmul(previous(None, through_k_h), t_gates.chunk(4, -1)[1], ct_cells)
    t_ct_zs, _, t_ct_h, t_ct_c = _backward(
        gates, k, k_h, w_hh, s_h, last(t_ct_h, t_ct_y), last(t_ct_c, through_k_h), s_c, t_k * ct_state
    )
    t_ct_z = stack(t_ct_zs, x, gate_size)
    tangents = t_x, previous(t_h, t_y), t_w_ih, t_ct_z, t_ct_z
    t_ct_x, *t_ct_p = t_cotangents(c.needs, x, previous(h, y), w_ih, ct_z, ct_z, *tangents)
    return narrow(inputs, (t_ct_x, t_ct_h, t_ct_c, *t_ct_p))


def _backward(
    gates: Tensor,
    k: Tensor,
    k_h: Tensor,
    w_hh: Tensor,
    s_h: Tensor,
    ct_h: Tensor,
    ct_c: Tensor,
    s_c: Tensor | None = None,
    s_z: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """From ct_h, ct_c of the last state back to those of the first: ct_z and ct of each step, and ct_h, ct_c.

    The sources s_h and s_c of a step belong to the state that it finds, s_z to the step itself.
    """
    forget = gates.chunk(4, -1)[1]
    nothing = (None,) * k.shape[2]
    sources = s_h.unbind(2), nothing if s_c is None else s_c.unbind(2), nothing if s_z is None else s_z.unbind(2)
    steps = list(zip(*sources, k.unbind(2), k_h.unbind(2), forget.unbind(2), strict=True))
    ct_zs, ct_states = [], []
    for s_h_t, s_c_t, s_z_t, k_t, k_h_t, f in reversed(steps):
        ct_c = torch.addcmul(ct_c, k_h_t, ct_h)
        ct_state = torch.cat((ct_c, ct_c, ct_c, ct_h), -1)
        ct_z = k_t * ct_state if s_z_t is None else torch.addcmul(s_z_t, k_t, ct_state)
        ct_h = product(ct_z, w_hh, s_h_t)
        ct_c = f * ct_c if s_c_t is None else torch.addcmul(s_c_t, f, ct_c)
        ct_zs.append(ct_z)
        ct_states.append(ct_state)
    return ct_zs[::-1], ct_states[::-1], ct_h, ct_c


def _slopes(gates: Tensor) -> Tensor:
    """The derivatives of i, f, g, o, by their own values."""
    i, f, g, o = gates.chunk(4, -1)
    return torch.cat((i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)), -1)


def _coefficients(gates: Tensor, before: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """(k_i, k_f, k_g, k_o) and k_h, from c_{t-1} = before and e = tanh(c_t)."""
    i, _, g, o = gates.chunk(4, -1)
    return torch.cat((g, before, i, e), -1) * _slopes(gates), o * (1 - e * e)


def _t_coefficients(
    gates: Tensor, before: Tensor, e: Tensor, t_gates: Tensor, t_before: Tensor, t_cells: Tensor
) -> tuple[Tensor, Tensor]:
    """The tangents of `_coefficients`."""
    i, f, g, o = gates.chunk(4, -1)
    t_i, _, t_g, t_o = t_gates.chunk(4, -1)
    t_e = (1 - e * e) * t_cells
    t_slopes = torch.cat((1 - 2 * i, 1 - 2 * f, -2 * g, 1 - 2 * o), -1) * t_gates
    t_k = torch.addcmul(
        torch.cat((t_g, t_before, t_i, t_e), -1) * _slopes(gates), torch.cat((g, before, i, e), -1), t_slopes
    )
    return t_k, t_o * (1 - e * e) - 2 * o * e * t_e


OP = Op(
    "lstm",
    inputs=("x", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh"),
    kernels={"reference": Rules(_forward, _jvp, _vjp, _vjp_jvp)},
    outputs=3,
    saves_output=True,
    zero_tangents=False,
)


def _plain(
    x: Tensor,
    state: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    h, c = state or (x.new_zeros(*x.shape[:-2], w_hh.shape[-1]),) * 2
    outputs = [h]
    for x_t in x.unbind(-2):
        z = x_t @ w_ih.mT + h @ w_hh.mT
        for b in (b_ih, b_hh):
            z = z if b is None else z + b.unsqueeze(-2)
        i, f, g, o = z.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs, -2)[..., 1:, :], (h, c)


def _flat(x: Tensor, h: Tensor | None, c: Tensor | None, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The public function of tensors alone, as samples give them."""
    y, (h, c) = lstm(x, None if h is None or c is None else (h, c), *weights)
    return y, h, c


def _flat_plain(x: Tensor, h: Tensor | None, c: Tensor | None, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, (h, c) = _plain(x, None if h is None or c is None else (h, c), *weights)
    return y, h, c


def _samples(make: Make) -> list[Sample]:
    def weights(*lead: int, features: int = 2, hidden: int = 2) -> tuple[Tensor, ...]:
        return (
            make(*lead, 4 * hidden, features),
            make(*lead, 4 * hidden, hidden),
            make(*lead, 4 * hidden),
            make(*lead, 4 * hidden),
        )

    shared = weights()
    return [
        Sample("per_task", (make(2, 2, 3, 2), make(2, 2, 2), make(2, 2, 2), *weights(2))),
        Sample("per_task_no_state_no_bias", (make(2, 1, 3, 3), None, None, *weights(2, features=3)[:2])),
        Sample("shared", (make(3, 2, 2), make(3, 2), make(3, 2), *weights()), per_task=False),
        Sample("shared_of_tasks", (make(2, 2, 3, 2), make(2, 2, 2), make(2, 2, 2), *shared), per_task=False),
        Sample("odd_one_bias", (make(1, 3, 5, 1), None, None, *weights(1, features=1, hidden=3)[:3]), per_task=False),
        Sample("no_sequences", (make(2, 0, 3, 2), None, None, *weights(2))),
        Sample("no_tasks", (make(0, 2, 3, 2), None, None, *weights(0))),
    ]


def _benchmark(make: Make) -> list[Sample]:
    def sample(name: str, T: int, B: int, L: int, D: int, H: int) -> Sample:
        scale = H**-0.5
        weights = make(T, 4 * H, D) * scale, make(T, 4 * H, H) * scale, make(T, 4 * H) * scale, make(T, 4 * H) * scale
        return Sample(name, (make(T, B, L, D), make(T, B, H), make(T, B, H), *weights))

    return [sample("8x8x20x128-256", 8, 8, 20, 128, 256), sample("32x2x32x64-64", 32, 2, 32, 64, 64)]


def _cost(sample: Sample, order: int) -> Cost:
    x, w_hh = sample.args[0], sample.args[4]
    tokens, gate_size, size = x.shape[:-1].numel(), w_hh.shape[-2], x.element_size()
    products = 2 * tokens * gate_size * (x.shape[-1] + w_hh.shape[-1])
    inputs = sum(t.numel() for t in sample.args if t is not None)
    kept = tokens * 2 * (gate_size + w_hh.shape[-1])
    return Cost(
        flop=(1, 2, 6)[order] * products, bytes=(inputs + kept, 2 * inputs + kept, 4 * inputs + 2 * kept)[order] * size
    )


SPEC = Spec(OP, _flat, _flat_plain, _samples, _benchmark, _cost)
