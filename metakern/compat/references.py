"""Attributes by which a module reaches its parts, other than as registered submodules, made anew for its copy.

    self.table = {"b": self.b}      self.call = self.b.forward      self.last = functools.partial(apply, self.b)

A copy that shared these attributes would compute with the original's weights. So a list, dictionary, bound method,
partial, closure or object from which a copied module or tensor can be reached is copied too; all else is shared.
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

# Types whose values hold no module or tensor. Most attributes of a module are of these, and need no search.
PLAIN = (
    {type(None), bool, int, float, complex, str, bytes, type, range, slice, torch.Size, torch.dtype, torch.device}
) | {torch.Generator, type(len), type(torch.relu)}
# Libraries whose objects are not searched: a trainer holds the model, its data and much else, and none of it runs
# within a forward. Containers and modules of these libraries are searched.
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
    """Copies values that lead to old modules or tensors, so that they lead to new ones.

    `pairs` are (old, new) modules and tensors. The search does not go into the objects in `bounds`. `made` holds the
    values that `mended` has copied so far, as (old, new).
    """

    def __init__(self, pairs: Iterable[tuple[Any, Any]], bounds: Iterable[Any] = ()) -> None:
        pairs = list(pairs)
        self.made: list[tuple[Any, Any]] = []
        self._bounds = set(map(id, bounds))
        self._new: dict[int, Any] = {id(old): new for old, new in pairs}
        # Ids are used as keys, so their objects must stay alive: a freed object's id may be given to another one.
        self._alive: list[Any] = [old for old, _ in pairs]
        self._leads: set[int] = set()
        self._targets = frozenset(self._new)

    def mended(self, value: Any) -> Any:
        """Returns the value itself if it leads to no old module or tensor, else a copy that leads to the new ones."""
        if type(value) in PLAIN or (type(value) in _CONTAINERS and not value):
            return value
        self._explore(value)
        return self._made(value)

    def _explore(self, start: Any) -> None:
        """Finds all objects within `start` from which an old module or tensor, a target, can be reached.

        It goes from the targets backwards, from an object to those that hold it, as references may form cycles.
        """
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
        """Returns a new value of the same kind: complete if it is immutable, else for `_fill` to fill.

        A cycle of references that passes through a mutable object can be copied in this way.
        """
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
            if hasattr(value, "_torchdynamo_orig_callable"):  # torch.compile made it, for the old module
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
                f"clone: an object that holds a part of the model must be copyable, got a {type(value).__name__} that "
                "is not: register the part as a submodule of the model, and call it there"
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
    """Gives `old` the contents that its copy `new` has by now, with the objects in them mapped by `back`."""
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
    """Returns whether a closure's cell has a value yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # the name is bound later
        return False
    return True


def _parts(value: Any) -> Iterator[Any]:
    """Yields the objects that the value holds directly."""
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
    """Yields an object's attributes as (name, value), those in `__slots__` too."""
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)
