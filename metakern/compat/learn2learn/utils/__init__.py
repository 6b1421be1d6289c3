"""learn2learn's functions on modules whose parameters have a history: clone, update, detach; accuracy; the magic box.

clone_module    p' = p                  p' is part of the graph, so that derivatives reach p
update_module   p <- p + u              out of place, so that derivatives reach p and u
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
    """Returns clones of the tensors, through which derivatives reach them.

    >>> import torch
    >>> from metakern.compat.learn2learn import clone_parameters
    >>> [p.shape for p in clone_parameters(torch.nn.Linear(3, 1).parameters())]
    [torch.Size([1, 3]), torch.Size([1])]
    """
    return [p.clone() for p in param_list]


def clone_named_parameters(param_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns clones of the tensors by name, through which derivatives reach them.

    >>> import torch
    >>> from metakern.compat.learn2learn import clone_named_parameters
    >>> list(clone_named_parameters(dict(torch.nn.Linear(3, 1).named_parameters())))
    ['weight', 'bias']
    """
    return {name: p.clone() for name, p in param_dict.items()}


def clone_module(module: M, memo: dict[Tensor, Tensor] | None = None) -> M:
    """Returns a copy of the module whose parameters are clones, through which derivatives reach the module's own.

    Buffers that require a gradient are cloned and all others are shared, so the running statistics of a batch norm in
    the clone are the module's. A parameter or submodule in several places of the module is one in the clone too.

    Args:
        module: Any module.
        memo: The clones made so far, by their originals. Pass one dictionary for several modules that share parameters.

    Returns:
        The copy, of the module's class.

    Raises:
        ValueError: If the module can't be copied, such as one of TorchScript.

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
    """Replaces each parameter p of the module by p + update, a new tensor, so that derivatives reach p and the update.

    Args:
        module: A module whose parameters may be replaced by tensors, as those of a clone.
        updates: A tensor, or None for no update, for each of `module.parameters()`. By default parameters and buffers
            are updated by their attribute `update`, where they have one.
        memo: The tensors updated so far, by the ones that they replace. Pass one dictionary for several modules that
            share parameters.

    Returns:
        The same module.

    Raises:
        ValueError: If there are not as many updates as parameters.

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
    """Detaches the parameters and buffers of a cloned module from their history, in place.

    Args:
        module: A clone.
        keep_requires_grad: Whether tensors that require a gradient go on to, as leaves. By default none does.

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
    """Returns a copy of a distribution whose tensors are clones, through which derivatives reach the original's.

    Modules, transforms and distributions in it are copied in the same way.

    Args:
        dist: A `torch.distributions.Distribution`, or an object of another kind, such as a `Transform` or a module.

    Returns:
        The copy, of the same class.

    >>> import torch
    >>> from metakern.compat.learn2learn import clone_distribution
    >>> mean = torch.zeros(2, requires_grad=True)
    >>> clone_distribution(torch.distributions.Normal(mean, 1.0)).log_prob(torch.ones(2)).sum().backward()
    >>> mean.grad
    tensor([1., 1.])
    """
    memo: dict[Tensor, Tensor] = {}
    clone = once(torch.clone, memo)
    twins: dict[int, Any] = {}  # by id: a transform and its inverse refer to each other

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
    """Detaches the tensors of a distribution from their history, in place, and returns the distribution.

    So it does with those of the modules, transforms and distributions in it.

    >>> import torch
    >>> from metakern.compat.learn2learn import detach_distribution
    >>> mean = torch.zeros(2, requires_grad=True)
    >>> detach_distribution(torch.distributions.Normal(mean, 1.0)).mean.requires_grad
    False
    """
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
    """Returns the fraction of rows whose largest entry is at the target.

    Args:
        preds: Scores, [B, classes].
        targets: Classes, [B], integers.

    Returns:
        A scalar, float32.

    >>> import torch
    >>> from metakern.compat.learn2learn.utils import accuracy
    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    tensor(0.5000)
    """
    return (preds.argmax(dim=1) == targets).sum().float() / preds.size(0)


def magic_box(x: Any) -> Any:
    """Returns exp(x - stop(x)) for a tensor: ones, whose derivative with respect to x is one at every order.

    What is no tensor is returned as it is. Foerster et al. 2018, "DiCE", section 3.

    >>> import torch
    >>> from metakern.compat.learn2learn import magic_box
    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> magic_box(x), torch.autograd.grad(5 * magic_box(x), x)
    (tensor(1., grad_fn=<ExpBackward0>), (tensor(5.),))
    """
    return torch.exp(x - x.detach()) if isinstance(x, Tensor) else x
