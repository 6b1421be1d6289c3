"""Shared by both interfaces: copy a module tree so that it computes with other tensors, and differentiate its loss.

A copy has module objects and parameters of its own, and buffers if asked for. It shares nearly all other attributes
with the original, so it costs little more than a few dictionaries a module. Nothing here makes a reference cycle: a
copy and its graph are freed as soon as nobody holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from metakern.compat.references import PLAIN, References, refreshed
from metakern.meta.batching import exact_kernels
from metakern.meta.functions import FusedFunctions
from metakern.ops.core.plain import where_small

Change = Callable[[Tensor], Tensor]


# Attributes of a module that `_leading` leaves out: those that `copied` handles itself, those that hold no module or
# tensor, and those that only functional modules have.
_OWN = {
    "_buffers",
    "_compiled_call_impl",
    "_fast_params",
    "_flat_weight_refs",
    "_flat_weights",
    "_is_full_backward_hook",
    "_modules",
    "_non_persistent_buffers_set",
    "_parameters",
    "_fmodel_places",
    "_references",
    "_fmodel_replaced",
    "_fmodel_root",
    "_fmodel_recomputes",
    "_fmodel_source",
    "training",
}
# Files whose modules, but for those in _CALLERS, call no function that `fused` replaces.
_LAYERS = {
    *(f"torch.nn.modules.{name}" for name in ("activation", "batchnorm", "container", "conv", "dropout", "flatten")),
    *(f"torch.nn.modules.{name}" for name in ("linear", "normalization", "padding", "pooling")),
    *(f"metakern.nn.{name}" for name in ("activation", "linear", "norm")),
}
_CALLERS = {nn.GELU, nn.MultiheadAttention, nn.SiLU}
# Attributes that hold hooks; most are empty.
_HOOKS = {name for name in nn.Module().__dict__ if "hook" in name} - _OWN


def copied(module: Any, parameter: Change, buffer: Change) -> Any:
    """Returns a copy of a module tree with `parameter(p)` for each parameter p and `buffer(b)` for each buffer b.

    A module in several places of the tree is copied once; wrap the arguments in `once` for the same to hold of tensors.
    Containers, bound methods, closures and objects through which a module reaches its own parts are copied too and hold
    the copied parts. A part compiled by `torch.compile` runs uncompiled in the copy. If `module` is no `nn.Module`, it
    is returned as it is.

    Raises ValueError for a module that can't be copied: its `forward` was replaced by another function, it is
    TorchScript, its weights are offloaded, or it reaches a part through an object that can't be copied.
    """
    if not isinstance(module, nn.Module):
        return module
    twins: dict[int, tuple[nn.Module, nn.Module]] = {}
    tensors: dict[int, tuple[Tensor, Tensor]] = {}

    def known(change: Change) -> Change:
        def remembered(tensor: Tensor) -> Tensor:
            new = change(tensor)
            if new is not tensor:
                tensors[id(tensor)] = tensor, new
            return new

        return remembered

    copy = _copied(module, known(parameter), known(buffer), twins)
    references = References((*twins.values(), *tensors.values()))
    for old, twin in twins.values():
        kept = _rebound(old, twin, references)
        if "forward" in old.__dict__ and "forward" not in kept:
            raise ValueError(
                f"clone: the forward of {type(old).__name__} must be a method, got another function in its place, "
                "which may hold the module's own parameters: override forward in a subclass instead"
            )
        if kept:
            twin.__dict__["_references"] = kept
    return copy


def _leading(module: nn.Module) -> list[tuple[str, Any]]:
    """Returns the attributes, by name, through which the module may reach another module or a tensor."""
    return [
        (name, value)
        for name, value in module.__dict__.items()
        if name not in _OWN and type(value) not in PLAIN and (name not in _HOOKS or value)
    ]


def _rebound(old: nn.Module, twin: nn.Module, references: References) -> dict[str, Any]:
    """Replaces the twin's attributes that still lead to old modules or tensors; returns the new values by name."""
    if _is_compiled(old):
        twin.__dict__["forward"] = twin._modules["_orig_mod"]
        return {"forward": twin.__dict__["forward"]}
    kept = {}
    for name, value in _leading(old):
        if (new := references.mended(value)) is not value:
            twin.__dict__[name] = kept[name] = new
    return kept


