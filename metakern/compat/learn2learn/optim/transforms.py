"""Modules from a gradient to an update, of the same shape; and what makes one for a parameter.

    ModuleTransform           u = M(g), g as one row               M any module from n to n, n the number of elements
    KroneckerTransform        u = L g R, as n x m                  (R^T ⊗ L) of the gradient
    MetaCurvatureTransform    u = lr M_in g M_out                  and M_f over a filter's elements

Park, Oliva 2019, "Meta-Curvature", section 3; Arnold, Iqbal, Sha 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Transform = Callable[[Tensor], nn.Module | None]


class ReshapedTransform(nn.Module):
    """A transform of gradients in another shape."""

    def __init__(self, transform: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.transform, self.in_shape = transform, shape

    def forward(self, grad: Tensor) -> Tensor:
        return self.transform(grad.reshape(self.in_shape)).reshape(grad.shape)


class ModuleTransform:
    """Makes transforms by `module_cls(n, n)`, n the number of a parameter's elements.

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
    """Makes transforms by `kronecker_cls(n=n, m=m, bias=bias, psd=psd)`: of vectors, matrices and filters of images.

    Raises ValueError for parameters of other shapes.
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
    """Transforms by parameter, or by module for all that it has; None for what is not named."""

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
    """The transform of Meta-Curvature for a vector, a matrix or filters [A, B, h, w]; the identity at first.

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
