"""A model's parameters by role: adapted (one for each task), shared (meta-learned, the same for all), frozen."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Adapt = Sequence[str] | Callable[[str], bool] | None


class Parameters:
    """Names, tensors and places of a model's parameters; tied ones are one parameter with several places.

    adapted: {name: parameter} that the inner loop changes; shared: those that only the outer loop learns.
    """

    def __init__(self, model: nn.Module, adapt: Adapt = None) -> None:
        self.model = model
        selected = _selector(adapt)
        self.adapted: dict[str, nn.Parameter] = {}
        self.shared: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if selected(name) and not parameter.requires_grad and adapt is not None:
                raise ValueError(
                    f"MAML: adapt must select trainable parameters, got {name!r}, which has requires_grad=False"
                )
            if parameter.requires_grad:
                (self.adapted if selected(name) else self.shared)[name] = parameter
        if not self.adapted:
            rule = "model must have trainable parameters" if adapt is None else "adapt must match a parameter's name"
            raise ValueError(f"MAML: {rule}, got {'none' if adapt is None else repr(adapt)}")
        names = {id(p): name for name, p in self.adapted.items()}
        self.places: list[tuple[nn.Module, str, str]] = [  # module, attribute, name of the parameter
            (module, attribute, names[id(parameter)])
            for module in model.modules()
            for attribute, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in names
        ]

    def holding(self, adapted: dict[str, nn.Parameter], shared: dict[str, nn.Parameter]) -> Parameters:
        """The same roles of other parameters, which stand in the same places."""
        other = copy.copy(self)
        other.adapted, other.shared = adapted, shared
        return other

    @contextmanager
    def bound(self, phi: Sequence[Tensor]) -> Iterator[None]:
        """Puts phi (in the order of `adapted`) in the parameters' places for the duration of the block."""
        values = dict(zip(self.adapted, phi, strict=True))
        try:
            put((module, attribute, values[name]) for module, attribute, name in self.places)
            yield
        finally:
            put((module, attribute, self.adapted[name]) for module, attribute, name in self.places)


def put(tensors: Iterable[tuple[nn.Module, str, Any]]) -> None:
    """Puts each tensor (or None) in the place of a module's parameter: (module, attribute, tensor)."""
    recurrent = {}
    for module, attribute, tensor in tensors:
        module._parameters[attribute] = tensor
        if isinstance(module, nn.RNNBase):
            recurrent[id(module)] = module
    for module in recurrent.values():  # torch.nn's recurrent layers keep a second list of their weights
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names if hasattr(module, name)]


def twin(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a model, in `dtype` if one is given, whose frozen parameters are not copied but shared where they can
    be: a base under LoRA, most of a model, is needed once."""
    frozen = {
        id(p): p if dtype is None else nn.Parameter(p.detach().to(dtype), requires_grad=False)
        for p in model.parameters()
        if not p.requires_grad and p.is_floating_point()
    }
    kept = (v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf)
    memo: dict[int, Any] = {**frozen, **{id(t): t.detach().clone() for t in kept}}
    copied = copy.deepcopy(model, memo)
    # By the class's own method: an attribute `to` of the instance, as accelerate sets one, is the original's.
    return copied if dtype is None else nn.Module.to(copied, dtype)


def _selector(adapt: Adapt) -> Callable[[str], bool]:
    if adapt is None:
        return lambda name: True
    if callable(adapt):
        return adapt
    if isinstance(adapt, str):
        adapt = [adapt]
    patterns = [re.compile(_as_regex(pattern)) for pattern in adapt]
    return lambda name: any(pattern.fullmatch(name) for pattern in patterns)


def _as_regex(pattern: str) -> str:
    """A shell-style pattern over dotted names; a prefix selects all under it: "head", "layers.*.bias"."""
    if not isinstance(pattern, str):
        raise TypeError(f"MAML: adapt must hold name patterns (strings), got {type(pattern).__name__}")
    escaped = "".join({"*": ".*", "?": "."}.get(ch, re.escape(ch)) for ch in pattern)
    return rf"{escaped}(\..*)?"
