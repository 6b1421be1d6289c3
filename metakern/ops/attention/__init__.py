"""Softmax attention: causal or full, grouped-query, with lengths.

    S = scale Q Kᵀ, masked     lse = log Σ_j exp S     P = exp(S - lse)     O = P V

    jvp       t_S = scale (t_Q Kᵀ + Q t_Kᵀ)     t_lse = Σ_j P t_S     t_P = P (t_S - t_lse)     t_O = t_P V + P t_V
    vjp       ct_P = ct_O Vᵀ     δ = Σ_j P ct_P     ct_S = P (ct_P - δ)
              ct_Q = scale ct_S K     ct_K = scale ct_Sᵀ Q     ct_V = Pᵀ ct_O
    vjp_jvp   t_ct_P = t_ct_O Vᵀ + ct_O t_Vᵀ     t_δ = Σ_j (t_P ct_P + P t_ct_P)
              t_ct_S = t_P (ct_P - δ) + P (t_ct_P - t_δ)
              t_ct_Q = scale (t_ct_S K + ct_S t_K)     t_ct_K = scale (t_ct_Sᵀ Q + ct_Sᵀ t_Q)
              t_ct_V = t_Pᵀ ct_O + Pᵀ t_ct_O

| tensor | shape |
|---|---|
| q, y | [B, H, L, D] |
| k, v | [B, H_kv, L_k, D] |
| lengths | [B] |

Sequences are independent, so B takes the place of the tasks. The H / H_kv query heads that share a head of k and v are
stacked along L. A row that sees no key has lse = ∞: its P, its output and all its derivatives are zeros.

Residuals: lse [B, H, L], in float32 for half precision, which is computed in float32. These reference rules hold
L x L_k matrices. Dao et al. 2022, "FlashAttention", appendix B.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from metakern.ops import _checks
from metakern.ops._rules import Op, Rules, Tensors
from metakern.ops._spec import Cost, Make, Sample, Spec
from metakern.ops._tensors import wide


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q kᵀ) v for q [B, H, L, D] and k, v [B, H_kv, L_k, D]; H is a multiple of H_kv.

    causal: query i sees keys up to i + L_k - L, as in decoding. lengths [B]: the number of a sequence's valid keys;
    what stands beyond them, NaN included, reaches no result. A query that sees no key gives zeros, with zero
    derivatives. scale: 1 / √D where None.

    Raises TypeError or ValueError, naming the argument, where kinds, dtypes, devices or shapes do not fit.

    >>> import metakern as mk, torch
    >>> q, k = torch.zeros(1, 2, 2, 1), torch.zeros(1, 1, 2, 1)
    >>> mk.ops.attention(q, k, torch.tensor([[[[1.0], [3.0]]]]))[0, 0]
    tensor([[1.],
            [2.]])
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        _checks.tensor("attention", name, value)
        if value.dim() != 4:
            raise ValueError(f"attention: {name} must have 4 dimensions, [B, H, L, D], got {list(value.shape)}")
    _checks.floating("attention", q=q, k=k, v=v)
    B, H, _, D = q.shape
    H_kv, L_k = k.shape[1:3]
    _checks.shape("attention", "k", k, (B, H_kv, L_k, D), "[B, H_kv, L_k, D]")
    _checks.shape("attention", "v", v, (B, H_kv, L_k, D), "[B, H_kv, L_k, D]")
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"attention: q must have a multiple of the {H_kv} heads of k and v, got {H}")
    if lengths is not None:
        _checks.indices("attention", "lengths", lengths, q.device)
        _checks.shape("attention", "lengths", lengths, (B,), "[B]")
    if scale is None:
        scale = D**-0.5 if D else 1.0
    elif not isinstance(scale, float | int):
        raise TypeError(f"attention: scale must be a number or None, got {type(scale).__name__}")
    return OP(q, k, v, lengths=lengths, causal=causal, scale=scale)[0]


def _forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    _check_lengths(c.lengths, inputs[1].shape[2])
    q, k, v = _stacked(c, inputs, *inputs)
    s = _scores(c, inputs, q, k)
    top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    top = top.masked_fill(top == -torch.inf, 0)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    blind = total == 0
    total = total.masked_fill(blind, 1)
    lse = (top + torch.log(total)).masked_fill(blind, torch.inf)
    return (_unstacked(e @ v / total, inputs[0]),), (lse.reshape(inputs[0].shape[:3]),)


def _jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    q, k, v = _stacked(c, inputs, *inputs)
    t_q, t_k, t_v = _stacked(c, inputs, *t_inputs)
    p = _probabilities(c, inputs, q, k, r[0])
    t_s = t_q @ k.mT + q @ t_k.mT
    t_lse = (p * t_s).sum(-1, keepdim=True)
    t_y = (p * (t_s - t_lse)) @ v + p @ t_v
    return (_unstacked(t_y, inputs[0]),), (t_lse.reshape(inputs[0].shape[:3]),)


def _vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    q, k, v = _stacked(c, inputs, *inputs)
    p, ct_y = _probabilities(c, inputs, q, k, r[0]), _rows(ct_outputs[0], k)
    ct_p = ct_y @ v.mT
    ct_s = p * (ct_p - (p * ct_p).sum(-1, keepdim=True))
    return _cotangents(c, inputs, (ct_s @ k, ct_s.mT @ q, p.mT @ ct_y))


def _vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_outputs: Tensors,
    t_ct_outputs: Tensors | None,
) -> Tensors:
    q, k, v = _stacked(c, inputs, *inputs)
    t_q, t_k, t_v = _stacked(c, inputs, *t_inputs)
    p, ct_y = _probabilities(c, inputs, q, k, r[0]), _rows(ct_outputs[0], k)
    t_p = p * (t_q @ k.mT + q @ t_k.mT - _rows(t_r[0].unsqueeze(-1), k))
    ct_p, t_ct_p, t_ct_v = ct_y @ v.mT, ct_y @ t_v.mT, t_p.mT @ ct_y
    if t_ct_outputs is not None:
        t_ct_y = _rows(t_ct_outputs[0], k)
        t_ct_p = t_ct_p + t_ct_y @ v.mT
        t_ct_v = t_ct_v + p.mT @ t_ct_y
    centered = ct_p - (p * ct_p).sum(-1, keepdim=True)
    t_centered = t_ct_p - (t_p * ct_p + p * t_ct_p).sum(-1, keepdim=True)
    ct_s, t_ct_s = p * centered, t_p * centered + p * t_centered
    return _cotangents(c, inputs, (t_ct_s @ k + ct_s @ t_k, t_ct_s.mT @ q + ct_s.mT @ t_q, t_ct_v))


def _check_lengths(lengths: Tensor | None, L_k: int) -> None:
    """On the CPU alone: elsewhere it would wait for the device, and lengths out of range act as 0 or L_k."""
    if lengths is not None and lengths.device.type == "cpu" and ((lengths < 0) | (lengths > L_k)).any():
        raise ValueError(f"attention: lengths must be between 0 and L_k = {L_k}, got {lengths.tolist()}")


def _rows(x: Tensor, k: Tensor) -> Tensor:
    """The query heads that share a head of k, stacked: [B, H, L, D] -> [B, H_kv, H / H_kv · L, D]."""
    B, H, L, D = x.shape
    return wide(x).reshape(B, k.shape[1], H // k.shape[1] * L, D)


def _unstacked(rows: Tensor, q: Tensor) -> Tensor:
    """The inverse of `_rows`, in the dtype of the inputs."""
    return rows.reshape(*q.shape[:3], rows.shape[-1]).to(q.dtype)


def _stacked(c: SimpleNamespace, inputs: Tensors, q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    """scale q as rows, and k, v with zeros beyond the lengths: 0 · NaN must not reach a sum."""
    k, v = wide(k), wide(v)
    if c.lengths is not None:
        beyond = (torch.arange(k.shape[2], device=k.device) >= c.lengths[:, None])[:, None, :, None]
        k, v = k.masked_fill(beyond, 0), v.masked_fill(beyond, 0)
    return c.scale * _rows(q, k), k, v


def _scores(c: SimpleNamespace, inputs: Tensors, q: Tensor, k: Tensor) -> Tensor:
    """S, with -∞ where a query does not see a key."""
    (H, L), (H_kv, L_k) = inputs[0].shape[1:3], k.shape[1:3]
    s = q @ k.mT
    if c.causal:
        later = torch.ones(L, L_k, dtype=torch.bool, device=k.device).triu(1 + L_k - L)
        s = s.masked_fill(later.repeat(H // H_kv, 1), -torch.inf)
    if c.lengths is not None:
        beyond = torch.arange(L_k, device=k.device) >= c.lengths[:, None]
        s = s.masked_fill(beyond[:, None, None], -torch.inf)
    return s


def _probabilities(c: SimpleNamespace, inputs: Tensors, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    return torch.exp(_scores(c, inputs, q, k) - _rows(lse.unsqueeze(-1), k))


def _cotangents(c: SimpleNamespace, inputs: Tensors, rows: tuple[Tensor, Tensor, Tensor]) -> Tensors:
    q, k, v = inputs
    ct_q, ct_k, ct_v = rows
    return _unstacked(c.scale * ct_q, q), ct_k.to(k.dtype), ct_v.to(v.dtype)


OP = Op(
    "attention",
    inputs=("q", "k", "v"),
    constants=("lengths",),
    kernels={"reference": Rules(_forward, _jvp, _vjp, _vjp_jvp)},
)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    L, L_k = q.shape[2], k.shape[2]
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    visible = torch.ones(L, L_k, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(L_k - L)
    if lengths is not None:
        visible = visible & (torch.arange(L_k, device=q.device) < lengths[:, None, None, None])
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (torch.softmax(s.masked_fill(~visible, torch.finfo(s.dtype).min), -1) * visible) @ v


def _samples(make: Make) -> list[Sample]:
    def qkv(B: int, H: int, H_kv: int, L: int, L_k: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
        return make(B, H, L, D), make(B, H_kv, L_k, D), make(B, H_kv, L_k, D)

    return [
        Sample("causal", qkv(2, 2, 2, 4, 4, 3)),
        Sample("full", qkv(2, 1, 1, 3, 5, 2), {"causal": False}),
        Sample("grouped_decoding", qkv(2, 4, 2, 2, 5, 2), {"scale": 0.7}),
        Sample("more_queries_than_keys", qkv(2, 2, 1, 5, 3, 2)),
        Sample("lengths", qkv(3, 2, 1, 3, 4, 2), {"lengths": torch.tensor([4, 0, 2]), "causal": False}, per_task=False),
        Sample("lengths_causal", qkv(2, 2, 2, 4, 4, 2), {"lengths": torch.tensor([3, 1])}, per_task=False),
        Sample("no_sequences", qkv(0, 2, 1, 3, 3, 2)),
        Sample("no_queries", qkv(2, 2, 1, 0, 3, 2)),
        Sample("no_keys", qkv(2, 2, 1, 3, 0, 2), {"causal": False}),
    ]


def _benchmark(make: Make) -> list[Sample]:
    def sample(name: str, B: int, H: int, L: int, D: int) -> Sample:
        return Sample(name, (make(B, H, L, D), make(B, H, L, D), make(B, H, L, D)))

    return [sample("32x4x64x32", 32, 4, 64, 32), sample("1x4x1024x64", 1, 4, 1024, 64)]


def _cost(sample: Sample, order: int) -> Cost:
    q, k, v = sample.args
    product = 2 * q.numel() * k.shape[2] * (0.5 if sample.kwargs.get("causal", True) else 1.0)
    moved = 2 * q.numel() + k.numel() + v.numel()
    return Cost(flop=(2, 5, 14)[order] * product, bytes=(1, 2, 4)[order] * moved * q.element_size())


SPEC = Spec(OP, attention, _plain, _samples, _benchmark, _cost)
