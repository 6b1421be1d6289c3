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
    """MAML whose inner loop adapts the head alone: by default the last module that owns trainable parameters.

    adapt: name patterns or a predicate, to name another head. Other arguments as MAML's.

    >>> import torch, metakern as mk
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> anil = mk.ANIL(model, mk.losses.classification, steps=3)
    >>> x, y = torch.randn(5, 10, 8), torch.randint(4, (5, 10))
    >>> sorted(anil.adapt((x, y)))
    ['2.bias', '2.weight']
    """

    def __init__(self, model: nn.Module, loss: Loss, adapt: Adapt = None, **options: Any) -> None:
        super().__init__(model, loss, adapt=_head(model) if adapt is None else adapt, **options)


def _head(model: nn.Module) -> list[str]:
    """The names of the last module's own trainable parameters; a tied one has the name of its first place."""
    names = {id(p): name for name, p in model.named_parameters()}
    owned = [[names[id(p)] for p in m.parameters(recurse=False) if p.requires_grad] for m in model.modules()]
    return next((names for names in reversed(owned) if names), [])
