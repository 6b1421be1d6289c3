"""higher's functional modules: copies of a module that compute with fast parameters, replaced at each update.

    parameters(time=k)    phi_k, the parameters after k updates; by default the present ones
    fmodel(x, params=p)   the module's output with p, which become the present parameters

A copy made with `copy_initial_weights=False` starts from clones of the module's parameters, so that derivatives reach
these. Where the model may use activation checkpointing, each forward runs on module objects of its own, so that it is
recomputed with its own weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from metakern.compat.modules import Places, apart, copied, once, stay, surroundings, watched
from metakern.compat.recompute import recomputes

Encapsulator = Callable[[Any, nn.Module], None]


class FunctionalPart(nn.Module):
    """The base class that each module of a functional module has beside its own class."""

    _like: type[nn.Module]  # the module's own class
    _fmodel_root: Callable[[], FunctionalModule | None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        root = self._fmodel_root()
        if (root is not None and not root._fmodel_recomputes) or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        with apart(self) as twin:
            return twin.forward(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; setting a parameter is an update of the functional module, in which only it changes."""
        if isinstance(value, nn.Module) and name in self._modules and not isinstance(value, FunctionalPart):
            raise ValueError(
                f"fmodel: submodules must be set in the model before it is made functional, got {name!r} set later"
            )
        if name not in self._parameters:
            super().__setattr__(name, value)
            return
        if not isinstance(value, Tensor):
            raise TypeError(f"fmodel: {name} must be a tensor, got {type(value).__name__}")
        root = self._fmodel_root()
        if root is None:
            raise ValueError(f"fmodel: parameters must be set in the functional model itself, got {name!r} of a copy")
        if root.fast_params is None:
            raise ValueError(
                f"fmodel: parameters must all be set before a single one is, got {name!r} set first: call "
                "update_params(params)"
            )
        params = list(root.fast_params)
        params[root._fmodel_places.number(self, name)] = value
        root.update_params(params)


