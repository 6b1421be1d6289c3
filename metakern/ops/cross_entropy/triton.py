"""The rules of cross-entropy in Triton: a program has a row of logits, or a block of a row; V may have any size.

The formulas are those of `__init__.py`, for rows [N, V]: `scale` is s ct_y of each row, `t_scale` is s t_ct_y. The vjp
is the term of vjp_jvp in t_scale, so one kernel computes both. Every rule reads each logit once. `forward` finds ℓ in
one pass (Milakov, Gimelshein 2018, "Online normalizer calculation for softmax"). The other rules get ℓ, so that their p
has its rounding error, relatively |ℓ| 2^-24 in float32. A row of weight 0 is not read.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakern.ops.core import matrices
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels.launch import cdiv, contiguous, jit, launch, quotient, wide

LARGEST = 4096  # elements of a block


@jit
def _share_kernel(target_ptr, share_ptr, N, IGNORED, BLOCK_N: tl.constexpr):
    """Stores s of a task's tokens."""
    t = tl.program_id(0).to(tl.int64)
    counts = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        counts += tl.load(target_ptr + t * N + n, n < N, other=IGNORED) != IGNORED
    share = quotient(1.0, tl.maximum(tl.sum(counts, 0), 1).to(share_ptr.dtype.element_ty))
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        counted = tl.load(target_ptr + t * N + n, n < N, other=IGNORED) != IGNORED
        tl.store(share_ptr + t * N + n, tl.where(counted, share, 0.0), n < N)


