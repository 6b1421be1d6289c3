"""First-order MAML: the inner gradients are treated as constants.

dL/dtheta ≈ mean_t grad Q_t(phi_K)        (Finn et al. 2017, section 5.2; Nichol et al. 2018, section 2)
"""

from __future__ import annotations

from typing import Any

from torch import nn

from metakern.meta.algorithms.maml import MAML
from metakern.meta.batching import Loss


class FOMAML(MAML):
    """MAML without second derivatives: cheaper, but its meta-gradient is biased.

    Args:
        model: The model, as `metakern.MAML` takes it.
        loss: `loss(model, batch)` returns the loss of one task, a scalar tensor.
        **options: The other arguments of `metakern.MAML`, except `first_order`, which is True.

    Raises:
        TypeError: As `metakern.MAML` raises it; also if `first_order` is passed.
        ValueError: As `metakern.MAML` raises it.

    >>> import torch, metakern as mk
    >>> mk.FOMAML(torch.nn.Linear(8, 4), mk.losses.classification, steps=3).first_order
    True
    """

    def __init__(self, model: nn.Module, loss: Loss, **options: Any) -> None:
        super().__init__(model, loss, first_order=True, **options)
