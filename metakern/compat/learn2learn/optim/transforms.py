"""Modules that map a parameter's gradient g to an update u of the same shape, and factories of such modules.

    ModuleTransform           u = M(g), g as one row         M: any module from n to n features, g with n elements
    KroneckerTransform        u = L g R, g as n x m          that is (R^T ⊗ L) times the gradient
    MetaCurvatureTransform    u = lr M_in g M_out            and M_f, over the positions h w of filters

Park, Oliva 2019, "Meta-Curvature", section 3; Arnold, Iqbal, Sha 2021, "When MAML can adapt fast and how to assist when
it cannot".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Transform = Callable[[Tensor], nn.Module | None]


class ReshapedTransform(nn.Module):
    """A module that reshapes a gradient, transforms it, and reshapes the result back.

    Args:
        transform: The module that transforms the reshaped gradient; its output has as many elements.
        shape: The shape that it gets.

    >>> import torch
    >>> from metakern.compat.learn2learn.optim import ReshapedTransform
    >>> ReshapedTransform(torch.nn.Linear(6, 6), (1, 6))(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """

    def __init__(self, transform: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.transform, self.in_shape = transform, shape

    def forward(self, grad: Tensor) -> Tensor:
        return self.transform(grad.reshape(self.in_shape)).reshape(grad.shape)


class ModuleTransform:
    """A factory of transforms: for a parameter with n elements, `module_cls(n, n)` on the gradient as a row [1, n].

    Args:
        module_cls: A class of modules from n to n features, such as `torch.nn.Linear`.

    >>> import torch
    >>> from metakern.compat.learn2learn.optim import ModuleTransform
    >>> ModuleTransform(torch.nn.Linear)(torch.zeros(2, 3))(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """

    def __init__(self, module_cls: Callable[[int, int], nn.Module]) -> None:
        self.module_cls = module_cls

    def __call__(self, parameter: Tensor) -> ReshapedTransform:
        n = parameter.numel()
        return ReshapedTransform(self.module_cls(n, n), (1, n))


class KroneckerTransform:
    """A factory of transforms: `kronecker_cls(n=n, m=m, bias=bias, psd=psd)` on the gradient as matrices [..., n, m].

    A vector [n] is taken as [n, 1], and filters [A, B, h, w] as A matrices [B, h w].

    Args:
        kronecker_cls: A class of Kronecker layers, such as `KroneckerLinear`.
        bias: Whether the layers have a bias.
        psd: Whether they use positive semi-definite matrices, L^T L and R^T R.

    Raises:
        ValueError: At a call, for a parameter that has not 1, 2 or 4 dimensions.

    >>> import torch
    >>> from metakern.compat import learn2learn as l2l
    >>> transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
    >>> transform(torch.zeros(4, 3, 2, 2))(torch.ones(4, 3, 2, 2)).shape
    torch.Size([4, 3, 2, 2])
    """

    def __init__(self, kronecker_cls: Callable[..., nn.Module], bias: bool = False, psd: bool = True) -> None:
        self.kronecker_cls, self.bias, self.psd = kronecker_cls, bias, psd

    def __call__(self, parameter: Tensor) -> ReshapedTransform:
        shape = parameter.shape
        if len(shape) not in (1, 2, 4):
            raise ValueError(
                f"KroneckerTransform: parameter must be of 1, 2 or 4 dimensions, got one of shape {list(shape)}"
            )
        n, m = {1: lambda: (shape[0], 1), 2: lambda: shape, 4: lambda: (shape[1], shape[2] * shape[3])}[len(shape)]()
        return ReshapedTransform(self.kronecker_cls(n=n, m=m, bias=self.bias, psd=self.psd), (-1, n, m))


class TransformDictionary:
    """A factory of transforms that uses another factory for each parameter.

    A call with a parameter that no key covers returns None, for no transform.

    Args:
        dictionary: Factories by a parameter, or by a module for all of its parameters.

    Raises:
        TypeError: For a key that is neither a module nor a parameter.

    >>> import torch
    >>> from metakern.compat import learn2learn as l2l
    >>> net = torch.nn.Linear(3, 1)
    >>> transform = l2l.optim.TransformDictionary({net.weight: lambda p: l2l.nn.Scale(p.shape)})
    >>> transform(net.weight), transform(net.bias)
    (Scale(), None)
    """

    def __init__(self, dictionary: Mapping[nn.Module | nn.Parameter, Transform]) -> None:
        self.param_to_transform: dict[Tensor, Transform] = {}
        for key, transform in dictionary.items():
            if not isinstance(key, nn.Module | nn.Parameter):
                raise TypeError(
                    f"TransformDictionary: keys must be modules or parameters, got one of {type(key).__name__}"
                )
            for p in key.parameters() if isinstance(key, nn.Module) else [key]:
                self.param_to_transform[p] = transform

    def __call__(self, param: Tensor, *args: Any, **kwargs: Any) -> nn.Module | None:
        transform = self.param_to_transform.get(param)
        return None if transform is None else transform(param, *args, **kwargs)


class MetaCurvatureTransform(nn.Module):
    """The transform of Meta-Curvature for a vector, a matrix or filters [A, B, h, w].

    It starts as the identity times `lr`. Park, Oliva 2019, "Meta-Curvature", section 3.

    Args:
        param: The parameter; only its shape matters.
        lr: The factor of the update.

    Raises:
        ValueError: For a parameter that has not 1, 2 or 4 dimensions.

    >>> import torch
    >>> from metakern.compat.learn2learn.optim import MetaCurvatureTransform
    >>> grad = torch.randn(4, 3, 2, 2)
    >>> torch.equal(MetaCurvatureTransform(grad)(grad), grad)
    True
    """

    def __init__(self, param: Tensor, lr: float = 1.0) -> None:
        super().__init__()
        self.lr, self.dim = lr, param.dim()
        if self.dim not in (1, 2, 4):
            raise ValueError(
                f"MetaCurvatureTransform: param must be of 1, 2 or 4 dimensions, got one of shape {list(param.shape)}"
            )
        if self.dim == 1:
            self.mc = nn.Parameter(torch.ones_like(param))
            return
        self.mc_in = nn.Parameter(torch.eye(param.shape[0]))
        self.mc_out = nn.Parameter(torch.eye(param.shape[1]))
        if self.dim == 4:
            self.mc_f = nn.Parameter(torch.eye(param.shape[2] * param.shape[3]))

    def forward(self, grad: Tensor) -> Tensor:
        if self.dim == 1:
            return self.lr * (self.mc * grad)
        if self.dim == 2:
            return self.lr * (self.mc_in @ grad @ self.mc_out)
        a, b, f = len(self.mc_in), len(self.mc_out), len(self.mc_f)
        update = grad.permute(2, 3, 0, 1).reshape(f * a, b) @ self.mc_out
        update = self.mc_f @ update.reshape(f, a * b)
        update = self.mc_in @ update.view(f, a, b).permute(1, 0, 2).reshape(a, f * b)
        return self.lr * update.view(a, f, b).permute(0, 2, 1).reshape(grad.shape)
