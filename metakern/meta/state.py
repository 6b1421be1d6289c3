"""Saves and restores what a forward pass can change: attributes and buffers of modules, and random generators."""

from __future__ import annotations

import os
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_DEPTH = 6  # levels of nested containers that are looked into


PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device})
INTERNAL = frozenset(vars(nn.Module()))  # attributes that every module has
_MOST = 256  # of a container with more items, only the number of items is compared


def every_module(*roots: nn.Module) -> list[nn.Module]:
    """Return the roots and all modules within them, each once: `nn.Module.modules` takes several times as long."""
    found = dict.fromkeys(roots)
    modules = list(found)
    for module in modules:  # the list grows meanwhile
        for child in module._modules.values():
            if child is not None and child not in found:
                found[child] = None
                modules.append(child)
    return modules


def contents(value: Any, numbers: bool, depth: int = 3) -> Any:
    """Return a hashable summary of a container, a configuration object or a function, to be compared.

    Without `numbers` it consists of plain values, identities of functions, and the types of everything else. With
    `numbers` it has the values of the numbers instead. Of tensors and modules it has only the type.
    """
    kind = type(value)
    if kind in (int, float):
        return value if numbers else kind
    if kind in PLAIN:
        return None if numbers else value
    if callable(value) and not isinstance(value, nn.Module | type):
        return None if numbers else id(value)
    if not depth or isinstance(value, Tensor | nn.Module | type):
        return kind
    if isinstance(value, dict):
        names, values = list(value), list(value.values())
    elif isinstance(value, list | tuple | set | frozenset | deque):
        names, values = [], list(value)
    elif kind.__module__.startswith(("torch", "builtins", "numpy")) or not hasattr(value, "__dict__"):
        return kind
    else:
        names, values = list(vars(value)), list(vars(value).values())
    if len(values) > _MOST:
        return kind, len(values)
    plain = tuple(name if type(name) in PLAIN else type(name) for name in names)
    return kind, plain, tuple(contents(part, numbers, depth - 1) for part in values)


class ModuleState:
    """A snapshot of the attributes and buffers of modules, including nested containers and random generators.

    `restore` puts it back: buffers by value, all other tensors by identity.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = [(module, dict(vars(module))) for module in modules]
        held = [buffer for module, _ in self._modules for buffer in module._buffers.values() if buffer is not None]
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in held]
        self._contents = {
            (id(module), name): (contents(value, False), contents(value, True))
            for module, attributes in self._modules
            for name, value in attributes.items()
            if name not in INTERNAL and type(value) not in PLAIN
        }
        self._containers: list[tuple[Any, Any]] = []
        self._generators: list[tuple[Callable[[Any], Any], Any]] = []
        seen: set[int] = set()
        for _, attributes in self._modules:
            for value in attributes.values():  # these include the dictionaries of parameters, buffers and submodules
                self._look(value, seen, _DEPTH)

    def _look(self, value: Any, seen: set[int], depth: int) -> None:
        if id(value) in seen or not depth:
            return
        kind = type(value)
        if isinstance(value, list | dict | set | deque):
            seen.add(id(value))
            self._containers.append((value, value.copy()))
            for part in list(value.values() if isinstance(value, dict) else value):
                self._look(part, seen, depth - 1)
        elif isinstance(value, tuple):
            for part in value:
                self._look(part, seen, depth - 1)
        elif isinstance(value, torch.Generator):
            self._generators.append((value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._generators.append((value.setstate, value.getstate()))
        elif isinstance(value, np.random.RandomState):
            self._generators.append((value.set_state, value.get_state()))
        elif isinstance(value, np.random.Generator):
            generator = value.bit_generator
            self._generators.append((partial(setattr, generator, "state"), generator.state))
        elif isinstance(value, SimpleNamespace) or (
            hasattr(value, "__dict__")
            and not isinstance(value, nn.Module | Tensor | type | MethodType)
            and not kind.__module__.startswith(("torch", "builtins", "transformers"))
            and not callable(value)
        ):
            seen.add(id(value))
            self._containers.append((vars(value), dict(vars(value))))
            for part in list(vars(value).values()):
                self._look(part, seen, depth - 1)

    def changed(self) -> set[tuple[int, str]]:
        """Return the attributes that differ from the snapshot: (id of the module, name).

        A container outside of a module's own attributes is given as (id of the container, "").
        """
        attributes = {
            (id(module), name)
            for module, before in self._modules
            for name, value in vars(module).items()
            if before.get(name, self) is not value or self._changed_within(id(module), name, value)
        }
        own = {id(module._parameters) for module, _ in self._modules}  # the engine puts each task's parameters there
        others = {id(held) for held, copied in self._containers if _parts(held) != _parts(copied)} - own
        return attributes | {(place, "") for place in others}

    def restore_tensors(self) -> None:
        """Restore only the attributes and containers that now hold tensors which they did not hold before."""
        for module, attributes in self._modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, Tensor) and attributes.get(name) is not value:
                    if name in attributes:
                        vars(module)[name] = attributes[name]
                    else:
                        del vars(module)[name]
        for container, copied in self._containers:
            known = set(_parts(copied))
            parts = container.values() if isinstance(container, dict) else container
            if any(isinstance(part, Tensor) and id(part) not in known for part in parts):
                _refill(container, copied)

    def _changed_within(self, place: int, name: str, value: Any) -> bool:
        before = self._contents.get((place, name))
        return before is not None and before != (contents(value, False), contents(value, True))

    def restore(self) -> None:
        for module, attributes in self._modules:
            _refill(vars(module), attributes)
        with torch.no_grad():
            for buffer, value in self._buffers:
                if not _same(buffer, value):
                    buffer.data.copy_(value)
        for container, copied in self._containers:
            _refill(container, copied)
        self.restore_generators()

    def restore_generators(self) -> None:
        """Restore only the random generators that modules hold."""
        for put, state in self._generators:
            put(state)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num()))


def _parts(container: Any) -> list[int]:
    """Return the ids of a container's items (of a dictionary's values), in order."""
    return list(map(id, container.values() if isinstance(container, dict) else container))


def _refill(container: Any, copied: Any) -> None:
    """Put a container's items back. One that holds them still is left alone: other threads may be reading it."""
    same = _parts(container) == _parts(copied)
    if same and not (isinstance(container, dict) and list(map(id, container)) != list(map(id, copied))):
        return
    if isinstance(container, list):
        container[:] = copied
    elif isinstance(container, dict | set):
        container.clear()
        container.update(copied)
    else:
        container.clear()
        container.extend(copied)


_TRIALS = threading.RLock()


def _renewed() -> None:
    """Drop the lock in a forked child: the thread that held it does not exist there."""
    global _TRIALS
    _TRIALS = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renewed)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Restore the random states of PyTorch (CPU, and `device`), Python and NumPy at the end of the block.

    These states are those of the process, so one thread at a time may be in such a block; others wait.
    """
    with _TRIALS:
        python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, device)


def seeded() -> None:
    """Set the global generators of PyTorch, Python and NumPy to the seed at which each evaluation of a trial starts."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
