"""Adam and AdamW as inner optimizers.

    m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g²        step <- step + 1
    phi <- phi - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

with g + weight_decay phi for g in Adam, and phi scaled by 1 - lr weight_decay first in AdamW, as torch.optim does
(Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2). Where v = 0, the root's slope is taken as zero:
exact, and no NaN (`metakern.ops.adam_update` says why).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from metakern.ops.adam_update import adam_update
from metakern.optim.base import Stepwise, fraction, non_negative, numbers, positive


class Adam(Stepwise):
    """Inner Adam; arguments as torch.optim.Adam's, and as SGD's what is learned of lr, beta1, beta2, eps, weight_decay.

    Raises ValueError for a negative rate or decay, an eps that is not positive, or betas outside [0, 1).

    >>> import metakern as mk
    >>> mk.optim.Adam(lr=1e-3, learn_lr=True).lr.value
    Parameter containing:
    tensor(0.0010, requires_grad=True)
    """

    counts = True
    decoupled = False
    fills = (0.0, 0.0)

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        learn: str | Iterable[str] = (),
        learn_lr: bool = False,
        per: str = "all",
        steps: int | None = None,
    ) -> None:
        name = type(self).__name__
        non_negative(name, lr=lr, weight_decay=weight_decay)
        positive(name, eps=eps)
        beta1, beta2 = numbers(name, "betas", betas, 2)
        fraction(name, beta1=beta1, beta2=beta2)
        hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        super().__init__(hyper, learn, learn_lr, per, steps)

    def step(
        self, count: int, phi: list[Tensor], grads: list[Tensor], *state: list[Tensor], **hyper: Any
    ) -> tuple[list[Tensor], ...]:
        (m, v), lr, betas = state, hyper.pop("lr"), (hyper.pop("beta1"), hyper.pop("beta2"))
        return adam_update(phi, grads, m, v, lr, step=count, betas=betas, decoupled=self.decoupled, **hyper)


class AdamW(Adam):
    """Inner Adam with decoupled weight decay; arguments as torch.optim.AdamW's.

    >>> import metakern as mk
    >>> mk.optim.AdamW(lr=1e-3).weight_decay.initial
    0.01
    """

    decoupled = True

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        learn: str | Iterable[str] = (),
        learn_lr: bool = False,
        per: str = "all",
        steps: int | None = None,
    ) -> None:
        super().__init__(lr, betas, eps, weight_decay, learn=learn, learn_lr=learn_lr, per=per, steps=steps)
