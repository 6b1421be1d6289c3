"""learn2learn's MAML: a module that is cloned for each task, and clones that adapt by their own losses.

    clone    phi = theta                                    a copy of the module with a history
    adapt    phi <- phi - lr grad loss(phi)                 lr one for all
    batch    L(theta) = mean_t query loss_t(phi_K)          the same loop over a batch of tasks, by `metakern.MAML`

Each forward of a clone runs on modules of its own, so that what is recomputed later, by activation checkpointing, is
recomputed with the weights of that forward. Finn, Abbeel, Levine 2017, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import repeat
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metakern import optim
from metakern.compat.learn2learn.algorithms.base_learner import BaseLearner
from metakern.compat.learn2learn.utils import clone_module, update_module
from metakern.compat.modules import Places, apart, fused, gradients, is_ours, same_device, stay, watched
from metakern.compat.recompute import recomputes
from metakern.meta.algorithms import maml as engine

Criterion = Callable[[Any, Any], Tensor]
L = TypeVar("L", bound="Learner")
M = TypeVar("M", bound=nn.Module)


def maml_update(model: M, lr: float | Tensor, grads: Sequence[Tensor | None] | None = None) -> M:
    """phi <- phi - lr grad, in place for the module and out of place for autograd; returns the module.

    grads: a tensor, or None, for each of `model.parameters()`; without it, `update_module` by their attributes.
    """
    return update_module(model) if grads is None else descend("maml_update", model, repeat(lr), grads)


def descend(who: str, model: M, rates: Iterable[float | Tensor], grads: Sequence[Tensor | None]) -> M:
    places = Places(model)
    if len(grads) != len(places.values):
        raise ValueError(
            f"{who}: grads must have an entry for each of the {len(places.values)} parameters, got {len(grads)}"
        )
    places.put(model, _descended(places.values, rates, grads))
    return model


def _descended(phi: list[Tensor], rates: Iterable[float | Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
    return [p if g is None else p - lr * g for p, lr, g in zip(phi, rates, grads, strict=False)]


class Learner(BaseLearner):
    """What MAML and Meta-SGD share: the clone's steps, and the engine for a batch of tasks."""

    first_order: bool

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{type(self).__name__}: model must be an nn.Module, got {type(model).__name__}")
        super().__init__(model)
        self._fused = self._recomputes = self._is_new = False
        # Tuples, for neither the module that a clone is of nor the engine is a part of this one.
        self._source: tuple[nn.Module, ...] = ()
        self._engine: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": ()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_new and not torch.compiler.is_compiling():
            self._is_new = False
            with watched(type(self).__name__, self._source):
                return self._run(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with fused() if self._fused else nullcontext():
            if not self._recomputes or not torch.is_grad_enabled():
                return self.module(*args, **kwargs)
            with apart(self.module) as twin:
                return twin(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Learner:
        """What `to()` and the like do."""
        if not self._source:
            return super()._apply(fn, recurse)
        stay(f"{type(self).__name__}: a clone", (*self.parameters(), *self.buffers()), fn)
        return self

    def _cloned(self, learner: L) -> L:
        learner._source, learner._fused = (self.module,), is_ours(self.module)
        learner._recomputes, learner._is_new = recomputes(self.module), True
        return learner

    def _inner(self) -> optim.SGD:
        """The engine's inner optimizer, of the same rates."""
        raise NotImplementedError

    def _step(
        self,
        loss: Tensor,
        rates: Iterable[float | Tensor],
        first_order: bool | None,
        allow_unused: bool = False,
        allow_nograd: bool = False,
    ) -> None:
        who, places = f"{type(self).__name__}.adapt", Places(self.module)
        phi = places.values
        if not allow_nograd and not all(p.requires_grad for p in phi):
            self._none_frozen(who)
        for source in self._source:
            same_device(who, source, phi)
        first_order = self.first_order if first_order is None else first_order
        grads = gradients(who, loss, phi, create_graph=not first_order)
        for i, g in enumerate(grads):
            if g is None and phi[i].requires_grad and not allow_unused:
                name = [name for name, _ in self.module.named_parameters()][i]
                raise ValueError(
                    f"{who}: loss must depend on every parameter, got one that does not depend on {name!r}: "
                    "with allow_unused=True it stays as it is"
                )
        places.put(self.module, _descended(phi, rates, grads))

    def _none_frozen(self, who: str) -> None:
        for name, p in self.module.named_parameters():
            if not p.requires_grad:
                raise ValueError(
                    f"{who}: every parameter must require a gradient, got {name!r}, which does not: "
                    "with MAML's allow_nograd=True it stays as it is"
                )

    def batch(
        self,
        support: tuple[Any, Any],
        query: tuple[Any, Any],
        loss: Criterion,
        steps: int = 1,
        first_order: bool | None = None,
        **options: Any,
    ) -> Tensor:
        """The mean query loss of a batch of tasks after `steps` of adaptation to the support of each.

        It stands for this loop, and its `backward()` leaves the same gradients:

            error = 0.0
            for t in range(tasks):
                learner = maml.clone()
                for _ in range(steps):
                    learner.adapt(loss(learner(support[0][t]), support[1][t]))
                error = error + loss(learner(query[0][t]), query[1][t]) / tasks

        support, query: (inputs, targets), with the tasks along dimension 0 of every tensor; loss(predictions, targets)
        of one task, the same object at each call, as the plan that is made at the first one is kept for it. options:
        those of `metakern.MAML`, which runs it, such as capture=False; for batches and losses of another form there is
        that class itself. Raises ValueError for a clone, and for frozen parameters without allow_nograd.

        >>> import torch
        >>> from metakern.compat.learn2learn import MAML
        >>> maml, loss = MAML(torch.nn.Linear(8, 4), lr=0.1), torch.nn.CrossEntropyLoss()
        >>> x, y = torch.randn(16, 10, 8), torch.randint(4, (16, 10))
        >>> maml.batch((x, y), (x, y), loss, steps=5).backward()
        """
        first_order = self.first_order if first_order is None else first_order
        if self._source:
            raise ValueError("batch: it must be called on the learner that has the parameters, got a clone of it")
        inner = self._inner()
        key = (steps, first_order, options, inner.lr.initial, *map(id, inner.parameters()))
        if self._engine[:1] != (loss,) or self._engine[1] != key:

            def task_loss(model: nn.Module, batch: tuple[Any, Any]) -> Tensor:
                inputs, targets = batch
                return loss(model(inputs), targets)

            run = engine.MAML(self.module, task_loss, inner, steps, first_order, **options)
            self._engine = loss, key, run
        return self._engine[2](support, query)


class MAML(Learner):
    """MAML around a module: `clone()` for a task, `adapt(loss)` the clone, and differentiate the loss that follows.

    lr: a number, or a tensor that is learned too. `first_order` leaves out second derivatives. `allow_unused` lets
    parameters that a loss does not depend on stay as they are (by default where `allow_nograd`), `allow_nograd` frozen
    ones. A model that was patched by `metakern.patch` runs by metakern's ops in its clones.

    >>> import torch
    >>> from metakern.compat.learn2learn import MAML
    >>> maml = MAML(torch.nn.Linear(8, 4), lr=0.1)
    >>> x, y = torch.randn(10, 8), torch.randn(10, 4)
    >>> learner = maml.clone()
    >>> learner.adapt((learner(x) - y).square().mean())
    >>> (learner(x) - y).square().mean().backward()
    >>> maml.module.weight.grad.shape
    torch.Size([4, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
    ) -> None:
        super().__init__(model)
        if not isinstance(lr, Real | Tensor):
            raise TypeError(f"MAML: lr must be a number or a tensor, got {type(lr).__name__}")
        self.lr = lr
        self.first_order, self.allow_nograd = first_order, allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """A step of gradient descent on the loss, a scalar; arguments that are not given are those of the learner.

        Raises ValueError where the loss does not depend on the learner's parameters as they are now, and where a
        parameter is frozen or unused and nothing allows it; RuntimeError where the loss's graph was freed, or the
        model was moved to another device.
        """
        allow_unused = self.allow_unused if allow_unused is None else allow_unused
        allow_nograd = self.allow_nograd if allow_nograd is None else allow_nograd
        self._step(loss, repeat(self.lr), first_order, allow_unused, allow_nograd)

    def clone(
        self, first_order: bool | None = None, allow_unused: bool | None = None, allow_nograd: bool | None = None
    ) -> MAML:
        """A learner whose module is a `clone_module` of this one's; arguments that are not given are this one's."""
        learner = MAML(
            clone_module(self.module),
            self.lr,
            self.first_order if first_order is None else first_order,
            self.allow_unused if allow_unused is None else allow_unused,
            self.allow_nograd if allow_nograd is None else allow_nograd,
        )
        return self._cloned(learner)

    def _inner(self) -> optim.SGD:
        if not self.allow_nograd:
            self._none_frozen("MAML.batch")
        if not isinstance(self.lr, Tensor) or not self.lr.requires_grad:
            return optim.SGD(lr=float(self.lr))
        if not isinstance(self.lr, nn.Parameter):
            raise ValueError("MAML.batch: lr must be a number or an nn.Parameter, got a tensor with a history")
        inner = optim.SGD(lr=0.0, learn_lr=True)
        inner.lr.value = self.lr
        return inner
