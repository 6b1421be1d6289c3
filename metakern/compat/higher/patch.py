"""higher's functional modules: a copy of a module that computes with fast parameters, and keeps all of them.

    parameters(time=k)    phi_k, after k updates; time=None: the last ones
    fmodel(x, params=p)   the module's output with p, which become the last ones

A copy made with `copy_initial_weights=False` has clones of the module's parameters, so that derivatives reach these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from metakern.compat._modules import Places, copied, fused, is_ours, once, stay

Encapsulator = Callable[[Any, nn.Module], None]


class FunctionalModule(nn.Module):
    """What `monkeypatch` adds to a module's own class."""

    _history: list[list[Tensor]]
    _places: Places
    _source: tuple[nn.Module, ...]  # what it is a copy of, on the same device
    _track: bool
    _fused: bool

    def forward(self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
        """The module's output with its fast parameters, which `params` replace if given."""
        if params is not None:
            self.update_params(params)
        elif not self._history:
            raise ValueError("fmodel: params must be given to a functional module without parameters of its own")
        if not self._fused:
            return super().forward(*args, **kwargs)
        with fused():
            return super().forward(*args, **kwargs)

    def update_params(self, params: Iterable[Tensor]) -> None:
        """The next fast parameters, in the order of `parameters()`; without higher gradients the former are let go."""
        params = list(params)
        if len(params) != len(self._places.values):
            raise ValueError(
                f"fmodel: params must have an entry for each of the {len(self._places.values)} parameters, "
                f"got {len(params)}"
            )
        self._places.put(params)
        if not self._track:
            self._history.clear()
        self._history.append(params)

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[Any]:
        """The fast parameters after `time` updates, by default the last ones; always those of all submodules."""
        if not self._history:
            raise ValueError("fmodel: parameters must be set before they are read, got none")
        time = -1 if time is None else time
        if not self._track and time not in (-1, 0):
            raise ValueError(f"fmodel: time must be -1 or 0 where no higher gradients are tracked, got {time}")
        if not -len(self._history) <= time < len(self._history):
            raise ValueError(f"fmodel: time must be at most {len(self._history) - 1}, the updates so far, got {time}")
        return iter(self._history[time])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FunctionalModule:
        """What `to()` and the like do."""
        stay("fmodel: the module", (*(self.fast_params or ()), *self.buffers()), fn)
        return self

    @property
    def fast_params(self) -> list[Tensor] | None:
        return self._history[-1] if self._history else None

    @fast_params.setter
    def fast_params(self, value: Iterable[Tensor]) -> None:
        self.update_params(value)

    @property
    def init_fast_params(self) -> list[Tensor]:
        if not self._track:
            raise ValueError("fmodel: initial parameters must be tracked to be read, got track_higher_grads=False")
        return self._history[0]

    @property
    def track_higher_grads(self) -> bool:
        return self._track

    @track_higher_grads.setter
    def track_higher_grads(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"fmodel: track_higher_grads must be True or False, got {value!r}")
        self._track = value


@cache
def _functional(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of functional modules that are also of this class."""
    return type(f"Functional{kind.__name__}", (FunctionalModule, kind), {"__module__": kind.__module__})


def make_functional(module: nn.Module, encapsulator: Encapsulator | None = None, device: Any = None) -> Any:
    """A copy of the module that is called with `params`; encapsulator(fmodule, module) may give it some."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"monkeypatch: module must be an nn.Module, got {type(module).__name__}")
    if isinstance(module, FunctionalModule):
        raise ValueError("monkeypatch: module must be an ordinary one, got one that was made functional before")
    if "forward" in module.__dict__:
        raise ValueError("monkeypatch: module must have its class's forward, got one whose forward was replaced")
    fmodule = copied(module, lambda p: p, once(lambda b: b.detach().to(device=device, copy=True)))
    fmodule.__class__ = _functional(type(module))  # type: ignore[arg-type]
    fmodule.__dict__.update(
        _history=[],
        _places=Places(fmodule),
        _source=(module,) if device is None else (),
        _track=True,
        _fused=is_ours(module),
    )
    if encapsulator is not None:
        encapsulator(fmodule, module)
    return fmodule


def monkeypatch(
    module: nn.Module,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> Any:
    """A functional copy of the module, with fast parameters and buffers of its own.

    Its parameters are detached copies, or with `copy_initial_weights=False` clones, through which derivatives reach the
    module's. `track_higher_grads=False` keeps no parameters but the last. Raises TypeError for what is no module,
    ValueError for a functional one.

    >>> import torch
    >>> from metakern.compat import higher
    >>> fmodel = higher.monkeypatch(torch.nn.Linear(2, 1))
    >>> fmodel(torch.ones(3, 2), params=[torch.ones(1, 2), torch.zeros(1)])[0]
    tensor([2.])
    >>> [p.shape for p in fmodel.parameters(time=0)]
    [torch.Size([1, 2]), torch.Size([1])]
    """

    def copy(p: Tensor) -> Tensor:
        if copy_initial_weights:
            return p.detach().to(device=device, copy=True).requires_grad_(p.requires_grad)
        return p.clone() if device is None else p.clone().to(device)

    fmodule = make_functional(module, lambda fmodule, _: fmodule.update_params(map(copy, module.parameters())), device)
    fmodule.track_higher_grads = track_higher_grads
    return fmodule
