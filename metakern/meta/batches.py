"""Batches: trees of tensors with the tasks along dimension 0.

A tree is made of lists, tuples, named tuples, dictionaries of any kind (also transformers' BatchEncoding), dataclasses
and `types.SimpleNamespace`. All its tensors have the tasks along dimension 0. Everything else in it (None, strings,
numbers, NumPy arrays) is the same for all tasks and is passed to the loss as it is.

Where the inner steps take different data, a `PerStep` holds a batch for each of them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

Rebuild = Callable[[Sequence[Any]], Any]
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclasses.dataclass(frozen=True, init=False)
class PerStep:
    """A batch for each inner step, in place of one for all.

    As a support, it holds the batches of steps 0, ..., K - 1. As a query, it holds those of the losses after 0, ..., K
    steps; batches of losses that are not taken may be None.

    Args:
        *batches: The batches, with the same tasks.

    Raises:
        ValueError: There are none.

    >>> import torch, metakern as mk
    >>> maml = mk.MAML(torch.nn.Linear(8, 4), mk.losses.classification, steps=2, capture=False)
    >>> first, second, query = ((torch.randn(5, 10, 8), torch.randint(4, (5, 10))) for _ in range(3))
    >>> maml(mk.PerStep(first, second), query).shape
    torch.Size([])
    """

    batches: tuple[Any, ...]

    def __init__(self, *batches: Any) -> None:
        if not batches:
            raise ValueError("PerStep: batches must hold one for each inner step, got none")
        object.__setattr__(self, "batches", batches)

    @classmethod
    def split(cls, batch: Any) -> PerStep:
        """Return the batches `[T, ...]` that a batch `[T, K, ...]` holds along dimension 1 of every tensor.

        Raises:
            ValueError: The tensors differ in the size of dimension 1, or have none.
        """
        sizes = {t.shape[1] if t.dim() > 1 else 0 for t in tensors(batch)}
        if len(sizes) != 1 or not (steps := max(sizes)):
            raise ValueError(f"PerStep: tensors must have the steps along dimension 1, got sizes {sorted(sizes)}")
        return cls(*(mapped(partial(torch.select, dim=1, index=k), batch) for k in range(steps)))


@dataclasses.dataclass(frozen=True)
class Outer:
    """What the outer loop minimises: for each task, a weighted sum of its query losses after some inner steps.

    Attributes:
        batch: The query batch, or a `PerStep` with one for each number of steps from 0 to K.
        steps: After how many inner steps the query loss counts, ascending.
        weights: `[T, len(steps)]`, or None where all are 1.
    """

    batch: Any
    steps: tuple[int, ...]
    weights: Tensor | None = None

    @property
    def last(self) -> int:
        """The number of inner steps that count."""
        return self.steps[-1]

    def weighted(self, losses: Tensor, k: int) -> Tensor:
        """Return the query losses `[T]` after k steps, times their weights."""
        return losses if self.weights is None else losses * self.weights[:, self.steps.index(k)]


def per_step(support: Any, steps: int) -> Any:
    """Return the batches that a function of the number of a step returns as a `PerStep`, and other supports as given.

    Without steps, it is called once all the same, as the batch tells the number of tasks.
    """
    if isinstance(support, FunctionType | MethodType | partial):
        return PerStep(*(support(k) for k in range(max(steps, 1))))
    return support


def at_step(batch: Any, k: int) -> Any:
    """Return the batch of step k, or of the loss after k steps."""
    return batch.batches[k] if isinstance(batch, PerStep) else batch


def whole(*batches: Any) -> list[Any]:
    """Return the batches that the loss gets: those within each `PerStep` and `Outer`, and the others themselves."""
    opened = [batch.batch if isinstance(batch, Outer) else batch for batch in batches]
    parts = [batch.batches if isinstance(batch, PerStep) else (batch,) for batch in opened]
    return [part for group in parts for part in group if part is not None]


def flatten(tree: Any) -> tuple[list[Any], Rebuild]:
    """Return the leaves of a tree, and a function that builds such a tree from other leaves."""
    if type(tree) is tuple and all(isinstance(leaf, Tensor) for leaf in tree):  # most batches: the same, but faster
        return list(tree), tuple
    leaves: list[Any] = []
    build = _opened(tree, leaves)
    return leaves, lambda values: build(iter(values))


def structure(tree: Any) -> tuple:
    """Return a hashable value that is equal for trees which differ only in the sizes and values of their tensors."""
    leaves, _ = flatten(tree)
    return (containers(tree), *map(_kind, leaves))


def select(tree: Any, index: int | slice | Tensor) -> Any:
    """Return the tree with each tensor indexed along dimension 0: one task, or some tasks."""
    return mapped(lambda t: t[index], tree)


def mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return the tree with `function(tensor)` in place of each tensor."""
    leaves, rebuild = flatten(tree)
    return rebuild([function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]


def ordinary(tree: Any) -> Any:
    """Return the batch with ordinary copies of its inference tensors (as of Lightning's validation), for autograd."""
    if not any(t.is_inference() for t in tensors(tree)):
        return tree
    return mapped(lambda t: t.clone() if t.is_inference() else t, tree)


def over_tasks(function: Callable[..., Tensor], tree: Any, *more: Any) -> Tensor:
    """Return `torch.func.vmap` of `function(tree, *more)` over the tasks of the tree's tensors and of `more`."""
    leaves, rebuild = flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def one(carried: tuple, *more: Any) -> Tensor:
        inner = list(leaves)
        for i, tensor in zip(where, carried, strict=True):
            inner[i] = tensor
        return function(rebuild(inner), *more)

    return torch.func.vmap(one, randomness="different")(tuple(leaves[i] for i in where), *more)


def tasks_of(tree: Any, what: str = "batch") -> int:
    """Return the number of tasks in a batch.

    Raises ValueError if it has no tensors, no tasks or no elements, if its tensors disagree, or if a tensor is a
    scalar, is nested or requires a gradient. `what` is the name of the batch in messages.
    """
    leaves = tensors(tree)
    if not leaves:
        raise ValueError(
            f"MAML: {what} must hold tensors, got {type(tree).__name__}: torch.as_tensor makes one of a NumPy array"
        )
    for leaf in leaves:
        if leaf.is_nested:
            raise ValueError(f"MAML: {what} must hold padded tensors, got a nested one: see metakern.pad_tasks")
        if leaf.dim() == 0:
            raise ValueError(f"MAML: {what} must have the tasks along dimension 0 of every tensor, got a scalar")
        if leaf.requires_grad:
            raise ValueError(f"MAML: {what} must not require a gradient, got a tensor that does")
    sizes = sorted({leaf.shape[0] for leaf in leaves})
    if len(sizes) > 1:
        raise ValueError(
            f"MAML: {what} must have one number of tasks along dimension 0, got {sizes}: use in the "
            "loss what all tasks share, or expand it to [T, ...]"
        )
    if sizes[0] == 0:
        raise ValueError(f"MAML: {what} must hold at least one task, got 0")
    if not any(leaf.numel() for leaf in leaves):
        raise ValueError(f"MAML: {what} must hold examples, got tensors of sizes {[list(t.shape) for t in leaves]}")
    return sizes[0]


def same_tasks(support: Any, query: Any) -> int:
    """Return the number of tasks of two batches. Raises ValueError if they differ, or as `tasks_of` does."""
    tasks, others = tasks_of(support, "support"), tasks_of(query, "query")
    if tasks != others:
        raise ValueError(f"MAML: query must have the {tasks} tasks of support, got {others}")
    return tasks


def two_tasks(tree: Any, again: int = 0) -> Any:
    """Return two tasks of a batch, changed so that they differ in every tensor, as far as its values allow.

    Noise of a tenth of their spread is added to floating-point tensors. A tensor of different whole numbers (tokens,
    labels, masks, counts) is permuted in the second task instead, if both tasks have the same one. `again` asks for
    milder changes: 1 only shifts rows where the tasks are equal, 2 changes nothing.
    """
    random = torch.Generator().manual_seed(0)
    index = torch.arange(2, device="cpu") % tasks_of(tree)

    def told_apart(tensor: Tensor) -> Tensor:
        pair = tensor.detach()[index.to(tensor.device)].clone()
        if again == 2 or pair[0].numel() == 0:
            return pair
        if pair.is_floating_point() and again == 0 and (_constant(pair) or not torch.equal(pair, pair.round())):
            spread = pair.double().std().nan_to_num(0.0)
            scale = 0.1 * (spread if spread > 0 else pair.double().abs().mean() + 0.1)
            moved = torch.randn(pair.shape, generator=random, dtype=torch.float64, device="cpu").to(scale)
            return pair + (scale * moved).to(pair)
        if torch.equal(pair[0], pair[1]) and pair.dim() > 1:
            if again == 0:
                order = torch.randperm(pair[1].numel(), generator=random, device="cpu").to(pair.device)
                pair[1] = pair[1].flatten()[order].view(pair[1].shape)
            else:
                pair[1] = pair[1].roll(1, 0)
        return pair

    return mapped(told_apart, tree)


def _constant(tensor: Tensor) -> bool:
    """Whether all elements are equal, so that permuting them changes nothing."""
    return bool(tensor.min() == tensor.max())


def pad_tasks(tasks: Sequence[Any]) -> Any:
    """Stack tasks of unequal size into one batch, padded to the largest task, with a mask.

    Tensors are padded with 0 in every dimension, except integer targets, which are padded with -100, the label that
    `metakern.losses` ignore. In a dictionary of tensors, the targets are the entries "labels" and "targets"; in a tuple
    or a list, the last tensor.

    Args:
        tasks: For each task a dictionary, tuple or list of tensors `[N, ...]`. Sizes may differ between tasks.

    Returns:
        A dictionary, list or (also for a named tuple) tuple with tensors `[T, N, ...]`, N the greatest size, and one
        more entry: a boolean mask `[T, N]` that is True where a task has an example. It is `batch["mask"]`, or the last
        item of the tuple or list.

    Raises:
        ValueError: There are no tasks; a task is no dictionary, tuple or list; or tasks differ in structure, in the
            number of dimensions of a tensor, or in dtype or device.

    >>> import torch, metakern as mk
    >>> x, y, mask = mk.pad_tasks([(torch.ones(3, 2), torch.tensor([0, 1, 1])), (torch.ones(1, 2), torch.tensor([1]))])
    >>> x.shape, y.tolist(), mask.tolist()
    (torch.Size([2, 3, 2]), [[0, 1, 1], [1, -100, -100]], [[True, True, True], [True, False, False]])
    """
    if not tasks:
        raise ValueError("pad_tasks: tasks must hold at least one task, got none")
    first = tasks[0]
    if not isinstance(first, tuple | list | Mapping):
        raise ValueError(f"pad_tasks: a task must be a dictionary or a tuple of tensors, got {type(first).__name__}")
    if len({structure(task) for task in tasks}) > 1:
        raise ValueError("pad_tasks: tasks must have one structure, with tensors of the same dimensions and dtypes")
    flat = [flatten(task) for task in tasks]
    names = list(first) if isinstance(first, Mapping) and len(first) == len(flat[0][0]) else [None] * len(flat[0][0])
    columns: list[Any] = []
    for i, column in enumerate(zip(*(leaves for leaves, _ in flat), strict=True)):
        if not isinstance(column[0], Tensor):
            columns.append(column[0])
            continue
        target = names[i] in ("labels", "targets") or (names[i] is None and i == len(names) - 1)
        fill = -100 if target and not column[0].is_floating_point() and column[0].dtype != torch.bool else 0
        sizes = [max(t.shape[d] for t in column) for d in range(column[0].dim())]
        padded = column[0].new_full((len(tasks), *sizes), fill)
        for t, tensor in enumerate(column):
            place: Any = (t, *(slice(n) for n in tensor.shape))
            padded[place] = tensor
        columns.append(padded)
    counts = [
        next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 0) for leaves, _ in flat
    ]
    device = next((leaf.device for leaf in columns if isinstance(leaf, Tensor)), None)
    mask = torch.arange(max(counts), device=device)[None] < torch.tensor(counts, device=device)[:, None]
    batch = flat[0][1](columns)
    if isinstance(first, Mapping):
        return {**batch, "mask": mask}
    return [*batch, mask] if isinstance(first, list) else (*batch, mask)


