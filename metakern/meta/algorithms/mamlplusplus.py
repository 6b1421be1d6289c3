"""MAML++: query losses after every inner step, rates of their own for layers and steps, first order at the beginning.

    L(theta) = mean_t sum_{k=1}^{K} w_k Q_t(phi_k)        w_k from 1/K each to w_K alone, as the training goes on

Antoniou, Edwards, Storkey 2019, "How to train your MAML", section 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metakern.meta.algorithms.maml import MAML, refuse
from metakern.meta.batching import Loss
from metakern.meta.parameters import Adapt, Parameters
from metakern.optim import SGD, InnerOptimizer, StepOffsets

LEAST = 0.03  # the weight that each loss but the last keeps, in 1/K


class MAMLPlusPlus(MAML):
    """MAML with the multi-step loss, the rates and the annealing of MAML++ (Antoniou et al. 2019, section 4).

    A training call computes K query losses instead of one. The paper's cosine schedule of the outer rate is
    `torch.optim.lr_scheduler.CosineAnnealingLR`. Its batch norms take the statistics of the batch of each step, as
    `nn.BatchNorm2d` does here in training mode, and in the paper's own code.

    Args:
        model: The model, as `metakern.MAML` takes it.
        loss: `loss(model, batch)` returns the loss of one task, a scalar tensor.
        inner: The optimizer of the inner loop; by default SGD with a learned rate for each parameter and step.
        steps: The number of inner steps, K, at least 1.
        anneal: The number of training calls over which the weights of the query losses go from 1/K each to the last
            alone, of which 0.03/K stay with each other loss (the paper's multi-step loss annealing).
        first_order_calls: The number of training calls at the beginning that take no second derivatives (the paper's
            derivative-order annealing).
        lr: The initial inner rate, where `inner` is None.
        per_step_norms: Whether norms have weights and biases of their own for each inner step (the paper's per-step
            batch normalization), which the outer loop learns and the inner loop does not adapt: by
            `metakern.optim.StepOffsets`, for all layers with "norm" in the name of their class.
        **options: The other arguments of `metakern.MAML`, except `first_order` and `query_weights`.

    Attributes:
        calls: The number of training calls so far, a buffer, so that training can go on from a state dict.

    Raises:
        TypeError: As `metakern.MAML` raises it.
        ValueError: As `metakern.MAML` raises it; also if `steps` is 0, `anneal` or `first_order_calls` is negative, or
            `per_step_norms` is not a bool, or is True and no norm has a parameter that `adapt` selects.

    >>> import torch, metakern as mk
    >>> maml = mk.MAMLPlusPlus(torch.nn.Linear(8, 4), mk.losses.classification, steps=2, anneal=100)
    >>> x, y = torch.randn(5, 10, 8), torch.randint(4, (5, 10))
    >>> maml((x, y), (x, y)).backward()
    >>> maml.query_weights
    (0.0, 0.5, 0.5)
    """

    calls: Tensor

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        inner: InnerOptimizer | None = None,
        steps: int = 5,
        anneal: int = 1000,
        first_order_calls: int = 0,
        lr: float = 0.01,
        per_step_norms: bool = False,
        **options: Any,
    ) -> None:
        refuse("MAMLPlusPlus", options, "first_order", "query_weights")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"MAMLPlusPlus: steps must be an integer of at least 1, got {steps!r}")
        for name, value in (("anneal", anneal), ("first_order_calls", first_order_calls)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"MAMLPlusPlus: {name} must be an integer of at least 0, got {value!r}")
        if not isinstance(per_step_norms, bool):
            raise ValueError(f"MAMLPlusPlus: per_step_norms must be True or False, got {per_step_norms!r}")
        inner = SGD(lr, learn_lr=True, per="parameter", steps=steps) if inner is None else inner
        if per_step_norms and isinstance(model, nn.Module):
            inner = StepOffsets(inner, _norms(model, options.get("adapt")), steps)
        super().__init__(model, loss, inner, steps, **options)
        self.anneal, self.first_order_calls = anneal, first_order_calls
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, support: Any, query: Any) -> Tensor:
        """Return the mean outer loss over the tasks, as `metakern.MAML` does.

        The call counts as a training call where gradients are enabled.
        """
        calls = int(self.calls)
        self.query_weights, self.first_order = self.weights(calls), calls < self.first_order_calls
        value = super().forward(support, query)
        self.calls += torch.is_grad_enabled()
        return value

    def weights(self, calls: int) -> tuple[float, ...]:
        """Return the weights of the query losses after 0, 1, ..., K steps, after a number of training calls."""
        done = min(calls / self.anneal, 1.0) if self.anneal else 1.0
        each = max(1 - done, LEAST) / self.steps
        return (0.0, *[each] * (self.steps - 1), 1 - (self.steps - 1) * each)


def _norms(model: nn.Module, adapt: Adapt) -> list[str]:
    """Return the names of the adapted parameters of norms. Raises ValueError if there are none."""
    norms = {id(module) for module in model.modules() if "norm" in type(module).__name__.lower()}
    names = [name for module, _, name in Parameters(model, adapt).places if id(module) in norms]
    if not names:
        raise ValueError("MAMLPlusPlus: per_step_norms must have norms with adapted parameters, got none")
    return names
