"""LSTM over whole sequences: one layer in one direction, with weights that all tasks share or of each task.

    z_t = x_t W_ihᵀ + b_ih + h_{t-1} W_hhᵀ + b_hh         i, f, g, o = σ(z_i), σ(z_f), tanh(z_g), σ(z_o)
    c_t = f c_{t-1} + i g                                 h_t = o tanh(c_t)

With the slopes i' = i (1 - i), f' and o' alike, g' = 1 - g², and e = tanh(c_t), a step's tangents are

    t_i = i' t_z_i,   t_f = f' t_z_f,   t_g = g' t_z_g,   t_o = o' t_z_o
    t_c_t = f t_c_{t-1} + t_f c_{t-1} + t_i g + i t_g           t_h_t = t_o e + o (1 - e²) t_c_t

its cotangents, from those of h_t and c_t (h_t adds to that of c_t),

    ct_c_t += o (1 - e²) ct_h_t
    ct_z = (ct_c_t g i',  ct_c_t c_{t-1} f',  ct_c_t i g',  ct_h_t e o')       ct_c_{t-1} = f ct_c_t

and their tangents follow by the product rule, with t_i' = (1 - 2 i) t_i, t_g' = -2 g t_g and t_e = (1 - e²) t_c_t. The
large products before and after the recurrence are in `recurrent.py`.

| tensor | shape |
|---|---|
| x | [T, B, L, I] |
| h, c, and the final states | [T, B, H] |
| w_ih, w_hh | [T, 4H, I], [T, 4H, H] |
| b_ih, b_hh | [T, 4H] |
| y | [T, B, L, H] |

Residuals: the gates (i, f, g, o) [T, B, L, 4H], h_{t-1} and c_{t-1} [T, B, L, H]; the vjp keeps the cotangents of h_t
and c_t. Half precision is computed in float32. Hochreiter, Schmidhuber 1997, "Long short-term memory"; the forget gate
of Gers, Schmidhuber, Cummins 2000, section 3; equations and order of the gates as in torch.nn.LSTM.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from metakern.ops.core.autocast import autocast
from metakern.ops.core.autograd import Op
from metakern.ops.core.recurrent import Cell, Gates, apply, kernels, plain
from metakern.ops.core.spec import Cost, Make, Sample, Spec


@autocast("lower")
def lstm(
    x: Tensor,
    state: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns the outputs of one LSTM layer at every step, and its final state (h, c).

    It is differentiable twice in all floating-point arguments. The equations, and the order of the gates in the rows of
    the weights (input, forget, cell, output), are those of torch.nn.LSTM (Hochreiter, Schmidhuber 1997; the forget gate
    of Gers, Schmidhuber, Cummins 2000, section 3). Half precision is computed in float32; `torch.autocast` lowers
    float32 to the region's dtype.

    Args:
        x: [B, L, I], sequences of L steps; or [T, B, L, I] for T tasks.
        state: The initial state (h, c), each [B, H] or [T, B, H]; None for zeros.
        w_ih: The weight of the input, [4H, I]; with x [T, B, L, I] also [T, 4H, I], one for each task.
        w_hh: The weight of the state, [4H, H] or [T, 4H, H].
        b_ih: [4H] or [T, 4H]; None for zeros.
        b_hh: [4H] or [T, 4H]; None for zeros.
        lengths: [B] or [T, B], int64 or int32: the number of steps of each sequence, from 0 to L; None for L. Outputs
            after them are zero, and the final state is that after the last of them, as with
            torch.nn.utils.rnn.pack_padded_sequence.
        reverse: Whether each sequence runs from its last step to its first.

    Returns:
        (y, (h, c)): the outputs, [B, L, H] or [T, B, L, H], and the final state, each [B, H] or [T, B, H].

    Raises:
        TypeError: For tensors that are not floating point or not of one dtype, lengths that are not int64 or int32,
            or a state that is no pair.
        ValueError: Where shapes or devices do not fit; on the CPU also for lengths outside [0, L].

    >>> import metakern as mk, torch
    >>> x, w_ih, w_hh = torch.ones(2, 3, 4), torch.zeros(20, 4), torch.zeros(20, 5)
    >>> y, (h, c) = mk.ops.lstm(x, None, w_ih, w_hh)
    >>> y.shape, h.shape
    (torch.Size([2, 3, 5]), torch.Size([2, 5]))
    """
    if state is not None and (not isinstance(state, tuple | list) or len(state) != 2):
        raise TypeError(f"lstm: state must be None or a pair (h, c), got {type(state).__name__}")
    h, c = (None, None) if state is None else state
    weights, biases = {"w_ih": w_ih, "w_hh": w_hh}, {"b_ih": b_ih, "b_hh": b_hh}
    y, h_n, c_n = apply(OP, 4, x, {"h": h, "c": c}, weights, biases, lengths, reverse=reverse)
    return y, (h_n, c_n)


def _forward(c: SimpleNamespace, u: Gates, p: Gates, s: Gates) -> tuple[Gates, Gates]:
    z_i, z_f, z_g, z_o = (a + b for a, b in zip(u, p, strict=True))
    i, f, g, o = torch.sigmoid(z_i), torch.sigmoid(z_f), torch.tanh(z_g), torch.sigmoid(z_o)
    cell = f * s[1] + i * g
    return (o * torch.tanh(cell), cell), (i, f, g, o)


