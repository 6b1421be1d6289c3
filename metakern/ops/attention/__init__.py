"""Softmax attention: causal, in a sliding window or full, with grouped queries and a mask over the keys.

    S = scale Q Kᵀ, masked     lse = log Σ_j exp S     P = exp(S - lse)     O = P V

    jvp       t_S = scale (t_Q Kᵀ + Q t_Kᵀ)     t_lse = Σ_j P t_S     t_P = P (t_S - t_lse)     t_O = t_P V + P t_V
    vjp       ct_P = ct_O Vᵀ     δ = Σ_j P ct_P     ct_S = P (ct_P - δ)
              ct_Q = scale ct_S K     ct_K = scale ct_Sᵀ Q     ct_V = Pᵀ ct_O
    vjp_jvp   t_ct_P = t_ct_O Vᵀ + ct_O t_Vᵀ     t_δ = Σ_j (t_P ct_P + P t_ct_P)
              t_ct_S = t_P (ct_P - δ) + P (t_ct_P - t_δ)
              t_ct_Q = scale (t_ct_S K + ct_S t_K)     t_ct_K = scale (t_ct_Sᵀ Q + ct_Sᵀ t_Q)
              t_ct_V = t_Pᵀ ct_O + Pᵀ t_ct_O

The kernels work in blocks and hold no L x L_k matrix. Given the log-sum-exp of its rows, a block of P is computed again
from the blocks of Q and K; everything else is a sum over blocks. Only four sums over a whole row must be known before a
block of t_P, ct_S or t_ct_S is computed: lse, t_lse, δ and t_δ. The last two need no pass over the keys, because P
enters them only through O (Σ_j P_ij ⟨ct_O_i, V_j⟩ = ⟨ct_O_i, O_i⟩):

    δ_i = ⟨ct_O_i, O_i⟩        t_δ_i = ⟨t_ct_O_i, O_i⟩ + ⟨ct_O_i, t_O_i⟩

In jvp, t_lse only multiplies O, so one pass gives both: t_O = Σ_j P (t_S V + t_V) - t_lse O. The residuals are
therefore lse and O, with the tangents t_lse and t_O, and each rule needs one pass over the blocks, with 2, 5, 5 and 12
products for a block. (The Triton kernels make two passes in vjp and vjp_jvp, see `triton.py`.)

| tensor | shape |
|---|---|
| q, y | [B, H, L, D] |
| k, v | [B, H_kv, L_k, D] |
| mask | [B, L_k], True for the keys that are seen |
| lse | [B, H, L], in float32 for half precision |

Sequences are independent, so B is the dimension of the tasks. The H / H_kv query heads that share a head of k and v are
stacked along L. A row that sees no key has lse = ∞: its P, its output and all its derivatives are zero. Half precision
is computed in float32, but Triton's products take half-precision factors and accumulate in float32. The reference rules
hold L x L_k matrices. Dao et al. 2022, "FlashAttention", appendix B.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from metakern.ops.core import checks, cpp, triton_kernels
from metakern.ops.core.autocast import autocast
from metakern.ops.core.autograd import Op
from metakern.ops.core.matrices import wide
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Cost, Make, Sample, Spec


@autocast("lower")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    lengths: Tensor | None = None,
    padding: str = "right",
    mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Returns softmax(scale q kᵀ) v, which is differentiable twice in q, k and v.

    The C++ and Triton kernels hold no L x L_k matrix, at any order. Half precision accumulates in float32, and
    `torch.autocast` lowers float32 to the region's dtype. A query that sees no key gives zeros, with zero derivatives.
    A key that `lengths` or `mask` hides reaches no result, even if it is NaN. Dao et al. 2022, "FlashAttention",
    appendix B.

    Args:
        q: [B, H, L, D].
        k: [B, H_kv, L_k, D]; H is a multiple of H_kv, and H / H_kv query heads share each head of k and v.
        v: [B, H_kv, L_k, D].
        causal: Whether query i sees no key after its own position, i + L_k - L, as in decoding.
        lengths: [B], int64 or int32: the number of valid keys of each sequence, from 0 to L_k; None for all.
        padding: Where the keys that `lengths` hides are: "right" for the last ones, "left" for the first ones.
        mask: [B, L_k], bool, True for the keys that are seen; None for all.
        window: The number of keys that a query sees at most, counted back from its own position, which is one of them;
            None for no limit. Needs `causal`.
        scale: The factor of the scores; None for 1 / √D.

    Returns:
        [B, H, L, D], in the dtype of q.

    Raises:
        TypeError: For tensors of a wrong dtype, or a mask on another device, or a scale that is no number.
        ValueError: Where shapes or devices do not fit, H is no multiple of H_kv, `window` is below 1 or given without
            `causal`, or `padding` is neither "left" nor "right"; on the CPU also where `lengths` is out of range.

    >>> import metakern as mk, torch
    >>> q, k = torch.zeros(1, 2, 2, 1), torch.zeros(1, 1, 2, 1)
    >>> mk.ops.attention(q, k, torch.tensor([[[[1.0], [3.0]]]]))[0, 0]
    tensor([[1.],
            [2.]])
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        checks.tensor("attention", name, value)
        if value.dim() != 4:
            raise ValueError(f"attention: {name} must have 4 dimensions, [B, H, L, D], got {list(value.shape)}")
    checks.floating("attention", q=q, k=k, v=v)
    B, H, _, D = q.shape
    H_kv, L_k = k.shape[1:3]
    checks.shape("attention", "k", k, (B, H_kv, L_k, D), "[B, H_kv, L_k, D]")
    checks.shape("attention", "v", v, (B, H_kv, L_k, D), "[B, H_kv, L_k, D]")
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"attention: q must have a multiple of the {H_kv} heads of k and v, got {H} heads")
    if window is not None and (not isinstance(window, int) or window < 1 or not causal):
        raise ValueError(
            f"attention: window must be a positive integer with causal=True, got {window!r} with causal={causal}"
        )
    if scale is None:
        scale = D**-0.5 if D else 1.0
    elif not isinstance(scale, float | int):
        raise TypeError(f"attention: scale must be a number or None, got {type(scale).__name__}")
    seen = _seen(k, lengths, padding, mask)
    return OP(q, k, v, mask=seen, causal=bool(causal), window=window, scale=float(scale))[0]


def _seen(k: Tensor, lengths: Tensor | None, padding: str, mask: Tensor | None) -> Tensor | None:
    """Returns one mask [B, L_k] for `lengths` and `mask` together, or None if both are None."""
    B, _, L_k, _ = k.shape
    if padding not in ("left", "right"):
        raise ValueError(f"attention: padding must be left or right, got {padding!r}")
    if mask is not None:
        checks.tensor("attention", "mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"attention: mask must be torch.bool, got {mask.dtype}")
        if mask.device != k.device:
            raise ValueError(f"attention: mask must be on {k.device}, got {mask.device}")
        checks.shape("attention", "mask", mask, (B, L_k), "[B, L_k]")
    if lengths is None:
        return mask
    checks.indices("attention", "lengths", lengths, k.device)
    checks.shape("attention", "lengths", lengths, (B,), "[B]")
    _check_range(lengths, L_k)
    at = torch.arange(L_k, device=k.device)
    seen = at < lengths[:, None] if padding == "right" else at >= L_k - lengths[:, None]
    return seen if mask is None else seen & mask


def _check_range(lengths: Tensor, L_k: int) -> None:
    """Raises ValueError for lengths outside [0, L_k], on the CPU only.

    Elsewhere the check would wait for the device. There, lengths out of range act as 0 or L_k.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(lengths):
        lengths = torch._C._functorch.get_unwrapped(lengths)
    if lengths.device.type == "cpu" and ((lengths < 0) | (lengths > L_k)).any():
        raise ValueError(f"attention: lengths must be between 0 and L_k = {L_k}, got {lengths.tolist()}")


