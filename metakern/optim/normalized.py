"""Normalized gradient descent: steps of a length that does not depend on that of the gradient.

    n = |g| over all adapted parameters of a task, or of each parameter        g <- g / (n + eps)        then as SGD

At g = 0 the slope of n is taken as zero, which gives no NaN and is exact: the normalized gradient has the slope 1 / eps
there (Hazan, Levy, Shalev-Shwartz 2015, "Beyond convexity: stochastic quasi-convex optimization", algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from metakern.optim.base import State, Tensors, norms, positive, scaled
from metakern.optim.sgd import SGD


class NormalizedSGD(SGD):
    """SGD as an inner optimizer, on gradients divided by their norm (Hazan, Levy, Shalev-Shwartz 2015, algorithm 1).

    Args:
        lr, momentum, nesterov, weight_decay: As for `SGD`.
        eps: Added to the norm.
        norm: "all" for one norm over all adapted parameters of a task, "parameter" for one norm for each parameter.
        learn: Any of lr, momentum and weight_decay; as for `SGD`.
        learn_lr, per, steps: As for `SGD`.

    Raises:
        ValueError: As `SGD` does, for an eps that is not positive, or for any other `norm`.
        TypeError: As `SGD` does, or for an eps that is no number.

    >>> import metakern as mk, torch
    >>> inner = mk.optim.NormalizedSGD(lr=1.0)
    >>> inner.update([torch.zeros(2, 2)], [torch.tensor([[3.0, 4.0], [0.0, 0.0]])], ())[0]
    [tensor([[-0.6000, -0.8000],
            [ 0.0000,  0.0000]])]
    """

    affine = False
    takes_norms = True

    def __init__(
        self,
        lr: float = 0.01,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        norm: str = "all",
        *,
        learn: str | Iterable[str] = (),
        learn_lr: bool = False,
        per: str = "all",
        steps: int | None = None,
    ) -> None:
        super().__init__(lr, momentum, nesterov, weight_decay, learn=learn, learn_lr=learn_lr, per=per, steps=steps)
        positive("NormalizedSGD", eps=eps)
        if norm not in ("all", "parameter"):
            raise ValueError(f"NormalizedSGD: norm must be 'all' or 'parameter', got {norm!r}")
        self.eps, self.norm = eps, norm

    @property
    def combines(self) -> bool:  # type: ignore[override]
        return self._combines(NormalizedSGD.update)

    def update(self, phi: Tensors, grads: Tensors, state: State, *losses: Tensor) -> tuple[list[Tensor], State]:
        groups = [grads] if self.norm == "all" and grads else [[g] for g in grads]
        normalized = [g for group in groups for g in scaled(group, 1 / (norms(group) + self.eps))]
        return super().update(phi, normalized, state)
