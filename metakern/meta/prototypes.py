"""Prototypes of classes: the mean embedding of each class's support examples, for batches with the tasks first.

Examples with a negative label do not count. A class without an example in a task has the prototype zero there, and 0
shots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.losses import labelled
from metakern.meta.batches import mapped, select


def labels_of(of: str, what: str, batch: Any) -> Tensor:
    """Return the labels of a batch, `[T, N]`, int64. Raises ValueError, for the algorithm `of`, if it has no such."""
    labels = labelled(batch, f"{of}: {what}")[2]
    if labels.dim() != 2 or labels.is_floating_point():
        raise ValueError(f"{of}: {what} must have integer labels [T, N], got {labels.dtype} {list(labels.shape)}")
    return labels.long()


def embedded(model: nn.Module, call: Callable[..., Tensor], batch: Any, shape: torch.Size) -> Tensor:
    """Return the embeddings `[T, N, D]` of a batch of `shape` T, N, from one call for the examples of all tasks.

    If a batch norm of the model takes the statistics of its batch, there is one call for each task, and the running
    statistics stay as they are.
    """
    args, inputs, _ = labelled(batch, "batch")
    if any(map(_takes_statistics, model.modules())):
        tasks = (select((args, inputs), t) for t in range(shape[0]))
        with _untracked(model):
            x = torch.cat([call(*args, **inputs) for args, inputs in tasks])
    else:
        args, inputs = mapped(lambda t: t.flatten(0, 1), (args, inputs))
        x = call(*args, **inputs)
    if len(x) != shape.numel():
        raise ValueError(f"MAML: labels must be one for each example, got {list(shape)} labels for {len(x)} examples")
    return x.unflatten(0, shape)


def membership(labels: Tensor, classes: int) -> Tensor:
    """Return whether an example has a class, `[T, C, N]`, given labels `[T, N]`."""
    return labels.unsqueeze(1) == torch.arange(classes, device=labels.device).unsqueeze(1)


def shots_of(labels: Tensor, classes: int) -> Tensor:
    """Return the number of examples of each class, `[T, C]`, int64, given labels `[T, N]`."""
    return membership(labels, classes).sum(-1)


def prototypes(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the mean embedding of each class, `[T, C, D]`, for embeddings x `[T, N, D]`."""
    member = membership(labels, classes).to(x.dtype)
    kept = torch.where((labels >= 0).unsqueeze(-1), x, 0.0)
    return member @ kept / member.sum(-1, keepdim=True).clamp(min=1)


def check_support(of: str, labels: Tensor, classes: int) -> None:
    """Raise ValueError for a label that is no class, and for a task with fewer than two classes."""
    if labels.numel() and labels.max() >= classes:
        raise ValueError(f"{of}: labels must be below the {classes} classes, got {int(labels.max())}")
    known = (shots_of(labels, classes) > 0).sum(1)
    if (known < 2).any():
        task = int((known < 2).nonzero()[0])
        raise ValueError(
            f"{of}: support must hold examples of at least two classes in each task, got"
            f" {'one' if known[task] else 'none'} in task {task}"
        )


def check_query(of: str, labels: Tensor, shots: Tensor) -> None:
    """Raise ValueError for a query whose class has no example in the support of its task."""
    known = F.pad(shots > 0, (0, 1)).gather(1, labels.clamp(0, shots.shape[1]))
    wrong = (labels >= 0) & ~known
    if wrong.any():
        task, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{of}: query must have classes of its task's support, got class {int(labels[task, place])} in task {task}"
        )


def _takes_statistics(module: nn.Module) -> bool:
    """Whether the embedding of an example depends on the others of its batch, through a batch norm."""
    norm = nn.modules.batchnorm._BatchNorm
    return isinstance(module, norm) and (module.training or module.running_mean is None)


@contextmanager
def _untracked(model: nn.Module) -> Iterator[None]:
    """Within the block, batch norms in training mode do not update their running statistics."""
    norms = [m for m in model.modules() if _takes_statistics(m) and m.track_running_stats]
    try:
        for module in norms:
            module.track_running_stats = False  # type: ignore[assignment]
        yield
    finally:
        for module in norms:
            module.track_running_stats = True  # type: ignore[assignment]
