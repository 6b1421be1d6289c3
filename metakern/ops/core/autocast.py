"""Inside `torch.autocast`, an op casts its floating-point tensors to the dtype that PyTorch's own function would use.

| policy | dtype | ops |
|---|---|---|
| lower | the autocast dtype of the device | products of matrices, recurrent layers |
| float32 | float32 | norms, cross-entropy |
| widest | the widest dtype among the arguments | elementwise ops, embedding |

A float64 tensor stays float64 under every policy. Sums over half precision are accumulated in float32. The rules of an
op always run with autocast off, even if a derivative is taken inside an autocast region.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from metakern.native import memory
from metakern.ops.core import plain

F = TypeVar("F", bound=Callable[..., Any])


def enabled(device: torch.device) -> bool:
    """Returns whether autocast is on for a device; for one that has no autocast, such as "meta", it is off."""
    if not torch._C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(device.type):
        return False
    return torch.is_autocast_enabled(device.type)


def autocast(policy: str) -> Callable[[F], F]:
    """Returns a decorator that makes the public function of an op follow `torch.autocast`, by the table above.

    The casts are differentiable. Inside an autocast region an op runs its rules on small tensors too, since autocast
    would change the derivatives of plain operations. The decorated function also obeys `plain_operations`.
    `__torch_function__` modes do not see inside it.
    """

    def decorated(function: F) -> F:
        def run(*args: Any, **kwargs: Any) -> Any:
            floats = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
            if not floats or not enabled(floats[0].device):
                return function(*args, **kwargs)
            dtype = _dtype(policy, floats)

            def cast(t: Tensor) -> Tensor:
                if not t.is_floating_point() or t.dtype == torch.float64:
                    return t
                memory.check(function.__name__, "every tensor", t)
                return t.to(dtype)

            with torch.autocast(floats[0].device.type, enabled=False), plain.where_small(False):
                return function(*tree_map_only(Tensor, cast, args), **tree_map_only(Tensor, cast, kwargs))

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if plain.everywhere():
                from metakern.ops import SPECS

                return SPECS[function.__name__].plain(*args, **kwargs)
            called = run if torch._C._is_any_autocast_enabled() else function
            if torch.compiler.is_dynamo_compiling() or not torch._C._len_torch_function_stack():
                return called(*args, **kwargs)
            with torch._C.DisableTorchFunction():  # else a mode is called for each attribute, at the cost of a small op
                return called(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorated


def _dtype(policy: str, floats: list[Tensor]) -> torch.dtype:
    if policy == "lower":
        return torch.get_autocast_dtype(floats[0].device.type)
    widest = reduce(torch.promote_types, (t.dtype for t in floats))
    return torch.promote_types(widest, torch.float32) if policy == "float32" else widest


def plainly(rule: Callable[..., Any], *args: Any) -> Any:
    """Returns rule(*args), computed with autocast off."""
    if not torch._C._is_any_autocast_enabled():
        return rule(*args)
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        return rule(*args)
