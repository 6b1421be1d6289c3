"""Meta-SGD: MAML that learns a learning rate for each element of each parameter along with theta.

Li, Zhou, Chen, Li 2017, "Meta-SGD: learning to learn quickly for few-shot learning", algorithm 1.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from metakern import optim
from metakern.meta.algorithms.maml import MAML
from metakern.meta.batching import Loss


class MetaSGD(MAML):
    """MAML with `metakern.optim.MetaSGD` as the inner optimizer: one learned rate for each element of each parameter.

    Pass `metasgd.parameters()` to the outer optimizer: it holds the model's parameters and the rates.

    Args:
        model: The model, as `metakern.MAML` takes it.
        loss: `loss(model, batch)` returns the loss of one task, a scalar tensor.
        lr: The initial value of all rates.
        **options: The other arguments of `metakern.MAML`, except `inner`.

    Raises:
        TypeError: As `metakern.MAML` raises it; also if `inner` is passed.
        ValueError: As `metakern.MAML` raises it.

    >>> import torch, metakern as mk
    >>> metasgd = mk.MetaSGD(torch.nn.Linear(8, 4), mk.losses.classification, lr=0.05)
    >>> [tuple(p.shape) for p in metasgd.parameters()]
    [(4, 8), (4,), (4, 8), (4,)]
    """

    def __init__(self, model: nn.Module, loss: Loss, lr: float = 0.01, **options: Any) -> None:
        super().__init__(model, loss, inner=optim.MetaSGD(lr), **options)
