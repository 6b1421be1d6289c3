"""What an inner optimizer is: a differentiable map from parameters, gradients and state to the next ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

Tensors = Sequence[Tensor]
State = tuple[Tensor, ...]


class InnerOptimizer(nn.Module):
    """phi_{k+1}, s_{k+1} = update(phi_k, g_k, s_k), with every tensor `[T, *shape]`: a parameter for each task.

    A module, because its hyper-parameters may be learned in the outer loop: what is an `nn.Parameter` of it gets its
    exact gradient. `affine` says that the update is affine in (phi, g, state), so that its pullback needs none of them.
    """

    affine = False

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        """Called once with the adapted parameters, for hyper-parameters that are shaped by them."""

    def init(self, phi: Tensors) -> State:
        """The state before the first step, a flat tuple of tensors."""
        return ()

    def update(self, phi: Tensors, grads: Tensors, state: State) -> tuple[list[Tensor], State]:
        """One step, of differentiable operations."""
        raise NotImplementedError

    def hyper_parameters(self) -> list[nn.Parameter]:
        """Those that the outer loop learns."""
        return [p for p in self.parameters() if p.requires_grad]


def non_negative(optimizer: str, **values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{optimizer}: {name} must be at least 0, got {value}")


def fraction(optimizer: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{optimizer}: {name} must be in [0, 1), got {value}")


class Rates(nn.Module):
    """Learning rates: one fixed number, or learned: one for all, one for each parameter, or one for each element.

    Learned rates are plain numbers, not logarithms, so that the outer loop may turn a direction off or around
    (Li et al. 2017, "Meta-SGD", section 3).
    """

    def __init__(self, lr: float, learn: bool, per: str = "all") -> None:
        super().__init__()
        if per not in ("all", "parameter", "element"):
            raise ValueError(f"learning rate: per must be 'all', 'parameter' or 'element', got {per!r}")
        self.initial, self.learn, self.per = float(lr), learn, per
        if learn and per == "all":
            self.value = nn.Parameter(torch.tensor(self.initial))

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        if self.learn and self.per != "all" and not hasattr(self, "values"):
            self.values = nn.ParameterList(
                torch.full((p.shape if self.per == "element" else ()), self.initial, dtype=p.dtype, device=p.device)
                for p in adapted.values()
            )

    def of(self, phi: Tensors) -> list[float | Tensor]:
        """A rate for each parameter, a number or a tensor that broadcasts over `[T, *shape]`."""
        if not self.learn:
            return [self.initial] * len(phi)
        if self.per == "all":
            return [self.value] * len(phi)
        return list(self.values)
