"""Parameters that are divided between the processes of a training while no step uses them, by PyTorch's FSDP2.

    between steps      process r holds the r-th part of each parameter, of its gradient, and of its moments in AdamW
    in a step          all_gather of the parameters; losses and gradients of the process's own tasks; reduce_scatter of
                       the gradients, to their sums; AdamW on the own parts

The inner loop needs the parameters whole, because each task adapts all of them, so they are gathered together and not
one layer after another. A scalar, such as one inner rate for all parameters, can't be divided: each process holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metakern.dialogue import processes

__all__ = ["Sharding", "clip", "gathered", "part_of", "replicated"]


class _Root(nn.Module):
    """The module that FSDP2 gathers before its forward pass, which is that of any module over the same parameters."""

    def __init__(self, algorithm: nn.Module) -> None:
        super().__init__()
        self.algorithm = algorithm

    def forward(self, module: nn.Module, *batches: Any) -> Tensor:
        return module(*batches).clone()  # FSDP2 warns of views


class Sharding:
    """The parameters of an algorithm, divided between processes or, if not `active`, whole in each of them.

    Args:
        algorithm: Its parameters, all of one device, are divided in place.
        wanted: Whether to divide them; one process on its own divides nothing.
    """

    def __init__(self, algorithm: nn.Module, wanted: bool) -> None:
        self.active = wanted and processes.size() > 1
        self._root = _Root(algorithm)
        self._depth = 0
        if self.active:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(next(algorithm.parameters()).device.type, (processes.size(),))
            scalars = {p for p in algorithm.parameters() if p.ndim == 0}
            root: Any = fully_shard(self._root, mesh=mesh, ignored_params=scalars)
            root.set_gradient_divide_factor(1.0)  # a sum, as each loss has its weight already
            root.set_force_sum_reduction_for_comms(True)  # gloo knows no other

    def __call__(self, module: nn.Module, support: Any, query: Any) -> Tensor:
        """Return the loss of a module over parameters of the algorithm; its backward pass adds up the gradients.

        The gradients of scalars are those of the process alone.
        """
        if not self.active:
            return module(support, query)
        with processes.together():
            self._root.unshard()  # type: ignore[operator]
        return _Then.apply(self._root(module, support, query), self._complete)

    def _complete(self) -> None:
        """Give each parameter that has a gradient in any process one in this process, before they are added up.

        Where processes skip different layers, FSDP2 would add the gradients of different parameters.
        """
        parameters = [p for p in self._root.parameters() if p.ndim]
        for p, has in zip(parameters, processes.have_gradients(parameters), strict=True):
            if has and p.grad is None:
                p.grad = torch.zeros_like(p)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a loss that the sharding has returned, and add them up over processes."""
        try:
            loss.backward()
        except RuntimeError as error:
            if self.active and (isinstance(error, dist.DistBackendError) or "gloo" in str(error)):
                raise processes.LostProcessError(processes.LOST) from error
            raise

    @contextmanager
    def whole(self, change: bool = False) -> Iterator[None]:
        """Within the block, parameters are whole in all processes, without gradients.

        Args:
            change: Keep what the block has written into them.
        """
        if not self.active or self._depth:
            yield
            return
        root: Any = self._root
        with processes.together():
            root.unshard()
        self._depth += 1
        try:
            yield
            whole = {name: p.detach().clone() for name, p in root.named_parameters()} if change else {}
        finally:
            self._depth -= 1
            root.reshard()
        with torch.no_grad():
            for name, p in root.named_parameters():
                if name in whole:
                    p.copy_(part_of(whole[name], p))


class _Then(torch.autograd.Function):
    """The identity, which has a function called at the end of the backward pass, before what FSDP2 does there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> tuple:
        torch.autograd.Variable._execution_engine.queue_callback(ctx.call)
        return ct, None


def replicated(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return those of `tensors` that each process holds whole."""
    return [x for x in tensors if not _is_divided(x)]


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor, with the parts of all processes if it is divided."""
    with processes.together():
        return tensor.full_tensor() if _is_divided(tensor) else tensor  # type: ignore[attr-defined]


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that each process has whole, divided as `like` is."""
    if not _is_divided(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    part: Any = like
    return distribute_tensor(tensor, part.device_mesh, part.placements, src_data_rank=None)


def clip(parameters: Sequence[Tensor], largest: float) -> Tensor:
    """Scale the gradients of parameters so that their norm together is at most `largest`; return the norm before."""
    kinds = [[p for p in parameters if _is_divided(p) is divided] for divided in (False, True)]
    gradients = [[p.grad for p in kind if p.grad is not None] for kind in kinds if kind]
    with processes.together():
        norms = [gathered(nn.utils.get_total_norm(kind)) for kind in gradients]
        norm = torch.stack(norms).norm() if len(norms) > 1 else norms[0]
        for kind in kinds:
            nn.utils.clip_grads_with_norm_(kind, largest, norm)
    return norm


def _is_divided(tensor: Tensor) -> bool:
    """Whether a tensor is PyTorch's DTensor, whose module is not imported where nothing is divided."""
    return hasattr(tensor, "full_tensor")
