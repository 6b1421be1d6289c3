"""higher's helpers on nested structures and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def flatten(x: Any) -> list[Any]:
    """Returns the leaves of nested dictionaries, lists, tuples and sets as one list.

    >>> from metakern.compat import higher
    >>> higher.utils.flatten({"lr": [0.1], "betas": [(0.9, 0.99)]})
    [0.1, 0.9, 0.99]
    """
    if isinstance(x, dict):
        x = list(x.values())
    return [leaf for part in x for leaf in flatten(part)] if isinstance(x, list | tuple | set) else [x]


def get_func_params(
    module: nn.Module, device: torch.device | str | None = None, safe_copy: bool = True
) -> list[Tensor]:
    """Returns the module's parameters as tensors without a history, for a call of a functional module.

    Args:
        module: Any module.
        device: Where the tensors are; by default where the parameters are.
        safe_copy: Whether the tensors have storage of their own. With False they share that of the parameters, unless
            they are moved.

    Returns:
        Tensors in the order of `module.parameters()`, which require a gradient where the parameters do.

    >>> import torch
    >>> from metakern.compat import higher
    >>> [p.shape for p in higher.utils.get_func_params(torch.nn.Linear(2, 1))]
    [torch.Size([1, 2]), torch.Size([1])]
    """
    return [_copy_tensor(p, safe_copy, device) for p in module.parameters()]


def _copy_tensor(t: Tensor, safe_copy: bool, device: torch.device | str | None = None) -> Tensor:
    copied = t.detach().clone() if safe_copy else t.detach()
    return copied.to(device=device).requires_grad_(t.requires_grad)


def _recursive_map(target: Any, map_fn: Callable[[Any], Any]) -> Any:
    """Returns the nested structure with `map_fn(leaf)` in place of each leaf."""
    if isinstance(target, dict):
        return type(target)({k: _recursive_map(v, map_fn) for k, v in target.items()})
    if isinstance(target, list | tuple | set):
        return type(target)(_recursive_map(x, map_fn) for x in target)
    return map_fn(target)


def _find_param_in_list(param: Tensor, l: Any) -> int | None:
    """Returns the index of a tensor in a list, compared by identity; None if it is not there."""
    return next((i for i, p in enumerate(l) if p is param), None)
