"""CAVIA: the inner loop changes a few context parameters alone, which start at zero for every task.

    c_0 = 0        c_{k+1} = U(c_k, grad_c S_t(theta, c_k))        L(theta) = mean_t Q_t(theta, c_K)

Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson 2019, "Fast context adaptation via meta-learning", section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metakern.meta.algorithms.maml import MAML
from metakern.meta.batches import tasks_of
from metakern.meta.batching import Loss
from metakern.meta.engine import Prepared
from metakern.meta.parameters import Adapt


class CAVIA(MAML):
    """MAML whose inner loop changes context parameters alone; all other parameters are meta-learned through it.

    The context parameters start at zero for each task, and so get no gradient. What a task adds to the model is a
    small vector, and the inner loop can take large steps.

    Args:
        model: The model, with context parameters, such as those of `metakern.nn.Contextual`.
        loss: `loss(model, batch)` returns the loss of one task, a scalar tensor.
        context: Name patterns or a predicate that select the context parameters.
        **options: The other arguments of `metakern.MAML`, except `adapt`.

    Raises:
        TypeError: As `metakern.MAML` raises it.
        ValueError: As `metakern.MAML` raises it; the model must have context parameters.

    >>> import torch, metakern as mk
    >>> layer = mk.nn.Contextual(torch.nn.Linear(8, 16), size=5)
    >>> model = torch.nn.Sequential(layer, torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> cavia = mk.CAVIA(model, mk.losses.classification, inner=mk.optim.SGD(lr=1.0), steps=2)
    >>> x, y = torch.randn(5, 10, 8), torch.randint(4, (5, 10))
    >>> {name: tuple(c.shape) for name, c in cavia.adapt((x, y)).items()}
    {'0.context': (5, 5)}
    """

    def __init__(self, model: nn.Module, loss: Loss, context: Adapt = ("context", "*.context"), **options: Any) -> None:
        super().__init__(model, loss, adapt=context, **options)

    def _initial(self, prepared: Prepared, support: Any) -> dict[str, Tensor]:
        adapted, tasks = prepared.parameters.adapted, tasks_of(support)
        return {name: torch.zeros_like(p).expand(tasks, *p.shape) for name, p in adapted.items()}
