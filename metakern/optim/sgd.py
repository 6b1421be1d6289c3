"""Stochastic gradient descent with momentum, Nesterov's momentum and weight decay, as an inner optimizer.

    g <- g + weight_decay phi        b <- momentum b + g        d = g + momentum b (Nesterov), b (momentum), or g
    phi <- phi - lr d

The equations of torch.optim.SGD (Sutskever et al. 2013, section 2), which start from b = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from metakern.ops.core.updates import has_kernels
from metakern.ops.sgd_update import DESCENT, MOMENTUM, NESTEROV
from metakern.optim.base import Hyper, Stepwise, Values, fraction, non_negative


class SGD(Stepwise):
    """SGD as an inner optimizer, with the equations of torch.optim.SGD (Sutskever et al. 2013, section 2).

    Args:
        lr: The learning rate.
        momentum: The factor of the momentum buffers.
        nesterov: Whether the momentum is Nesterov's.
        weight_decay: weight_decay phi is added to the gradient.
        learn: The name, or names, of the hyper-parameters that the outer loop learns: "lr", "momentum",
            "weight_decay". Their arguments are the initial values.
        learn_lr: Whether to learn lr, as with "lr" in `learn`.
        per: Whether a learned hyper-parameter has one value for "all" parameters, one for each "parameter" (tensor),
            or one for each "element" (Meta-SGD, Li et al. 2017).
        steps: K for separate learned values in each of the first K inner steps, the last of which also serve all later
            steps (MAML++, Antoniou et al. 2019, section 4); None for the same values in all steps.

    Raises:
        ValueError: For a negative rate or decay, a momentum outside [0, 1), Nesterov without momentum, a number that is
            not finite, an unknown name in `learn`, another `per`, or `steps` below 1.
        TypeError: For a value that is no number, a `learn` that holds no names, or a learn_lr that is no bool.

    >>> import metakern as mk
    >>> [name for name, _ in mk.optim.SGD(lr=0.1, momentum=0.9, learn=("lr", "momentum")).named_parameters()]
    ['lr.value', 'momentum.value']
    >>> mk.optim.SGD(lr=0.1, learn_lr=True, steps=3).lr.value.tolist()
    [0.10000000149011612, 0.10000000149011612, 0.10000000149011612]
    """

    affine = True
    momentum: Hyper

    def __init__(
        self,
        lr: float = 0.01,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        learn: str | Iterable[str] = (),
        learn_lr: bool = False,
        per: str = "all",
        steps: int | None = None,
    ) -> None:
        name = type(self).__name__
        non_negative(name, lr=lr, weight_decay=weight_decay)
        fraction(name, momentum=momentum)
        super().__init__({"lr": lr, "weight_decay": weight_decay, "momentum": momentum}, learn, learn_lr, per, steps)
        if nesterov and self.momentum.absent:
            raise ValueError(f"{name}: momentum must be positive with nesterov, got 0")
        self.nesterov = nesterov

    @property
    def combines(self) -> bool:  # type: ignore[override]
        return self._combines(Stepwise.update)

    def _combines(self, update: Callable[..., Any]) -> bool:
        """Whether the hyper-parameters are numbers for whole tensors, and no subclass has another update."""
        own = type(self).update is update and type(self).step is SGD.step
        hyper = [getattr(self, name) for name in self.names]
        return own and not any(h.learn and h.per == "element" for h in hyper)

    @property
    def fills(self) -> tuple[float, ...]:
        return () if self.momentum.absent else (0.0,)

    def step(
        self, count: int, phi: list[Tensor], grads: list[Tensor], *state: list[Tensor], **hyper: Values
    ) -> tuple[list[Tensor], ...]:
        """Runs a kernel where there is one; otherwise operations that a captured program can fuse with others."""
        rates = (hyper["lr"], hyper["weight_decay"], *([hyper["momentum"]] if state else []))
        update = (NESTEROV if self.nesterov else MOMENTUM) if state else DESCENT
        call = update if has_kernels(phi[0]) else update.plain
        return call((phi, grads, *state), rates)