def _copied(module: Any, parameter: Change, buffer: Change, twins: dict[int, tuple[nn.Module, nn.Module]]) -> Any:
    if not isinstance(module, nn.Module):
        return module
    if id(module) not in twins:
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"clone: the model must be written in Python, got {type(module).__name__} of torch.jit in it, which "
                "computes with its own parameters: pass the Python module that torch.jit.script was given"
            )
        if "_hf_hook" in module.__dict__ and any(p is not None and p.is_meta for p in module._parameters.values()):
            raise ValueError(
                f"clone: parameters must be in memory, got a {type(module).__name__} that accelerate offloads and "
                "whose original weights it would load at each forward: load the model without offloading"
            )
        twin = object.__new__(type(module))
        twins[id(module)] = module, twin
        state = twin.__dict__
        state.update(module.__dict__)
        state.pop("_references", None)
        state["_parameters"] = {n: p if p is None else parameter(p) for n, p in module._parameters.items()}
        state["_buffers"] = {n: b if b is None else buffer(b) for n, b in module._buffers.items()}
        state["_modules"] = {n: _copied(child, parameter, buffer, twins) for n, child in module._modules.items()}
        # What `module.compile()` stored computes with the old module.
        state["_compiled_call_impl"] = None
        if "_flat_weights" in state:  # a recurrent layer changes this list of its weights in place
            state["_flat_weights"] = list(state["_flat_weights"])
    return twins[id(module)][1]


def _is_compiled(module: nn.Module) -> bool:
    """Returns whether `torch.compile` made this module; told by its name, as importing the compiler takes long."""
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules


class Guarded(dict):
    """The parameter dictionary of a copied module, which a backward through a forward from before a step can't read.

    Activation checkpointing recomputes a part of the forward during the backward. A module that has stepped in between
    holds later weights, and the gradient would be wrong without an error. Autograd numbers its nodes in the order in
    which they are made, so the number of the node that needs the recomputed tensors tells whether its forward came
    before the last step, at which the count was `since`. A forward within `apart` needs no guard, as its modules never
    step.
    """

    since = 0

    def check(self) -> None:
        if torch._C._current_graph_task_id() == -1:
            return
        node = torch._C._current_autograd_node()
        if node is not None and node._sequence_nr() < self.since:
            raise RuntimeError(
                "clone: a forward from before a step must not be recomputed with the weights from after it, got "
                "activation checkpointing around the clone or in a part of it that was called by itself: call the "
                "learner or functional model as a whole with the checkpoints inside of it, or call "
                "gradient_checkpointing_disable()"
            )

    def __getitem__(self, name: str) -> Any:
        self.check()
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.check()
        return super().get(name, default)

    def items(self) -> Any:
        self.check()
        return super().items()

    def values(self) -> Any:
        self.check()
        return super().values()

    def __reduce__(self) -> Any:
        """Copies and pickles without `since`: a copied dictionary has made no step."""
        return Guarded, (dict(self),)


@contextmanager
def apart(module: nn.Module) -> Iterator[nn.Module]:
    """Yields a twin of a copied module, for one forward: new module objects that hold the same tensors.

    Steps of `module` do not change the twin, so a recomputation in the backward reads the weights of this forward. What
    the forward sets on the twin's modules is set on those of `module` at the end of the block.
    """
    twins: dict[int, tuple[nn.Module, nn.Module]] = {}
    twin = _apart(module, twins)
    pairs = list(twins.values())
    leading = [(old, new) for old, new in pairs if _leading(old)]
    references = References(pairs if leading else ())
    rebound = {id(old): _rebound(old, new, references) for old, new in leading}
    before = [_held(new) for _, new in pairs]
    try:
        yield twin
    finally:
        changed = [pair for pair, held in zip(pairs, before, strict=True) if _held(pair[1]) != held]
        if changed or references.made:
            back = References([(new, old) for old, new in (*pairs, *references.made)])
            for old, new in changed:
                _written_back(old, new, rebound.get(id(old), {}), back)
            for old, new in references.made:
                refreshed(old, new, back)


def _held(twin: nn.Module) -> list[int]:
    """Returns the ids of what the twin holds; they stay valid, as the module that it is a twin of holds it too."""
    state = twin.__dict__
    return [*map(id, state.values()), *map(id, state["_modules"].values()), *map(id, state["_parameters"].values())]


def _apart(module: Any, twins: dict[int, tuple[nn.Module, nn.Module]]) -> Any:
    if not isinstance(module, nn.Module):
        return module
    if id(module) not in twins:
        twin = object.__new__(getattr(type(module), "_like", type(module)))
        twins[id(module)] = module, twin
        state = twin.__dict__
        state.update(module.__dict__)
        state["_parameters"] = dict(module._parameters.items())
        state["_modules"] = {n: _apart(child, twins) for n, child in module._modules.items()}
        if "_flat_weights" in state:
            state["_flat_weights"] = list(state["_flat_weights"])
    return twins[id(module)][1]


