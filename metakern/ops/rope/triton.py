"""The rules of rope in Triton: one kernel for the rotation and for its transpose.

| tile | part of | shape |
|---|---|---|
| cos, sin: halves a and b | [T, L, D] | [BLOCK_L, BLOCK_D] |
| x, y: halves a and b | [T, H, L, D] | [BLOCK_L, BLOCK_D] |

A program rotates the same positions of HEADS heads, for which it reads cos and sin once. x may have any strides except
in its last dimension, where it is copied unless the stride is 1.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels.launch import INTERPRETED, cdiv, contiguous, jit, launch, wide

TILE = 8 if INTERPRETED else 1024
HEADS = 2 if INTERPRETED else 4


@jit
def _turn_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    H,
    L,
    stride_t,
    stride_h,
    stride_l,
    HALF: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(L, BLOCK_L)
    program = tl.program_id(0).to(tl.int64)
    t = program // blocks
    l = program % blocks * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (l < L) & (d < HALF)
    ACCUMULATOR: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    angle = (t * L + l) * 2 * HALF + d
    cos_a = tl.load(cos_ptr + angle, inside, other=0.0).to(ACCUMULATOR)
    cos_b = tl.load(cos_ptr + angle + HALF, inside, other=0.0).to(ACCUMULATOR)
    sin_a = tl.load(sin_ptr + angle, inside, other=0.0).to(ACCUMULATOR)
    sin_b = tl.load(sin_ptr + angle + HALF, inside, other=0.0).to(ACCUMULATOR)
    if TRANSPOSED:
        sin_a, sin_b = -sin_b, -sin_a
    for i in tl.static_range(HEADS):
        h = tl.program_id(1) * HEADS + i
        own = inside & (h + 0 * d < H)  # a block, because Triton 3.9's interpreter takes no scalar as a mask
        from_x = x_ptr + t * stride_t + h * stride_h + l * stride_l + d
        a = wide(tl.load(from_x, own, other=0.0))
        b = wide(tl.load(from_x + HALF, own, other=0.0))
        to_y = y_ptr + ((t * H + h) * L + l) * 2 * HALF + d
        tl.store(to_y, a * cos_a - b * sin_a, own)
        tl.store(to_y + HALF, b * cos_b + a * sin_b, own)


def _turned(c: SimpleNamespace, x: Tensor, transposed: bool) -> Tensors:
    if x.stride(3) != 1 or x._is_zerotensor() or x.is_neg():
        (x,) = contiguous(x)
    T, H, L, D = x.shape
    half = D // 2
    block_d = triton.next_power_of_2(max(half, 1))
    block_l = max(min(TILE // block_d, triton.next_power_of_2(max(L, 1))), 1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (T * cdiv(L, block_l), cdiv(H, HEADS)) if half else (0,)
    launch(
        _turn_kernel,
        grid,
        x.device,
        x,
        *contiguous(c.cos, c.sin),
        y,
        H,
        L,
        *x.stride()[:3],
        HALF=half,
        TRANSPOSED=transposed,
        HEADS=HEADS,
        BLOCK_L=block_l,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return (y,)


def forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    return _turned(c, inputs[0], transposed=False), ()


def jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    return forward(c, t_inputs)


def vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    return _turned(c, ct_outputs[0], transposed=True)


def vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_outputs: Tensors,
    t_ct_outputs: Tensors | None,
) -> Tensors:
    return (None,) if t_ct_outputs is None else vjp(c, inputs, r, t_ct_outputs)


RULES = Rules(forward, jvp, vjp, vjp_jvp)


def compiled(make: Make) -> list[Sample]:
    own = Sample("own", (make(4, 8, 512, 64),), {"cos": make(4, 512, 64), "sin": make(4, 512, 64)})
    return [own, Sample("wide", (make(2, 4, 512, 256),), {"cos": make(512, 256), "sin": make(512, 256)})]
