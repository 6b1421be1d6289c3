"""torch.nn's smooth activations by metakern's ops, with second derivatives in closed form, in both modes."""

from __future__ import annotations

from torch import Tensor, nn

from metakern import ops


class GELU(nn.GELU):
    """torch.nn.GELU, computed by `metakern.ops.gelu`, for a tensor of any shape.

    Args:
        approximate: "none" or "tanh".

    Raises:
        TypeError: When called, for an input that is not floating point.
        ValueError: When called, for any other `approximate`.

    >>> import metakern as mk, torch
    >>> mk.nn.GELU()(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.8413])
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu(input, self.approximate)


class SiLU(nn.SiLU):
    """torch.nn.SiLU, computed by `metakern.ops.silu`, for a tensor of any shape.

    Args:
        inplace: Whether to overwrite the input, which takes torch.nn's own implementation.

    Raises:
        TypeError: When called without `inplace`, for an input that is not floating point.

    >>> import metakern as mk, torch
    >>> mk.nn.SiLU()(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.7311])
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.inplace else ops.silu(input)
