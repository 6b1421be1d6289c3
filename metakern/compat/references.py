"""The ways to a module's parts beside its registered submodules, and the same ways to the parts of its copy.

    self.table = {"b": self.b}      self.call = self.b.forward      self.last = functools.partial(apply, self.b)

A copy that kept them would compute with the first module's weights. So a list, dictionary, bound method, partial,
closure or object from which a copied module or tensor can be reached is made anew for the copy; all else is shared.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from types import CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

# What holds nothing, told by its class at once: most attributes of a module.
PLAIN = (
    {type(None), bool, int, float, complex, str, bytes, type, range, slice, torch.Size, torch.dtype, torch.device}
) | {torch.Generator, type(len), type(torch.relu)}
# Libraries whose objects are not looked into: a trainer holds the model, its data and much else, and none of it runs
# within a forward. Their containers and modules are.
_FOREIGN = {
    "accelerate",
    "lightning",
    "lightning_fabric",
    "metakern",
    "numpy",
    "pytorch_lightning",
    "torch",
    "transformers",
}
_CONTAINERS = {dict, list, tuple, set, OrderedDict}
_OPEN = (SimpleNamespace, UserDict, UserList)
_Cached: Any = type(lru_cache(len))


class References:
    """What stands for what: copies by the modules and tensors that they are of.

    `bounds` are not looked into. `made` holds what `mended` made, as (old, new).
    """

    def __init__(self, pairs: Iterable[tuple[Any, Any]], bounds: Iterable[Any] = ()) -> None:
        pairs = list(pairs)
        self.made: list[tuple[Any, Any]] = []
        self._bounds = set(map(id, bounds))
        self._new: dict[int, Any] = {id(old): new for old, new in pairs}
        # Whatever is named by its id must live as long as the id is used.
        self._alive: list[Any] = [old for old, _ in pairs]
        self._leads: set[int] = set()
        self._targets = frozenset(self._new)

    def mended(self, value: Any) -> Any:
        """The value, or where it leads to a copied module or tensor one like it that leads to the copy."""
        if type(value) in PLAIN or (type(value) in _CONTAINERS and not value):
            return value
        self._explore(value)
        return self._made(value)

    def _explore(self, start: Any) -> None:
        """Finds what leads to the targets: backwards, from them along what holds what, for there may be circles."""
        holders: dict[int, list[int]] = defaultdict(list)
        seen = {id(start)}
        todo = [start]
        while todo:
            value = todo.pop()
            self._alive.append(value)
            if id(value) in self._targets or id(value) in self._bounds:
                continue
            for part in _parts(value):
                if type(part) in PLAIN:
                    continue
                holders[id(part)].append(id(value))
                if id(part) not in seen:
                    seen.add(id(part))
                    todo.append(part)
        found = [target for target in self._targets if target in seen]
        while found:
            for holder in holders[found.pop()]:
                if holder not in self._leads:
                    self._leads.add(holder)
                    found.append(holder)

    def _made(self, value: Any) -> Any:
        if id(value) in self._new:
            return self._new[id(value)]
        if id(value) not in self._leads:
            return value
        made = self._shell(value)
        self._new[id(value)] = made
        self._fill(value, made)
        self.made.append((value, made))
        return made

    def _shell(self, value: Any) -> Any:
        """A value like it: complete where it can't be changed later, else to be filled."""
        if isinstance(value, MethodType):
            return MethodType(self._made(value.__func__), self._made(value.__self__))
        if isinstance(value, partial):
            call = self._made(value.func)
            made = type(value)(
                call, *map(self._made, value.args), **{k: self._made(v) for k, v in value.keywords.items()}
            )
            made.__dict__.update({k: self._made(v) for k, v in value.__dict__.items()})
            return made
        if isinstance(value, FunctionType):
            if hasattr(value, "_torchdynamo_orig_callable"):  # torch.compile's, of the first module
                return self._made(value._torchdynamo_orig_callable)
            cells = None if value.__closure__ is None else tuple(CellType() for _ in value.__closure__)
            function = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
            for name in ("__qualname__", "__module__", "__doc__"):
                setattr(function, name, getattr(value, name))
            return function
        if isinstance(value, weakref.ref):
            return weakref.ref(self._made(value()))
        if isinstance(value, _Cached):
            return lru_cache(**value.cache_parameters())(self._made(value.__wrapped__))
        if isinstance(value, tuple):
            parts = map(self._made, value)
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, set | frozenset):
            return type(value)(map(self._made, value))
        if isinstance(value, nn.Module):
            return object.__new__(type(value))
        try:
            return copy.copy(value)
        except Exception as error:
            raise ValueError(
                f"clone: what leads to a part of the model must be copyable, got a {type(value).__name__} that is not: "
                "register the part as a submodule, and use that"
            ) from error

    def _fill(self, value: Any, made: Any) -> None:
        if isinstance(value, FunctionType):
            if hasattr(value, "_torchdynamo_orig_callable"):
                return
            for cell, new in zip(value.__closure__ or (), made.__closure__ or (), strict=True):
                if filled(cell):
                    new.cell_contents = self._made(cell.cell_contents)
            made.__defaults__ = self._made(value.__defaults__)
            made.__kwdefaults__ = self._made(value.__kwdefaults__)
            made.__dict__.update({k: self._made(v) for k, v in value.__dict__.items()})
        elif isinstance(value, list):
            made[:] = map(self._made, value)
        elif isinstance(value, deque):
            made.clear()
            made.extend(map(self._made, value))
        elif isinstance(value, dict):
            made.clear()
            made.update({self._made(k): self._made(v) for k, v in value.items()})
        elif isinstance(value, nn.Module):
            made.__dict__.update({k: self._made(v) for k, v in value.__dict__.items()})
        elif not isinstance(value, MethodType | partial | weakref.ref | _Cached | tuple | set | frozenset):
            for name, part in _attributes(value):
                if (new := self._made(part)) is not part:
                    object.__setattr__(made, name, new)


