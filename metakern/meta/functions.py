"""Replaces functions of PyTorch that a model or a loss calls by metakern's ops that compute the same.

PyTorch's attention with second derivatives stores L x L matrices and runs a dozen kernels per call; its cross-entropy,
GELU and SiLU run three to eight kernels at second order. A call with arguments that an op doesn't support is left to
PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metakern import ops
from metakern.ops.core import plain

_SMALL_ATTENTION = 2**19  # multiplications of the scores; see ops/core/plain.py


class Repaired(TorchFunctionMode):
    """Within the block, functions of PyTorch with wrong second derivatives are replaced by correct ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        return REPAIRED.get(func, func)(*args, **kwargs or {})


class FusedFunctions(TorchFunctionMode):
    """Within the block, functions of torch.nn.functional run as metakern's ops where these support the arguments."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        fused = _FUSED.get(func)
        if fused is None:
            return func(*args, **kwargs)
        found = fused(*args, **kwargs)
        return func(*args, **kwargs) if found is NotImplemented else found


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention; NotImplemented unless a mask is boolean and the same for all heads and queries of a sequence.

    PyTorch aligns a causal mask to the upper left, the op to the lower right, so causal attention needs as many keys
    as queries.
    """
    shapes = query.dim() == key.dim() == value.dim() == 4 and key.shape == value.shape
    if not shapes or dropout_p or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        return NotImplemented
    (B, H, L, _), (H_kv, L_k) = query.shape, key.shape[1:3]
    if (H_kv != H and not (enable_gqa and H_kv and H % H_kv == 0)) or (is_causal and L_k != L):
        return NotImplemented
    if attn_mask is not None:
        if attn_mask.dtype != torch.bool or attn_mask.shape != (B, 1, 1, L_k) or is_causal:
            return NotImplemented
        attn_mask = attn_mask[:, 0, 0]
    elif plain.is_faster(query, query.numel() * L_k, _SMALL_ATTENTION):
        return NotImplemented
    return ops.attention(query, key, value, causal=is_causal, mask=attn_mask, scale=scale)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Mean cross-entropy; NaN where every target is ignored, as in PyTorch."""
    plain = weight is None and size_average is None and reduce is None and reduction == "mean" and not label_smoothing
    if not plain or input.dim() != 2 or target.dim() != 1 or target.dtype not in (torch.int64, torch.int32):
        return NotImplemented
    value = ops.cross_entropy(input, target, ignore_index)
    return torch.where((target == ignore_index).all(), torch.nan, value)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Embedding. Unlike PyTorch's under vmap, it never reads the next task's table where a token is out of range."""
    if max_norm is not None or scale_grad_by_freq or sparse or weight.dim() != 2 or not weight.is_floating_point():
        return NotImplemented
    if plain.is_faster(weight, input.numel(), inf):
        return NotImplemented
    rows = ops.embedding(input, weight)
    if padding_idx is None or padding_idx < 0:
        return rows if padding_idx is None else NotImplemented
    return torch.where((input == padding_idx).unsqueeze(-1), rows.detach(), rows)  # the padding row has no gradient


def _gelu(input: Tensor, approximate: str = "none") -> Any:
    return ops.gelu(input, approximate)


def _silu(input: Tensor, inplace: bool = False) -> Any:
    return NotImplemented if inplace else ops.silu(input)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return g v / |v| (Salimans, Kingma 2016, section 2). PyTorch's CPU kernel has wrong second derivatives."""
    axes = [i for i in range(v.dim()) if i != dim % v.dim()] if dim != -1 else list(range(v.dim()))
    return v * (g / v.square().sum(axes, keepdim=True).sqrt())


# Functions of PyTorch whose second derivatives are wrong -> correct ones.
REPAIRED: dict[Any, Callable[..., Any]] = {torch._weight_norm: _weight_norm}
_FUSED: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.cross_entropy: _cross_entropy,
    F.embedding: _embedding,
    F.gelu: _gelu,
    F.silu: _silu,
    **REPAIRED,
}
