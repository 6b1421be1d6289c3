"""The rules of attention in Triton, without an L x L_k matrix in memory.

A program of `_forward_kernel`, `_jvp_kernel` or `_queries_kernel` has a block of queries and loops over the keys that
they see. A program of `_keys_kernel` has a block of keys and loops over the queries that see them, in all heads of a
group. `_queries_kernel` and `_keys_kernel` give the vjp or, if they get tangents, the vjp_jvp. With g = ct_P - δ and
t = t_S - t_lse

    ct_S = P g      t_P = P t      t_ct_S = P u      u = t g - t_δ + t_ct_P

so that the products of t_ct_P are added to t g - t_δ. S is in units of log 2, for exp2. `_forward_kernel` and
`_jvp_kernel` compare positions only in blocks on the diagonal or at the end of the keys, which takes a second loop. The
other two have no registers to spare for a second loop, and always compare.

Where PyTorch's own flash kernels support a call, they compute its forward and its vjp (`by_library`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels import launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(launch.INTERPRETED)


class Heads(NamedTuple):
    """A tensor [B, H, L, D] as an argument of kernels: its pointer and strides; the stride of D is 1."""

    ptr: Any
    batch: int
    head: int
    row: int


class Sizes(NamedTuple):
    """The sizes of a call, its window and its mask."""

    H: int
    group: int
    L: int
    L_k: int
    window: int | None
    mask_ptr: Any


@dataclass(frozen=True)
class Constants:
    """The constants that a kernel is compiled for, besides its block sizes."""

    scale: float
    causal: bool
    D: int
    BLOCK_D: int
    ACC: Any
    precision: str


@triton.jit
def _dot(a, b, total, C: tl.constexpr):
    """Returns total + a b; total may be None."""
    if INTERPRETED:  # the interpreter would read the bits of bfloat16 as integers
        a, b = a.to(C.ACC), b.to(C.ACC)
    return tl.dot(a, b, total, input_precision=C.precision, out_dtype=C.ACC)


@triton.jit
def _tile(x, batch, head, row, inside, C: tl.constexpr, WHOLE: tl.constexpr = False):
    """Loads rows of a head, [ROWS, BLOCK_D], with zeros beyond D and in rows outside; WHOLE: all rows are inside."""
    column = tl.arange(0, C.BLOCK_D)
    ptrs = x.ptr + batch * x.batch + head * x.head + row.to(tl.int64)[:, None] * x.row + column[None, :]
    if WHOLE:
        return tl.load(ptrs) if C.D == C.BLOCK_D else tl.load(ptrs, mask=(column < C.D)[None, :], other=0.0)
    mask = inside[:, None] if C.D == C.BLOCK_D else inside[:, None] & (column < C.D)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _put(x, batch, head, row, inside, tile, C: tl.constexpr):
    """Stores a tile [ROWS, BLOCK_D] in rows of a head."""
    column = tl.arange(0, C.BLOCK_D)
    ptrs = x.ptr + batch * x.batch + head * x.head + row.to(tl.int64)[:, None] * x.row + column[None, :]
    tl.store(ptrs, tile.to(x.ptr.dtype.element_ty), mask=inside[:, None] & (column < C.D)[None, :])


@triton.jit
def _place(rows, heads, BLOCK: tl.constexpr):
    """Returns this program's sequence, head and first row.

    Programs of the last rows start first, because these may see the most keys.
    """
    blocks = tl.cdiv(rows, BLOCK)
    at = tl.program_id(0)
    head = (at // blocks).to(tl.int64)
    return head // heads, head % heads, (blocks - 1 - at % blocks) * BLOCK


@triton.jit
def _shown(p, batch, key):
    """Returns which of these keys the mask shows; keys beyond the last one are hidden."""
    return tl.load(p.mask_ptr + batch * p.L_k + key, mask=key < p.L_k, other=0) != 0


@triton.jit
def _ends_shown(p, batch, BLOCK: tl.constexpr):
    """Returns the first key that the mask of a sequence shows, and the key after the last one that it shows."""
    first, last = p.L_k, 0
    for start in range(0, p.L_k, BLOCK):
        key = start + tl.arange(0, BLOCK)
        shown = _shown(p, batch, key)
        first = tl.minimum(first, tl.min(tl.where(shown, key, p.L_k), 0))
        last = tl.maximum(last, tl.max(tl.where(shown, key + 1, 0), 0))
    return first, last


@triton.jit
def _keys_seen(p, batch, query, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Returns begin, whole_end, end for the keys that M queries from `query` on see.

    All queries see, by position, all keys of the blocks in [begin, whole_end). Keys in [whole_end, end) need comparing.
    """
    low, high = query + p.L_k - p.L, tl.minimum(query + M, p.L) - 1 + p.L_k - p.L  # their positions among the keys
    begin, whole_end, end = 0, p.L_k, p.L_k
    if C.causal:
        whole_end, end = tl.maximum(low + 1, 0), tl.maximum(high + 1, 0)
    if p.window is not None:
        begin = tl.maximum(low - p.window + 1, 0)
    if p.mask_ptr is not None:
        first, last = _ends_shown(p, batch, 1024)
        begin, end = tl.maximum(begin, first), tl.minimum(end, last)
    begin = begin // N * N
    if p.window is not None:
        return begin, begin, end
    return begin, tl.maximum(tl.minimum(whole_end, end) // N * N, begin), end


@triton.jit
def _queries_seeing(p, key, there, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Returns begin, end for the queries that see any of the N keys from `key` on."""
    low, high = key + p.L - p.L_k, tl.minimum(key + N, p.L_k) - 1 + p.L - p.L_k  # their positions among the queries
    begin, end = 0, p.L
    if C.causal:
        begin = tl.maximum(low, 0) // M * M
    if p.window is not None:
        end = tl.minimum(high + p.window, p.L)
    if p.mask_ptr is not None:
        end = tl.where(tl.max(there.to(tl.int32), 0) == 0, 0, end)
    return begin, end


@triton.jit
def _keys_inside(p, batch, key):
    """Returns which of these keys exist and are shown by the mask."""
    return key < p.L_k if p.mask_ptr is None else _shown(p, batch, key)


@triton.jit
def _scores(s, query, key, inside, p, C: tl.constexpr, EDGE: tl.constexpr, KEYS: tl.constexpr):
    """Returns S for a tile s of products q kᵀ or k qᵀ, with -∞ where a query does not see a key.

    KEYS is the dimension of the keys in s. EDGE: positions must be compared.
    """
    query, key = tl.expand_dims(query, KEYS) + p.L_k - p.L, tl.expand_dims(key, 1 - KEYS)
    s = s * (C.scale * LOG2E)
    if EDGE or p.mask_ptr is not None:
        s = tl.where(tl.expand_dims(inside, 1 - KEYS), s, float("-inf"))
    if EDGE and C.causal:
        seen = key <= query if p.window is None else (key <= query) & (key > query - p.window)
        s = tl.where(seen, s, float("-inf"))
    return s


@launch.jit
def _forward_kernel(q, k, v, y, lse_ptr, p, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    batch, head, first = _place(p.L, p.H, M)
    kv_head = head // p.group
    query = first + tl.arange(0, M)
    inside = query < p.L
    q_tile = _tile(q, batch, head, query, inside, C)  # [M, D]
    top, total = tl.full([M], float("-inf"), C.ACC), tl.zeros([M], C.ACC)
    y_tile = tl.zeros(q_tile.shape, C.ACC)
    edges = _keys_seen(p, batch, first, C, M, N)
    for span in tl.static_range(0 if p.window is None else 1, 2):
        for start in range(edges[span], edges[span + 1], N):
            key = start + tl.arange(0, N)
            there = _keys_inside(p, batch, key)
            k_tile = _tile(k, batch, kv_head, key, there, C, span == 0 and p.mask_ptr is None)  # [N, D]
            v_tile = _tile(v, batch, kv_head, key, there, C, span == 0 and p.mask_ptr is None)  # [N, D]
            s = _scores(_dot(q_tile, k_tile.T, None, C), query, key, there, p, C, span == 1, 1)  # [M, N]
            before = top
            top = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(top == float("-inf"), 0.0, top)
            prob, decay = tl.exp2(s - shift[:, None]), tl.exp2(before - shift)
            total = total * decay + tl.sum(prob, 1)
            y_tile = _dot(prob.to(v_tile.dtype), v_tile, y_tile * decay[:, None], C)
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    _put(y, batch, head, query, inside, y_tile / total[:, None], C)
    lse = tl.where(blind, float("inf"), (top + tl.log2(total)) * LN2)
    tl.store(lse_ptr + (batch * p.H + head) * p.L + query, lse, mask=inside)


@launch.jit
def _jvp_kernel(
    q, k, v, t_q, t_k, t_v, y, lse_ptr, t_y, t_lse_ptr, p, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    batch, head, first = _place(p.L, p.H, M)
    kv_head = head // p.group
    query = first + tl.arange(0, M)
    inside = query < p.L
    row = (batch * p.H + head) * p.L + query
    q_tile = _tile(q, batch, head, query, inside, C)  # [M, D]
    t_q_tile = _tile(t_q, batch, head, query, inside, C)
    lse = tl.load(lse_ptr + row, mask=inside, other=float("inf")) * LOG2E  # [M]
    t_lse, t_y_tile = tl.zeros([M], C.ACC), tl.zeros(q_tile.shape, C.ACC)
    edges = _keys_seen(p, batch, first, C, M, N)
    for span in tl.static_range(0 if p.window is None else 1, 2):
        for start in range(edges[span], edges[span + 1], N):
            key = start + tl.arange(0, N)
            there = _keys_inside(p, batch, key)
            k_tile = _tile(k, batch, kv_head, key, there, C, span == 0 and p.mask_ptr is None)  # [N, D]
            t_k_tile = _tile(t_k, batch, kv_head, key, there, C, span == 0 and p.mask_ptr is None)
            v_tile = _tile(v, batch, kv_head, key, there, C, span == 0 and p.mask_ptr is None)
            t_v_tile = _tile(t_v, batch, kv_head, key, there, C, span == 0 and p.mask_ptr is None)
            s = _scores(_dot(q_tile, k_tile.T, None, C), query, key, there, p, C, span == 1, 1)
            prob = tl.exp2(s - lse[:, None])  # [M, N]
            t_s = _dot(q_tile, t_k_tile.T, _dot(t_q_tile, k_tile.T, None, C), C)
            t_prob = prob * t_s * C.scale  # t_P without its term -P t_lse, which is subtracted at the end
            t_lse += tl.sum(t_prob, 1)
            t_y_tile = _dot(t_prob.to(v_tile.dtype), v_tile, t_y_tile, C)
            t_y_tile = _dot(prob.to(v_tile.dtype), t_v_tile, t_y_tile, C)
    y_tile = _tile(y, batch, head, query, inside, C)
    _put(t_y, batch, head, query, inside, t_y_tile - t_lse[:, None] * y_tile, C)
    tl.store(t_lse_ptr + row, t_lse, mask=inside)


@launch.jit
def _delta_kernel(y, ct_y, t_y, t_ct_y, delta_ptr, t_delta_ptr, p, C: tl.constexpr, M: tl.constexpr):
    """Stores δ, and t_δ if there is t_y."""
    batch, head, first = _place(p.L, p.H, M)
    query = first + tl.arange(0, M)
    inside = query < p.L
    row = (batch * p.H + head) * p.L + query
    y_tile = _tile(y, batch, head, query, inside, C).to(C.ACC)  # [M, D]
    ct_y_tile = _tile(ct_y, batch, head, query, inside, C).to(C.ACC)
    tl.store(delta_ptr + row, tl.sum(ct_y_tile * y_tile, 1), mask=inside)
    if t_y is not None:
        t_delta = tl.sum(ct_y_tile * _tile(t_y, batch, head, query, inside, C), 1)
        if t_ct_y is not None:
            t_delta += tl.sum(_tile(t_ct_y, batch, head, query, inside, C) * y_tile, 1)
        tl.store(t_delta_ptr + row, t_delta, mask=inside)


@launch.jit
def _queries_kernel(
    q, k, v, ct_y, t_q, t_k, t_v, t_ct_y, ct_q, lse_ptr, delta_ptr, t_lse_ptr, t_delta_ptr, p,
    C: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Stores ct_q, or t_ct_q if there are tangents."""
    batch, head, first = _place(p.L, p.H, M)
    kv_head = head // p.group
    query = first + tl.arange(0, M)
    inside = query < p.L
    row = (batch * p.H + head) * p.L + query
    q_tile = _tile(q, batch, head, query, inside, C)  # [M, D]
    ct_y_tile = _tile(ct_y, batch, head, query, inside, C)
    lse = tl.load(lse_ptr + row, mask=inside, other=float("inf")) * LOG2E  # [M]
    delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
    if t_q is not None:
        t_q_tile = _tile(t_q, batch, head, query, inside, C)
        t_lse = tl.load(t_lse_ptr + row, mask=inside, other=0.0)
        t_delta = tl.load(t_delta_ptr + row, mask=inside, other=0.0)
        if t_ct_y is not None:
            t_ct_y_tile = _tile(t_ct_y, batch, head, query, inside, C)
    total = tl.zeros(q_tile.shape, C.ACC)
    begin, _, end = _keys_seen(p, batch, first, C, M, N)
    for start in range(begin, end, N):
        key = start + tl.arange(0, N)
        there = _keys_inside(p, batch, key)
        k_tile = _tile(k, batch, kv_head, key, there, C)  # [N, D]
        v_tile = _tile(v, batch, kv_head, key, there, C)
        s = _scores(_dot(q_tile, k_tile.T, None, C), query, key, there, p, C, True, 1)
        prob = tl.exp2(s - lse[:, None])  # [M, N]
        g = _dot(ct_y_tile, v_tile.T, None, C) - delta[:, None]
        if t_q is None:
            total = _dot((prob * g).to(k_tile.dtype), k_tile, total, C)
        else:
            t_k_tile = _tile(t_k, batch, kv_head, key, there, C)
            t_v_tile = _tile(t_v, batch, kv_head, key, there, C)
            t_s = _dot(q_tile, t_k_tile.T, _dot(t_q_tile, k_tile.T, None, C), C)
            u = (t_s * C.scale - t_lse[:, None]) * g - t_delta[:, None]
            u = _dot(ct_y_tile, t_v_tile.T, u, C)
            if t_ct_y is not None:
                u = _dot(t_ct_y_tile, v_tile.T, u, C)
            total = _dot((prob * u).to(k_tile.dtype), k_tile, total, C)
            total = _dot((prob * g).to(k_tile.dtype), t_k_tile, total, C)
    _put(ct_q, batch, head, query, inside, total * C.scale, C)


@launch.jit
def _keys_kernel(
    q, k, v, ct_y, t_q, t_k, t_v, t_ct_y, ct_k, ct_v, lse_ptr, delta_ptr, t_lse_ptr, t_delta_ptr, p,
    C: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Stores ct_k and ct_v, or their tangents if there are tangents; either is None if it is not wanted."""
    batch, kv_head, first = _place(p.L_k, p.H // p.group, N)
    key = first + tl.arange(0, N)
    inside = key < p.L_k
    there = _keys_inside(p, batch, key)
    k_tile = _tile(k, batch, kv_head, key, there, C)  # [N, D]
    v_tile = _tile(v, batch, kv_head, key, there, C)
    if t_q is not None:
        t_k_tile = _tile(t_k, batch, kv_head, key, there, C)
        t_v_tile = _tile(t_v, batch, kv_head, key, there, C)
    total_k, total_v = tl.zeros(k_tile.shape, C.ACC), tl.zeros(v_tile.shape, C.ACC)
    begin, end = _queries_seeing(p, first, there, C, M, N)
    for head in range(kv_head * p.group, (kv_head + 1) * p.group):
        for start in range(begin, end, M):
            query = start + tl.arange(0, M)
            asking = query < p.L
            row = (batch * p.H + head) * p.L + query
            q_tile = _tile(q, batch, head, query, asking, C)  # [M, D]
            ct_y_tile = _tile(ct_y, batch, head, query, asking, C)
            lse = tl.load(lse_ptr + row, mask=asking, other=float("inf")) * LOG2E  # [M]
            s = _scores(_dot(k_tile, q_tile.T, None, C), query, key, there, p, C, True, 0)
            prob = tl.exp2(s - lse[None, :])  # [N, M]
            if t_q is not None:
                t_q_tile = _tile(t_q, batch, head, query, asking, C)
                t_lse = tl.load(t_lse_ptr + row, mask=asking, other=0.0)
                t = _dot(k_tile, t_q_tile.T, _dot(t_k_tile, q_tile.T, None, C), C) * C.scale - t_lse[None, :]
                if t_ct_y is not None:
                    t_ct_y_tile = _tile(t_ct_y, batch, head, query, asking, C)
            if ct_v is not None:
                total_v = _dot((prob if t_q is None else prob * t).to(v_tile.dtype), ct_y_tile, total_v, C)
                if t_ct_y is not None:
                    total_v = _dot(prob.to(v_tile.dtype), t_ct_y_tile, total_v, C)
            if ct_k is not None:
                delta = tl.load(delta_ptr + row, mask=asking, other=0.0)
                g = _dot(v_tile, ct_y_tile.T, None, C) - delta[None, :]
                if t_q is None:
                    total_k = _dot((prob * g).to(k_tile.dtype), q_tile, total_k, C)
                else:
                    t_delta = tl.load(t_delta_ptr + row, mask=asking, other=0.0)
                    u = _dot(t_v_tile, ct_y_tile.T, t * g - t_delta[None, :], C)
                    if t_ct_y is not None:
                        u = _dot(v_tile, t_ct_y_tile.T, u, C)
                    total_k = _dot((prob * u).to(k_tile.dtype), q_tile, total_k, C)
                    total_k = _dot((prob * g).to(k_tile.dtype), t_q_tile, total_k, C)
    if ct_k is not None:
        _put(ct_k, batch, kv_head, key, inside, total_k * C.scale, C)
    if ct_v is not None:
        _put(ct_v, batch, kv_head, key, inside, total_v, C)


class Blocks(NamedTuple):
    """The numbers of queries (M) and keys (N) of a block, and of warps and pipeline stages of its program."""

    M: int
    N: int
    warps: int
    stages: int


# M, N, warps and stages for half precision, by kernel and BLOCK_D. _LARGE is for GPUs whose programs have 200 KiB of
# shared memory (sm_90, sm_100), _SMALL for others. The first entry is the largest whose loops spill no registers. A
# warp group of sm_90 multiplies 64 rows at a time.
_LARGE = {
    "forward": {64: ((128, 64, 8, 2), (64, 64, 4, 3)), 128: ((128, 64, 8, 2), (64, 64, 4, 2)), 256: ((64, 64, 8, 2),)},
    "jvp": {64: ((128, 64, 8, 2), (64, 64, 4, 2)), 128: ((64, 64, 4, 2), (64, 32, 4, 2)), 256: ((64, 32, 4, 2),)},
    "queries": {64: ((64, 64, 4, 2), (128, 64, 8, 2)), 128: ((64, 64, 4, 2),), 256: ((64, 32, 4, 1),)},
    "keys": {64: ((64, 64, 4, 2), (32, 64, 4, 2)), 128: ((32, 64, 4, 2),), 256: ((32, 64, 4, 1),)},
    "t_queries": {
        64: ((64, 64, 4, 2), (128, 64, 8, 2)),
        128: ((64, 32, 4, 2), (128, 32, 8, 2)),
        256: ((64, 16, 4, 1),),
    },
    "t_keys": {64: ((32, 64, 4, 2), (32, 128, 8, 2)), 128: ((16, 64, 4, 2), (32, 64, 4, 1)), 256: ((16, 64, 4, 1),)},
}
_SMALL = {
    "forward": {64: ((128, 64, 4, 2), (64, 64, 4, 2)), 128: ((64, 64, 4, 2),), 256: ((64, 32, 8, 2),)},
    "jvp": {64: ((64, 64, 4, 2), (64, 32, 4, 2)), 128: ((32, 32, 4, 2),), 256: ((32, 16, 4, 1),)},
    "queries": {64: ((64, 64, 4, 2), (64, 32, 4, 2)), 128: ((64, 32, 4, 2),), 256: ((32, 32, 4, 1),)},
    "keys": {64: ((32, 64, 4, 2), (32, 32, 4, 2)), 128: ((32, 32, 4, 2),), 256: ((32, 32, 4, 1),)},
    "t_queries": {64: ((64, 32, 4, 2), (32, 32, 4, 2)), 128: ((32, 32, 4, 1),), 256: ((16, 16, 4, 1),)},
    "t_keys": {64: ((16, 64, 4, 2), (32, 32, 4, 2)), 128: ((32, 32, 4, 1),), 256: ((16, 16, 4, 1),)},
}


def blocks(kernel: str, dtype: torch.dtype, BLOCK_D: int, shared: int) -> tuple[Blocks, ...]:
    """Returns the block sizes to choose from, the best guess first; `shared`: bytes of shared memory for a program."""
    if launch.INTERPRETED:
        return (Blocks(4, 4, 4, 1),)
    if kernel == "delta":
        return (Blocks(32, 0, 4, 1),)
    if dtype == torch.float32 and BLOCK_D <= 128 and kernel in ("forward", "queries", "keys"):
        return (Blocks(32, 32, 4, 1),)
    if dtype in (torch.float32, torch.float64) or BLOCK_D > 256:
        return (Blocks(16, 16, 4, 1),)
    return tuple(Blocks(*sizes) for sizes in (_LARGE if shared >= 200 << 10 else _SMALL)[kernel][max(64, BLOCK_D)])


class _Launcher:
    """Launches the kernels of one call, which share its sizes and constants."""

    def __init__(self, c: SimpleNamespace, q: Tensor, k: Tensor) -> None:
        (B, H, L, D), (H_kv, L_k) = q.shape, k.shape[1:3]
        self.q, self.queries, self.keys = q, (L, B * H), (L_k, B * H_kv)
        mask = None if c.mask is None else c.mask.contiguous()
        self.problem = Sizes(H, H // H_kv, L, L_k, c.window, mask)
        acc = tl.float64 if q.dtype == torch.float64 else tl.float32
        self.constants = Constants(c.scale, c.causal, D, max(16, triton.next_power_of_2(D)), acc, launch.precision())

    def __call__(self, kernel: Any, *args: Any, tangents: bool = False) -> None:
        device = self.q.device
        name = "t_" * tangents + kernel.__name__.removeprefix("_").removesuffix("_kernel")
        choice = blocks(name, self.q.dtype, self.constants.BLOCK_D, launch.shared_memory(device))
        own, (rows, heads) = ("N", self.keys) if kernel is _keys_kernel else ("M", self.queries)
        args = (*(_heads(a) if isinstance(a, Tensor) and a.dim() == 4 else a for a in args), self.problem)
        # Timing may choose other blocks in another run, and with them another rounding: never in deterministic mode.
        if len(choice) > 1 and device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
            tuned = _tuned(kernel, choice, self.problem.L.bit_length())
            if rows * heads:
                launch.check(kernel, device, *args)
                with torch.cuda.device(device):
                    tuned[lambda meta: (launch.cdiv(rows, meta[own]) * heads,)](*args, C=self.constants)
            return
        M, N, warps, stages = choice[0]
        sizes = {"M": M, **launch.ROUNDED} if kernel is _delta_kernel else {"M": M, "N": N}
        grid = (launch.cdiv(rows, sizes[own]) * heads,)
        launch.launch(kernel, grid, device, *args, C=self.constants, **sizes, num_warps=warps, num_stages=stages)


@cache
def _tuned(kernel: Any, choice: tuple[Blocks, ...], bits: int) -> Any:
    """Returns the kernel, autotuned over `choice` at its first call.

    The cache tunes anew for each `bits`, the bit length of L.
    """
    configs = [triton.Config({"M": M, "N": N}, num_warps=warps, num_stages=stages) for M, N, warps, stages in choice]
    return triton.autotune(configs, key=["C"])(kernel)


def _heads(x: Tensor) -> Heads:
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Heads(x, *x.stride()[:3])


def _per_query(q: Tensor) -> Tensor:
    """Returns an uninitialized tensor with a number for each query, [B, H, L]."""
    return q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def by_library(c: SimpleNamespace, q: Tensor, k: Tensor, capability: tuple[int, int] | None) -> bool:
    """Returns whether PyTorch's flash kernels support a call on a GPU of this capability.

    The capability is None where PyTorch has no such kernels.
    """
    if capability is None or capability < (8, 0) or c.mask is not None or c.window is not None or c.scale <= 0:
        return False
    widest = 256 if capability in ((8, 0), (9, 0), (10, 0)) else 192
    (L, D), L_k = q.shape[2:], k.shape[2]
    aligned = not c.causal or L_k == L
    fits = q.dtype in (torch.bfloat16, torch.float16) and D % 8 == 0 and widest >= D
    return aligned and fits and q.numel() > 0 and k.numel() > 0


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return launch.capability(device) if torch.backends.cuda.is_flash_attention_available() else None


def _aligned(x: Tensor) -> Tensor:
    """Returns x, copied unless it is aligned for PyTorch's flash kernels, which read 16 bytes at a time."""
    fits = x.stride(-1) == 1 and not any(stride % 8 for stride in x.stride()[:3]) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    q, k, v = inputs
    if by_library(c, q, k, _capability(q.device)):
        flash = torch.ops.aten._scaled_dot_product_flash_attention.default
        y, lse, *_ = flash(*(_aligned(x) for x in inputs), is_causal=c.causal, scale=c.scale)
        return (y,), (lse,)
    y, lse = torch.empty_like(q), _per_query(q)
    _Launcher(c, q, k)(_forward_kernel, q, k, v, y, lse)
    return (y,), (lse,)


def _jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    (q, k, v), (lse, y), (t_q, t_k, t_v) = inputs, r, t_inputs
    t_y, t_lse = torch.empty_like(y), _per_query(q)
    _Launcher(c, q, k)(_jvp_kernel, q, k, v, t_q, t_k, t_v, y, lse.contiguous(), t_y, t_lse)
    return (t_y,), (t_lse,)


def _vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    (q, k, v), (lse, y), (ct_y,) = inputs, r, ct_outputs
    if by_library(c, q, k, _capability(q.device)):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
        tensors = (_aligned(x) for x in (ct_y, q, k, v, y))
        seed = torch.zeros(2, dtype=torch.int64, device=q.device)  # the random state of a dropout that is not used
        sizes = (q.shape[2], k.shape[2])
        return flash(*tensors, lse.contiguous(), None, None, *sizes, 0.0, c.causal, seed, seed, scale=c.scale)
    return _cotangents(c, inputs, r, ct_y, (None, None, None), (None, None), None)


def _vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_outputs: Tensors,
    t_ct_outputs: Tensors | None,
) -> Tensors:
    return _cotangents(c, inputs, r, ct_outputs[0], t_inputs, t_r, None if t_ct_outputs is None else t_ct_outputs[0])


def _cotangents(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    ct_y: Tensor,
    t_inputs: Tensors,
    t_r: Tensors,
    t_ct_y: Tensor | None,
) -> Tensors:
    """Returns ct_q, ct_k and ct_v, or their tangents if there are tangents."""
    (q, k, _), (lse, y), (t_lse, t_y) = inputs, r, t_r
    run, delta, tangents = _Launcher(c, q, k), _per_query(q), t_y is not None
    t_delta = _per_query(q) if tangents else None
    run(_delta_kernel, y, ct_y, t_y, t_ct_y, delta, t_delta)
    lse, t_lse = lse.contiguous(), t_lse.contiguous() if tangents else None
    tensors, rows = (*inputs, ct_y, *t_inputs, t_ct_y), (lse, delta, t_lse, t_delta)
    ct_q, ct_k, ct_v = (torch.empty_like(x) if need else None for x, need in zip(inputs, c.needs, strict=True))
    if ct_q is not None:
        run(_queries_kernel, *tensors, ct_q, *rows, tangents=tangents)
    # The sums of ct_k and ct_v for wide heads do not both fit into the registers of one program.
    together = run.constants.BLOCK_D <= 128
    for pair in ((ct_k, ct_v),) if together else ((ct_k, None), (None, ct_v)):
        if any(x is not None for x in pair):
            run(_keys_kernel, *tensors, *pair, *rows, tangents=tangents)
    return ct_q, ct_k, ct_v


RULES = Rules(_forward, _jvp, _vjp, _vjp_jvp)


def compiled(make: Make) -> list[Sample]:
    """Returns wide heads for half precision; for float32, heads that fill no block, with a window and a mask."""

    def sample(name: str, D: int, **options: Any) -> Sample:
        return Sample(name, (make(2, 4, 512, D), make(2, 2, 512, D), make(2, 2, 512, D)), options)

    if make.dtype != torch.float32:
        return [sample("causal", 128)]
    return [sample("masked_window", 48, mask=torch.empty(2, 512, dtype=torch.bool, device=make.device), window=256)]
