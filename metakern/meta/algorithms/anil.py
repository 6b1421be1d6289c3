"""Almost no inner loop: only the head adapts, the body is meta-learned through it.

Raghu, Raghu, Bengio, Vinyals 2020, "Rapid learning or feature reuse?", section 4.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from metakern.meta.algorithms.maml import MAML
from metakern.meta.batching import Loss
from metakern.meta.parameters import Adapt


class ANIL(MAML):
    """MAML whose inner loop adapts only the head of the model; all other parameters are meta-learned without adapting.

    Args:
        model: The model, as `metakern.MAML` takes it.
        loss: `loss(model, batch)` returns the loss of one task, a scalar tensor.
        adapt: Name patterns or a predicate that select the head. The default head is the last module, in the order of
            `model.modules()`, that owns trainable parameters itself.
        **options: The other arguments of `metakern.MAML`.

    Raises:
        TypeError: As `metakern.MAML` raises it.
        ValueError: As `metakern.MAML` raises it; `adapt` must match a trainable parameter.

    >>> import torch, metakern as mk
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> anil = mk.ANIL(model, mk.losses.classification, steps=3)
    >>> x, y = torch.randn(5, 10, 8), torch.randint(4, (5, 10))
    >>> sorted(anil.adapt((x, y)))
    ['2.bias', '2.weight']
    """

    def __init__(self, model: nn.Module, loss: Loss, adapt: Adapt = None, **options: Any) -> None:
        super().__init__(model, loss, adapt=head_of(model) if adapt is None else adapt, **options)


def head_of(model: nn.Module) -> list[str]:
    """Return the names of the trainable parameters of the last module that owns any.

    A tied parameter has the name of its first place in `model.named_parameters()`.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    owned = [[names[id(p)] for p in m.parameters(recurse=False) if p.requires_grad] for m in model.modules()]
    return next((names for names in reversed(owned) if names), [])
