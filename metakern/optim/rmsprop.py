"""RMSprop as an inner optimizer.

    g <- g + weight_decay phi        v <- alpha v + (1 - alpha) g²        a <- alpha a + (1 - alpha) g (centered)
    d = g / (sqrt(v - a²) + eps)     b <- momentum b + d (with momentum)   phi <- phi - lr b (or lr d)

Without centering, a is zero.

The equations of torch.optim.RMSprop (Tieleman & Hinton 2012, lecture 6.5; Graves 2013, equations 38 to 45).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from metakern.ops.rmsprop_update import rmsprop_update
from metakern.optim.base import Hyper, Stepwise, fraction, non_negative, positive


class RMSprop(Stepwise):
    """RMSprop as an inner optimizer, with the equations of torch.optim.RMSprop (Tieleman, Hinton 2012, lecture 6.5).

    Args:
        lr: The learning rate.
        alpha: The decay rate of the averages.
        eps: Added to the root.
        weight_decay: weight_decay phi is added to the gradient.
        momentum: The factor of the momentum buffers.
        centered: Whether gradients are divided by their standard deviation instead of their root mean square (Graves
            2013, equations 38 to 45).
        learn: Any of lr, alpha, eps, weight_decay and momentum; as for `SGD`.
        learn_lr, per, steps: As for `SGD`.

    Raises:
        ValueError: For a negative rate or decay, an eps that is not positive, an alpha or momentum outside [0, 1), a
            number that is not finite, or as `SGD` does for `learn`, `per` and `steps`.
        TypeError: For a value that is no number, or as `SGD` does for `learn` and `learn_lr`.

    >>> import metakern as mk
    >>> [name for name, _ in mk.optim.RMSprop(learn=("alpha", "eps")).named_parameters()]
    ['alpha.value', 'eps.value']
    """

    momentum: Hyper

    def __init__(
        self,
        lr: float = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        learn: str | Iterable[str] = (),
        learn_lr: bool = False,
        per: str = "all",
        steps: int | None = None,
    ) -> None:
        non_negative("RMSprop", lr=lr, weight_decay=weight_decay)
        positive("RMSprop", eps=eps)
        fraction("RMSprop", alpha=alpha, momentum=momentum)
        hyper = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(hyper, learn, learn_lr, per, steps)
        self.centered = centered

    @property
    def fills(self) -> tuple[float, ...]:
        return (0.0,) * (1 + self.centered + (not self.momentum.absent))

    def step(
        self, count: int, phi: list[Tensor], grads: list[Tensor], *state: list[Tensor], **hyper: Any
    ) -> tuple[list[Tensor], ...]:
        v, *rest = state
        a = rest.pop(0) if self.centered else None
        return rmsprop_update(phi, grads, v, hyper.pop("lr"), a, *rest, **hyper)
