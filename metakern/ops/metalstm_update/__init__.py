"""One step of an LSTM that updates parameters, for all coordinates (elements of parameters) and tasks in one call.

Every coordinate has a state of its own, and all share the weights. A first layer, an LSTM, reads the gradient and the
loss. A second layer reads the first one's output h', the parameter, and its own last gates. Its gates are a rate i' and
a decay f', and its cell state is the parameter itself:

    x = u(grad), u(loss)                u(z) = (log|z| / p, sign z), or (-1, e^p z) where |z| < e^-p
    a = w_ih x + w_hh h + b             c' = σ(a_f) c + σ(a_i) tanh(a_g),  h' = σ(a_o) tanh(c')
    i', f' = σ(w_gates [h', phi, i or f] + b_gates)
    phi' = f' phi - i' grad

| tensor | shape |
|---|---|
| phi, grad and phi' | [T, N] |
| loss | [T] |
| h, c and h', c', with H hidden units | [T, H, N] |
| gates (i, f), and gates' | [T, 2, N] |
| w_ih, w_hh, b, in the order i, f, g, o of torch.nn.LSTM | [T, 4H, 4], [T, 4H, H], [T, 4H] |
| w_gates, b_gates | [T, 2, H + 2], [T, 2] |

The loss is the same for all coordinates of a task, so it enters the op in b. Inside the op the weights are w_x
[T, 4H, 2] for u(grad), w_hh, b, w_h [T, 2, H] for h', and w_own [T, 2, 3] for phi, the last gate and 1.

vjp: ct_p, ct_h', ct_c' and ct_gates' are the cotangents of the outputs, and ct_s those of the arguments of both gates:

    ct_s = (ct_gates' + (-grad ct_p, phi ct_p)) gates' (1 - gates')       ct_phi = f' ct_p + w_phi^T ct_s
    ct_h' += w_h^T ct_s                 ct_c' += ct_h' σ(a_o) (1 - tanh²(c'))
    ct_a: those of torch.nn.LSTM's gates         ct_h = w_hh^T ct_a,  ct_c = σ(a_f) ct_c'
    ct_grad = -i' ct_p + u'(grad)^T w_x^T ct_a   and sums over N for the weights

jvp and vjp_jvp are forward and vjp of dual numbers. Residuals: none; every rule computes the hidden units again, so
that nothing of their size is kept but the state itself. Half precision is computed in float32.

Ravi, Larochelle 2017, "Optimization as a model for few-shot learning", sections 3 (the second layer) and 5 (the first);
Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent", appendix A (u).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from metakern import native
from metakern.ops.core import checks, cpp, triton_kernels
from metakern.ops.core.autograd import Op
from metakern.ops.core.dual import Dual, linear, rules, sigmoid, tanh
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Cost, Make, Sample, Spec

PART = 2048  # coordinates in one product


def metalstm_update(
    phi: Tensor,
    grad: Tensor,
    loss: Tensor,
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b: Tensor,
    w_gates: Tensor,
    b_gates: Tensor,
    *,
    p: float = 10.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns parameters and state after one step of a learned LSTM; differentiable twice in all tensors.

    Each of N coordinates (elements of all parameters) gets a rate i and a decay f: phi' = f phi - i grad. They come
    from two layers (Ravi, Larochelle 2017, sections 3 and 5): an LSTM with H hidden units, with the equations of
    torch.nn.LSTM, and the gates i and f. Half precision is computed in float32.

    Args:
        phi: The parameters of T tasks, [T, N].
        grad: Their gradients, [T, N].
        loss: The losses of the tasks, [T].
        h, c: The state of the LSTM, [T, H, N].
        gates: The gates i and f of the last step, [T, 2, N].
        w_ih: Weights of the logarithm and sign of the gradient, and of those of the loss, [4H, 4] or [T, 4H, 4].
        w_hh: Weights of h, [4H, H] or [T, 4H, H].
        b: [4H] or [T, 4H].
        w_gates: Weights with which i and f read the LSTM's output, phi and their own last value, [2, H + 2] or
            [T, 2, H + 2].
        b_gates: [2] or [T, 2].
        p: Gradient and loss are read on a logarithmic scale where they exceed e^-p (Andrychowicz et al. 2016, appendix
            A).

    Returns:
        (phi, h, c, gates) after the step, shaped like the arguments.

    Raises:
        TypeError: For tensors that are not floating point, or not of one dtype.
        ValueError: Where shapes or devices do not fit, or for a p that is not positive.

    >>> import metakern as mk, torch
    >>> state = torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), torch.zeros(1, 2, 2)
    >>> weights = torch.zeros(12, 4), torch.zeros(12, 3), torch.zeros(12), torch.zeros(2, 5), torch.tensor([0.0, 9.0])
    >>> mk.ops.metalstm_update(torch.ones(1, 2), torch.tensor([[1.0, -1.0]]), torch.ones(1), *state, *weights)[0]
    tensor([[0.4999, 1.4999]])
    """
    tensors = {"phi": phi, "grad": grad, "loss": loss, "h": h, "c": c, "gates": gates}
    weights = {"w_ih": w_ih, "w_hh": w_hh, "b": b, "w_gates": w_gates, "b_gates": b_gates}
    checks.floating("metalstm_update", **tensors, **weights)
    if phi.dim() != 2 or h.dim() != 3:
        name, sizes, got = ("phi", "T, N", phi) if phi.dim() != 2 else ("h", "T, H, N", h)
        raise ValueError(f"metalstm_update: {name} must have shape [{sizes}], got {list(got.shape)}")
    if not p > 0:
        raise ValueError(f"metalstm_update: p must be positive, got {p}")
    (T, N), H = phi.shape, h.shape[1]
    sizes_of = {"grad": (T, N), "loss": (T,), "h": (T, H, N), "c": (T, H, N), "gates": (T, 2, N)}
    for name, shape in sizes_of.items():
        checks.shape("metalstm_update", name, tensors[name], shape, "that of phi and h")
    own = {"w_ih": (4 * H, 4), "w_hh": (4 * H, H), "b": (4 * H,), "w_gates": (2, H + 2), "b_gates": (2,)}
    for name, shape in own.items():
        value = (
            weights[name] if weights[name].dim() == 1 + len(shape) else weights[name].expand(T, *weights[name].shape)
        )
        checks.shape("metalstm_update", name, value, (T, *shape), "[T, *sizes of h]")
        weights[name] = value
    w_ih, w_hh, b, w_gates, b_gates = weights.values()
    b = b + (w_ih[..., 2:] @ _read(loss.unsqueeze(1), p)).squeeze(-1)
    w_own = torch.cat([w_gates[..., H:], b_gates.unsqueeze(-1)], -1)
    y = OP(phi, grad, h, c, gates, w_ih[..., :2], w_hh, b, w_gates[..., :H], w_own, p=float(p))
    return y[0], y[1], y[2], y[3]


