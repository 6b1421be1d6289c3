"""Reptile: move the initialisation toward the adapted parameters of each task.

    dL/dtheta := mean_t (theta - phi_K)        (Nichol, Achiam, Schulman 2018, algorithm 2, the batched version)

With one task per batch it is the serial version, algorithm 1. The gradient uses neither second derivatives nor the
query batch. A call still returns the query loss after adaptation, to monitor training.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from metakern.meta.algorithms.maml import MAML
from metakern.meta.batches import Outer, at_step
from metakern.meta.batching import Loss
from metakern.meta.engine import Prepared


class Reptile(MAML):
    """Reptile's gradient with MAML's interface.

    The arguments are those of `metakern.MAML`; `strategy`, `first_order` and `query_weights` have no effect, as neither
    second derivatives nor gradients of the query are taken. Parameters that are not adapted, and learned
    hyper-parameters of the inner optimizer, get no gradient.

    Raises:
        TypeError: As `metakern.MAML` raises it.
        ValueError: As `metakern.MAML` raises it.

    >>> import torch, metakern as mk
    >>> model = torch.nn.Linear(8, 4)
    >>> x, y = torch.randn(5, 10, 8), torch.randint(4, (5, 10))
    >>> mk.Reptile(model, mk.losses.classification, steps=5)((x, y), (x, y)).backward()
    >>> model.weight.grad.shape
    torch.Size([4, 8])
    """

    def __init__(self, model: nn.Module, loss: Loss, **options: Any) -> None:
        super().__init__(model, loss, **options | {"first_order": True, "query_weights": None})

    def _meta_gradient(
        self, prepared: Prepared, support: Any, outer: Outer, *start: list[Tensor]
    ) -> list[Tensor | None]:
        unroll, theta = self._loop(prepared, *start), self._theta(prepared, support, *start)
        *_, phi = unroll.trajectory(theta, support, self.steps)
        moved = [(start - end).sum(0) for start, end in zip(theta, unroll.formed(phi), strict=True)]
        hyper = unroll.inner.hyper_parameters()
        return [
            unroll.query(phi, at_step(outer.batch, self.steps)),
            *moved,
            *[None] * (len(prepared.shared) + len(hyper)),
        ]