def _written_back(old: nn.Module, twin: nn.Module, rebound: dict[str, Any], back: References) -> None:
    """Sets on `old` the attributes, submodules and parameters that the forward set on its twin."""
    state, after = old.__dict__, twin.__dict__
    for name, value in after.items():
        own = name in _OF_A_TWIN or (name in rebound and value is rebound[name])
        if not own and value is not state.get(name, state):
            state[name] = back.mended(value)
    for name in state.keys() - after.keys():
        del state[name]
    for name, child in after["_modules"].items():
        if (child := back.mended(child)) is not old._modules.get(name, state):
            old._modules[name] = child
    for name, p in after["_parameters"].items():
        if p is not dict.get(old._parameters, name, state):
            if hasattr(type(old), "_like"):
                setattr(old, name, p)
            else:
                old._parameters[name] = p


_OF_A_TWIN = {"_parameters", "_modules", "_flat_weights", "_flat_weight_refs"}


def once(change: Change, memo: dict[Tensor, Tensor] | None = None) -> Change:
    """Returns `change` with its results kept by tensor in `memo`, so that it is called once for each tensor."""
    memo = {} if memo is None else memo

    def remembered(tensor: Tensor) -> Tensor:
        if tensor not in memo:
            memo[tensor] = change(tensor)
        return memo[tensor]

    return remembered


class Places:
    """The parameters of a module tree, in the order of `parameters()`, each with every module and name that holds it.

    The modules' parameter dictionaries become `Guarded` ones.
    """

    def __init__(self, module: nn.Module) -> None:
        self.values: list[Tensor] = []
        self._places: list[tuple[dict[str, Any], str, int]] = []
        numbers: dict[int, int] = {}
        for owner in module.modules():
            if not isinstance(owner._parameters, Guarded):
                owner.__dict__["_parameters"] = Guarded(owner._parameters)
            for name, value in owner._parameters.items():
                if value is not None:
                    number = numbers.setdefault(id(value), len(self.values))
                    if number == len(self.values):
                        self.values.append(value)
                    self._places.append((owner._parameters, name, number))

    def put(self, module: nn.Module, values: Sequence[Tensor]) -> None:
        """Makes a step: `values` replace the parameters of the tree `module`, whose places these are."""
        for parameters, name, number in self._places:
            parameters[name] = values[number]
        stepped(module, zip(self.values, values, strict=True))
        self.values = list(values)

    def number(self, owner: nn.Module, name: str) -> int:
        """Returns the index in `values` of the parameter `name` of the module `owner`; ValueError if it has none."""
        for parameters, n, number in self._places:
            if parameters is owner._parameters and n == name:
                return number
        raise ValueError(f"fmodel: parameters must be set in the functional model itself, got {name!r} of a copy of it")


