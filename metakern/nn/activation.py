"""torch.nn's smooth activations over metakern's ops: second derivatives in closed form, in both modes."""

from __future__ import annotations

from torch import Tensor, nn

from metakern import ops


class GELU(nn.GELU):
    """torch.nn.GELU by `metakern.ops.gelu`, for a tensor of any shape.

    >>> import metakern as mk, torch
    >>> mk.nn.GELU()(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.8413])
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu(input, self.approximate)


class SiLU(nn.SiLU):
    """torch.nn.SiLU by `metakern.ops.silu`, for a tensor of any shape; in place where torch.nn's is.

    >>> import metakern as mk, torch
    >>> mk.nn.SiLU()(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.7311])
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.inplace else ops.silu(input)
