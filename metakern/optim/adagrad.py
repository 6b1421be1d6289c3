"""Adagrad as an inner optimizer.

    g <- g + weight_decay phi        v <- v + g²
    phi <- phi - lr / (1 + (step - 1) lr_decay) g / (sqrt(v) + eps)

The equations of torch.optim.Adagrad (Duchi, Hazan & Singer 2011, figure 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from metakern.ops.adagrad_update import adagrad_update
from metakern.optim.base import Stepwise, non_negative, positive


class Adagrad(Stepwise):
    """Adagrad as an inner optimizer, with the equations of torch.optim.Adagrad (Duchi, Hazan, Singer 2011, figure 1).

    Args:
        lr: The learning rate.
        lr_decay: Step number k has the rate lr / (1 + (k - 1) lr_decay).
        weight_decay: weight_decay phi is added to the gradient.
        initial_accumulator_value: The initial sum of squared gradients.
        eps: Added to the root of the sum of squared gradients.
        learn: Any of lr, eps and weight_decay; as for `SGD`.
        learn_lr, per, steps: As for `SGD`.

    Raises:
        ValueError: For a negative rate, decay or initial value, an eps that is not positive, a number that is not
            finite, or as `SGD` does for `learn`, `per` and `steps`.
        TypeError: For a value that is no number, or as `SGD` does for `learn` and `learn_lr`.

    >>> import metakern as mk, torch
    >>> mk.optim.Adagrad(initial_accumulator_value=0.5).init([torch.ones(2)])
    (tensor([0.5000, 0.5000]), tensor(0., dtype=torch.float64))
    """

    counts = True

    def __init__(
        self,
        lr: float = 0.01,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        learn: str | Iterable[str] = (),
        learn_lr: bool = False,
        per: str = "all",
        steps: int | None = None,
    ) -> None:
        initial = {"initial_accumulator_value": initial_accumulator_value}
        non_negative("Adagrad", lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, **initial)
        positive("Adagrad", eps=eps)
        super().__init__({"lr": lr, "eps": eps, "weight_decay": weight_decay}, learn, learn_lr, per, steps)
        self.lr_decay, self.initial_accumulator_value = lr_decay, initial_accumulator_value

    @property
    def fills(self) -> tuple[float, ...]:
        return (self.initial_accumulator_value,)

    def step(
        self, count: int, phi: list[Tensor], grads: list[Tensor], *state: list[Tensor], **hyper: Any
    ) -> tuple[list[Tensor], ...]:
        lr, slower = hyper.pop("lr"), 1 / (1 + (count - 1) * self.lr_decay)
        lr = [h * slower for h in lr] if isinstance(lr, list) else lr * slower
        return adagrad_update(phi, grads, state[0], lr, **hyper)