def refreshed(old: Any, new: Any, back: References) -> None:
    """Gives a container or object the contents that the one made of it has by now, `back` in terms of the old ones."""
    if isinstance(old, dict):
        contents = {back.mended(k): back.mended(v) for k, v in new.items()}
        if len(contents) != len(old) or any(k not in old or old[k] is not v for k, v in contents.items()):
            old.clear()
            old.update(contents)
    elif isinstance(old, list | deque):
        values = [back.mended(v) for v in new]
        if len(values) != len(old) or any(a is not b for a, b in zip(values, old, strict=True)):
            old.clear()
            old.extend(values)
    elif not isinstance(old, MethodType | partial | weakref.ref | _Cached | FunctionType | tuple | set | frozenset):
        before = dict(_attributes(old))
        for name, part in _attributes(new):
            if (value := back.mended(part)) is not before.get(name, before):
                object.__setattr__(old, name, value)


def filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a name that is bound later
        return False
    return True


def _parts(value: Any) -> Iterator[Any]:
    """What is reached through the value at once."""
    if isinstance(value, list | tuple | set | frozenset | deque):
        yield from value
    elif isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, MethodType):
        yield value.__func__
        yield value.__self__
    elif isinstance(value, partial):
        yield value.func
        yield from value.args
        yield from value.keywords.values()
        yield from value.__dict__.values()
    elif isinstance(value, FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if filled(cell))
        yield from (value.__defaults__, value.__kwdefaults__)
        yield from value.__dict__.values()
    elif isinstance(value, weakref.ref):
        yield value()
    elif isinstance(value, _Cached):
        yield value.__wrapped__
    elif isinstance(value, nn.Module):
        yield from value.__dict__.values()
    elif not isinstance(value, Tensor | type | ModuleType):
        root = type(value).__module__.partition(".")[0]
        if isinstance(value, _OPEN) or (root not in _FOREIGN and root not in sys.stdlib_module_names):
            yield from (part for _, part in _attributes(value))


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Of an object, those in slots too."""
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)
