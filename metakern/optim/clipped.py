"""Gradient clipping in the inner loop, around any inner optimizer.

    n = |g| over all adapted parameters of a task        g <- min(1, norm / (n + 1e-6)) g

The factor of torch.nn.utils.clip_grad_norm_, differentiated: where it clips, the update depends on the direction of g
alone (Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", algorithm 1).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metakern.optim.base import InnerOptimizer, State, Tensors, norms, positive, scaled


class Clipped(InnerOptimizer):
    """An inner optimizer that clips the gradients of each task before another optimizer's update.

    The clipped norm is over all adapted parameters of a task. The factor is that of `torch.nn.utils.clip_grad_norm_`,
    and the meta-gradient goes through it (Pascanu et al. 2013, algorithm 1).

    Args:
        inner: The optimizer that gets the clipped gradients.
        norm: The largest norm, or its initial value.
        learn_norm: Whether the outer loop learns `norm`.

    Raises:
        ValueError: For a norm that is not positive and finite.
        TypeError: For an `inner` that is not an inner optimizer, a norm that is no number, or a learn_norm that is no
            bool.

    >>> import metakern as mk, torch
    >>> inner = mk.optim.Clipped(mk.optim.SGD(lr=1.0), norm=1.0)
    >>> (moved,), _ = inner.update([torch.zeros(2, 2)], [torch.tensor([[3.0, 4.0], [0.3, 0.4]])], ())
    >>> moved
    tensor([[-0.6000, -0.8000],
            [-0.3000, -0.4000]])
    """

    takes_norms = True

    def __init__(self, inner: InnerOptimizer, norm: float, learn_norm: bool = False) -> None:
        super().__init__()
        if not isinstance(inner, InnerOptimizer):
            raise TypeError(f"Clipped: inner must be one of metakern.optim's optimizers, got {type(inner).__name__}")
        positive("Clipped", norm=norm)
        if not isinstance(learn_norm, bool):
            raise TypeError(f"Clipped: learn_norm must be True or False, got {learn_norm!r}")
        self.inner = inner
        self.norm = nn.Parameter(torch.tensor(float(norm))) if learn_norm else float(norm)

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        self.inner.prepare(adapted)

    @property
    def combines(self) -> bool:  # type: ignore[override]
        return type(self).update is Clipped.update and self.inner.combines

    @property
    def takes_losses(self) -> bool:  # type: ignore[override]
        return self.inner.takes_losses

    def init(self, phi: Tensors) -> State:
        return self.inner.init(phi)

    def update(self, phi: Tensors, grads: Tensors, state: State, *losses: Tensor) -> tuple[list[Tensor], State]:
        if grads:
            n = norms(grads) + 1e-6
            limit = self.norm.to(n) if isinstance(self.norm, Tensor) else self.norm
            grads = scaled(grads, torch.where(n < limit, 1, limit / n))
        return self.inner.update(phi, grads, state, *losses)
