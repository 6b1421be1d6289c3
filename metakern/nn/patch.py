"""Puts metakern's modules into a model that was built of torch.nn's, in place, and takes them out again.

A module of metakern has the attributes of the one in torch.nn that it stands for: only the class of the object changes.
Parameters, buffers, hooks, names and modes are the very same, and optimizers go on with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from metakern.nn.norm import LayerNorm, RMSNorm
from metakern.nn.recurrent import GRU, LSTM, RNN

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: RNN,
    nn.GRU: GRU,
    nn.LSTM: LSTM,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
}
_FORMER = "_metakern_former_class"  # an attribute of a replaced module, so that copies of a model keep it


class Replaced(NamedTuple):
    """A module at `path`, "" being the model itself, that was of the class `before` and is of the class `after`."""

    path: str
    before: str
    after: str


class Left(NamedTuple):
    """A module at `path`, of the class `kind`, that stayed what it was, and why."""

    path: str
    kind: str
    why: str


class Report(NamedTuple):
    """What `patch` or `unpatch` did; made to be printed."""

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...] = ()

    def __str__(self) -> str:
        rows = [(path, f"{before} -> {after}") for path, before, after in self.replaced]
        rows += [(path, f"{kind} left: {why}") for path, kind, why in self.left]
        width = max((len(path or "(model)") for path, _ in rows), default=0)
        lines = (f"  {path or '(model)':{width}}  {what}" for path, what in rows)
        return "\n".join([f"{len(self.replaced)} replaced, {len(self.left)} left", *lines])


def patch(model: nn.Module) -> Report:
    """Makes every RNN, GRU, LSTM, LayerNorm and RMSNorm of torch.nn in `model`, or the model itself, metakern's.

    In place; done twice is done once. Left alone, and reported, are subclasses, which may compute something else,
    modules whose `forward` was replaced, and LSTMs with projections. Raises TypeError where `model` is not a module.

    >>> import metakern as mk, torch
    >>> model = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.LSTM(4, 8), torch.nn.LSTM(8, 8, proj_size=2))
    >>> print(mk.patch(model))
    2 replaced, 1 left
      0  torch.nn.LayerNorm -> metakern.nn.LayerNorm
      1  torch.nn.LSTM -> metakern.nn.LSTM
      2  torch.nn.LSTM left: proj_size must be 0, got 2
    """
    replaced, left = [], []
    for path, module in _modules("patch", model):
        kind, why = type(module), _obstacle(module)
        if why:
            left.append(Left(path, _name(kind), why))
        elif kind in _CLASSES:
            module.__dict__[_FORMER], module.__class__ = kind, _CLASSES[kind]
            replaced.append(Replaced(path, _name(kind), _name(type(module))))
    return Report(tuple(replaced), tuple(left))


def unpatch(model: nn.Module) -> Report:
    """Takes back what `patch` did to `model`. Modules that were metakern's from the start stay so.

    >>> import metakern as mk, torch
    >>> model = torch.nn.GRU(2, 3)
    >>> _ = mk.patch(model)
    >>> print(mk.unpatch(model))
    1 replaced, 0 left
      (model)  metakern.nn.GRU -> torch.nn.GRU
    """
    replaced = []
    for path, module in _modules("unpatch", model):
        former = module.__dict__.pop(_FORMER, None)
        if former is not None:
            replaced.append(Replaced(path, _name(type(module)), _name(former)))
            module.__class__ = former
    return Report(tuple(replaced))


def _modules(verb: str, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb}: model must be a torch.nn.Module, got {type(model).__name__}")
    return model.named_modules()


def _obstacle(module: nn.Module) -> str | None:
    """Why a module that is one of torch.nn's, or derives from one, can't be replaced; None for every other module."""
    kind = type(module)
    if kind in _CLASSES.values() or not isinstance(module, tuple(_CLASSES)):
        return None
    if kind not in _CLASSES:
        return "a subclass, which may compute something else"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if isinstance(module, nn.LSTM) and module.proj_size:
        return f"proj_size must be 0, got {module.proj_size}"
    return None


def _name(kind: type) -> str:
    """The name that a class is known by."""
    package = "torch.nn" if kind in _CLASSES else "metakern.nn" if kind in _CLASSES.values() else kind.__module__
    return f"{package}.{kind.__qualname__}"
