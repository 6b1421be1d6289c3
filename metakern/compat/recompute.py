"""Find out whether a model may recompute a part of its forward during the backward, as activation checkpointing does.

The names in the model's code decide. Each forward of a model that may recompute runs within `apart`, at some cost. A
recomputation that is not foreseen here raises in `Guarded`, so a wrong answer costs time or an error, never a wrong
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from metakern.compat.references import filled

_NAMES = ("checkpoint", "ckpt", "recompute", "remat", "offload", "reversible")


def recomputes(module: nn.Module) -> bool:
    """Returns whether any module in the tree may recompute; one whose forward was replaced counts as one that may."""
    parts = list(module.modules())
    kinds: set[Any] = set(map(type, parts))
    return any(map(_of_class, kinds)) or any(_of_instance(part.__dict__) for part in parts)


def _of_instance(state: dict[str, Any]) -> bool:
    if "forward" in state:
        return True
    kinds = {kind for kind in set(map(type, state.values())) if issubclass(kind, FunctionType | MethodType | partial)}
    return bool(kinds) and any(type(value) in kinds and _named(value, set()) for value in state.values())


@cache
def _of_class(kind: type) -> bool:
    own = [base for base in kind.__mro__ if base is not object and not base.__module__.startswith("torch.nn.")]
    seen: set[int] = set()
    return any(_named(value, seen) for base in own for value in vars(base).values())


def _named(value: Any, seen: set[int]) -> bool:
    """Returns whether one of the words `_NAMES` is in a name that the function uses.

    Functions, classes and modules that it reaches by its globals and closure are looked at too.
    """
    if isinstance(value, property):
        return any(_named(part, seen) for part in (value.fget, value.fset))
    if isinstance(value, staticmethod | classmethod | MethodType):
        value = value.__func__
    if isinstance(value, partial):
        value = value.func
    if isinstance(value, ModuleType):
        return _says(value.__name__)
    if not isinstance(value, FunctionType) or id(value) in seen:
        return isinstance(value, type) and _says(value.__name__)
    seen.add(id(value))
    if value.__module__.startswith("torch."):
        return _says(value.__module__) or _says(value.__name__)
    names = list(_names(value.__code__))
    cells = [cell.cell_contents for cell in value.__closure__ or () if filled(cell)]
    reached = (*cells, *(value.__globals__[name] for name in names if name in value.__globals__))
    return any(map(_says, names)) or any(_named(part, seen) for part in reached)


def _names(code: CodeType) -> Iterator[str]:
    """Yields the identifiers in a code object and in those nested in it."""
    yield from (code.co_name, *code.co_names, *code.co_varnames, *code.co_freevars)
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _names(part)
        elif isinstance(part, str) and part.isidentifier():  # may be the name that getattr is given
            yield part


def _says(name: str) -> bool:
    return any(word in name.lower() for word in _NAMES)
