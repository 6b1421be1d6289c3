"""GRU over whole sequences: one layer in one direction, with weights that all tasks share or of each task.

    u = x_t W_ihᵀ + b_ih     p = h_{t-1} W_hhᵀ + b_hh
    r, z = σ(u_r + p_r), σ(u_z + p_z)     n = tanh(u_n + r p_n)     h_t = n + z (h_{t-1} - n)

With the slopes r' = r (1 - r), z' = z (1 - z), n' = 1 - n², a step's tangents are

    t_r = r' (t_u_r + t_p_r),   t_z = z' (t_u_z + t_p_z),   t_n = n' (t_u_n + r t_p_n + t_r p_n)
    t_h_t = (1 - z) t_n + z t_h_{t-1} + t_z (h_{t-1} - n)

its cotangents, with m = (1 - z) n' ct_h_t,

    ct_p = (m p_n r',  (h_{t-1} - n) z' ct_h_t,  m r)     ct_u = (ct_p_r, ct_p_z, m)
    ct_h_{t-1} = z ct_h_t + ct_p W_hh

and their tangents follow by the product rule, with t_r' = (1 - 2 r) t_r and t_n' = -2 n t_n. The large products before
and after the recurrence are in `recurrent.py`.

| tensor | shape |
|---|---|
| x | [T, B, L, I] |
| h, and the final state | [T, B, H] |
| w_ih, w_hh | [T, 3H, I], [T, 3H, H] |
| b_ih, b_hh | [T, 3H] |
| y | [T, B, L, H] |

Residuals: (r, z, n, p_n) [T, B, L, 4H] and h_{t-1} [T, B, L, H]; the vjp keeps the cotangent of h_t. Half precision is
computed in float32. Cho et al. 2014, "Learning phrase representations using RNN encoder-decoder", section 2.3;
equations and order of the gates as in torch.nn.GRU.
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
def gru(
    x: Tensor,
    h: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns the outputs of one GRU layer at every step, and its final state.

    It is differentiable twice in all floating-point arguments. The equations, and the order of the gates in the rows of
    the weights (reset, update, new), are those of torch.nn.GRU (Cho et al. 2014, section 2.3). Half precision is
    computed in float32; `torch.autocast` lowers float32 to the region's dtype.

    Args:
        x: [B, L, I], sequences of L steps; or [T, B, L, I] for T tasks.
        h: The initial state, [B, H] or [T, B, H]; None for zeros.
        w_ih: The weight of the input, [3H, I]; with x [T, B, L, I] also [T, 3H, I], one for each task.
        w_hh: The weight of the state, [3H, H] or [T, 3H, H].
        b_ih: [3H] or [T, 3H]; None for zeros.
        b_hh: [3H] or [T, 3H]; None for zeros.
        lengths: [B] or [T, B], int64 or int32: the number of steps of each sequence, from 0 to L; None for L. Outputs
            after them are zero, and the final state is that after the last of them, as with
            torch.nn.utils.rnn.pack_padded_sequence.
        reverse: Whether each sequence runs from its last step to its first.

    Returns:
        (y, h): the outputs, [B, L, H] or [T, B, L, H], and the final state, [B, H] or [T, B, H].

    Raises:
        TypeError: For tensors that are not floating point or not of one dtype, or lengths that are not int64 or int32.
        ValueError: Where shapes or devices do not fit; on the CPU also for lengths outside [0, L].

    >>> import metakern as mk, torch
    >>> y, h = mk.ops.gru(torch.ones(2, 3, 4), torch.ones(2, 5), torch.zeros(15, 4), torch.zeros(15, 5))
    >>> y[0, :, 0], h.shape
    (tensor([0.5000, 0.2500, 0.1250]), torch.Size([2, 5]))
    """
    weights, biases = {"w_ih": w_ih, "w_hh": w_hh}, {"b_ih": b_ih, "b_hh": b_hh}
    y, h_n = apply(OP, 3, x, {"h": h}, weights, biases, lengths, reverse=reverse)
    return y, h_n


def _forward(c: SimpleNamespace, u: Gates, p: Gates, s: Gates) -> tuple[Gates, Gates]:
    r, z = torch.sigmoid(u[0] + p[0]), torch.sigmoid(u[1] + p[1])
    n = torch.tanh(u[2] + r * p[2])
    return (n + z * (s[0] - n),), (r, z, n, p[2])


def _jvp(c: SimpleNamespace, kept: Gates, s: Gates, t_u: Gates, t_p: Gates, t_s: Gates) -> tuple[Gates, Gates]:
    r, z, n, p_n = kept
    t_r, t_z = r * (1 - r) * (t_u[0] + t_p[0]), z * (1 - z) * (t_u[1] + t_p[1])
    t_n = (1 - n * n) * (t_u[2] + r * t_p[2] + t_r * p_n)
    return (t_n + z * (t_s[0] - t_n) + t_z * (s[0] - n),), (t_r, t_z, t_n, t_p[2])


def _vjp(c: SimpleNamespace, kept: Gates, s: Gates, ct: Gates) -> tuple[Gates, Gates, Gates]:
    (r, z, n, p_n), (ct_h,) = kept, ct
    m = (1 - z) * (1 - n * n) * ct_h
    ct_r, ct_z = m * p_n * r * (1 - r), ct_h * (s[0] - n) * z * (1 - z)
    return (ct_r, ct_z, m * r), (ct_r, ct_z, m), (z * ct_h,)


def _vjp_jvp(
    c: SimpleNamespace, kept: Gates, s: Gates, t_kept: Gates, t_s: Gates, ct: Gates, t_ct: Gates
) -> tuple[Gates, Gates, Gates]:
    (r, z, n, p_n), (t_r, t_z, t_n, t_p_n), (ct_h,), (t_ct_h,) = kept, t_kept, ct, t_ct
    k, t_k = (1 - z) * (1 - n * n), -t_z * (1 - n * n) - 2 * (1 - z) * n * t_n
    m, t_m = k * ct_h, t_k * ct_h + k * t_ct_h
    t_ct_r = (t_m * p_n + m * t_p_n) * r * (1 - r) + m * p_n * (1 - 2 * r) * t_r
    t_ct_z = ((t_s[0] - t_n) * ct_h + (s[0] - n) * t_ct_h) * z * (1 - z) + (s[0] - n) * ct_h * (1 - 2 * z) * t_z
    return (t_ct_r, t_ct_z, t_m * r + m * t_r), (t_ct_r, t_ct_z, t_m), (t_z * ct_h + z * t_ct_h,)


CELL = Cell(lambda c: "gru", 3, _forward, _jvp, _vjp, _vjp_jvp, kept=4, split=True)
OP = Op(
    "gru",
    inputs=("x", "h", "w_ih", "w_hh", "b_ih", "b_hh"),
    constants=("lengths",),
    kernels=kernels(CELL),
    outputs=2,
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
        Sample("lengths", (make(2, 3, 4, 2), make(2, 3, 2), *weights(2), make.lengths([0, 4, 2], [3, 1, 4]))),
        Sample("reverse", (make(2, 2, 3, 2), make(2, 2, 2), *weights(2)), {"reverse": True}),
        Sample(
            "lengths_reverse",
            (make(2, 2, 3, 2), None, *weights()[:3], None, make.lengths([3, 0], [1, 2])),
            {"reverse": True},
            per_task=False,
        ),
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
    moved = (inputs + kept, 2 * inputs + kept, 3 * inputs + 2 * kept)
    return Cost(flop=(1, 2, 4)[order] * products, bytes=moved[order] * size)


SPEC = Spec(OP, gru, plain(_layer, 1), _samples, _benchmark, _cost)
