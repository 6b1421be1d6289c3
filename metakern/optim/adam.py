"""Adam and AdamW as inner optimizers.

    m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g²        step <- step + 1
    phi <- phi - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

Adam takes g + weight_decay phi for g; AdamW first multiplies phi by 1 - lr weight_decay. These are the equations of
torch.optim (Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2). Where v = 0, the slope of the root
is taken as zero, which is exact and gives no NaN (`metakern/ops/adam_update` says why).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from metakern.ops.adam_update import adam_update
from metakern.optim.base import Stepwise, fraction, non_negative, numbers, positive


class Adam(Stepwise):
    """Adam as an inner optimizer, with the equations of torch.optim.Adam (Kingma, Ba 2015, algorithm 1).

    Args:
        lr: The learning rate.
        betas: (beta1, beta2), the decay rates of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: weight_decay phi is added to the gradient.
        learn: Any of lr, beta1, beta2, eps and weight_decay; as for `SGD`.
        learn_lr, per, steps: As for `SGD`.

    Raises:
        ValueError: For a negative rate or decay, an eps that is not positive, betas outside [0, 1), a number that is
            not finite, or as `SGD` does for `learn`, `per` and `steps`.
        TypeError: For a value that is no number, or as `SGD` does for `learn` and `learn_lr`.

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
    """AdamW as an inner optimizer, with the equations of torch.optim.AdamW (Loshchilov, Hutter 2019, algorithm 2).

    Args:
        lr: The learning rate.
        betas: (beta1, beta2), the decay rates of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Each step first multiplies phi by 1 - lr weight_decay.
        learn: Any of lr, beta1, beta2, eps and weight_decay; as for `SGD`.
        learn_lr, per, steps: As for `SGD`.

    Raises:
        ValueError: As `Adam` does.
        TypeError: As `Adam` does.

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
