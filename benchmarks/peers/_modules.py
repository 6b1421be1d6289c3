"""torch.nn's layers in a form that `torch.func.vmap` can differentiate twice, with the same names of parameters.

vmap has no rule for torch.nn's recurrent layers, and through it the second derivatives of an affine layer norm are
wrong (torch 2.13), while those of a plain one are right.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Cells(nn.Module):
    """A recurrent layer: the products of the input for all time steps, then a loop over time."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.mode, self.hidden = layer.mode, layer.hidden_size
        for name, p in layer.named_parameters():
            self.register_parameter(name, p)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        steps = F.linear(x, self.weight_ih_l0, self.bias_ih_l0).unbind(1)
        h = c = x.new_zeros(x.shape[0], self.hidden)
        outputs = []
        for gates in steps:
            recurrent = F.linear(h, self.weight_hh_l0, self.bias_hh_l0)
            if self.mode == "LSTM":
                i, f, g, o = (gates + recurrent).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            elif self.mode == "GRU":
                (x_r, x_z, x_n), (h_r, h_z, h_n) = gates.chunk(3, -1), recurrent.chunk(3, -1)
                n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
                h = n + (x_z + h_z).sigmoid() * (h - n)
            else:
                h = (gates + recurrent).tanh()
            outputs.append(h)
        return (torch.stack(outputs, 1),)


class Affine(nn.Module):
    """A layer norm as one without weight and bias, times the weight, plus the bias."""

    def __init__(self, layer: nn.LayerNorm) -> None:
        super().__init__()
        self.shape, self.eps = layer.normalized_shape, layer.eps
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, eps=self.eps) * self.weight + self.bias


def differentiable(model: nn.Module) -> nn.Module:
    """Return a copy of the model with these layers, on the same parameters."""
    model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.RNNBase):
                setattr(parent, name, Cells(child))
            elif isinstance(child, nn.LayerNorm):
                setattr(parent, name, Affine(child))
    return model
