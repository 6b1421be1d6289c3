"""Steps with transformed gradients: of a module within a task, and of an optimizer that is learned as it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from metakern.compat.learn2learn.optim.transforms import Transform
from metakern.compat.learn2learn.utils import update_module
from metakern.compat.modules import differentiated


class ParameterUpdate(nn.Module):
    """As `torch.autograd.grad`, and each gradient goes through the transform that its parameter has.

    parameters: those that transforms are made for, by `transform(parameter)`, None for none.
    """

    def __init__(self, parameters: Iterable[Tensor], transform: Transform) -> None:
        super().__init__()
        made = [transform(p) for p in parameters]
        for t in made:
            if t is not None and not isinstance(t, nn.Module):
                raise TypeError(f"ParameterUpdate: transform must make a module or None, got {type(t).__name__}")
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
        """The update of each parameter; None where it is frozen, or the loss does not depend on it, if allowed."""
        phi = list(parameters)
        if len(phi) != len(self.transforms_indices):
            raise ValueError(
                f"ParameterUpdate: parameters must be the {len(self.transforms_indices)} that transforms were made "
                f"for, got {len(phi)}"
            )
        wanted = [p for p in phi if p.requires_grad]
        if not allow_nograd and len(wanted) < len(phi):
            raise ValueError(
                "ParameterUpdate: every parameter must require a gradient, got one that does not: with "
                "allow_nograd=True it stays as it is"
            )
        found = iter(differentiated("ParameterUpdate", loss, wanted, create_graph, retain_graph or create_graph))
        updates: list[Tensor | None] = []
        for p, number in zip(phi, self.transforms_indices, strict=True):
            g = next(found) if p.requires_grad else None
            if g is None and p.requires_grad and not allow_unused:
                raise ValueError(
                    f"ParameterUpdate: loss must depend on every parameter, got one of shape {list(p.shape)} that it "
                    "does not depend on: with allow_unused=True it stays as it is"
                )
            updates.append(g if g is None or number is None else self.transforms_modules[number](g))
        return updates


class DifferentiableSGD(nn.Module):
    """p <- p - lr g for each parameter of a module, in place for the module and out of place for autograd.

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
        """gradients: one, or None, for each parameter; by default their `grad`."""
        given = [p.grad for p in module.parameters()] if gradients is None else gradients
        update_module(module, [None if g is None else g.mul(-self.lr) for g in given])


class LearnableOptimizer(nn.Module):
    """An optimizer whose transforms of the gradients are its parameters, with derivatives of the next loss.

    `step()` gives the model parameters that depend on the transforms; the next `loss.backward()` leaves gradients in
    both, for any torch.optim optimizer of `parameters()` to learn from.

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
        """p <- p - lr T(grad), p and grad without their history."""
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
        """Of the model's parameters, whose gradients the transforms may still need as they are."""
        for p in self.info["model"].parameters():
            if p.is_leaf or p.retains_grad:
                p.grad = None