def _opened(value: Any, leaves: list[Any]) -> Callable[[Iterator[Any]], Any]:
    """Append the leaves of a value to `leaves`; return a function that builds such a value from other leaves."""
    kind = type(value)
    if isinstance(value, Tensor) or kind in _PLAIN:
        leaves.append(value)
        return next
    if isinstance(value, list | tuple):
        parts = [_opened(part, leaves) for part in value]
        if hasattr(value, "_fields"):
            return lambda rest: kind(*(part(rest) for part in parts))
        return lambda rest: kind([part(rest) for part in parts])
    names, put = _fields(value)
    if put is None:
        if any(isinstance(held, Tensor) for held in getattr(value, "__dict__", {}).values()):
            raise ValueError(
                "MAML: batches must be made of tensors, lists, tuples, dictionaries and dataclasses,"
                f" got a {kind.__name__}"
            )
        leaves.append(value)
        return next
    opened = {name: _opened(part, leaves) for name, part in names.items()}
    return lambda rest: put({name: part(rest) for name, part in opened.items()})


def _fields(value: Any) -> tuple[dict[Any, Any], Callable[[dict], Any] | None]:
    """Return the named parts of a container and a function that builds one like it from other parts.

    For a value that is no container they are {} and None.
    """
    if type(value) is dict:
        return value, lambda parts: parts
    if isinstance(value, dict):

        def like(parts: dict) -> Any:
            other = copy.copy(value)
            for name, part in parts.items():
                other[name] = part
            return other

        return dict(value), like
    if isinstance(value, UserDict):

        def holding(parts: dict) -> Any:
            other = copy.copy(value)
            other.data = parts
            return other

        return dict(value.data), holding
    if isinstance(value, Mapping):
        return dict(value), type(value)
    if (dataclasses.is_dataclass(value) and not isinstance(value, type)) or isinstance(value, SimpleNamespace):
        fields = vars(value)

        def replaced(parts: dict) -> Any:
            other = copy.copy(value)
            for name, part in parts.items():
                object.__setattr__(other, name, part)
            return other

        return dict(fields), replaced
    return {}, None


def containers(value: Any) -> Any:
    """Return the types and keys of the containers of a tree, hashable."""
    if isinstance(value, Tensor) or type(value) in _PLAIN:
        return None
    if isinstance(value, list | tuple):
        return (type(value), *map(containers, value))
    names, put = _fields(value)
    return None if put is None else (type(value), tuple(names), *map(containers, names.values()))


def _kind(leaf: Any) -> Any:
    """Return the part of a leaf that belongs to the structure: all but the sizes and values of a tensor."""
    if isinstance(leaf, Tensor):
        return (leaf.dim(), leaf.dtype, leaf.device)
    if isinstance(leaf, np.ndarray):
        return (leaf.shape, leaf.dtype.str, leaf.tobytes())
    if isinstance(leaf, float) and leaf != leaf:
        return (float, "nan")
    return (type(leaf), leaf) if type(leaf) in _PLAIN or isinstance(leaf, np.generic) else (type(leaf), id(leaf))
