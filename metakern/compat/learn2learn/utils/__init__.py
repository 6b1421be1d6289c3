"""learn2learn's functions on modules whose parameters have a history: clone, update, detach; and the magic box.

clone_module    p' = p                  a copy of the module; derivatives with respect to p' reach p
update_module   p <- p + u              out of place, so that derivatives reach both
magic_box       exp(x - stop(x)) = 1    with the derivative of x (Foerster et al. 2018, "DiCE", section 3)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from metakern.compat.modules import copied, once, stepped

D = TypeVar("D")
M = TypeVar("M", bound=nn.Module)
_HOLDERS = (Distribution, Transform)


def clone_parameters(param_list: Iterable[Tensor]) -> list[Tensor]:
    return [p.clone() for p in param_list]


def clone_named_parameters(param_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.clone() for name, p in param_dict.items()}


def clone_module(module: M, memo: dict[Tensor, Tensor] | None = None) -> M:
    """A copy of the module, whose parameters are clones of its parameters in autograd's sense.

    Buffers are shared, but for those that require a gradient, which are cloned; so batch norm in a clone goes on
    counting in the module. Parameters and submodules that occur twice still are one. `memo` holds the clones by the
    tensors that they are of, for several modules with parameters in common.

    >>> import torch
    >>> from metakern.compat.learn2learn import clone_module
    >>> net = torch.nn.Linear(3, 1)
    >>> clone_module(net)(torch.ones(2, 3)).sum().backward()
    >>> net.weight.grad
    tensor([[2., 2., 2.]])
    """
    clone = once(torch.clone, memo)
    return copied(module, clone, lambda b: clone(b) if b.requires_grad else b)


def update_module(module: M, updates: Sequence[Tensor | None] | None = None, memo: dict | None = None) -> M:
    """Adds an update to each parameter, in place for the module and out of place for autograd; returns the module.

    updates: a tensor, or None, for each of `module.parameters()`; without it, the attributes `update` of parameters
    and buffers, where they have one. Raises ValueError where the numbers differ.

    >>> import torch
    >>> from metakern.compat.learn2learn import clone_module, update_module
    >>> net = torch.nn.Linear(3, 1, bias=False)
    >>> clone = update_module(clone_module(net), updates=[torch.ones(1, 3)])
    >>> torch.equal(clone.weight, net.weight + 1)
    True
    """
    if updates is not None:
        parameters = list(module.parameters())
        if len(updates) != len(parameters):
            raise ValueError(
                f"update_module: updates must have an entry for each of the {len(parameters)} parameters, "
                f"got {len(updates)}"
            )
        for p, update in zip(parameters, updates, strict=True):
            p.update = update  # type: ignore[attr-defined]
    memo = {} if memo is None else memo
    changed = []
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if (update := getattr(tensor, "update", None)) is not None:
                    memo[tensor] = tensor + update
                    changed.append((tensor, memo[tensor]))
                    tensor.update = None  # type: ignore[attr-defined]
                tensors[name] = memo.get(tensor, tensor)
    stepped(module, changed)
    return module


def detach_module(module: nn.Module, keep_requires_grad: bool = False) -> None:
    """Cuts the parameters and buffers of a cloned module from their history, in place.

    They no longer require a gradient, unless `keep_requires_grad`.

    >>> import torch
    >>> from metakern.compat.learn2learn import clone_module, detach_module
    >>> clone = clone_module(torch.nn.Linear(3, 1))
    >>> detach_module(clone, keep_requires_grad=True)
    >>> clone.weight.is_leaf, clone.weight.requires_grad
    (True, True)
    """
    for tensor in (*module.parameters(), *module.buffers()):
        keep = keep_requires_grad and tensor.requires_grad
        tensor.detach_().requires_grad_(keep)


def clone_distribution(dist: D) -> D:
    """A copy of a distribution, whose tensors are clones of its tensors in autograd's sense.

    So are those of the modules, transforms and distributions in it.

    >>> import torch
    >>> from metakern.compat.learn2learn import clone_distribution
    >>> mean = torch.zeros(2, requires_grad=True)
    >>> clone_distribution(torch.distributions.Normal(mean, 1.0)).log_prob(torch.ones(2)).sum().backward()
    >>> mean.grad
    tensor([1., 1.])
    """
    memo: dict[Tensor, Tensor] = {}
    clone = once(torch.clone, memo)
    twins: dict[int, Any] = {}  # a transform and its inverse refer to each other

    def cloned(value: Any) -> Any:
        if isinstance(value, Tensor):
            return clone(value)
        if isinstance(value, nn.Module):
            return clone_module(value, memo)
        if isinstance(value, list | tuple):
            return type(value)(map(cloned, value))
        if not isinstance(value, _HOLDERS):
            return value
        if id(value) not in twins:
            twin = twins[id(value)] = copy.copy(value)
            twin.__dict__.update({name: cloned(part) for name, part in value.__dict__.items()})
        return twins[id(value)]

    return cloned(dist)


def detach_distribution(dist: D) -> D:
    """Cuts a distribution's tensors, modules, transforms and distributions from their history; returns it."""
    seen = set()

    def detached(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach()
        if isinstance(value, list | tuple):
            return type(value)(map(detached, value))
        if isinstance(value, nn.Module):
            detach_module(value)
        elif isinstance(value, _HOLDERS) and id(value) not in seen:
            seen.add(id(value))
            value.__dict__.update({name: detached(part) for name, part in value.__dict__.items()})
        return value

    return detached(dist)


def accuracy(preds: Tensor, targets: Tensor) -> Tensor:
    """The part of the rows whose largest entry is at the target.

    >>> import torch
    >>> from metakern.compat.learn2learn.utils import accuracy
    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    tensor(0.5000)
    """
    return (preds.argmax(dim=1) == targets).sum().float() / preds.size(0)


def magic_box(x: Any) -> Any:
    """1 for a tensor, with the derivatives of exp(x) at 0; anything else as it is.

    >>> import torch
    >>> from metakern.compat.learn2learn import magic_box
    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> magic_box(x), torch.autograd.grad(5 * magic_box(x), x)
    (tensor(1., grad_fn=<ExpBackward0>), (tensor(5.),))
    """
    return torch.exp(x - x.detach()) if isinstance(x, Tensor) else x
