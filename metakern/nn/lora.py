"""The linear layer with LoRA.

    y = x Wᵀ + b + (alpha / rank) (x Aᵀ) Bᵀ

Hu et al. 2021, "LoRA: low-rank adaptation of large language models", section 4.1. `metakern.lora` turns the linear
layers of a model into such layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import ops
from metakern.ops.core import autocast

FORMER = "_metakern_former_class"  # the attribute with the class that a module had before `metakern.patch`


@dataclass(frozen=True)
class Settings:
    """The LoRA settings of one layer, checked; alpha=None means the rank."""

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"lora: rank must be an integer of at least 1, got {self.rank!r}")
        if self.alpha is not None and not (isinstance(self.alpha, int | float) and 0 < self.alpha < math.inf):
            raise ValueError(f"lora: alpha must be a positive number, got {self.alpha!r}")
        if not (isinstance(self.dropout, int | float) and 0 <= self.dropout < 1):
            raise ValueError(f"lora: dropout must be in [0, 1), got {self.dropout!r}")


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank correction, computed by `metakern.ops.lora_linear`.

    The constructor makes a frozen `torch.nn.Linear(in_features, out_features, bias)` with trainable factors `lora_A`
    [rank, in], random, and `lora_B` [out, rank], zero. `metakern.lora` adapts the layers of an existing model instead.
    The input is [..., in], the output [..., out]. Factors whose dtype differs from the weight's are cast to it for the
    products. Hu et al. 2021, "LoRA", section 4.1.

    Args:
        in_features: The size of the input.
        out_features: The size of the output.
        bias: Whether the frozen layer has a bias.
        rank: The rank of the correction.
        alpha: The correction is multiplied by alpha / rank; None for alpha = rank.
        dropout: The probability of dropout on the input of the correction, in training.
        device: The device of the parameters.
        dtype: The dtype of the parameters.

    Raises:
        ValueError: For a rank that is no integer of at least 1, an alpha that is not positive, or a dropout outside
            [0, 1); when called, for an input of another shape.
        TypeError: When called without autocast, for an input of another dtype than the weight's.

    >>> import metakern as mk, torch
    >>> layer = mk.nn.LoraLinear(4, 3, rank=2)
    >>> layer(torch.zeros(5, 4)).shape, [name for name, p in layer.named_parameters() if p.requires_grad]
    (torch.Size([5, 3]), ['lora_A', 'lora_B'])
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        settings = Settings(rank, alpha, dropout)
        linear = nn.Linear(in_features, out_features, bias, device, dtype).requires_grad_(False)
        self.__dict__.update(linear.__dict__)
        self._adapt(nn.Linear, settings)

    def _adapt(
        self, base: type[nn.Module], settings: Settings, dtype: torch.dtype | None = None, generator: Any = None
    ) -> None:
        """Adds the factors to this module, which is a layer of the class `base` in everything else."""
        self.base, self.dropout = base, settings.dropout
        self.alpha = float(settings.rank if settings.alpha is None else settings.alpha)
        out, size = matrix(self).shape
        A = torch.empty(settings.rank, size)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        like: Any = {"device": self.weight.device, "dtype": dtype or self.weight.dtype}
        self.lora_A, self.lora_B = nn.Parameter(A.to(**like)), nn.Parameter(torch.zeros(out, settings.rank, **like))
        # The hook does nothing. Its presence keeps nn.TransformerEncoderLayer off its fast path, which would read the
        # weight and never call this layer.
        self._present = self.register_forward_pre_hook(_nothing)

    def _give_back(self) -> None:
        """Turns this module back into the layer that it was, which stays frozen."""
        self._present.remove()
        base = self.base
        for name in ("lora_A", "lora_B", "base", "alpha", "dropout", "_present"):
            delattr(self, name)
        self.__class__ = base  # type: ignore[assignment]

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-2]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        return run(self, x, partial(getattr, self))

    def extra_repr(self) -> str:
        out, size = matrix(self).shape
        sizes = f"in_features={size}, out_features={out}, bias={self.bias is not None}"
        return f"{sizes}, rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"


def run(module: LoraLinear, x: Tensor, parameter: Callable[[str], Tensor]) -> Tensor:
    """Returns the output of the layer for x [..., in], with the factors that `parameter` gives by name.

    x is [T, ..., in] where the factors have the tasks first; so does a bias that is adapted.
    """
    weight = matrix(module)
    if autocast.enabled(x.device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    A, B = (parameter(name).to(weight.dtype) for name in ("lora_A", "lora_B"))
    bias = None if module.bias is None else module.bias.to(weight.dtype)
    learns = bias is not None and (bias.requires_grad or not isinstance(module.bias, nn.Parameter))
    fixed = None if learns else bias
    if module.training and module.dropout:
        narrow = ops.linear(F.dropout(x, module.dropout), A)
        y = ops.linear(x, weight, fixed) + module.scale * ops.linear(narrow, B)
    else:
        y = ops.lora_linear(x, weight, A, B, module.scale, fixed)
    if bias is None or bias is fixed:
        return y
    return y + bias.view(*bias.shape[:-1], *(1,) * (y.dim() - bias.dim()), -1)


def former_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class of a module, or the class that it had before `metakern.lora` or `metakern.patch`."""
    return module.base if isinstance(module, LoraLinear) else module.__dict__.get(FORMER, type(module))


def is_conv1d(module: nn.Module) -> bool:
    """Returns whether a module is, with or without LoRA, GPT-2's linear layer, whose weight is [in, out]."""
    return (former_class(module).__module__, former_class(module).__name__) == ("transformers.pytorch_utils", "Conv1D")


def matrix(layer: nn.Module) -> Tensor:
    """Returns the weight of a linear layer as [out, in]."""
    weight: Any = layer.weight
    return weight.mT if is_conv1d(layer) else weight


def _nothing(module: nn.Module, args: tuple) -> None:
    pass
