"""Prototypical networks: the class of a query is that of the nearest mean of embedded support examples.

    p_c = mean of f(x_i) over the support examples of class c        log P(c | x) = log_softmax_c(-d(f(x), p_c))

The distance d is the squared Euclidean distance, or the negative cosine over a learned temperature. There is no inner
loop: all tasks share the parameters of f, so one forward pass embeds the examples of all of them.

Snell, Swersky, Zemel 2017, "Prototypical networks for few-shot learning", section 2; Chen, Liu, Xu, Darrell, Wang 2021,
"Meta-baseline: exploring simple meta-learning for few-shot learning", section 3.2 (cosine and temperature).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metakern import ops
from metakern.meta.algorithms.maml import counts
from metakern.meta.batches import same_tasks, tasks_of
from metakern.meta.prototypes import check_query, check_support, embedded, labels_of, prototypes, shots_of

DISTANCES = ("euclidean", "cosine")


class ProtoNet(nn.Module):
    """Prototypical networks with MAML's interface, for any `nn.Module` that embeds examples.

    `protonet(support, query)` returns the mean over the tasks of their mean query cross-entropy, a scalar. Its
    `backward()` adds the gradient to the parameters' `.grad`. There is no plan, no chunks of tasks and no captured
    program: without an inner loop, a call is one forward and one backward pass of the model for all tasks.

    A batch has the forms of `metakern.losses.classification`, with the tasks along dimension 0 of every tensor: (x, y),
    (x, y, mask), or a dictionary with labels and maybe mask, whose other entries are keyword arguments of the model.
    Labels are `[T, N]`. Tasks may have different classes and shots: examples with a negative label, or whose mask is
    False, do not count, and a class without an example in a task's support has probability 0 in that task.

    Args:
        model: Maps examples `[B, ...]` to embeddings `[B, D]`, each example by itself. A batch norm in training mode
            takes the statistics of one task's support or query.
        distance: "euclidean" (squared), or "cosine".
        temperature: The initial temperature, by which the cosine is divided; it is learned with the model.
        classes: The number of classes C of a task. None takes the highest label of the support.

    Attributes:
        query_losses: The query loss of each task at the last call, `[T]`, detached; None before the first call.
        log_temperature: The logarithm of the temperature, a parameter; None with the squared distance.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: `distance`, `temperature` or `classes` has another value. At a call: a batch has another form or
            another number of tasks; the model does not return embeddings `[B, D]`; a task has no support example, or
            only one class; a label is not below `classes`; or a query has a class without a support example.

    >>> import torch, metakern as mk
    >>> protonet = mk.ProtoNet(torch.nn.Linear(8, 16))
    >>> x, y = torch.randn(5, 12, 8), torch.arange(12).remainder(4).expand(5, 12)
    >>> protonet((x, y), (x, y)).backward()
    >>> protonet.model.weight.grad.shape
    torch.Size([16, 8])
    """

    def __init__(
        self, model: nn.Module, distance: str = "euclidean", temperature: float = 0.1, classes: int | None = None
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"ProtoNet: model must be an nn.Module, got {type(model).__name__}")
        if distance not in DISTANCES:
            raise ValueError(f"ProtoNet: distance must be euclidean or cosine, got {distance!r}")
        if not temperature > 0 or not math.isfinite(temperature):
            raise ValueError(f"ProtoNet: temperature must be positive, got {temperature}")
        if classes is not None and (not isinstance(classes, int) or classes < 2):
            raise ValueError(f"ProtoNet: classes must be None or an integer of at least 2, got {classes!r}")
        self.model, self.distance, self.classes = model, distance, classes
        cosine = distance == "cosine"
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature))) if cosine else None
        self.query_losses: Tensor | None = None  # [T]

    def forward(self, support: Any, query: Any) -> Tensor:
        """Return the mean query loss over the tasks, a scalar.

        Args:
            support: The examples that make the prototypes, `[T, S, ...]`.
            query: The examples that are classified, `[T, Q, ...]`, with the same tasks.

        Raises:
            ValueError: As the class says.
        """
        losses = self._losses(support, query)
        self.query_losses = losses.detach()
        return losses.mean()

    def log_probabilities(self, support: Any, query: Any) -> Tensor:
        """Return the log-probabilities of the classes of each query, `[T, Q, C]`.

        They are -inf for a class without a support example. The labels of the queries are not read.
        """
        same_tasks(support, query)
        x, labels, classes = self._support(support)
        return self._classified(x, labels, self._embedded(query, "query")[0], classes)

    def adapt(self, support: Any, steps: int | None = None) -> dict[str, Tensor]:
        """Return what a task adds to the model, detached.

        Args:
            support: The examples that make the prototypes, `[T, S, ...]`.
            steps: Has no effect, as there are no inner steps.

        Returns:
            "prototypes", `[T, C, D]`, zeros for a class without an example; and "shots", `[T, C]`, the number of
            examples of each class.
        """
        with torch.no_grad():
            x, labels, classes = self._support(support)
            return {"prototypes": prototypes(x, labels, classes), "shots": shots_of(labels, classes)}

    def evaluate(self, support: Any, query: Any, steps: Sequence[int] = (0,)) -> Tensor:
        """Return the query losses, detached, `[len(steps), T]`; as there are no inner steps, all rows are equal."""
        rows = len(counts(steps))
        with torch.no_grad():
            return self._losses(support, query).expand(rows, -1).clone()

    def _losses(self, support: Any, query: Any) -> Tensor:
        """Return the mean negative log-likelihood of each task's queries, `[T]`; 0 for a task without a query."""
        same_tasks(support, query)
        x, labels, classes = self._support(support)
        y, target = self._embedded(query, "query")
        check_query("ProtoNet", target, shots_of(labels, classes))
        kept = target >= 0
        found = self._classified(x, labels, y, classes).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return torch.where(kept, -found, 0.0).sum(1) / kept.sum(1).clamp(min=1)

    def _support(self, support: Any) -> tuple[Tensor, Tensor, int]:
        """Return the embeddings of the support `[T, S, D]`, the labels `[T, S]` and the number of classes."""
        tasks_of(support, "support")
        labels = labels_of("ProtoNet", "support", support)
        highest = int(labels.max()) if labels.numel() else 0
        classes = max(highest + 1, 2) if self.classes is None else self.classes
        check_support("ProtoNet", labels, classes)
        return *self._embedded(support, "support"), classes

    def _embedded(self, batch: Any, what: str) -> tuple[Tensor, Tensor]:
        """Return the embeddings `[T, N, D]` and the labels `[T, N]` of a batch."""
        labels = labels_of("ProtoNet", what, batch)
        return embedded(self.model, self._called, batch, labels.shape), labels

    def _called(self, *args: Any, **inputs: Any) -> Tensor:
        x = self.model(*args, **inputs)
        if not isinstance(x, Tensor) or x.dim() != 2:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"ProtoNet: model must return embeddings [B, D], got {got}")
        return x

    def _classified(self, support: Tensor, labels: Tensor, query: Tensor, classes: int) -> Tensor:
        """Return the log-probabilities `[T, Q, C]` of embedded queries.

        With norms of 1, -|x - p|² / (2 temperature) is the cosine over the temperature, up to a constant.
        """
        if self.log_temperature is not None:
            scale = (-0.5 * self.log_temperature).exp() * 0.5**0.5
            shots = shots_of(labels, classes)
            support, query = unit(prototypes(support, labels, classes)) * scale, unit(query) * scale
            labels = torch.arange(classes, device=labels.device).where(shots > 0, -1)
        return ops.prototype_log_softmax(support, labels, query, classes)


def unit(x: Tensor) -> Tensor:
    """Return x `[..., D]` divided by its norm; zeros, as of padding, stay zeros, with finite derivatives."""
    squared = x.square().sum(-1, keepdim=True)
    return x * squared.where(squared > 0, 1.0).rsqrt()
