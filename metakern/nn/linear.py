"""torch.nn's linear layer over metakern's op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import ops


class Linear(nn.Linear):
    """torch.nn.Linear by `metakern.ops.linear`: the same arguments, state dict and outputs.

    input is [..., in_features] and the output [..., out_features]; another shape raises ValueError. Under autocast it
    is torch.nn's.

    >>> import metakern as mk, torch
    >>> mk.nn.Linear(3, 5)(torch.zeros(2, 7, 3)).shape
    torch.Size([2, 7, 5])
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b by metakern's op, or by PyTorch where it must choose the dtypes."""
    return F.linear(x, weight, bias) if mixed(x, weight) else ops.linear(x, weight, bias)


def mixed(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether PyTorch must choose the dtypes: under autocast, or where there are several."""
    return torch.is_autocast_enabled(x.device.type) or any(p is not None and p.dtype != x.dtype for p in parameters)
