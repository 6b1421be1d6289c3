"""Random numbers in trials: each task draws the same ones, whatever the batching.

A batching of a model that adds noise, drops units or samples can only be compared with plain autograd on the same
random numbers. So within `Alike` the n-th random operation is seeded with n. Where it gets the tensors of T tasks at
once, along dimension 0, it is called for each task separately. What one task draws alone is recorded, so that a
batching whose tasks would share random numbers is found.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

_RANDOM = torch.Tag.nondeterministic_seeded
ZEROS = torch.ops.aten._efficientzerotensor.default  # has no memory; PyTorch crashes on it under a dispatch mode


class DrawsError(RuntimeError):
    """Under this batching, tasks would share random numbers or draw other ones than alone."""


class Alike(TorchDispatchMode):
    """Within the block, random operations draw for each of `tasks` tasks what one task draws alone.

    Args:
        tasks: The number of tasks that each random operation gets at once.
        expected: `taken` of one task alone, to be compared.

    Attributes:
        taken: For each random operation so far its name and how many numbers each task drew.

    Raises:
        DrawsError: Within the block, where the tasks would share random numbers or draw other ones than alone.
    """

    def __init__(self, tasks: int = 1, expected: list[tuple[str, int]] | None = None) -> None:
        super().__init__()
        self.tasks, self.expected, self.taken = tasks, expected, list[tuple[str, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is ZEROS:
            return torch.zeros(*args, **kwargs)
        if _RANDOM not in func.tags or dropout_of(func, args, kwargs) == 0:
            return func(*args, **kwargs)
        number, generator = len(self.taken), kwargs.get("generator")

        def call(args: Any, kwargs: Any) -> Any:
            if generator is None:
                torch.manual_seed(number)
            else:
                generator.manual_seed(number)
            return func(*args, **kwargs)

        result = call(args, kwargs) if self.tasks == 1 else self._for_each_task(func, call, args, kwargs)
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.taken.append((str(func), (max(sizes) if sizes else 0) // self.tasks))
        if self.expected is not None and (
            number >= len(self.expected) or self.taken[number][1] != self.expected[number][1]
        ):
            raise DrawsError("its tasks would not draw the random numbers that each draws alone")
        return result

    def _for_each_task(self, func: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        shapes = [leaves[i].shape for i in where] or [leaf for leaf in args if isinstance(leaf, list | tuple)]
        lengths = [shape[0] if len(shape) else 0 for shape in shapes]
        if not lengths or any(not n or n % self.tasks for n in lengths):
            raise DrawsError("its tasks would draw the same random numbers")
        parts = []
        for t in range(self.tasks):
            if where:
                inner = list(leaves)
                for i in where:
                    n = leaves[i].shape[0] // self.tasks
                    inner[i] = leaves[i][t * n : (t + 1) * n]
                parts.append(call(*tree_unflatten(inner, spec)))
            else:
                smaller = tuple([a[0] // self.tasks, *a[1:]] if isinstance(a, list | tuple) else a for a in args)
                parts.append(call(smaller, kwargs))
        if func._schema.is_mutable:
            return args[0]
        return tree_map(lambda *same: torch.cat(same) if isinstance(same[0], Tensor) else same[0], *parts)


def dropout_of(func: Any, args: Any, kwargs: Any) -> float | None:
    """Return the dropout of fused attention, which draws nothing if it is 0; None for other operations."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return args[i] if i < len(args) else kwargs.get("dropout_p", argument.default_value)
    return None


def python_states() -> tuple[Any, Any]:
    """Return the states of the generators of `random` and NumPy, to be compared."""
    numpy = np.random.get_state()
    return random.getstate(), str([np.asarray(part).tolist() for part in numpy])
