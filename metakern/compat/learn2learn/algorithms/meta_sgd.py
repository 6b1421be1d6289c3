"""learn2learn's Meta-SGD: MAML with a learned learning rate for each element of each parameter.

    adapt    phi_i <- phi_i - lr_i grad_i loss(phi)         lr_i has the shape of phi_i

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
    """Replaces each parameter p of the model by p - lr grad, a new tensor, so that derivatives reach p, lr and grad.

    Args:
        model: A module whose parameters may be replaced by tensors, as those of a clone.
        lrs: A tensor for each of `model.parameters()`, of its shape or one that broadcasts to it.
        grads: A tensor, or None for no step, for each of them.

    Returns:
        The same model.

    Raises:
        ValueError: If there are not as many gradients as parameters.

    >>> import torch
    >>> from metakern.compat.learn2learn import clone_module, meta_sgd_update
    >>> net = torch.nn.Linear(3, 1, bias=False)
    >>> clone = meta_sgd_update(clone_module(net), [torch.full((1, 3), 0.5)], [torch.ones(1, 3)])
    >>> torch.equal(clone.weight, net.weight - 0.5)
    True
    """
    return descend("meta_sgd_update", model, lrs, grads)


class MetaSGD(Learner):
    """Meta-SGD for a module: MAML with a learning rate for each element of each parameter, learned as `lrs`.

    `clone()` it for a task, call `adapt(loss)` on the clone, and differentiate its next loss. Li, Zhou, Chen, Li 2017,
    algorithm 1.

    Args:
        model: Any module. It is the submodule `module` of the learner.
        lr: The value at which all rates start.
        first_order: Whether to leave out second derivatives.
        lrs: The rates themselves, a tensor for each parameter, in place of `lr`.

    Raises:
        TypeError: If `model` is no `nn.Module`.
        ValueError: If there are not as many `lrs` as parameters.

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
        """Takes a step on the loss with the learned rates; call it on a clone.

        Args:
            loss: A tensor of one element, computed with the clone's present parameters.
            first_order: Whether to leave out second derivatives; by default as the learner does.

        Raises:
            TypeError: If `loss` is no tensor.
            ValueError: If `loss` has more than one element or no graph, if it does not depend on each of the present
                parameters, or if a parameter is frozen.
            RuntimeError: If the graph of `loss` was freed or has a reentrant checkpoint, or if the model was moved to
                another device.
        """
        self._step(loss, self.lrs, first_order)

    def clone(self) -> MetaSGD:
        """Returns a learner for one task, whose module and rates are clones of this one's.

        Raises:
            ValueError: If the module can't be copied.
        """
        lrs = clone_parameters(self.lrs)
        return self._cloned(MetaSGD(clone_module(self.module), first_order=self.first_order, lrs=lrs))

    def _inner(self) -> optim.SGD:
        self._none_frozen("MetaSGD.batch")
        if not all(isinstance(lr, nn.Parameter) for lr in self.lrs):
            raise ValueError("MetaSGD.batch: lrs must be nn.Parameters, got other tensors")
        inner = optim.MetaSGD()
        for (name, _), lr in zip(self.module.named_parameters(), self.lrs, strict=True):
            inner.lr.values[name] = lr
        return inner
