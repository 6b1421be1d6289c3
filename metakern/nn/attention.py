"""torch.nn's multi-head attention by metakern's ops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import ops
from metakern.nn.linear import linear, mixed


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention with the same arguments, state dict and outputs, exact to second order.

    query, key and value are [L, B, E]; [B, L, E] with `batch_first`; or [L, E] without a batch.

    The fused `metakern.ops.attention` runs for need_weights=False (not torch.nn's default) without a mask, with a
    key_padding_mask of booleans, and with is_causal=True, which says that attn_mask is the causal mask. Other masks,
    active dropout, autocast and need_weights=True take ordinary PyTorch operations, which hold all attention weights in
    memory. A query that sees no key gives zeros before the output projection, where torch.nn gives NaN.

    Args:
        *args, **kwargs: The arguments of torch.nn.MultiheadAttention; add_bias_kv and add_zero_attn must be False.

    Raises:
        ValueError: For add_bias_kv or add_zero_attn; when called, for shapes that do not fit.

    >>> import metakern as mk, torch
    >>> attention, x = mk.nn.MultiheadAttention(4, num_heads=2, batch_first=True), torch.zeros(1, 3, 4)
    >>> y, weights = attention(x, x, x, need_weights=False, is_causal=True)
    >>> y.shape, weights
    (torch.Size([1, 3, 4]), None)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if obstacle := extra_keys(self):
            raise ValueError(f"MultiheadAttention: {obstacle}")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = self._check(query, key, value)
        q, k, v = (self._batch_first(x, batched) for x in self._projected(query, key, value))
        if is_causal and q.shape[2] != k.shape[2]:
            raise ValueError(
                f"MultiheadAttention: key must have the length {q.shape[2]} of query where is_causal, got {k.shape[2]}"
            )
        if attn_mask is not None:
            expected = (q.shape[2], k.shape[2])
            _shaped("attn_mask", attn_mask, expected if attn_mask.dim() == 2 else (q.shape[0] * q.shape[1], *expected))
        dropout = self.dropout if self.training else 0.0
        weights = None
        padding = self._padding(q, k, key_padding_mask)
        additive = padding is not None and padding.dtype != torch.bool
        if need_weights or dropout or additive or (attn_mask is not None and not is_causal) or mixed(q, k, v):
            y, weights = _composed(q, k, v, self._masks(q, k, padding, attn_mask, is_causal), dropout)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = ops.attention(q, k, v, causal=is_causal, mask=None if padding is None else ~padding)
        y = y.transpose(1, 2).flatten(2)
        if not batched:
            y, weights = y.squeeze(0), None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return linear(y, self.out_proj.weight, self.out_proj.bias), weights if need_weights else None

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Checks the shapes of the inputs, and returns whether there is a batch dimension."""
        for name, x, size in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != size:
                raise ValueError(
                    f"MultiheadAttention: {name} must have 2 or 3 dimensions like query, the last of size {size}, "
                    f"got {list(x.shape)}"
                )
        return query.dim() == 3

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if not self._qkv_same_embed_dim:
            weights: Any = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif query is key and key is value:
            return linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        """Returns x as [B, H, L, D]."""
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _padding(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None) -> Tensor | None:
        """Returns key_padding_mask as [B, L_k], or None."""
        if key_padding_mask is None:
            return None
        if key_padding_mask.dim() == 1:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        return _shaped("key_padding_mask", key_padding_mask, (q.shape[0], k.shape[2]))

    def _masks(
        self, q: Tensor, k: Tensor, padding: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> list[Tensor]:
        """Returns the masks in torch.nn's convention, to broadcast to [B, H, L, L_k]: True hides, numbers are added."""
        (B, H, L, _), L_k = q.shape, k.shape[2]
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask.unflatten(0, (B, H)) if attn_mask.dim() == 3 else attn_mask)
        elif is_causal:
            masks.append(torch.ones(L, L_k, dtype=torch.bool, device=q.device).triu(1))
        if padding is not None:
            masks.append(padding[:, None, None])
        return masks


def extra_keys(module: nn.MultiheadAttention) -> str | None:
    """Returns which option of a module adds keys that are not in its input, as an error's text, or None."""
    for name, present in (("add_bias_kv", module.bias_k is not None), ("add_zero_attn", module.add_zero_attn)):
        if present:
            return f"{name} must be False, got True"
    return None


def _shaped(name: str, mask: Tensor, expected: tuple[int, ...]) -> Tensor:
    if tuple(mask.shape) != expected:
        raise ValueError(f"MultiheadAttention: {name} must have shape {list(expected)}, got {list(mask.shape)}")
    return mask


def _composed(q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], dropout: float) -> tuple[Tensor, Tensor]:
    """Returns attention by ordinary PyTorch operations, and its weights [B, H, L, L_k]."""
    s = q * q.shape[-1] ** -0.5 @ k.mT
    for mask in masks:
        s = s.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    blind = (s == -torch.inf).all(-1, keepdim=True)
    weights = F.dropout(torch.softmax(s.masked_fill(blind, 0), -1).masked_fill(blind, 0), dropout)
    return weights @ v, weights
