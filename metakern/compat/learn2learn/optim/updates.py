"""Steps with transformed gradients: of a module within a task, and of an optimizer that learns while it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from metakern.compat.learn2learn.optim.transforms import Transform
from metakern.compat.learn2learn.utils import update_module
from metakern.compat.modules import differentiated


class ParameterUpdate(nn.Module):
    """A module that computes gradients as `torch.autograd.grad` does, and changes each by a learned transform.

    Args:
        parameters: The parameters for which transforms are made.
        transform: `transform(parameter)` returns the module that transforms this parameter's gradient, or None for no
            transform.

    Raises:
        TypeError: If `transform` returns neither a module nor None.

    >>> import torch
    >>> from metakern.compat import learn2learn as l2l
    >>> net = torch.nn.Linear(3, 1)
    >>> update = l2l.optim.ParameterUpdate(net.parameters(), lambda p: l2l.nn.Scale(p.shape, alpha=0.5))
    >>> [u.detach() for u in update(net(torch.ones(1, 3)).sum(), net.parameters())]
    [tensor([[0.5000, 0.5000, 0.5000]]), tensor([0.5000])]
    """

    def __init__(self, parameters: Iterable[Tensor], transform: Transform) -> None:
        super().__init__()
        made = [transform(p) for p in parameters]
        for t in made:
            if t is not None and not isinstance(t, nn.Module):
                raise TypeError(f"ParameterUpdate: transform must return a module or None, got {type(t).__name__}")
        modules = [t for t in made if t is not None]
        self.transforms_modules = nn.ModuleList(modules)
        numbers = iter(range(len(modules)))
        self.transforms_indices = [None if t is None else next(numbers) for t in made]

    def forward(
        self,
        loss: Tensor,
        parameters: Iterable[Tensor],
        create_graph: bool = False,
        retain_graph: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
    ) -> list[Tensor | None]:
        """Returns the update of each parameter: its transformed gradient.

        Args:
            loss: A scalar.
            parameters: As many parameters as transforms were made for, in the same order, such as those of a clone.
            create_graph: Whether derivatives pass through the gradients.
            retain_graph: Whether the loss's graph is kept; `create_graph` keeps it too.
            allow_unused: Whether the loss may be independent of a parameter, whose update is then None.
            allow_nograd: Whether a parameter may require no gradient; its update is then None.

        Raises:
            ValueError: If there is another number of parameters, or one that is unused or frozen and may not be.
            RuntimeError: If the graph of `loss` was freed or has a reentrant checkpoint.
        """
        phi = list(parameters)
        if len(phi) != len(self.transforms_indices):
            raise ValueError(
                f"ParameterUpdate: parameters must be the {len(self.transforms_indices)} that transforms were made "
                f"for, got {len(phi)}"
            )
        wanted = [p for p in phi if p.requires_grad]
        if not allow_nograd and len(wanted) < len(phi):
            raise ValueError(
                "ParameterUpdate: every parameter must require a gradient, got one that does not: pass "
                "allow_nograd=True to leave it as it is"
            )
        found = iter(differentiated("ParameterUpdate", loss, wanted, create_graph, retain_graph or create_graph))
        updates: list[Tensor | None] = []
        for p, number in zip(phi, self.transforms_indices, strict=True):
            g = next(found) if p.requires_grad else None
            if g is None and p.requires_grad and not allow_unused:
                raise ValueError(
                    f"ParameterUpdate: loss must depend on every parameter, got one of shape {list(p.shape)} that it "
                    "does not depend on: pass allow_unused=True to leave it as it is"
                )
            updates.append(g if g is None or number is None else self.transforms_modules[number](g))
        return updates


class DifferentiableSGD(nn.Module):
    """Replaces each parameter p of a module by p - lr g, a new tensor, so that derivatives reach p and g.

    Args:
        lr: The learning rate.

    >>> import torch
    >>> from metakern.compat import learn2learn as l2l
    >>> clone = l2l.clone_module(net := torch.nn.Linear(3, 1, bias=False))
    >>> l2l.optim.DifferentiableSGD(lr=0.5)(clone, [torch.ones(1, 3)])
    >>> torch.equal(clone.weight, net.weight - 0.5)
    True
    """

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr

    def forward(self, module: nn.Module, gradients: Sequence[Tensor | None] | None = None) -> None:
        """Takes the step.

        Args:
            module: A module whose parameters may be replaced by tensors, as those of a clone.
            gradients: A tensor, or None for no step, for each of `module.parameters()`; by default their `grad`.

        Raises:
            ValueError: If there are not as many gradients as parameters.
        """
        given = [p.grad for p in module.parameters()] if gradients is None else gradients
        update_module(module, [None if g is None else g.mul(-self.lr) for g in given])


class LearnableOptimizer(nn.Module):
    """An optimizer with a learned transform of each gradient; the transforms' parameters are its `parameters()`.

    After `step()` the model's parameters depend on the transforms, so the next `loss.backward()` gives gradients to
    both, and a torch.optim optimizer of `parameters()` can train the transforms.

    Args:
        model: The module to train. It is not a submodule of the optimizer.
        transform: `transform(parameter)` returns the module that transforms this parameter's gradient. It is called
            once for each parameter.
        lr: The learning rate.

    Raises:
        TypeError: If `model` is no `nn.Module`.

    >>> import torch
    >>> from metakern.compat import learn2learn as l2l
    >>> model, x = torch.nn.Linear(3, 1), torch.ones(2, 3)
    >>> learned = l2l.optim.LearnableOptimizer(model, lambda p: l2l.nn.Scale(p.shape), lr=0.1)
    >>> for _ in range(2):
    ...     learned.zero_grad()
    ...     model(x).square().sum().backward()
    ...     learned.step()
    >>> all(p.grad is not None for p in learned.parameters())
    True
    """

    def __init__(self, model: nn.Module, transform: Callable[[Tensor], nn.Module], lr: float = 1.0) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"LearnableOptimizer: model must be an nn.Module, got {type(model).__name__}")
        self.info = {"model": model}  # not a submodule, whose parameters would be among the optimizer's
        self.transforms = nn.ModuleList([transform(p) for p in model.parameters()])
        self.lr = lr

    def step(self, closure: Any = None) -> None:
        """Replaces each parameter p that has a `grad` by p - lr T(grad), with p and grad detached.

        `closure` is ignored.
        """
        model = self.info["model"]
        for p, transform in zip(model.parameters(), self.transforms, strict=True):
            if p.grad is not None:
                g = p.grad.detach()
                p.detach_().requires_grad_(False)
                p.update = -self.lr * transform(g)  # type: ignore[attr-defined]
        update_module(model)
        for p in model.parameters():
            if p.requires_grad:
                p.retain_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets `grad` of the model's parameters to None, whatever `set_to_none` is.

        Zeros in place would change values that the graph of the transforms may still need.
        """
        for p in self.info["model"].parameters():
            if p.is_leaf or p.retains_grad:
                p.grad = None
