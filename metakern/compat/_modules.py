"""What both interfaces stand on: trees of modules that compute with other tensors, and the gradients of a loss there.

A copied tree shares all but its parameters with the first one, and is as cheap as a dictionary for each module. Nothing
here refers to a module from within it, so that a copy and its graph are freed as soon as nobody holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from metakern.meta._batching import exact_kernels
from metakern.meta._functions import Fused

Change = Callable[[Tensor], Tensor]


def copied(module: Any, parameter: Change, buffer: Change, memo: dict[int, nn.Module] | None = None) -> Any:
    """The tree with other parameters and buffers in it; what was one module or tensor in two places still is.

    What is no module stays as it is; `memo` holds the copies so far.
    """
    memo = {} if memo is None else memo
    if not isinstance(module, nn.Module):
        return module
    if id(module) not in memo:
        twin = memo[id(module)] = type(module).__new__(type(module))
        state = twin.__dict__
        state.update(module.__dict__)
        state["_parameters"] = {n: p if p is None else parameter(p) for n, p in module._parameters.items()}
        state["_buffers"] = {n: b if b is None else buffer(b) for n, b in module._buffers.items()}
        state["_modules"] = {n: copied(child, parameter, buffer, memo) for n, child in module._modules.items()}
        if "forward" in state:
            state["forward"] = _rebound(module, twin)
        if "_flat_weights" in state:  # of a recurrent layer, which brings the list up to date by itself
            state["_flat_weights"] = list(state["_flat_weights"])
    return memo[id(module)]


def _rebound(module: nn.Module, twin: nn.Module) -> MethodType:
    """The forward that a module got instead of its class's, for its copy."""
    forward = module.__dict__["forward"]
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        raise ValueError(
            f"clone: the forward of {type(module).__name__} must be a method, got another function in its place, "
            "which may hold the module's own parameters"
        )
    return MethodType(forward.__func__, twin)


def once(change: Change, memo: dict[Tensor, Tensor] | None = None) -> Change:
    """`change`, made once for a tensor and found again in `memo` from then on."""
    memo = {} if memo is None else memo

    def remembered(tensor: Tensor) -> Tensor:
        if tensor not in memo:
            memo[tensor] = change(tensor)
        return memo[tensor]

    return remembered


class Places:
    """The parameters of a tree of modules, in the order of `parameters()`, and the places that each of them has."""

    def __init__(self, module: nn.Module) -> None:
        self.values: list[Tensor] = []
        self._places: list[tuple[dict[str, Any], str, int]] = []
        numbers: dict[int, int] = {}
        for owner in module.modules():
            for name, value in owner._parameters.items():
                if value is not None:
                    number = numbers.setdefault(id(value), len(self.values))
                    if number == len(self.values):
                        self.values.append(value)
                    self._places.append((owner._parameters, name, number))

    def put(self, values: Sequence[Tensor]) -> None:
        for parameters, name, number in self._places:
            parameters[name] = values[number]


def is_ours(module: nn.Module) -> bool:
    """Whether metakern's modules are in it, as after `metakern.patch`."""
    return any(type(part).__module__.startswith("metakern.nn.") for part in module.modules())


@contextmanager
def fused() -> Iterator[None]:
    """Within it, what a model calls of torch.nn.functional runs by metakern's ops, or else twice differentiably."""
    with exact_kernels(), Fused():
        yield


def gradients(
    who: str, loss: Any, values: Sequence[Tensor], create_graph: bool, stepped: Iterable[int] | None = None
) -> list[Tensor | None]:
    """d loss / d value, None where a value is frozen or the loss does not depend on it.

    Raises TypeError where the loss is no tensor, ValueError where it is no scalar or depends on none of the values, of
    those with a number in `stepped` if given; RuntimeError where its graph is gone.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"{who}: loss must be a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"{who}: loss must be one number, got shape {list(loss.shape)}")
    wanted = [value for value in values if value.requires_grad]
    if not wanted:
        raise ValueError(f"{who}: the model must have a parameter that requires a gradient, got none")
    if not loss.requires_grad:
        raise ValueError(f"{who}: loss must have a graph, got a tensor without one: was it computed under no_grad()?")
    try:
        found = torch.autograd.grad(loss, wanted, create_graph=create_graph, allow_unused=True)
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            f"{who}: loss must have its graph, got one whose graph was freed by a backward() or a first-order step: "
            "compute it again"
        ) from error
    rest = iter(found)
    each = [next(rest) if value.requires_grad else None for value in values]
    if all(each[i] is None for i in (range(len(each)) if stepped is None else stepped)):
        raise ValueError(
            f"{who}: loss must depend on the current parameters of this model, got one that does not: it comes from "
            "another model, or from before the last step"
        )
    return each


def stay(who: str, tensors: Iterable[Tensor], change: Change) -> None:
    """Raises RuntimeError where `to()` or the like would change what has a history."""
    if any(change(t) is not t for t in tensors):
        raise RuntimeError(
            f"{who} must stay on its device and in its dtype, as its parameters have a history: move the model first"
        )


def same_device(who: str, source: nn.Module, values: Sequence[Tensor]) -> None:
    """Raises RuntimeError where the model has left the device on which its copy was made."""
    first = next(source.parameters(), None)
    if first is not None and values and first.device != values[0].device:
        raise RuntimeError(
            f"{who}: the model must stay on the device where the inner loop began, {values[0].device}, "
            f"got it on {first.device}: move it first, then begin the loop"
        )