def _forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
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


def _rows(x: Tensor, k: Tensor) -> Tensor:
    """Stacks the query heads that share a head of k: [B, H, L, D] -> [B, H_kv, H / H_kv · L, D]."""
    B, H, L, D = x.shape
    return wide(x).reshape(B, k.shape[1], H // k.shape[1] * L, D)


def _unstacked(rows: Tensor, q: Tensor) -> Tensor:
    """The inverse of `_rows`, in the dtype of the inputs."""
    return rows.reshape(*q.shape[:3], rows.shape[-1]).to(q.dtype)


def _stacked(c: SimpleNamespace, inputs: Tensors, q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    """Returns scale q in rows, and k and v with zeros at hidden keys, so that 0 · NaN reaches no sum."""
    k, v = wide(k), wide(v)
    if c.mask is not None:
        hidden = ~c.mask[:, None, :, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    return c.scale * _rows(q, k), k, v


def _scores(c: SimpleNamespace, inputs: Tensors, q: Tensor, k: Tensor) -> Tensor:
    """Returns S, with -∞ where a query does not see a key."""
    (H, L), (H_kv, L_k) = inputs[0].shape[1:3], k.shape[1:3]
    s = q @ k.mT
    if c.causal:
        s = s.masked_fill(~_band(L, L_k, c.window, k.device).repeat(H // H_kv, 1), -torch.inf)
    return s if c.mask is None else s.masked_fill(~c.mask[:, None, None], -torch.inf)


def _band(L: int, L_k: int, window: int | None, device: torch.device) -> Tensor:
    """Returns which keys each query sees by position, [L, L_k]."""
    band = torch.ones(L, L_k, dtype=torch.bool, device=device).tril(L_k - L)
    return band if window is None else band.triu(1 - window + L_k - L)


def _probabilities(c: SimpleNamespace, inputs: Tensors, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    return torch.exp(_scores(c, inputs, q, k) - _rows(lse.unsqueeze(-1), k))


def _cotangents(c: SimpleNamespace, inputs: Tensors, rows: tuple[Tensor, Tensor, Tensor]) -> Tensors:
    q, k, v = inputs
    ct_q, ct_k, ct_v = rows
    return _unstacked(c.scale * ct_q, q), ct_k.to(k.dtype), ct_v.to(v.dtype)


OP = Op(
    "attention",
    inputs=("q", "k", "v"),
    constants=("mask",),
    kernels={
        "reference": Rules(_forward, _jvp, _vjp, _vjp_jvp),
        "cpu": cpp.through_float32(
            cpp.rules("attention", ("mask",), lambda c: (c.scale, c.causal, c.window or 0)),
        ),
        "triton": triton_kernels.rules("attention"),
    },
    saves_output=True,
)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    lengths: Tensor | None = None,
    padding: str = "right",
    mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    L, L_k = q.shape[2], k.shape[2]
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    i, j = torch.arange(L, device=q.device)[:, None] + L_k - L, torch.arange(L_k, device=q.device)
    visible = torch.ones(L, L_k, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible & (j <= i)
    if window is not None:
        visible = visible & (j > i - window)
    if lengths is not None:
        first, last = (0, lengths) if padding == "right" else (L_k - lengths, L_k + 0 * lengths)
        first = first[:, None, None, None] if isinstance(first, Tensor) else first
        visible = visible & (j >= first) & (j < last[:, None, None, None])
    if mask is not None:
        visible = visible & mask[:, None, None]
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (torch.softmax(s.masked_fill(~visible, torch.finfo(s.dtype).min), -1) * visible) @ v


def _samples(make: Make) -> list[Sample]:
    def qkv(B: int, H: int, H_kv: int, L: int, L_k: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
        return make(B, H, L, D), make(B, H_kv, L_k, D), make(B, H_kv, L_k, D)

    def unequal(name: str, tensors: tuple[Tensor, Tensor, Tensor], **kwargs: Any) -> Sample:
        return Sample(name, tensors, kwargs, per_task=False)

    holes = torch.tensor([[True, False, True, True], [False, False, False, True], [False] * 4])
    return [
        Sample("causal", qkv(2, 2, 2, 4, 4, 3)),
        Sample("full", qkv(2, 1, 1, 3, 5, 2), {"causal": False}),
        Sample("grouped_decoding", qkv(2, 4, 2, 2, 5, 2), {"scale": 0.7}),
        Sample("more_queries_than_keys", qkv(2, 2, 1, 5, 3, 2)),
        Sample("window", qkv(2, 2, 1, 4, 5, 2), {"window": 2}),
        unequal("lengths", qkv(3, 2, 1, 3, 4, 2), lengths=torch.tensor([4, 0, 2]), causal=False),
        unequal("lengths_causal", qkv(2, 2, 2, 4, 4, 2), lengths=torch.tensor([3, 1])),
        unequal("lengths_left", qkv(2, 2, 2, 4, 4, 2), lengths=torch.tensor([3, 1]), padding="left"),
        unequal("mask", qkv(3, 2, 1, 4, 4, 2), mask=holes),
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
    return Cost(flop=(2, 5, 12)[order] * product, bytes=(1, 2, 3.25)[order] * moved * q.element_size())


SPEC = Spec(OP, attention, _plain, _samples, _benchmark, _cost)
