"""torch.nn's linear layer by metakern's op."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from metakern import ops
from metakern.ops.core import autocast


class Linear(nn.Linear):
    """torch.nn.Linear, computed by `metakern.ops.linear`, with the same arguments, state dict and outputs.

    The input is [..., in_features], the output [..., out_features]. Under autocast, and where the input and the weight
    have different dtypes, PyTorch's own function runs.

    Raises:
        ValueError: When called, for an input of another shape or on another device than the parameters.

    >>> import metakern as mk, torch
    >>> mk.nn.Linear(3, 5)(torch.zeros(2, 7, 3)).shape
    torch.Size([2, 7, 5])
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x Wᵀ + b, by metakern's op, or by PyTorch's function where PyTorch must choose the dtype."""
    return F.linear(x, weight, bias) if mixed(x, weight) else ops.linear(x, weight, bias)


def mixed(x: Tensor, *parameters: Tensor | None) -> bool:
    """Returns whether PyTorch must choose the dtype: under autocast, or if a parameter's dtype is not that of x."""
    return autocast.enabled(x.device) or any(p is not None and p.dtype != x.dtype for p in parameters)
