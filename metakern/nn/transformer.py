"""torch.nn's Transformer layers without their fast path, which has no second derivatives.

Attention, norms and linear layers are submodules, of metakern's classes. The classes here pass a boolean padding mask
on unchanged, so that the fused attention can use it, and run GELU by metakern's op.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len

from metakern import ops
from metakern.nn.attention import MultiheadAttention
from metakern.nn.linear import Linear
from metakern.nn.norm import LayerNorm

_OURS: dict[type, type] = {
    nn.Linear: Linear,
    nn.LayerNorm: LayerNorm,
    nn.MultiheadAttention: MultiheadAttention,
}


class _Layer(nn.Module):
    """The base of the encoder's and the decoder's layer: their submodules and their activation."""

    activation: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for module in self.modules():
            module.__class__ = _OURS.get(type(module), type(module))

    def _activated(self, x: Tensor) -> Tensor:
        return ops.gelu(x) if self.activation is F.gelu else self.activation(x)


class TransformerEncoderLayer(_Layer, nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer with the same arguments, state dict and outputs, without its fast path.

    It is exact to second order. The fused attention runs without a mask, with a src_key_padding_mask of booleans, and
    with is_causal=True, which says that src_mask is the causal mask (see `metakern.nn.MultiheadAttention`).

    >>> import metakern as mk, torch
    >>> mk.nn.TransformerEncoderLayer(4, nhead=2, batch_first=True)(torch.zeros(1, 3, 4)).shape
    torch.Size([1, 3, 4])
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        masks = src_mask, src_key_padding_mask, is_causal
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), *masks)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *masks))
        return self.norm2(x + self._ff_block(x))

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self._activated(self.linear1(x)))))


class TransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer with the same arguments, state dict and outputs.

    It is exact to second order.

    >>> import metakern as mk, torch
    >>> x = torch.zeros(1, 3, 4)
    >>> mk.nn.TransformerDecoderLayer(4, nhead=2, batch_first=True)(x, x).shape
    torch.Size([1, 3, 4])
    """

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(self.linear2(self.dropout(self._activated(self.linear1(x)))))


class TransformerEncoder(nn.TransformerEncoder):
    """torch.nn.TransformerEncoder with the same arguments, state dict and outputs, but without its fast path.

    Outputs at padded positions are therefore those of training; torch.nn's fast path may set them to zero.

    >>> import metakern as mk, torch
    >>> layer = mk.nn.TransformerEncoderLayer(4, nhead=2, batch_first=True)
    >>> mk.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)(torch.zeros(1, 3, 4)).shape
    torch.Size([1, 3, 4])
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        length = _get_seq_len(src, self.layers[0].self_attn.batch_first)
        causal = _detect_is_causal_mask(mask, is_causal, length)
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
        return x if self.norm is None else self.norm(x)
