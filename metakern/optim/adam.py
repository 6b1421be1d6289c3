"""Adam and AdamW as inner optimizers.

    m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g²        step <- step + 1
    phi <- phi - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

with g + weight_decay phi for g in Adam, and phi scaled by 1 - lr weight_decay first in AdamW, as torch.optim does
(Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2).

The square root has an infinite slope at v = 0, where g and its history are exactly zero (rows of an embedding that no
token touched). There dv/dg = 0 too, and the update as a function of g, g / (|g| + eps) at the first step, is
differentiable: its slope comes from m alone. The root's slope at zero is therefore taken as zero: exact, and no NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metakern.optim._base import InnerOptimizer, Rates, State, Tensors, fraction, non_negative


class Adam(InnerOptimizer):
    """Inner Adam; arguments as torch.optim.Adam's, `learn_lr` and `per` as SGD's.

    Raises ValueError for a negative rate or decay, an eps that is not positive, or betas outside [0, 1).

    >>> import metakern as mk
    >>> mk.optim.Adam(lr=1e-3, learn_lr=True).lr.value
    Parameter containing:
    tensor(0.0010, requires_grad=True)
    """

    decoupled = False

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        learn_lr: bool = False,
        per: str = "all",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        non_negative(name, lr=lr, weight_decay=weight_decay)
        if not eps > 0:
            raise ValueError(f"{name}: eps must be positive, got {eps}")
        fraction(name, beta1=betas[0], beta2=betas[1])
        self.lr = Rates(lr, learn_lr, per)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        self.lr.prepare(adapted)

    def init(self, phi: Tensors) -> State:
        """First moments, second moments, and the number of steps taken, in float64."""
        moments = tuple(torch.zeros_like(p) for p in phi)
        return (*moments, *(m.clone() for m in moments), torch.zeros((), dtype=torch.float64))

    def update(self, phi: Tensors, grads: Tensors, state: State) -> tuple[list[Tensor], State]:
        n, (beta1, beta2), rates = len(phi), self.betas, self.lr.of(phi)
        step = state[-1] + 1
        count: Any = step.tolist()  # not `item`: it is the same in every run, and no obstacle to a captured one
        bias1, bias2 = 1 - beta1**count, 1 - beta2**count
        if self.weight_decay and not self.decoupled:
            grads = [g + self.weight_decay * p for g, p in zip(grads, phi, strict=True)]
        first = [torch.lerp(g, m, beta1) for m, g in zip(state[:n], grads, strict=True)]
        second = [beta2 * v + (1 - beta2) * g * g for v, g in zip(state[n : 2 * n], grads, strict=True)]
        if self.weight_decay and self.decoupled:
            phi = [p * (1 - rate * self.weight_decay) for p, rate in zip(phi, rates, strict=True)]
        moved = [
            p - rate * (m / bias1) / (_sqrt(v / bias2) + self.eps)
            for p, rate, m, v in zip(phi, rates, first, second, strict=True)
        ]
        return moved, (*first, *second, step)


class AdamW(Adam):
    """Inner Adam with decoupled weight decay; arguments as torch.optim.AdamW's.

    >>> import metakern as mk
    >>> mk.optim.AdamW(lr=1e-3).weight_decay
    0.01
    """

    decoupled = True

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        learn_lr: bool = False,
        per: str = "all",
    ) -> None:
        super().__init__(lr, betas, eps, weight_decay, learn_lr, per)


def _sqrt(v: Tensor) -> Tensor:
    """The square root, with slope zero at zero."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1).sqrt(), 0)
