"""torch.nn's layer norm and RMS norm by metakern's ops, with first and second derivatives in closed form."""

from __future__ import annotations

from torch import Tensor, nn

from metakern import ops
from metakern.nn.linear import mixed


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm, computed by `metakern.ops.layer_norm`, with the same arguments, state dict and outputs.

    The input and the output are [..., *normalized_shape]. Under autocast, and where the input and the parameters have
    different dtypes, torch.nn's own implementation runs.

    Raises:
        ValueError: When called, for an input of another shape or on another device than the parameters.

    >>> import metakern as mk, torch
    >>> mk.nn.LayerNorm(2)(torch.tensor([[1.0, 3.0]]))
    tensor([[-1.0000,  1.0000]], grad_fn=<ViewBackward0>)
    """

    def forward(self, input: Tensor) -> Tensor:
        if mixed(input, self.weight, self.bias):
            return super().forward(input)
        weight, bias = (None if p is None else p.flatten() for p in (self.weight, self.bias))
        return ops.layer_norm(_flat(self, input), weight, bias, self.eps).view(input.shape)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm, computed by `metakern.ops.rms_norm`, with the same arguments, state dict and outputs.

    The input and the output are [..., *normalized_shape]. Under autocast, and where the input and the weight have
    different dtypes, torch.nn's own implementation runs.

    Raises:
        ValueError: When called, for an input of another shape or on another device than the parameters.

    >>> import metakern as mk, torch
    >>> mk.nn.RMSNorm(2, elementwise_affine=False)(torch.tensor([[1.0, 7.0]]))
    tensor([[0.2000, 1.4000]])
    """

    def forward(self, x: Tensor) -> Tensor:
        if mixed(x, self.weight):
            return super().forward(x)
        weight = None if self.weight is None else self.weight.flatten()
        return ops.rms_norm(_flat(self, x), weight, self.eps).view(x.shape)


def _flat(module: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    """Flattens the normalized dimensions: [..., *normalized_shape] -> [..., D]."""
    sizes = tuple(module.normalized_shape)
    if tuple(x.shape[-len(sizes) :]) != sizes:
        name = type(module).__name__
        raise ValueError(f"{name}: input must have shape [..., {', '.join(map(str, sizes))}], got {list(x.shape)}")
    return x.flatten(-len(sizes))
