"""First-order MAML: the inner gradients are taken for constants.

dL/dtheta ≈ mean_t grad Q_t(phi_K)        (Finn et al. 2017, section 5.2; Nichol et al. 2018, section 2)
"""

from __future__ import annotations

from typing import Any

from torch import nn

from metakern.meta.algorithms.maml import MAML
from metakern.meta.batching import Loss


class FOMAML(MAML):
    """MAML without second derivatives: cheaper, and biased. Arguments as MAML's.

    >>> import torch, metakern as mk
    >>> mk.FOMAML(torch.nn.Linear(8, 4), mk.losses.classification, steps=3).first_order
    True
    """

    def __init__(self, model: nn.Module, loss: Loss, **options: Any) -> None:
        super().__init__(model, loss, first_order=True, **options)
