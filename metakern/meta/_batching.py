"""Three ways to get the losses of many tasks, each with parameters of its own, from a loss of one task.

    losses(phi, batch) -> [T]        phi: a tensor [T, *shape] for each adapted parameter; batch: a tree, tasks first

fold   the model runs once, natively, with the tasks in its batch dimension and its parameter-owning modules given a
       weight for each task (`_fold.py`); only the loss around it is mapped over tasks.
vmap   `torch.func.vmap` of the whole loss over ordinary autograd. (Derivatives are taken outside of vmap, so only the
       batching rules of forward ops are used: torch 2.13's rule for the double backward of an affine layer_norm is
       wrong.)
loop   a task at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only

from metakern.meta._fold import Fold
from metakern.meta._functions import Fused
from metakern.meta._parameters import Parameters

Loss = Callable[[nn.Module, Any], Tensor]


class Batching(Protocol):
    name: str

    def losses(self, phi: Sequence[Tensor], batch: Any) -> Tensor: ...


def tasks_of(batch: Any, what: str = "batch") -> int:
    """The number of tasks in a tree of tensors; raises ValueError where they disagree."""
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not leaves:
        raise ValueError(f"MAML: {what} must hold tensors, got {type(batch).__name__}")
    if any(leaf.dim() == 0 for leaf in leaves):
        raise ValueError(f"MAML: {what} must have the tasks along dimension 0 of every tensor, got a scalar")
    if any(leaf.requires_grad for leaf in leaves):
        raise ValueError(f"MAML: {what} must not require a gradient, got a tensor that does")
    sizes = sorted({leaf.shape[0] for leaf in leaves})
    if len(sizes) > 1:
        raise ValueError(f"MAML: {what} must have one number of tasks along dimension 0, got {sizes}")
    if sizes[0] == 0:
        raise ValueError(f"MAML: {what} must hold at least one task, got 0")
    return sizes[0]


def ordinary(batch: Any) -> Any:
    """A batch that autograd takes: tensors made in inference mode, as by Lightning's validation loop, are copied."""
    return tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, batch)


def select(batch: Any, index: int | slice | Tensor) -> Any:
    """One task, or some tasks, of a tree of tensors."""
    return tree_map_only(Tensor, lambda t: t[index], batch)


class Loop:
    """A task at a time."""

    name = "loop"

    def __init__(self, parameters: Parameters, loss: Loss) -> None:
        self.parameters, self.loss = parameters, loss

    def losses(self, phi: Sequence[Tensor], batch: Any) -> Tensor:
        return torch.stack([self._one([p[t] for p in phi], select(batch, t)) for t in range(phi[0].shape[0])])

    def _one(self, phi: Sequence[Tensor], batch: Any) -> Tensor:
        with self.parameters.bound(phi), Fused():
            return scalar(self.loss(self.parameters.model, batch))


class Vmap(Loop):
    """`torch.func.vmap` over the tasks."""

    name = "vmap"

    def losses(self, phi: Sequence[Tensor], batch: Any) -> Tensor:
        return torch.func.vmap(self._one, randomness="different")(tuple(phi), batch)


class Folded(Loop):
    """The tasks in the model's batch dimension."""

    name = "fold"

    def __init__(self, parameters: Parameters, loss: Loss) -> None:
        super().__init__(parameters, loss)
        self.fold = Fold(parameters)

    def losses(self, phi: Sequence[Tensor], batch: Any) -> Tensor:
        def one(batch: Any) -> Tensor:
            return scalar(self.loss(self.parameters.model, batch))

        with self.fold.active(phi), Fused():
            return torch.func.vmap(one, randomness="different")(batch)


WAYS: dict[str, Callable[[Parameters, Loss], Batching]] = {"fold": Folded, "vmap": Vmap, "loop": Loop}


def scalar(value: Any) -> Tensor:
    """Checks what the user's loss returned."""
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"MAML: loss must return a scalar tensor for one task, got {got}")
    return value


@contextmanager
def exact_kernels() -> Iterator[None]:
    """PyTorch's own kernels that have second derivatives: math attention, no cuDNN recurrence, no fused encoder."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