def _read(z: Tensor, p: float) -> Tensor:
    """Returns u(z) [T, 2, N] of z [T, N]."""
    large = z.abs() >= exp(-p)
    log = torch.where(large, torch.where(large, z, 1.0).abs().log() / p, -1.0)
    return torch.stack([log, torch.where(large, z.sign(), exp(p) * z)], 1)


def _slope(z: Any, p: float) -> Any:
    """Returns u'(z) [T, 2, N] of z [T, N], a tensor or a dual number."""
    value = z.value if isinstance(z, Dual) else z
    large = value.abs() >= exp(-p)
    log = torch.where(large, 1 / (p * torch.where(large, value, 1.0)), 0.0)
    slope = torch.stack([log, exp(p) * (~large).to(log)], 1)
    if not isinstance(z, Dual):
        return slope
    return Dual(slope, torch.stack([-p * log * log * z.tangent, torch.zeros_like(log)], 1))


def _layers(p: float, phi: Any, grad: Any, h: Any, c: Any, gates: Any, *weights: Any) -> SimpleNamespace:
    """Returns what both layers compute, from tensors or dual numbers."""
    w_x, w_hh, b, w_h, w_own = weights
    a = arguments(p, (phi, grad, h, c, gates, *weights))
    i, f, g, o = (linear(lambda a, k=k: a.unflatten(1, (4, -1))[:, k], a) for k in range(4))
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c_next = f * c + i * g
    e = tanh(c_next)
    h_next = o * e
    of_phi, of_gate, bias = (linear(lambda w, k=k: w[..., k : k + 1], w_own) for k in range(3))
    gates_next = sigmoid(w_h @ h_next + of_phi * _row(phi) + of_gate * gates + bias)
    rate, decay = _two(gates_next)
    return SimpleNamespace(**{k: v for k, v in locals().items() if k != "weights"})


def arguments(p: float, inputs: Sequence[Any]) -> Any:
    """Returns the arguments of the first layer's gates, [T, 4H, N], from the op's inputs, tensors or dual numbers."""
    _, grad, h, _, _, w_x, w_hh, b, *_ = inputs
    return w_x @ _of_grad(p, grad) + w_hh @ h + _column(b)


