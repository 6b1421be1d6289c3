"""torch.nn's linear layer over metakern's op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metakern import ops


class Linear(nn.Linear):
    """torch.nn.Linear by `metakern.ops.linear`: the same arguments, state dict and outputs.

    input is [..., in_features] and the output [..., out_features]; another shape raises ValueError. Under autocast, and
    where input and weight are of two dtypes, it is torch.nn's.

    >>> import metakern as mk, torch
    >>> mk.nn.Linear(3, 5)(torch.zeros(2, 7, 3)).shape
    torch.Size([2, 7, 5])
    """

    def forward(self, input: Tensor) -> Tensor:
        if mixed(input, self.weight):
            return super().forward(input)
        return ops.linear(input, self.weight, self.bias)


def mixed(x: Tensor, *parameters: Tensor) -> bool:
    """Whether PyTorch must choose the dtypes: under autocast, or where there are several."""
    return torch.is_autocast_enabled(x.device.type) or any(p.dtype != x.dtype for p in parameters)
