"""learn2learn's Meta-SGD: MAML with a learned rate for each element of each parameter.

    adapt    phi_i <- phi_i - lr_i grad_i loss(phi)         lr_i of the shape of phi_i

Li, Zhou, Chen, Li 2017, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from metakern import optim
from metakern.compat.learn2learn.algorithms.maml import Learner, descend
from metakern.compat.learn2learn.utils import clone_module, clone_parameters

M = TypeVar("M", bound=nn.Module)


def meta_sgd_update(model: M, lrs: Iterable[Tensor], grads: Sequence[Tensor | None]) -> M:
    """As `maml_update`, with one of `lrs` for each parameter."""
    return descend("meta_sgd_update", model, lrs, grads)


class MetaSGD(Learner):
    """As MAML, with a learning rate for each element of each parameter, which `parameters()` holds too.

    lr is where the rates start; lrs, one tensor for each parameter, are taken as they are.

    >>> import torch
    >>> from metakern.compat.learn2learn import MetaSGD
    >>> list(MetaSGD(torch.nn.Linear(8, 4), lr=0.1).state_dict())
    ['module.weight', 'module.bias', 'lrs.0', 'lrs.1']
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        first_order: bool = False,
        lrs: Sequence[Tensor] | nn.ParameterList | None = None,
    ) -> None:
        super().__init__(model)
        if lrs is None:
            lrs = nn.ParameterList([nn.Parameter(p.detach().new_full(p.shape, lr)) for p in model.parameters()])
        count = len(list(model.parameters()))
        if len(lrs) != count:
            raise ValueError(f"MetaSGD: lrs must have an entry for each of the {count} parameters, got {len(lrs)}")
        self.lrs: Any = lrs
        self.first_order = first_order

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """A step on the loss, a scalar, with the learned rates; raises as MAML's does."""
        self._step(loss, self.lrs, first_order)

    def clone(self) -> MetaSGD:
        """A learner whose module and rates are clones of this one's."""
        lrs = clone_parameters(self.lrs)
        return self._cloned(MetaSGD(clone_module(self.module), first_order=self.first_order, lrs=lrs))

    def _inner(self) -> optim.SGD:
        self._none_frozen("MetaSGD.batch")
        if not all(isinstance(lr, nn.Parameter) for lr in self.lrs):
            raise ValueError("MetaSGD.batch: lrs must be nn.Parameters, got tensors with a history")
        inner = optim.MetaSGD()
        for (name, _), lr in zip(self.module.named_parameters(), self.lrs, strict=True):
            inner.lr.values[name] = lr
        return inner
