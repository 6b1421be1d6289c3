"""Elman's recurrent layer over whole sequences, in one direction, with weights that all tasks share or of each task.

    h_t = f(x_t W_ihᵀ + b_ih + h_{t-1} W_hhᵀ + b_hh)      f = tanh or relu,    k = 1 - h² or [h > 0]

The tangents and cotangents of a step, and the tangents of its cotangents, are

    t_h_t = k t_z     ct_z = k ct_h_t     t_ct_z = k t_ct_h_t + t_k ct_h_t     t_k = -2 h_t t_h_t or 0

where z is the argument of f. The large products before and after the recurrence are in `recurrent.py`.

| tensor | shape |
|---|---|
| x | [T, B, L, I] |
| h, and the final state | [T, B, H] |
| w_ih, w_hh | [T, H, I], [T, H, H] |
| b_ih, b_hh | [T, H] |
| y | [T, B, L, H] |

Residuals: h_{t-1} [T, B, L, H] and y; the vjp keeps the cotangent of h_t. Half precision is computed in float32. Elman
1990, "Finding structure in time", with the equations of torch.nn.RNN.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from metakern.ops.core.autocast import autocast
from metakern.ops.core.autograd import Op
from metakern.ops.core.recurrent import Cell, Gates, apply, kernels, plain
from metakern.ops.core.spec import Cost, Make, Sample, Spec


@autocast("lower")
def rnn(
    x: Tensor,
    h: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns the outputs of one recurrent layer at every step, and its final state.

    It is differentiable twice in all floating-point arguments. The equations are those of torch.nn.RNN (Elman 1990).
    Half precision is computed in float32; `torch.autocast` lowers float32 to the region's dtype.

    Args:
        x: [B, L, I], sequences of L steps; or [T, B, L, I] for T tasks.
        h: The initial state, [B, H] or [T, B, H]; None for zeros.
        w_ih: The weight of the input, [H, I]; with x [T, B, L, I] also [T, H, I], one for each task.
        w_hh: The weight of the state, [H, H] or [T, H, H].
        b_ih: [H] or [T, H]; None for zeros.
        b_hh: [H] or [T, H]; None for zeros.
        lengths: [B] or [T, B], int64 or int32: the number of steps of each sequence, from 0 to L; None for L. Outputs
            after them are zero, and the final state is that after the last of them, as with
            torch.nn.utils.rnn.pack_padded_sequence.
        nonlinearity: "tanh" or "relu".
        reverse: Whether each sequence runs from its last step to its first.

    Returns:
        (y, h): the outputs, [B, L, H] or [T, B, L, H], and the final state, [B, H] or [T, B, H].

    Raises:
        TypeError: For tensors that are not floating point or not of one dtype, or lengths that are not int64 or int32.
        ValueError: Where shapes or devices do not fit, or for any other nonlinearity; on the CPU also for lengths
            outside [0, L].

    >>> import metakern as mk, torch
    >>> y, h = mk.ops.rnn(torch.ones(1, 3, 1), None, torch.ones(1, 1), torch.ones(1, 1), nonlinearity="relu")
    >>> y.flatten(), h.flatten()
    (tensor([1., 2., 3.]), tensor([3.]))
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    weights, biases = {"w_ih": w_ih, "w_hh": w_hh}, {"b_ih": b_ih, "b_hh": b_hh}
    y, h_n = apply(OP, 1, x, {"h": h}, weights, biases, lengths, nonlinearity=nonlinearity, reverse=reverse)
    return y, h_n


def _forward(c: SimpleNamespace, u: Gates, p: Gates, s: Gates) -> tuple[Gates, Gates]:
    h = getattr(torch, c.nonlinearity)(u[0] + p[0])
    return (h,), (h,)


def _slope(c: SimpleNamespace, h: Tensor) -> Tensor:
    """Returns k, the derivative of f, in terms of h."""
    return 1 - h * h if c.nonlinearity == "tanh" else (h > 0).to(h.dtype)


def _jvp(c: SimpleNamespace, kept: Gates, s: Gates, t_u: Gates, t_p: Gates, t_s: Gates) -> tuple[Gates, Gates]:
    t_h = _slope(c, kept[0]) * (t_u[0] + t_p[0])
    return (t_h,), (t_h,)


def _vjp(c: SimpleNamespace, kept: Gates, s: Gates, ct: Gates) -> tuple[Gates, Gates, Gates]:
    ct_z = _slope(c, kept[0]) * ct[0]
    return (ct_z,), (ct_z,), (torch.zeros_like(ct_z),)


def _vjp_jvp(
    c: SimpleNamespace, kept: Gates, s: Gates, t_kept: Gates, t_s: Gates, ct: Gates, t_ct: Gates
) -> tuple[Gates, Gates, Gates]:
    t_ct_z = _slope(c, kept[0]) * t_ct[0]
    if c.nonlinearity == "tanh":
        t_ct_z = t_ct_z - 2 * kept[0] * t_kept[0] * ct[0]
    return (t_ct_z,), (t_ct_z,), (torch.zeros_like(t_ct_z),)


CELL = Cell(lambda c: f"rnn_{c.nonlinearity}", 1, _forward, _jvp, _vjp, _vjp_jvp, keeps_gates=False)
OP = Op(
    "rnn",
    inputs=("x", "h", "w_ih", "w_hh", "b_ih", "b_hh"),
    constants=("lengths",),
    kernels=kernels(CELL),
    outputs=2,
    saves_output=True,
    zero_tangents=False,
    vjp_residuals=1,
)


def _layer(
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
        Sample("lengths", (make(2, 3, 4, 2), make(2, 3, 2), *weights(2), make.lengths([0, 4, 2], [3, 1, 4]))),
        Sample("reverse", (make(2, 2, 3, 2), make(2, 2, 2), *weights(2)), {"reverse": True}),
        Sample(
            "lengths_reverse",
            (make(2, 2, 3, 2), None, *weights()[:3], None, make.lengths([3, 0], [1, 2])),
            {"reverse": True, **relu},
            per_task=False,
        ),
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
    moved = (inputs + kept, 2 * inputs + kept, 3 * inputs + 2 * kept)
    return Cost(flop=(1, 2, 4)[order] * products, bytes=moved[order] * size)


SPEC = Spec(OP, rnn, plain(_layer, 1), _samples, _benchmark, _cost)