def stepped(module: nn.Module, changed: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Marks a step of `module`, so that no forward from before it is recomputed with the new parameters (`Guarded`).

    `changed` holds pairs (old tensor, new tensor). Containers, closures and objects that `copied` made for the tree are
    updated to hold the new tensors.
    """
    now, owners = torch._C._autograd._get_sequence_nr(), list(module.modules())
    for owner in owners:
        if not isinstance(owner._parameters, Guarded):
            owner.__dict__["_parameters"] = Guarded(owner._parameters)
        owner.__dict__["_parameters"].since = now
    held = [owner for owner in owners if "_references" in owner.__dict__]
    if not held:
        return
    references = References(changed, bounds=owners)
    for owner in held:
        for name, value in owner.__dict__["_references"].items():
            if owner.__dict__.get(name) is value:  # else the user has set the attribute since, and it stays
                owner.__dict__["_references"][name] = owner.__dict__[name] = references.mended(value)


def surroundings(module: nn.Module, recomputes: bool) -> Callable[[], AbstractContextManager]:
    """Returns in what a tree must run if it has modules of metakern, as after `metakern.patch`.

    That is `fused`, if the tree has code that may call functions which `fused` replaces; plain layers of torch.nn call
    none. Ops are also plain where small, except if the tree `recomputes` activations: it does so outside of this block.
    """
    parts = list(module.modules())
    kinds = set(map(type, parts))
    if not any(kind.__module__.startswith(("metakern.nn.", "metakern.patching.")) for kind in kinds):
        return nullcontext
    if recomputes:
        return fused
    if any(kind.__module__ not in _LAYERS or kind in _CALLERS for kind in kinds):
        return fused_where_large
    replaced = any("forward" in part.__dict__ or part._forward_hooks or part._forward_pre_hooks for part in parts)
    return fused_where_large if replaced else where_small


@contextmanager
def fused() -> Iterator[None]:
    """Within the block, torch.nn.functional runs as metakern's ops or as PyTorch's twice differentiable kernels."""
    with exact_kernels(), FusedFunctions():
        yield


@contextmanager
def fused_where_large() -> Iterator[None]:
    """As `fused`, with PyTorch's twice differentiable operations where they are faster."""
    with fused(), where_small():
        yield


def gradients(
    who: str,
    loss: Any,
    values: Sequence[Tensor],
    create_graph: bool,
    stepped: Iterable[int] | None = None,
    retain_graph: bool = False,
) -> list[Tensor | None]:
    """Returns the gradient of `loss` for each of `values`; None where one is frozen or the loss does not depend on it.

    `who` starts the error messages. `stepped` holds the indices of the values that a step changes, all by default.

    Raises TypeError if the loss is no tensor. Raises ValueError if it has not one element or no graph, if no value
    requires a gradient, or if the loss depends on none of the values in `stepped`. Raises RuntimeError if the loss's
    graph was freed, or if it has a reentrant checkpoint.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"{who}: loss must be a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"{who}: loss must have one element, got shape {list(loss.shape)}: take its mean or sum")
    wanted = [value for value in values if value.requires_grad]
    if not wanted:
        raise ValueError(f"{who}: the model must have a parameter that requires a gradient, got none")
    if not loss.requires_grad:
        raise ValueError(f"{who}: loss must have a graph, got a tensor without one: was it computed under no_grad()?")
    found = differentiated(who, loss, wanted, create_graph, retain_graph or create_graph)
    rest = iter(found)
    each = [next(rest) if value.requires_grad else None for value in values]
    if all(each[i] is None for i in (range(len(each)) if stepped is None else stepped)):
        raise ValueError(
            f"{who}: loss must depend on the current parameters of this model, got one that does not: compute it with "
            "this model, after its last step"
        )
    return each


def differentiated(
    who: str, loss: Tensor, wanted: Sequence[Tensor], create_graph: bool, retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """Calls `torch.autograd.grad` and, for two of its errors, raises a RuntimeError that says what to do."""
    try:
        return torch.autograd.grad(
            loss, wanted, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
        )
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise RuntimeError(
                f"{who}: activation checkpointing must not be reentrant, got a model with use_reentrant=True: pass "
                "use_reentrant=False, in gradient_checkpointing_enable(gradient_checkpointing_kwargs=...) too, or call "
                "gradient_checkpointing_disable()"
            ) from error
        if "backward through the graph a second time" in str(error):
            raise RuntimeError(
                f"{who}: loss must have its graph, got one whose graph was freed by a backward() or a first-order "
                "step: compute it again"
            ) from error
        raise


@contextmanager
def watched(who: str, source: tuple[nn.Module, ...]) -> Iterator[None]:
    """Within the block, raises ValueError when a module of the original models `source` runs in place of its copy.

    A model with compiled parts is not checked, as torch.compile warns of hooks on all modules.
    """
    paths = {id(part): path for model in source for path, part in model.named_modules()}
    if not paths or any(map(_is_compiled, source[0].modules())):
        yield
        return

    def check(module: nn.Module, inputs: Any) -> None:
        if id(module) in paths:
            raise ValueError(
                f"{who}: each part of the model must be reached through the model, got {paths[id(module)]!r} reached "
                "in another way, so that it would not adapt: keep it in an attribute of the model, not of its class, "
                "and not in a global"
            )

    hook = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def stay(who: str, tensors: Iterable[Tensor], change: Change) -> None:
    """Raises RuntimeError if `to()` or a method like it would change one of `tensors`, which have a history."""
    if any(change(t) is not t for t in tensors):
        raise RuntimeError(
            f"{who} must stay on its device and in its dtype, as its parameters have a history: move the model first"
        )


def same_device(who: str, source: nn.Module, values: Sequence[Tensor]) -> None:
    """Raises RuntimeError if the model was moved to another device than `values`, the parameters of its copy."""
    first = next(source.parameters(), None)
    if first is not None and values and first.device != values[0].device:
        raise RuntimeError(
            f"{who}: the model must stay on the device where the inner loop began, {values[0].device}, "
            f"got it on {first.device}: move it before the loop begins"
        )
