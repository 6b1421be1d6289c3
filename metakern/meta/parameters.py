"""The roles of a model's parameters: adapted (one for each task), shared (meta-learned, the same for all), frozen."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import translate
from typing import Any

import torch
from torch import Tensor, nn

Adapt = Sequence[str] | Callable[[str], bool] | None


class Parameters:
    """The trainable parameters of a model by role. Tied parameters are one parameter with several places.

    Args:
        adapt: Which parameters are adapted: None for all, name patterns, or a predicate on names. A pattern is
            shell-style over the whole dotted name, and a prefix of it selects everything below: "head" selects
            "head.weight".

    Attributes:
        adapted: {name: parameter}, those that the inner loop changes.
        shared: {name: parameter}, those that only the outer loop learns.
        places: (module, attribute, name) for each place of an adapted parameter.

    Raises:
        TypeError: A pattern is not a string.
        ValueError: There is no trainable parameter, `adapt` matches none, or it matches one without a gradient; or a
            parameter is a shard of one.
    """

    def __init__(self, model: nn.Module, adapt: Adapt = None) -> None:
        self.model = model
        selected = selector(adapt)
        self.adapted: dict[str, nn.Parameter] = {}
        self.shared: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "full_tensor"):
                raise ValueError(
                    f"MAML: parameters must be whole in the inner loop, got {name!r}, which is sharded over processes:"
                    " shard the algorithm and not its layers, fully_shard(maml), and call maml.unshard() before"
                    " maml.adapt or maml.evaluate"
                )
            if parameter.requires_grad and parameter.is_complex():
                raise ValueError(f"MAML: parameters must be real, got {name!r} of {parameter.dtype}")
            if selected(name) and not parameter.requires_grad and adapt is not None:
                raise ValueError(
                    f"MAML: adapt must select trainable parameters, got {name!r}, which has requires_grad=False"
                )
            if parameter.requires_grad:
                (self.adapted if selected(name) else self.shared)[name] = parameter
        if not self.adapted:
            rule = "model must have trainable parameters" if adapt is None else "adapt must match a parameter's name"
            raise ValueError(f"MAML: {rule}, got {'none' if adapt is None else repr(adapt)}")
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
                raise ValueError(f"MAML: gradients must be dense, got the embedding {name!r} with sparse=True")
        names = {id(p): name for name, p in self.adapted.items()}
        self.places: list[tuple[nn.Module, str, str]] = [
            (module, attribute, names[id(parameter)])
            for module in model.modules()
            for attribute, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in names
        ]

    def holding(self, adapted: dict[str, nn.Parameter], shared: dict[str, nn.Parameter]) -> Parameters:
        """Return the same roles and places with other parameters in them."""
        other = copy.copy(self)
        other.adapted, other.shared = adapted, shared
        return other

    @contextmanager
    def bound(self, phi: Sequence[Tensor]) -> Iterator[None]:
        """Within the block, `phi` (in the order of `adapted`) replaces the adapted parameters in the model."""
        values = dict(zip(self.adapted, phi, strict=True))
        try:
            put((module, attribute, values[name]) for module, attribute, name in self.places)
            yield
        finally:
            put((module, attribute, self.adapted[name]) for module, attribute, name in self.places)


def put(tensors: Iterable[tuple[nn.Module, str, Any]]) -> None:
    """Set parameters of modules to tensors (or None), given as (module, attribute, tensor)."""
    recurrent = {}
    for module, attribute, tensor in tensors:
        module._parameters[attribute] = tensor
        if isinstance(module, nn.RNNBase):
            recurrent[id(module)] = module
    for module in recurrent.values():  # torch.nn's recurrent layers keep a second list of their weights
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names if hasattr(module, name)]


def twin(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of a model, in `dtype` if one is given, that shares its frozen parameters where their dtype allows.

    Under LoRA most parameters are frozen, so they are held once.
    """
    frozen = {
        id(p): p if dtype is None else nn.Parameter(p.detach().to(dtype), requires_grad=False)
        for p in model.parameters()
        if not p.requires_grad and p.is_floating_point()
    }
    kept = (v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf)
    memo: dict[int, Any] = {**frozen, **{id(t): t.detach().clone() for t in kept}}
    copied = copy.deepcopy(model, memo)
    # The method of the class: an attribute `to` of the instance (accelerate sets one) still belongs to the original.
    return copied if dtype is None else nn.Module.to(copied, dtype)


def selector(adapt: Adapt) -> Callable[[str], bool]:
    if adapt is None:
        return lambda name: True
    if callable(adapt):
        return adapt
    if isinstance(adapt, str):
        adapt = [adapt]
    if not isinstance(adapt, Iterable):
        raise TypeError(
            f"MAML: adapt must be a name pattern, a list of them, or a function of a name, got {type(adapt).__name__}"
        )
    patterns = [re.compile(form) for pattern in adapt for form in _as_regex(pattern)]
    return lambda name: any(pattern.match(name) for pattern in patterns)


def _as_regex(pattern: str) -> tuple[str, str]:
    """Return regular expressions of a shell-style pattern over dotted names, such as "head" or "layers.*.bias".

    One matches the names that the pattern describes, the other one all below them.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"MAML: adapt must hold name patterns (strings), got {type(pattern).__name__}")
    pattern = pattern.replace("[", "[[]")  # brackets stand for themselves
    return translate(pattern), translate(f"{pattern}.*")