def arguments_vjp(p: float, inputs: Sequence[Any], ct_a: Any) -> list[Any]:
    """Returns the cotangents of grad, h, w_x, w_hh and b, given those of the arguments of the first layer's gates."""
    _, grad, h, _, _, w_x, w_hh, *_ = inputs
    ct_x = _turned(w_x) @ ct_a * _slope(grad, p)
    ct_grad, ct_b = (linear(lambda a, dim=dim: a.sum(dim), ct) for ct, dim in ((ct_x, 1), (ct_a, -1)))
    return [ct_grad, _turned(w_hh) @ ct_a, summed(ct_a, _of_grad(p, grad)), summed(ct_a, h), ct_b]


def _of_grad(p: float, grad: Any) -> Any:
    """Returns u(grad) [T, 2, N], a tensor or a dual number."""
    if isinstance(grad, Dual):
        return Dual(_read(grad.value, p), _slope(grad.value, p) * grad.tangent.unsqueeze(1))
    return _read(grad, p)


def _row(x: Any) -> Any:
    return linear(lambda x: x.unsqueeze(1), x)


def _column(x: Any) -> Any:
    return linear(lambda x: x.unsqueeze(-1), x)


def _two(x: Any) -> tuple[Any, Any]:
    return linear(lambda x: x[:, 0], x), linear(lambda x: x[:, 1], x)


def _turned(x: Any) -> Any:
    return linear(lambda x: x.mT, x)


def summed(a: Any, b: Any) -> Any:
    """Returns a bᵀ, a sum over the coordinates, in parts: cuBLAS adds up a long sum one by one."""
    if isinstance(a, Dual):
        return Dual(summed(a.value, b.value), summed(a.tangent, b.value) + summed(a.value, b.tangent))
    parts = a.shape[-1] // PART
    if parts < 2:
        return a @ b.mT
    left, right = (x[..., : parts * PART].unflatten(-1, (parts, PART)).movedim(-2, 1) for x in (a, b))
    return (left @ right.mT).sum(1) + a[..., parts * PART :] @ b[..., parts * PART :].mT


def _forward(c: SimpleNamespace, *x: Any) -> Tensors:
    y = _layers(c.p, *x)
    return y.decay * y.phi - y.rate * y.grad, y.h_next, y.c_next, y.gates_next


def _vjp(c: SimpleNamespace, *tensors: Any) -> Tensors:
    *x, ct_p, ct_h, ct_c, ct_gates = tensors
    y = _layers(c.p, *x)
    ct_gates = ct_gates + linear(lambda i, f: torch.stack([i, f], 1), -(y.grad * ct_p), y.phi * ct_p)
    ct_s = ct_gates * y.gates_next * (1 - y.gates_next)
    ct_h = ct_h + _turned(y.w_h) @ ct_s
    ct_c = ct_c + ct_h * y.o * (1 - y.e * y.e)
    ct_a = linear(
        lambda *parts: torch.cat(parts, 1),
        ct_c * y.g * y.i * (1 - y.i),
        ct_c * y.c * y.f * (1 - y.f),
        ct_c * y.i * (1 - y.g * y.g),
        ct_h * y.e * y.o * (1 - y.o),
    )
    ct_grad, ct_h, *ct_first = arguments_vjp(c.p, x, ct_a)
    ct_own = (linear(lambda x: x.sum(-1), ct_s * part) for part in (_row(y.phi), y.gates))
    return (
        y.decay * ct_p + linear(lambda x: x.sum(1), y.of_phi * ct_s),
        ct_grad - y.rate * ct_p,
        ct_h,
        y.f * ct_c,
        y.of_gate * ct_s,
        *ct_first,
        summed(ct_s, y.h_next),
        linear(lambda *parts: torch.stack(parts, -1), *ct_own, linear(lambda x: x.sum(-1), ct_s)),
    )


