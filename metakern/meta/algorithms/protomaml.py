"""ProtoMAML: MAML whose linear head starts at the prototypes of the task's classes.

    w_c = 2 p_c        b_c = -|p_c|²        w_c · x + b_c = |x|² - |x - p_c|²

With p_c the mean of the head's inputs over the support examples of class c, at theta, the head classifies as a
prototypical network before the first inner step. The inner loop adapts head and body, and the meta-gradient passes
through the head's initial values to the body.

Triantafillou et al. 2020, "Meta-Dataset: a dataset of datasets for learning to learn from few examples", section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metakern.meta.algorithms.maml import MAML, refuse
from metakern.meta.batches import at_step, whole
from metakern.meta.batching import Loss
from metakern.meta.engine import Prepared
from metakern.meta.parameters import Parameters
from metakern.meta.prototypes import check_query, check_support, embedded, labels_of, prototypes, shots_of


class ProtoMAML(MAML):
    """MAML for classifiers, whose linear head each task initialises from its support; exact to second order.

    Batches are those of `metakern.ProtoNet`: (x, y), (x, y, mask), or a dictionary with labels. A class without an
    example in a task's support has probability 0 in that task: its bias is -inf. The head's own values are never used,
    and its parameters get no gradient.

    Args:
        model: A classifier, as `metakern.MAML` takes it, that calls its head once for embeddings `[B, D]`.
        loss: `loss(model, batch)` returns the loss of one task, such as `metakern.losses.classification`.
        head: The name of the head among the model's modules, a linear layer with a bias; by default the last linear
            layer.
        **options: The other arguments of `metakern.MAML`, except `weights`: tasks do not start from the same head.

    Raises:
        TypeError: As `metakern.MAML` raises it.
        ValueError: As `metakern.MAML` raises it. Also if `head` is no linear layer with a bias, or shares a parameter,
            or is not adapted. At a call: a task's support has fewer than two classes; a query has a class without a
            support example; a label is no output of the head; the head's input is not `[B, D]`; or a class has no
            example in a task, and the inner optimizer decays weights, which an infinite bias does not allow.

    >>> import torch, metakern as mk
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    >>> protomaml = mk.ProtoMAML(model, mk.losses.classification, steps=3)
    >>> x, y = torch.randn(5, 12, 8), torch.arange(12).remainder(4).expand(5, 12)
    >>> protomaml((x, y), (x, y)).backward()
    >>> model[0].weight.grad.shape, model[2].weight.grad
    (torch.Size([16, 8]), None)
    """

    def __init__(self, model: nn.Module, loss: Loss, head: str | None = None, **options: Any) -> None:
        refuse("ProtoMAML", options, "weights")
        super().__init__(model, loss, **options | {"weights": "explicit"})
        modules = dict(model.named_modules())
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        self.head = (linear or [""])[-1] if head is None else head
        if self.head not in linear or modules[self.head].bias is None:
            got = repr(head) if isinstance(head, str | None) else type(head).__name__
            raise ValueError(f"ProtoMAML: head must name a linear layer with a bias, got {got}")
        places = [name for _, _, name in Parameters(model, options.get("adapt")).places]
        for name in self._names:
            if places.count(name) != 1:
                raise ValueError(f"ProtoMAML: the head's {name!r} must be adapted and not shared with another module")

    @property
    def _names(self) -> tuple[str, str]:
        """The names of the head's parameters in the model."""
        prefix = f"{self.head}." if self.head else ""
        return f"{prefix}weight", f"{prefix}bias"

    def _prepare(self, *batches: Any, outer: bool = False) -> Prepared:
        prepared = super()._prepare(*batches, outer=outer)
        head: Any = self.model.get_submodule(self.head)
        labels = labels_of("ProtoMAML", "support", at_step(batches[0], 0))
        check_support("ProtoMAML", labels, head.out_features)
        shots = shots_of(labels, head.out_features)
        for query in whole(*batches[1:]):
            check_query("ProtoMAML", labels_of("ProtoMAML", "query", query), shots)
        decay = getattr(self.inner, "weight_decay", None)
        if decay is not None and not decay.absent and not shots.all():
            task, label = (shots == 0).nonzero()[0].tolist()
            raise ValueError(
                "ProtoMAML: inner must have no weight_decay where a task lacks a class of the head, got class"
                f" {label} without an example in task {task}"
            )
        return prepared

    def _initial(self, prepared: Prepared, support: Any) -> dict[str, Tensor]:
        head: Any = self.model.get_submodule(self.head)
        support = at_step(support, 0)
        labels, classes = labels_of("ProtoMAML", "support", support), head.out_features
        x = embedded(self.model, self._embeddings, support, labels.shape)
        p = prototypes(x, labels, classes)
        bias = torch.where(shots_of(labels, classes) > 0, -p.square().sum(-1), -torch.inf)
        values = 2 * p, bias
        return {name: v.to(head.weight.dtype) for name, v in zip(self._names, values, strict=True)}

    def _embeddings(self, *args: Any, **inputs: Any) -> Tensor:
        """Return what the head is called on in a call of the model, `[B, D]`."""
        head = self.model.get_submodule(self.head)
        forward, own, seen = head.forward, head.__dict__.get("forward"), []

        def watched(x: Tensor) -> Tensor:
            seen.append(x)
            return forward(x)

        head.__dict__["forward"] = watched
        try:
            self.model(*args, **inputs)
        finally:
            del head.__dict__["forward"]
            if own is not None:
                head.__dict__["forward"] = own
        if len(seen) != 1 or seen[0].dim() != 2:
            got = [list(x.shape) for x in seen]
            raise ValueError(f"ProtoMAML: the model must call its head once, on embeddings [B, D], got {got}")
        return seen[0]