class FunctionalModule(FunctionalPart):
    """The base class that a functional module, as `monkeypatch` returns it, has beside the module's own class."""

    _fast_params: list[list[Tensor]]  # after each update, or the present ones alone
    _fmodel_places: Places
    _fmodel_source: tuple[nn.Module, ...]  # the original module, if it is on the same device
    _track_higher_grads: bool
    _fmodel_within: Callable[[], AbstractContextManager]
    _fmodel_recomputes: bool
    _fmodel_is_new: bool  # whether it has not run yet
    _fmodel_replaced: Any  # a forward that was set on the module in place of its class's

    def forward(self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
        """Returns the module's output with the present parameters.

        Args:
            *args: Arguments of the module's own forward, as are the keywords.
            params: Tensors in the order of `parameters()`, which become the present parameters.

        Raises:
            ValueError: If there are no parameters yet, or if `params` are not as many as the module's. At the first
                call, if the model reaches a part of itself by its class or a global.
        """
        if params is not None:
            self.update_params(params)
        elif not self._fast_params:
            raise ValueError("fmodel: params must be given to a functional module without parameters, got None")
        if self._fmodel_is_new and not torch.compiler.is_compiling():
            self._fmodel_is_new = False
            with watched("fmodel", self._fmodel_source):
                return self._fmodel_run(*args, **kwargs)
        return self._fmodel_run(*args, **kwargs)

    def _fmodel_run(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward if self._fmodel_replaced is None else self._fmodel_replaced
        with self._fmodel_within():
            return forward(*args, **kwargs)

    def update_params(self, params: Iterable[Tensor]) -> None:
        """Makes `params`, in the order of `parameters()`, the present parameters.

        The former ones are kept, for `parameters(time=k)`, unless `track_higher_grads` is False.

        Raises:
            ValueError: If there are not as many as the module has.
        """
        params = list(params)
        if len(params) != len(self._fmodel_places.values):
            raise ValueError(
                f"fmodel: params must have an entry for each of the {len(self._fmodel_places.values)} parameters, "
                f"got {len(params)}"
            )
        self._fmodel_places.put(self, params)
        if not self._track_higher_grads:
            self._fast_params.clear()
        self._fast_params.append(params)

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[Any]:
        """Returns an iterator over the parameters after `time` updates, by default the present ones.

        They are always those of all submodules, whatever `recurse` is; a negative `time` counts from the present ones.

        Raises:
            ValueError: If there are no parameters yet, if there were fewer updates, or if former parameters are asked
                for although `track_higher_grads` is False.
        """
        if not self._fast_params:
            raise ValueError("fmodel: parameters must be set before they are read, got none")
        time = -1 if time is None else time
        if not self._track_higher_grads and time not in (-1, 0):
            raise ValueError(f"fmodel: time must be -1 or 0 with track_higher_grads=False, got {time}")
        if not -len(self._fast_params) <= time < len(self._fast_params):
            raise ValueError(
                f"fmodel: time must be at most {len(self._fast_params) - 1}, the number of updates so far, got {time}"
            )
        return iter(self._fast_params[time])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FunctionalModule:
        """Refuses the changes that `to()`, `half()` and their like would make."""
        stay("fmodel: the module", (*(self.fast_params or ()), *self.buffers()), fn)
        return self

    @property
    def fast_params(self) -> list[Tensor] | None:
        """The present parameters, None if there are none yet; setting it is `update_params`."""
        return self._fast_params[-1] if self._fast_params else None

    @fast_params.setter
    def fast_params(self, value: Iterable[Tensor]) -> None:
        self.update_params(value)

    @property
    def init_fast_params(self) -> list[Tensor]:
        """The parameters before the first update; ValueError if `track_higher_grads` is False."""
        if not self._track_higher_grads:
            raise ValueError("fmodel: track_higher_grads must be True to read the initial parameters, got False")
        return self._fast_params[0]

    @property
    def track_higher_grads(self) -> bool:
        """Whether former parameters are kept."""
        return self._track_higher_grads

    @track_higher_grads.setter
    def track_higher_grads(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"fmodel: track_higher_grads must be True or False, got {value!r}")
        self._track_higher_grads = value


_MonkeyPatchBase = FunctionalModule  # higher's name, by which code asks whether a module is functional


@cache
def _functional(kind: type[nn.Module], base: type[FunctionalPart]) -> Any:
    """Returns the class, derived from `base` and `kind`, of the copies of modules of the class `kind`."""
    return type(f"Functional{kind.__name__}", (base, kind), {"__module__": kind.__module__, "_like": kind})


def make_functional(module: nn.Module, encapsulator: Encapsulator | None = None, device: Any = None) -> Any:
    """Returns a functional copy of the module that has no parameters until it is given some.

    Args:
        module: Any module; it stays as it is.
        encapsulator: Called as `encapsulator(fmodule, module)` before the copy is returned; it may give it parameters.
        device: Where the copy's buffers are; by default where the module's are.

    Returns:
        The copy, a `FunctionalModule` and an instance of the module's class; call it as `fmodule(x, params=params)`.

    Raises:
        TypeError: If `module` is no `nn.Module`.
        ValueError: If it is functional already or can't be copied.

    >>> import torch
    >>> from metakern.compat import higher
    >>> fmodel = higher.make_functional(torch.nn.Linear(2, 1))
    >>> fmodel(torch.ones(3, 2), params=[torch.ones(1, 2), torch.zeros(1)])[0]
    tensor([2.])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"monkeypatch: module must be an nn.Module, got {type(module).__name__}")
    if any(isinstance(part, FunctionalPart) for part in module.modules()):
        raise ValueError("monkeypatch: module must not be functional, got a functional one: pass the original module")

    def alias(p: Tensor) -> Tensor:
        return p.detach().requires_grad_(p.requires_grad)

    fmodule = copied(module, once(alias), once(lambda b: b.detach().to(device=device, copy=True)))
    for part in fmodule.modules():
        kind: Any = type(part)
        part.__class__ = _functional(kind, FunctionalModule if part is fmodule else FunctionalPart)
        part.__dict__["_fmodel_root"] = weakref.ref(fmodule)
    fmodule.__dict__.update(
        _fast_params=[],
        _fmodel_places=Places(fmodule),
        _fmodel_source=(module,) if device is None else (),
        _track_higher_grads=True,
        _fmodel_within=surroundings(module, recomputes(module)),
        _fmodel_recomputes=recomputes(module),
        _fmodel_is_new=True,
        _fmodel_replaced=fmodule.__dict__.pop("forward", None),
    )
    if encapsulator is not None:
        encapsulator(fmodule, module)
    return fmodule


def buffer_sync(module: nn.Module, fmodule: nn.Module, device: torch.device | str | None = None) -> None:
    """Replaces the buffers of a functional module by copies of the module's present ones.

    Args:
        module: The module that `fmodule` was made of.
        fmodule: The functional module.
        device: Where the copies are; by default where the module's buffers are.

    Raises:
        KeyError: If `fmodule` lacks a submodule of `module`.

    >>> import torch
    >>> from metakern.compat import higher
    >>> norm = torch.nn.BatchNorm1d(2)
    >>> fmodel = higher.monkeypatch(norm)
    >>> _ = norm(torch.randn(3, 2))
    >>> higher.patch.buffer_sync(norm, fmodel)
    >>> fmodel.num_batches_tracked
    tensor(1)
    """
    copy = once(lambda b: b.detach().to(device=device, copy=True))
    parts = dict(fmodule.named_modules(remove_duplicate=False))
    for path, part in module.named_modules(remove_duplicate=False):
        if path not in parts:
            raise KeyError(f"buffer_sync: fmodule must have the module's submodules, got none at {path!r}")
        for name, buffer in part._buffers.items():
            parts[path]._buffers[name] = buffer if buffer is None else copy(buffer)


def monkeypatch(
    module: nn.Module,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> Any:
    """Returns a functional copy of the module, with parameters and buffers of its own.

    Args:
        module: Any module; it stays as it is.
        device: Where the copy is; by default where the module is.
        copy_initial_weights: Whether the copy starts from detached copies of the parameters. With False it starts from
            clones, through which derivatives reach the module's parameters.
        track_higher_grads: Whether former parameters are kept, for `parameters(time=k)`.

    Returns:
        The copy, a `FunctionalModule` and an instance of the module's class. `fmodel(x)` computes with the present
        parameters, `fmodel(x, params=params)` makes `params` the present ones.

    Raises:
        TypeError: If `module` is no `nn.Module`.
        ValueError: If it is functional already or can't be copied.

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