def _on_cpu() -> Rules:
    """Returns the rules of the C++ kernels, in which tensors with a dimension of 2, 3 or 4H columns are flat."""

    def call(rule: str, c: SimpleNamespace, *inputs: Any) -> Tensors:
        return native.call(f"metalstm_update_{rule}", *inputs, scalars=(c.p,))

    def flat(x: Tensors) -> Tensors:
        return (*x[:4], *(x[i].flatten(1) if i in (4, 5, 8, 9) else x[i] for i in range(4, 10)))

    def outputs(x: Tensors, y: Tensors) -> Tensors:
        return tuple(yi.view(xi.shape) for xi, yi in zip((x[0], *x[2:5]), y, strict=True))

    def cotangents(x: Tensors, ct_x: Tensors) -> Tensors:
        return tuple(ct.view(xi.shape) for xi, ct in zip(x, ct_x, strict=True))

    def flat_ct(ct: Tensors | None) -> Tensors:
        return (None,) * 4 if ct is None else (*ct[:3], ct[3].flatten(1))

    def forward(c: SimpleNamespace, x: Tensors) -> tuple[Tensors, Tensors]:
        return outputs(x, call("forward", c, *flat(x))), ()

    def jvp(c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors) -> tuple[Tensors, Tensors]:
        return outputs(x, call("jvp", c, *flat(x), *flat(t_x))), ()

    def vjp(c: SimpleNamespace, x: Tensors, r: Tensors, ct_y: Tensors) -> Tensors:
        return cotangents(x, call("vjp", c, *flat(x), *flat_ct(ct_y)))

    def vjp_jvp(
        c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors, t_r: Tensors, ct_y: Tensors, t_ct_y: Tensors | None
    ) -> Tensors:
        return cotangents(x, call("vjp_jvp", c, *flat(x), *flat(t_x), *flat_ct(ct_y), *flat_ct(t_ct_y)))

    return cpp.through_float32(Rules(forward, jvp, vjp, vjp_jvp, native.DTYPES))


REFERENCE = rules(_forward, _vjp)
OP = Op(
    "metalstm_update",
    inputs=("phi", "grad", "h", "c", "gates", "w_x", "w_hh", "b", "w_h", "w_own"),
    kernels={"reference": REFERENCE, "cpu": _on_cpu(), "triton": triton_kernels.rules("metalstm_update")},
    outputs=4,
)


def _plain(
    phi: Tensor,
    grad: Tensor,
    loss: Tensor,
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b: Tensor,
    w_gates: Tensor,
    b_gates: Tensor,
    *,
    p: float = 10.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.cat([_read(grad, p), _read(loss.unsqueeze(1), p).expand(-1, -1, phi.shape[1])], 1)
    i, f, g, o = (w_ih @ x + w_hh @ h + b.unsqueeze(-1)).chunk(4, -2)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    own = torch.stack([phi.unsqueeze(1).expand_as(gates), gates], -1)  # [T, 2, N, 2]
    s = w_gates[..., :-2] @ h + (own @ w_gates[..., -2:].unsqueeze(-1)).squeeze(-1) + b_gates.unsqueeze(-1)
    gates = s.sigmoid()
    return gates[:, 1] * phi - gates[:, 0] * grad, h, c, gates


def _samples(make: Make) -> list[Sample]:
    def sample(name: str, T: int, N: int, H: int, shared: bool = False, p: float = 10.0) -> Sample:
        own = () if shared else (T,)
        state = make(T, N), make(T, N), make(T), make(T, H, N), make(T, H, N), make(T, 2, N).sigmoid()
        shapes = (4 * H, 4), (4 * H, H), (4 * H,), (2, H + 2), (2,)
        return Sample(name, (*state, *(0.5 * make(*own, *shape) for shape in shapes)), {"p": p}, not shared)

    return [
        sample("tasks", 3, 5, 2),
        sample("shared-weights", 2, 7, 3, shared=True),
        sample("small-gradients", 2, 19, 4, p=0.5),
        sample("one-unit", 2, 1, 1),
        sample("no-coordinates", 2, 0, 3),
    ]


def _benchmark(make: Make) -> list[Sample]:
    T, N, H = 4, 32768, 20
    state = make(T, N), make(T, N), make(T), make(T, H, N), make(T, H, N), make(T, 2, N).sigmoid()
    weights = (0.1 * make(*shape) for shape in ((4 * H, 4), (4 * H, H), (4 * H,), (2, H + 2), (2,)))
    return [Sample("4x32768x20", (*state, *weights), per_task=False)]


def _cost(sample: Sample, order: int) -> Cost:
    """The products with w_hh, three of them in vjp, and the tensors of the state; a dual number's product is three."""
    T, H, N = sample.args[3].shape
    flop = (1, 3, 9)[order] * 2 * (4 * H * (H + 2) + 2 * (H + 2))
    numbers = (4 * H + 7, 6 * H + 11, 9 * H + 19)[order]
    return Cost(flop=flop * T * N, bytes=numbers * T * N * sample.args[0].element_size())


SPEC = Spec(OP, metalstm_update, _plain, _samples, _benchmark, _cost)
