"""torch.nn's linear layer by metakern's op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import ops
from metakern.native import memory
from metakern.ops.core import autocast, plain
from metakern.ops.linear import is_small


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
    """Returns x Wᵀ + b, by metakern's op, or by PyTorch's function where small or for it to choose the dtype."""
    with torch._C.DisableTorchFunction():  # else a mode is called for each attribute
        small = plain.allowed_where_small() and _fits(x, weight, bias) and is_small(x, weight)
    return F.linear(x, weight, bias) if small or mixed(x, weight) else ops.linear(x, weight, bias)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Returns whether the arguments are right beyond doubt; the op says what is wrong with others."""
    if not (x.dim() and weight.dim() == 2 and x.shape[-1] == weight.shape[1] and weight.dtype == x.dtype):
        return False
    memory.check("linear", "x", x)
    memory.check("linear", "weight", weight)
    if bias is not None:
        memory.check("linear", "bias", bias)
    return weight.is_cpu and (bias is None or (bias.is_cpu and bias.dtype == x.dtype))


def mixed(x: Tensor, *parameters: Tensor | None) -> bool:
    """Returns whether PyTorch must choose the dtype: under autocast, or if a parameter's dtype is not that of x."""
    with torch._C.DisableTorchFunction():  # else a mode is called for each attribute
        return autocast.enabled(x.device) or any(p is not None and p.dtype != x.dtype for p in parameters)