def _jvp(c: SimpleNamespace, kept: Gates, s: Gates, t_u: Gates, t_p: Gates, t_s: Gates) -> tuple[Gates, Gates]:
    (i, f, g, o), e = kept, _e(kept, s)
    t_z_i, t_z_f, t_z_g, t_z_o = (a + b for a, b in zip(t_u, t_p, strict=True))
    t_i, t_f, t_g, t_o = i * (1 - i) * t_z_i, f * (1 - f) * t_z_f, (1 - g * g) * t_z_g, o * (1 - o) * t_z_o
    t_cell = f * t_s[1] + t_f * s[1] + t_i * g + i * t_g
    return (t_o * e + o * (1 - e * e) * t_cell, t_cell), (t_i, t_f, t_g, t_o)


def _total(c: SimpleNamespace, kept: Gates, s: Gates, ct: Gates) -> Gates:
    e = _e(kept, s)
    return ct[0], ct[1] + kept[3] * (1 - e * e) * ct[0]


def _vjp(c: SimpleNamespace, kept: Gates, s: Gates, ct: Gates) -> tuple[Gates, Gates, Gates]:
    (i, f, g, o), (ct_h, ct_c), e = kept, ct, _e(kept, s)
    ct_z = ct_c * g * i * (1 - i), ct_c * s[1] * f * (1 - f), ct_c * i * (1 - g * g), ct_h * e * o * (1 - o)
    return ct_z, ct_z, (torch.zeros_like(ct_h), f * ct_c)


def _vjp_jvp(
    c: SimpleNamespace, kept: Gates, s: Gates, t_kept: Gates, t_s: Gates, ct: Gates, t_ct: Gates
) -> tuple[Gates, Gates, Gates]:
    (i, f, g, o), (t_i, t_f, t_g, t_o), (ct_h, ct_c), (t_ct_h, t_ct_c) = kept, t_kept, ct, t_ct
    e = _e(kept, s)
    slope = 1 - e * e
    t_e = slope * (f * t_s[1] + t_f * s[1] + t_i * g + i * t_g)
    t_ct_c = t_ct_c + (t_o * slope - 2 * o * e * t_e) * ct_h + o * slope * t_ct_h
    t_ct_z = (
        (t_ct_c * g + ct_c * t_g) * i * (1 - i) + ct_c * g * (1 - 2 * i) * t_i,
        (t_ct_c * s[1] + ct_c * t_s[1]) * f * (1 - f) + ct_c * s[1] * (1 - 2 * f) * t_f,
        (t_ct_c * i + ct_c * t_i) * (1 - g * g) - 2 * ct_c * i * g * t_g,
        (t_ct_h * e + ct_h * t_e) * o * (1 - o) + ct_h * e * (1 - 2 * o) * t_o,
    )
    return t_ct_z, t_ct_z, (torch.zeros_like(t_ct_h), f * t_ct_c + t_f * ct_c)


def _e(kept: Gates, s: Gates) -> Tensor:
    """Returns tanh(c_t)."""
    i, f, g, _ = kept
    return torch.tanh(f * s[1] + i * g)


CELL = Cell(lambda c: "lstm", 4, _forward, _jvp, _vjp, _vjp_jvp, _total, kept=4, states=2)
OP = Op(
    "lstm",
    inputs=("x", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh"),
    constants=("lengths",),
    kernels=kernels(CELL),
    outputs=3,
    zero_tangents=False,
    vjp_residuals=2,
)


def _layer(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    zeros = x.new_zeros(*x.shape[:-2], w_hh.shape[-1])
    h, c = zeros if h is None else h, zeros if c is None else c
    outputs = [h]
    for x_t in x.unbind(-2):
        z = x_t @ w_ih.mT + h @ w_hh.mT
        for b in (b_ih, b_hh):
            z = z if b is None else z + b.unsqueeze(-2)
        i, f, g, o = z.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs, -2)[..., 1:, :], h, c


def _flat(x: Tensor, h: Tensor | None, c: Tensor | None, *rest: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Calls `lstm` with h and c as separate arguments and results, as samples have them."""
    y, (h, c) = lstm(x, None if h is None or c is None else (h, c), *rest, **options)
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
        Sample(
            "lengths", (make(2, 3, 4, 2), make(2, 3, 2), make(2, 3, 2), *weights(2), make.lengths([0, 4, 2], [3, 1, 4]))
        ),
        Sample("reverse", (make(2, 2, 3, 2), make(2, 2, 2), make(2, 2, 2), *weights(2)), {"reverse": True}),
        Sample(
            "lengths_reverse",
            (make(2, 2, 3, 2), None, None, *shared[:3], None, make.lengths([3, 0], [1, 2])),
            {"reverse": True},
            per_task=False,
        ),
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
    kept = tokens * (gate_size + 2 * w_hh.shape[-1])
    moved = (inputs + kept, 2 * inputs + kept, 3 * inputs + 2 * kept)
    return Cost(flop=(1, 2, 4)[order] * products, bytes=moved[order] * size)


SPEC = Spec(OP, _flat, plain(_layer, 2), _samples, _benchmark, _cost)
