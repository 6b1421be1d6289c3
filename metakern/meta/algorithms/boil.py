"""Body only update in the inner loop: everything adapts but the head, so that the representation must change.

Oh, Yoo, Kim, Yun 2021, "BOIL: towards representation change for few-shot learning", section 3.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from metakern.meta.algorithms.anil import head_of
from metakern.meta.algorithms.maml import MAML
from metakern.meta.batching import Loss
from metakern.meta.parameters import Adapt, selector


class BOIL(MAML):
    """MAML whose inner loop leaves the head of the model as it is; the head is meta-learned without adapting.

    Args:
        model: The model, as `metakern.MAML` takes it.
        loss: `loss(model, batch)` returns the loss of one task, a scalar tensor.
        head: Name patterns or a predicate that select the head. The default head is that of `metakern.ANIL`.
        **options: The other arguments of `metakern.MAML`, except `adapt`.

    Raises:
        TypeError: As `metakern.MAML` raises it.
        ValueError: As `metakern.MAML` raises it; there must be a trainable parameter outside of the head.

    >>> import torch, metakern as mk
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> boil = mk.BOIL(model, mk.losses.classification, steps=3)
    >>> x, y = torch.randn(5, 10, 8), torch.randint(4, (5, 10))
    >>> sorted(boil.adapt((x, y)))
    ['0.bias', '0.weight']
    """

    def __init__(self, model: nn.Module, loss: Loss, head: Adapt = None, **options: Any) -> None:
        in_head = selector(head_of(model) if head is None else head)
        body = [name for name, p in model.named_parameters() if p.requires_grad and not in_head(name)]
        if not body:
            raise ValueError("BOIL: model must have trainable parameters outside of the head, got none")
        super().__init__(model, loss, adapt=body.__contains__, **options)
