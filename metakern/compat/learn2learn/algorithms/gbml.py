"""learn2learn's GBML: adaptation by gradients that a learned transform changes, one transform T_i for each parameter.

    adapt    u_i = T_i(grad_i loss(phi))        phi_i <- phi_i - lr u_i

With `adapt_transform` the parameters psi of the transforms adapt too: from the second step on, when phi depends on
them, psi <- psi - lr grad_psi loss(phi) comes first.

With a scale for each element it is Meta-SGD (Li et al. 2017), with Kronecker-factored transforms Meta-Curvature (Park,
Oliva 2019) and KFO (Arnold, Iqbal, Sha 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metakern.compat.learn2learn.algorithms.base_learner import BaseLearner
from metakern.compat.learn2learn.optim import DifferentiableSGD, ParameterUpdate
from metakern.compat.learn2learn.utils import clone_module
from metakern.compat.modules import apart, gradients, watched
from metakern.compat.recompute import recomputes


class GBML(BaseLearner):
    """Gradient-based meta-learning with learned transforms of the gradients.

    `clone()` it for a task, call `adapt(loss)` on the clone, and differentiate its next loss.

    Args:
        module: Any module.
        transform: `transform(parameter)` returns the module that transforms this parameter's gradient, or None for no
            transform. It is called once for each parameter.
        lr: The learning rate of `adapt`.
        adapt_transform: Whether the transforms adapt to a task too.
        first_order: Whether to leave out second derivatives.
        allow_unused: Whether a parameter that the loss does not depend on stays as it is in `adapt`; else it is a
            ValueError.
        allow_nograd: Whether a parameter that requires no gradient stays as it is in `adapt`; else it is a ValueError.
        compute_update: The transforms, if they were made already, as for a clone.

    Raises:
        TypeError: If `module` is no `nn.Module`, or if `transform` returns neither a module nor None.

    >>> import torch
    >>> from metakern.compat import learn2learn as l2l
    >>> transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
    >>> gbml = l2l.algorithms.GBML(torch.nn.Linear(8, 4), transform, lr=0.1)
    >>> x, y = torch.randn(10, 8), torch.randn(10, 4)
    >>> learner = gbml.clone()
    >>> learner.adapt((learner(x) - y).square().mean())
    >>> (learner(x) - y).square().mean().backward()
    >>> all(p.grad is not None for p in gbml.parameters())
    True
    """

    def __init__(
        self,
        module: nn.Module,
        transform: Callable[[Tensor], nn.Module | None],
        lr: float = 1.0,
        adapt_transform: bool = False,
        first_order: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        *,
        compute_update: ParameterUpdate | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"GBML: module must be an nn.Module, got {type(module).__name__}")
        super().__init__(module)
        self.transform, self.lr, self.adapt_transform = transform, lr, adapt_transform
        self.first_order, self.allow_unused, self.allow_nograd = first_order, allow_unused, allow_nograd
        made = ParameterUpdate(module.parameters(), transform) if compute_update is None else compute_update
        self.compute_update = made
        self.diff_sgd = DifferentiableSGD(lr)
        self._recomputes = False
        self._source: tuple[nn.Module, ...] = ()  # the original module, in a clone that has not run yet
        self._params_updated = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._source and not torch.compiler.is_compiling():
            source, self._source = self._source, ()
            with watched("GBML", source):
                return self._run(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if not self._recomputes or not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        with apart(self.module) as twin:
            return twin(*args, **kwargs)

    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        adapt_transform: bool | None = None,
    ) -> GBML:
        """Returns a learner for one task, whose module and transforms are clones of this one's.

        Args:
            first_order: As in the constructor, and so are the other arguments; by default as this learner has them.

        Raises:
            ValueError: If the module can't be copied.
        """
        learner = GBML(
            clone_module(self.module),
            self.transform,
            self.lr,
            self.adapt_transform if adapt_transform is None else adapt_transform,
            self.first_order if first_order is None else first_order,
            self.allow_unused if allow_unused is None else allow_unused,
            self.allow_nograd if allow_nograd is None else allow_nograd,
            compute_update=clone_module(self.compute_update),
        )
        learner._recomputes, learner._source = recomputes(self.module), (self.module,)
        return learner

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_nograd: bool | None = None,
        allow_unused: bool | None = None,
    ) -> None:
        """Takes a step on the loss with transformed gradients; call it on a clone.

        Args:
            loss: A scalar, computed with the clone's present parameters.
            first_order: As in the constructor, and so are the other arguments; by default as the learner has them.

        Raises:
            TypeError: If `loss` is no tensor.
            ValueError: If a parameter of the module or, with `adapt_transform`, of the transforms is unused or frozen
                and may not be.
            RuntimeError: If the graph of `loss` was freed or has a reentrant checkpoint.
        """
        if not isinstance(loss, Tensor):
            raise TypeError(f"GBML.adapt: loss must be a tensor, got {type(loss).__name__}")
        second_order = not (self.first_order if first_order is None else first_order)
        allow_nograd = self.allow_nograd if allow_nograd is None else allow_nograd
        allow_unused = self.allow_unused if allow_unused is None else allow_unused
        psi = list(self.compute_update.parameters())
        if self.adapt_transform and self._params_updated and psi:
            if not allow_nograd and not all(p.requires_grad for p in psi):
                raise ValueError(
                    "GBML.adapt: every parameter of the transform must require a gradient, got one that does not: "
                    "pass allow_nograd=True to leave it as it is"
                )
            # The loss is differentiated once more below.
            found = gradients("GBML.adapt", loss, psi, create_graph=second_order, retain_graph=True)
            if not allow_unused and any(g is None and p.requires_grad for g, p in zip(found, psi, strict=True)):
                raise ValueError(
                    "GBML.adapt: loss must depend on every parameter of the transform, got one that it does not depend "
                    "on: pass allow_unused=True to leave it as it is"
                )
            self.diff_sgd(self.compute_update, found)
        keep = second_order or self.adapt_transform
        updates = self.compute_update(
            loss,
            self.module.parameters(),
            create_graph=keep,
            retain_graph=keep,
            allow_unused=allow_unused,
            allow_nograd=allow_nograd,
        )
        self.diff_sgd(self.module, updates)
        self._params_updated = True
