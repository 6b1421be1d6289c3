"""PyTorch's functions that a model or a loss calls, by metakern's ops where these compute the same.

Attention of PyTorch that has a second derivative holds L x L matrices and is a dozen kernels a call; its cross-entropy,
GELU and SiLU are three to eight kernels at second order. A call that an op can't take is left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metakern import ops


class Fused(TorchFunctionMode):
    """Within the block, functions of torch.nn.functional run by metakern's ops."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        fused = _FUSED.get(func)
        found = NotImplemented if fused is None else fused(*args, **kwargs)
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
    """A mask must be boolean and the same for all heads and queries of a sequence; PyTorch aligns a causal one left."""
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
    """NaN where every target is ignored, as in PyTorch."""
    plain = weight is None and size_average is None and reduce is None and reduction == "mean" and not label_smoothing
    if not plain or input.dim() != 2 or target.dim() != 1 or target.dtype not in (torch.int64, torch.int32):
        return NotImplemented
    value = ops.cross_entropy(input, target, ignore_index)
    return torch.where((target == ignore_index).all(), torch.nan, value)


def _gelu(input: Tensor, approximate: str = "none") -> Any:
    return ops.gelu(input, approximate)


def _silu(input: Tensor, inplace: bool = False) -> Any:
    return NotImplemented if inplace else ops.silu(input)


_FUSED: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.cross_entropy: _cross_entropy,
    F.gelu: _gelu,
    F.silu: _silu,
}
