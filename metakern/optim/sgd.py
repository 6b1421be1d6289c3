"""Stochastic gradient descent with momentum, Nesterov's momentum and weight decay, as an inner optimizer.

    g <- g + weight_decay phi        b <- momentum b + g        d = g + momentum b (Nesterov), b, or g
    phi <- phi - lr d

The equations of torch.optim.SGD (Sutskever et al. 2013, section 2), which start from b = 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from metakern.optim._base import InnerOptimizer, Rates, State, Tensors, fraction, non_negative


class SGD(InnerOptimizer):
    """Inner SGD. `learn_lr` makes the learning rate a parameter of the outer loop; `per`: one rate for "all"
    parameters, for each "parameter" (tensor), or for each "element" (Meta-SGD).

    Raises ValueError for a negative rate or decay, a momentum outside [0, 1), or Nesterov without momentum.

    >>> import metakern as mk
    >>> [name for name, _ in mk.optim.SGD(lr=0.1, learn_lr=True).named_parameters()]
    ['lr.value']
    """

    affine = True

    def __init__(
        self,
        lr: float = 0.01,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        learn_lr: bool = False,
        per: str = "all",
    ) -> None:
        super().__init__()
        non_negative("SGD", lr=lr, weight_decay=weight_decay)
        fraction("SGD", momentum=momentum)
        if nesterov and not momentum:
            raise ValueError("SGD: momentum must be positive with nesterov, got 0")
        self.lr = Rates(lr, learn_lr, per)
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        self.lr.prepare(adapted)

    def init(self, phi: Tensors) -> State:
        return tuple(torch.zeros_like(p) for p in phi) if self.momentum else ()

    def update(self, phi: Tensors, grads: Tensors, state: State) -> tuple[list[torch.Tensor], State]:
        if self.weight_decay:
            grads = [g + self.weight_decay * p for g, p in zip(grads, phi, strict=True)]
        direction = grads
        if self.momentum:
            state = tuple(self.momentum * b + g for b, g in zip(state, grads, strict=True))
            nesterov = self.nesterov
            direction = [g + self.momentum * b for g, b in zip(grads, state, strict=True)] if nesterov else state
        rates = self.lr.of(phi)
        return [descended(p, rate, d) for p, rate, d in zip(phi, rates, direction, strict=True)], state


def descended(p: torch.Tensor, rate: float | torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """p - rate d: in one pass, and one for its derivative, where the rate is a number."""
    return p - rate * d if isinstance(rate, torch.Tensor) else torch.add(p, d, alpha=-rate)
