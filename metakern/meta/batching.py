"""Three batchings: ways to compute the losses of many tasks, each with its own parameters, from a loss of one task.

    losses(phi, batch) -> [T]        phi: a tensor [T, *shape] for each adapted parameter; batch: a tree, tasks first

fold   The model runs once with the tasks in its batch dimension; the modules that own adapted parameters use a weight
       for each task (`fold.py`). Only the loss around the model is mapped over the tasks.
vmap   `torch.func.vmap` of the whole loss. Derivatives are taken outside of vmap, so that only the batching rules of
       forward operations are used: PyTorch 2.13's rule for the double backward of an affine layer_norm is wrong.
loop   One task at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from metakern.meta.batches import over_tasks, select, structure
from metakern.meta.fold import Fold
from metakern.meta.functions import FusedFunctions, Repaired
from metakern.meta.parameters import Parameters
from metakern.meta.state import every_module
from metakern.ops.core.plain import plain_operations

Loss = Callable[[nn.Module, Any], Tensor]


class Batching(Protocol):
    """A way to compute the losses of all tasks of a batch, `[T]`, for parameters `phi` `[T, *shape]`."""

    name: str

    def losses(self, phi: Sequence[Tensor], batch: Any) -> Tensor: ...


class Loop:
    """Run the loss for one task at a time."""

    name = "loop"

    def __init__(self, parameters: Parameters, loss: Loss, plain: bool = False) -> None:
        self.parameters, self.loss, self.plain = parameters, loss, plain

    def losses(self, phi: Sequence[Tensor], batch: Any) -> Tensor:
        return torch.stack([self.one(select(batch, t), [p[t] for p in phi]) for t in range(phi[0].shape[0])])

    def one(self, batch: Any, phi: Sequence[Tensor]) -> Tensor:
        with self.parameters.bound(phi), self._operations():
            return scalar(self.loss(self.parameters.model, batch))

    def _operations(self) -> AbstractContextManager:
        """Return the mode in which the loss runs: metakern's ops, or PyTorch's own operations (`plain`)."""
        if not self.plain:
            return FusedFunctions()
        both = ExitStack()
        both.enter_context(plain_operations())
        both.enter_context(Repaired())
        return both


class Vmap(Loop):
    """Map the loss over the tasks by `torch.func.vmap`."""

    name = "vmap"

    def losses(self, phi: Sequence[Tensor], batch: Any) -> Tensor:
        return over_tasks(self.one, batch, tuple(phi))


class Folded(Loop):
    """Run the model once with all tasks in its batch dimension; map only the loss around it over the tasks."""

    name = "fold"

    def __init__(self, parameters: Parameters, loss: Loss, plain: bool = False) -> None:
        super().__init__(parameters, loss, plain)
        self.fold = Fold(parameters, self._operations)

    def losses(self, phi: Sequence[Tensor], batch: Any) -> Tensor:
        def one(batch: Any) -> Tensor:
            return scalar(self.loss(self.parameters.model, batch))

        with self.fold.active(phi, structure(batch)), self._operations():
            return over_tasks(one, batch)


WAYS: dict[str, Callable[..., Batching]] = {"fold": Folded, "vmap": Vmap, "loop": Loop}


def scalar(value: Any) -> Tensor:
    """Return the value of the user's loss. Raises ValueError unless it is a scalar tensor."""
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"MAML: loss must return a scalar tensor for one task, got {got}")
    return value


# Implementations of attention, each with the functions that read and set whether it may be used. `sdpa_kernel` does the
# same, in a time that counts beside a captured program's.
_ATTENTIONS = [
    (name, getattr(torch._C, f"_get_{name}_sdp_enabled"), getattr(torch._C, f"_set_sdp_use_{name}"))
    for name in ("cudnn", "flash", "mem_efficient", "math", "overrideable")
    if hasattr(torch._C, f"_get_{name}_sdp_enabled")
]


@contextmanager
def exact_kernels(model: nn.Module | None = None) -> Iterator[None]:
    """Within the block PyTorch uses kernels that have second derivatives.

    These are math attention, and neither cuDNN's nor oneDNN's recurrent layers nor the fused transformer encoder.
    Batch norms in training mode get no running statistics: their output does not depend on them, and they stay what
    they are.
    """
    fast, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    modules = [] if model is None else every_module(model)
    recurrent = model is None or any(isinstance(module, nn.RNNBase) for module in modules)
    with ExitStack() as undo:
        undo.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        if recurrent and cudnn:  # sets only the switch: `cudnn.flags` reads other settings, which may raise
            undo.callback(setattr, torch.backends.cudnn, "enabled", cudnn)
            torch.backends.cudnn.enabled = False
        if recurrent and torch._C._get_mkldnn_enabled():  # oneDNN's LSTM (float32 only) has no second derivatives
            undo.callback(torch._C._set_mkldnn_enabled, True)
            torch._C._set_mkldnn_enabled(False)
        for module in modules:
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats:
                undo.callback(module._buffers.update, dict(module._buffers))
                module._buffers.update(dict.fromkeys(module._buffers))
        for name, is_used, use in _ATTENTIONS:
            if is_used() is not (is_wanted := name == "math"):
                undo.callback(use, not is_wanted)
                use(is_wanted)
        yield
