"""Modules that replace submodules of a model, and modules that compute with transformed parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


class MetaModule(nn.Module):
    """A model whose submodules of given classes are replaced, in place.

    Args:
        module: The model. It changes: `module()` undoes the replacements.
        substitutions: By a class, the function that returns what replaces a module of exactly this class, such as
            `lambda linear: ParameterTransform(linear, ...)`.
        freeze_module: Whether the model's own parameters no longer require a gradient.

    >>> import torch
    >>> from metakern.compat import learn2learn as l2l
    >>> scaled = lambda linear: l2l.nn.ParameterTransform(linear, lambda p: l2l.nn.Scale())
    >>> model = l2l.nn.MetaModule(torch.nn.Sequential(torch.nn.Linear(3, 2)), {torch.nn.Linear: scaled})
    >>> [p.requires_grad for p in model.parameters()], len(list(model.meta_parameters()))
    ([False, False, True, True], 2)
    """

    def __init__(
        self,
        module: nn.Module,
        substitutions: Mapping[type[nn.Module], Callable[[Any], nn.Module]],
        freeze_module: bool = True,
    ) -> None:
        super().__init__()
        self.substitutions, self.freeze_module = substitutions, freeze_module
        self.wrapped_module = self._wrap(module)

    def _wrap(self, module: nn.Module) -> nn.Module:
        if self.freeze_module:
            for p in module.parameters(recurse=False):
                p.requires_grad_(False)
        for name, child in module.named_children():
            module._modules[name] = self._wrap(child)
        make = self.substitutions.get(type(module))
        return module if make is None else make(module)

    def _unwrap(self, module: nn.Module) -> nn.Module:
        base = module._modules.get("module") or module
        for name, child in base.named_children():
            base._modules[name] = self._unwrap(child)
        return base

    def meta_parameters(self, module: nn.Module | None = None) -> Iterator[Tensor]:
        """Yields what `meta_parameters()` of each submodule that has this method yields."""
        module = self.wrapped_module if module is None else module
        own: Any = getattr(module, "meta_parameters", None)
        if own is not None:
            yield from own()
        for child in module.children():
            yield from self.meta_parameters(child)

    def module(self) -> nn.Module:
        """Puts the original submodules back, in place, and returns the model.

        A replacement must hold the original as its submodule `module`, as `ParameterTransform` does.
        """
        return self._unwrap(self.wrapped_module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped_module(*args, **kwargs)


class ParameterTransform(nn.Module):
    """A module that computes as `module` does, with a learned transform of each parameter in the parameter's place.

    Args:
        module: Any module.
        transform: `transform(parameter)` returns the module that transforms this parameter. It is called once for each
            parameter.

    >>> import torch
    >>> from metakern.compat import learn2learn as l2l
    >>> linear = torch.nn.Linear(3, 2)
    >>> doubled = l2l.nn.ParameterTransform(linear, lambda p: l2l.nn.Scale(alpha=2.0))
    >>> torch.allclose(doubled(torch.ones(4, 3)), 2 * linear(torch.ones(4, 3)))
    True
    """

    def __init__(self, module: nn.Module, transform: Callable[[Tensor], nn.Module]) -> None:
        super().__init__()
        self.module, self.transform = module, transform
        # Names in a ModuleDict have no dots.
        self.parameter_transforms = nn.ModuleDict(
            {name.replace(".", "/"): transform(p) for name, p in module.named_parameters()}
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        transformed = {
            name: self.parameter_transforms[name.replace(".", "/")](p) for name, p in self.module.named_parameters()
        }
        return functional_call(self.module, transformed, args, kwargs)

    def meta_parameters(self) -> Iterator[Tensor]:
        """Yields the parameters of the transforms."""
        yield from self.parameter_transforms.parameters()