@jit
def _forward_kernel(z_ptr, target_ptr, share_ptr, loss_ptr, lse_ptr, V, BLOCK_V: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    counts = n >= 0 if share_ptr is None else tl.load(share_ptr + n) != 0
    high = tl.full([1], float("-inf"), lse_ptr.dtype.element_ty)  # the largest logit so far
    total = tl.zeros([1], lse_ptr.dtype.element_ty)  # Σ exp(z - high)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = wide(tl.load(z_ptr + n * V + v, (v < V) & counts, other=float("-inf")))  # [BLOCK_V]
        higher = tl.maximum(high, tl.max(z, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(high - base) + tl.sum(tl.exp(z - base), 0)
        high = higher
    log_total = tl.log(tl.where(counts, total, 1.0))
    target = tl.load(target_ptr + n)
    z = wide(tl.load(z_ptr + n * V + target, (target >= 0) & (target < V) & counts, other=float("nan")))
    tl.store(lse_ptr + n, tl.where(counts, log_total + high, 0.0))
    tl.store(loss_ptr + n, tl.where(counts, log_total + (high - z), 0.0))  # ℓ - z would add the rounding error of ℓ


@jit
def _jvp_kernel(z_ptr, lse_ptr, target_ptr, share_ptr, t_z_ptr, t_loss_ptr, t_lse_ptr, V, BLOCK_V: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    counts = n >= 0 if share_ptr is None else tl.load(share_ptr + n) != 0
    lse = tl.load(lse_ptr + n)
    sums = tl.zeros([BLOCK_V], lse_ptr.dtype.element_ty)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        inside = (v < V) & counts
        z = wide(tl.load(z_ptr + n * V + v, inside, other=float("-inf")))  # [BLOCK_V]
        sums += tl.exp(z - lse) * wide(tl.load(t_z_ptr + n * V + v, inside, other=0.0))
    t_lse = tl.sum(sums, 0)
    target = tl.load(target_ptr + n)
    t_z = wide(tl.load(t_z_ptr + n * V + target, (target >= 0) & (target < V) & counts, other=0.0))
    tl.store(t_lse_ptr + n, t_lse)
    tl.store(t_loss_ptr + n, t_lse - t_z)


@jit
def _vjp_kernel(
    z_ptr, lse_ptr, target_ptr, t_scale_ptr, scale_ptr, t_z_ptr, t_lse_ptr, out_ptr, g_ptr, V, BLOCK_V: tl.constexpr
):
    """Stores out = scale p (t_z - t_ℓ) + t_scale (p - e), where either scale may be None, and g = scale (p - e)."""
    n = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    zero = tl.zeros([1], lse_ptr.dtype.element_ty)
    t_scale = zero if t_scale_ptr is None else tl.load(t_scale_ptr + n)
    scale = zero if scale_ptr is None else tl.load(scale_ptr + n)
    inside = (v < V) & ((t_scale != 0) | (scale != 0))
    p = tl.exp(wide(tl.load(z_ptr + n * V + v, inside, other=float("-inf"))) - tl.load(lse_ptr + n))  # [BLOCK_V]
    less = v == tl.load(target_ptr + n)
    out = t_scale * (p - less)
    if scale_ptr is not None:
        t_z = wide(tl.load(t_z_ptr + n * V + v, inside, other=0.0))  # [BLOCK_V]
        out += scale * p * (t_z - tl.load(t_lse_ptr + n))
        if g_ptr is not None:
            tl.store(g_ptr + n * V + v, scale * (p - less), v < V)
    tl.store(out_ptr + n * V + v, out, v < V)


def _block(V: int) -> dict[str, int]:
    size = min(triton.next_power_of_2(max(V, 1)), LARGEST)
    return {"V": V, "BLOCK_V": size, "num_warps": min(max(size // 512, 4), 8)}


def losses(z: Tensor, target: Tensor, share: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns ℓ - z[target] and ℓ for rows z [..., V]; both are 0 where the row's share is 0."""
    z, target, share = contiguous(z, target, share)
    loss = matrices.wide(z[:0]).new_empty(target.shape)
    lse = torch.empty_like(loss)
    launch(_forward_kernel, (target.numel(),), z.device, z, target, share, loss, lse, **_block(z.shape[-1]))
    return loss, lse


def t_losses(z: Tensor, lse: Tensor, target: Tensor, t_z: Tensor, share: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the tangents of both results of `losses`."""
    z, lse, target, t_z, share = contiguous(z, lse, target, t_z, share)
    t_loss, t_lse = torch.empty_like(lse), torch.empty_like(lse)
    arguments = z, lse, target, share, t_z, t_loss, t_lse
    launch(_jvp_kernel, (target.numel(),), z.device, *arguments, **_block(z.shape[-1]))
    return t_loss, t_lse


def cotangents(
    z: Tensor,
    lse: Tensor,
    target: Tensor,
    t_scale: Tensor | None,
    scale: Tensor | None = None,
    t_z: Tensor | None = None,
    t_lse: Tensor | None = None,
    out: Tensor | None = None,
    g: Tensor | None = None,
) -> Tensor:
    """Returns scale p (t_z - t_ℓ) + t_scale (p - e) in `out`, which may be z or t_z; stores scale (p - e) in `g`."""
    z, lse, target, t_scale, scale, t_z, t_lse = contiguous(z, lse, target, t_scale, scale, t_z, t_lse)
    out, block = torch.empty_like(z) if out is None else out, _block(z.shape[-1])
    arguments = z, lse, target, t_scale, scale, t_z, t_lse, out, g
    launch(_vjp_kernel, (target.numel(), cdiv(block["V"], block["BLOCK_V"])), z.device, *arguments, **block)
    return out


def forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    share = _share(c, inputs[0])
    loss, lse = losses(inputs[0], c.target, share)
    return ((share * loss).sum(-1).to(inputs[0].dtype),), (lse,)


def jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    share = _share(c, inputs[0])
    t_loss, t_lse = t_losses(inputs[0], r[0], c.target, t_inputs[0], share)
    return ((share * t_loss).sum(-1).to(inputs[0].dtype),), (t_lse,)


def vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    return (cotangents(inputs[0], r[0], c.target, _share(c, inputs[0]) * ct_outputs[0].unsqueeze(-1)),)


def vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_outputs: Tensors,
    t_ct_outputs: Tensors | None,
) -> Tensors:
    share = _share(c, inputs[0])
    t_scale = None if t_ct_outputs is None else share * t_ct_outputs[0].unsqueeze(-1)
    scale = share * ct_outputs[0].unsqueeze(-1)
    return (cotangents(inputs[0], r[0], c.target, t_scale, scale, t_inputs[0], t_r[0]),)


def _share(c: SimpleNamespace, z: Tensor) -> Tensor:
    """Returns s [T, N], the weight of each token in its task's mean."""
    (T, N), (target,) = c.target.shape, contiguous(c.target)
    share = matrices.wide(z[:0]).new_empty(T, N)
    block = triton.next_power_of_2(min(max(N, 1), LARGEST))
    launch(_share_kernel, (T,), z.device, target, share, N, c.ignore_index, BLOCK_N=block)
    return share


RULES = Rules(forward, jvp, vjp, vjp_jvp)


def compiled(make: Make) -> list[Sample]:
    return [Sample(f"{V}", (make(2, 64, V), make.integers(V, 2, 64))) for V in (2000, 152_000)]
