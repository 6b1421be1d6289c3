"""learn2learn's MAML: a learner that is cloned for each task, and clones that adapt to the task's loss.

    clone    phi = theta                                    phi is part of the graph, so that derivatives reach theta
    adapt    phi <- phi - lr grad loss(phi)                 one learning rate for all parameters
    batch    L(theta) = mean_t query loss_t(phi_K)          the same loop for a batch of tasks, by `metakern.MAML`

Where the model may use activation checkpointing, each forward of a clone runs on module objects of its own, so that it
is recomputed with its own weights. Finn, Abbeel, Levine 2017, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice, repeat
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metakern import optim
from metakern.compat.learn2learn.algorithms.base_learner import BaseLearner
from metakern.compat.learn2learn.utils import clone_module, update_module
from metakern.compat.modules import Places, apart, gradients, same_device, stay, surroundings, watched
from metakern.compat.recompute import recomputes
from metakern.meta.algorithms import maml as engine

Criterion = Callable[[Any, Any], Tensor]
L = TypeVar("L", bound="Learner")
M = TypeVar("M", bound=nn.Module)


def maml_update(model: M, lr: float | Tensor, grads: Sequence[Tensor | None] | None = None) -> M:
    """Replaces each parameter p of the model by p - lr grad, a new tensor, so that derivatives reach p and grad.

    Args:
        model: A module whose parameters may be replaced by tensors, as those of a clone.
        lr: The learning rate, a number or a tensor.
        grads: A tensor, or None for no step, for each of `model.parameters()`. Without it, parameters are updated by
            their attribute `update`, as by `update_module`, whatever `lr` is.

    Returns:
        The same model.

    Raises:
        ValueError: If there are not as many gradients as parameters.

    >>> import torch
    >>> from metakern.compat.learn2learn import clone_module, maml_update
    >>> net = torch.nn.Linear(3, 1, bias=False)
    >>> clone = maml_update(clone_module(net), lr=0.5, grads=[torch.ones(1, 3)])
    >>> torch.equal(clone.weight, net.weight - 0.5)
    True
    """
    return update_module(model) if grads is None else descend("maml_update", model, repeat(lr), grads)


def descend(who: str, model: M, rates: Iterable[float | Tensor], grads: Sequence[Tensor | None]) -> M:
    places = Places(model)
    if len(grads) != len(places.values):
        raise ValueError(
            f"{who}: grads must have an entry for each of the {len(places.values)} parameters, got {len(grads)}"
        )
    places.put(model, _descended(who, places.values, rates, grads))
    return model


def _descended(
    who: str, phi: list[Tensor], rates: Iterable[float | Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor]:
    rates = list(islice(rates, len(phi)))
    if len(rates) != len(phi):
        raise ValueError(f"{who}: lrs must have an entry for each of the {len(phi)} parameters, got {len(rates)}")
    numbers = [float(lr) for lr in rates if not isinstance(lr, Tensor)]
    present = [g for g in grads if g is not None]
    if phi and len(numbers) == len(present) == len(phi):
        return list(torch._foreach_sub(phi, torch._foreach_mul(present, numbers)))  # the same numbers, less Python
    return [p if g is None else p - lr * g for p, lr, g in zip(phi, rates, grads, strict=True)]


class Learner(BaseLearner):
    """Base of MAML and MetaSGD: steps of a clone, and a meta-gradient of a batch of tasks by `metakern.MAML`."""

    first_order: bool

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{type(self).__name__}: model must be an nn.Module, got {type(model).__name__}")
        super().__init__(model)
        self._recomputes = self._is_new = False
        self._within: Callable[[], AbstractContextManager] = nullcontext
        # In tuples, so that neither the original of a clone nor the engine becomes a submodule.
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
        with self._within():
            if not self._recomputes or not torch.is_grad_enabled():
                return self.module(*args, **kwargs)
            with apart(self.module) as twin:
                return twin(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Learner:
        """Refuses the changes that `to()`, `half()` and their like would make to a clone, and makes them elsewhere."""
        if not self._source:
            return super()._apply(fn, recurse)
        stay(f"{type(self).__name__}: a clone", (*self.parameters(), *self.buffers()), fn)
        return self

    def _cloned(self, learner: L) -> L:
        learner._recomputes, learner._is_new = recomputes(self.module), True
        learner._source, learner._within = (self.module,), surroundings(self.module, learner._recomputes)
        return learner

    def _inner(self) -> optim.SGD:
        """Returns an inner optimizer of `metakern.optim` with this learner's rates."""
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
                    "pass allow_unused=True to leave it as it is"
                )
        places.put(self.module, _descended(who, phi, rates, grads))

    def _none_frozen(self, who: str) -> None:
        for name, p in self.module.named_parameters():
            if not p.requires_grad:
                raise ValueError(
                    f"{who}: every parameter must require a gradient, got {name!r}, which does not: "
                    "use MAML with allow_nograd=True to leave it as it is"
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
        """Returns the mean query loss of a batch of tasks, each after `steps` steps on its support loss.

        It replaces this loop, and its `backward()` gives the same gradients:

            error = 0.0
            for t in range(tasks):
                learner = maml.clone()
                for _ in range(steps):
                    learner.adapt(loss(learner(support[0][t]), support[1][t]))
                error = error + loss(learner(query[0][t]), query[1][t]) / tasks

        `metakern.MAML` computes it for all tasks at once; use that class for batches or losses of another form.

        Args:
            support: (inputs, targets), [T, B, ...]: the tasks are along dimension 0 of every tensor.
            query: The same, for as many tasks.
            loss: `loss(predictions, targets)` is the loss of one task, a scalar. Pass the same object at each call, as
                the plan is made at the first call and kept for this object.
            steps: The number of inner steps.
            first_order: Whether to leave out second derivatives; by default as the learner does.
            **options: Passed on to `metakern.MAML`, such as `capture=False`.

        Returns:
            A scalar.

        Raises:
            TypeError: If an option is unknown, or of the wrong type.
            ValueError: If it is called on a clone, if a parameter is frozen without `allow_nograd`, if a learned rate
                is no `nn.Parameter`, if an option is out of range, if support and query have different numbers of
                tasks, or if no batching is exact for this model and loss.

        >>> import torch
        >>> from metakern.compat.learn2learn import MAML
        >>> maml, loss = MAML(torch.nn.Linear(8, 4), lr=0.1), torch.nn.CrossEntropyLoss()
        >>> x, y = torch.randn(16, 10, 8), torch.randint(4, (16, 10))
        >>> maml.batch((x, y), (x, y), loss, steps=5).backward()
        """
        first_order = self.first_order if first_order is None else first_order
        if self._source:
            raise ValueError("batch: it must be called on the learner that was cloned, got a clone")
        inner = self._inner()
        key = (steps, first_order, options, inner.lr.initial, *map(id, inner.parameters()))
        if self._engine[:2] != (loss, key) or self._engine[2].model is not self.module:

            def task_loss(model: nn.Module, batch: tuple[Any, Any]) -> Tensor:
                inputs, targets = batch
                return loss(model(inputs), targets)

            run = engine.MAML(self.module, task_loss, inner, steps, first_order, **options)
            self._engine = loss, key, run
        return self._engine[2](support, query)


class MAML(Learner):
    """MAML for a module: `clone()` it for a task, call `adapt(loss)` on the clone, and differentiate its next loss.

    Clones of a model patched by `metakern.patch` run metakern's ops. Finn, Abbeel, Levine 2017, algorithm 1.

    Args:
        model: Any module. It is the submodule `module` of the learner.
        lr: The learning rate of `adapt`, a number or a tensor. An `nn.Parameter` is learned: it is one of
            `parameters()`.
        first_order: Whether to leave out second derivatives.
        allow_unused: Whether a parameter that the loss does not depend on stays as it is in `adapt`; else it is a
            ValueError. By default as `allow_nograd`.
        allow_nograd: Whether a parameter that requires no gradient stays as it is in `adapt`; else it is a ValueError.

    Raises:
        TypeError: If `model` is no `nn.Module`, or `lr` neither a number nor a tensor.

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
        """Takes a step of gradient descent on the loss; call it on a clone.

        Args:
            loss: A tensor of one element, computed with the clone's present parameters.
            first_order: As in the constructor, and so are the other arguments; by default as the learner has them.

        Raises:
            TypeError: If `loss` is no tensor.
            ValueError: If `loss` has more than one element or no graph, if it does not depend on the present
                parameters, or if a parameter is unused or frozen and may not be.
            RuntimeError: If the graph of `loss` was freed or has a reentrant checkpoint, or if the model was moved to
                another device.
        """
        allow_unused = self.allow_unused if allow_unused is None else allow_unused
        allow_nograd = self.allow_nograd if allow_nograd is None else allow_nograd
        self._step(loss, repeat(self.lr), first_order, allow_unused, allow_nograd)

    def clone(
        self, first_order: bool | None = None, allow_unused: bool | None = None, allow_nograd: bool | None = None
    ) -> MAML:
        """Returns a learner for one task, whose module is a `clone_module` of this one's.

        Args:
            first_order: As in the constructor, and so are the other arguments; by default as this learner has them.

        Raises:
            ValueError: If the module can't be copied.
        """
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
            raise ValueError(
                "MAML.batch: lr must be a number or an nn.Parameter, got a tensor that requires a gradient"
            )
        inner = optim.SGD(lr=0.0, learn_lr=True)
        inner.lr.value = self.lr
        return inner
