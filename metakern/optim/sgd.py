"""Stochastic gradient descent with momentum, Nesterov's momentum and weight decay, as an inner optimizer.

    g <- g + weight_decay phi        b <- momentum b + g        d = g + momentum b (Nesterov), b, or g
    phi <- phi - lr d

The equations of torch.optim.SGD (Sutskever et al. 2013, section 2), which start from b = 0.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from metakern.ops.core.updates import has_kernels
from metakern.ops.sgd_update import DESCENT, MOMENTUM, NESTEROV
from metakern.optim.base import Hyper, Stepwise, Values, fraction, non_negative


class SGD(Stepwise):
    """Inner SGD; lr, momentum and weight_decay may be learned.

    learn_lr makes the learning rate a parameter of the outer loop, `learn` any of the three by their names. per: one
    value for "all" parameters, for each "parameter" (tensor), or for each "element" (Meta-SGD). steps: values of their
    own for each of the first so many inner steps, of which the last ones stay (MAML++).

    Raises ValueError for a negative rate or decay, a momentum outside [0, 1), or Nesterov without momentum.

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
    def fills(self) -> tuple[float, ...]:
        return () if self.momentum.absent else (0.0,)

    def step(
        self, count: int, phi: list[Tensor], grads: list[Tensor], *state: list[Tensor], **hyper: Values
    ) -> tuple[list[Tensor], ...]:
        """By a kernel where there is one, else by operations that a captured program fuses with the gradients'."""
        rates = (hyper["lr"], hyper["weight_decay"], *([hyper["momentum"]] if state else []))
        update = (NESTEROV if self.nesterov else MOMENTUM) if state else DESCENT
        call = update if has_kernels(phi[0]) else update.plain
        return call((phi, grads, *state), rates)
