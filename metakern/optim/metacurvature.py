"""Meta-Curvature: gradient descent with a learned preconditioner for each parameter, in Kronecker factors.

    phi <- phi - lr (M_1 x_1 M_2 x_2 ... g)        M_d [n_d, n_d], learned with theta, the identity at first

x_d is the product along dimension d of the parameter [n_1, n_2, ...], so that a matrix G becomes M_1 G M_2ᵀ. Park,
Oliva 2019, "Meta-Curvature", section 3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metakern.optim.base import ByName, InnerOptimizer, State, Tensors, non_negative


class MetaCurvature(InnerOptimizer):
    """SGD as an inner optimizer whose gradients are multiplied by learned matrices along each dimension.

    A step costs 2 n_d FLOP for each element and dimension, and the matrices take n_d² numbers for each dimension. A
    dimension of more than `largest` elements has no matrix, such as the vocabulary of an embedding.

    Args:
        lr: The learning rate, which is fixed; the matrices learn it.
        largest: The largest size of a dimension with a matrix.

    Raises:
        ValueError: For a rate that is negative or not finite, or `largest` below 1; for parameters of other shapes than
            those of the same names before.
        TypeError: For a rate that is no number.

    >>> import metakern as mk, torch
    >>> maml = mk.MAML(torch.nn.Linear(3, 2), mk.losses.classification, mk.optim.MetaCurvature(lr=0.1))
    >>> {name: tuple(m.shape) for name, m in maml.inner.matrices.items()}
    {'weight/0': (2, 2), 'weight/1': (3, 3), 'bias/0': (2, 2)}
    """

    affine = True

    def __init__(self, lr: float = 0.01, largest: int = 1024) -> None:
        super().__init__()
        non_negative("MetaCurvature", lr=lr)
        if not isinstance(largest, int) or isinstance(largest, bool) or largest < 1:
            raise ValueError(f"MetaCurvature: largest must be an integer of at least 1, got {largest!r}")
        self.lr, self.largest = float(lr), largest
        self.matrices = ByName("MetaCurvature: matrices")
        self.bound: list[dict[int, str]] = []  # for each parameter of phi, the names of its matrices by dimension

    def extra_repr(self) -> str:
        return f"lr={self.lr:g}, largest={self.largest}"

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        """Creates identity matrices for parameters that have none yet."""
        self.bound = []
        for name, p in adapted.items():
            names = {d: f"{name}/{d}" for d, size in enumerate(p.shape) if size <= self.largest}
            for d, key in names.items():
                if key not in self.matrices:
                    self.matrices[key] = nn.Parameter(torch.eye(p.shape[d], dtype=p.dtype, device=p.device))
                elif len(self.matrices[key]) != p.shape[d]:
                    raise ValueError(
                        f"MetaCurvature: matrices must be learned for parameters of one model, got {name!r} of shape"
                        f" {list(p.shape)} where dimension {d} had {len(self.matrices[key])}: give each model an"
                        " optimizer of its own"
                    )
            self.bound.append(names)

    def hyper_parameters(self) -> list[nn.Parameter]:
        """Returns the matrices of the parameters that are adapted at present."""
        found = [self.matrices[key] for names in self.bound for key in names.values()]
        return [m for m in found if m.requires_grad]

    def update(self, phi: Tensors, grads: Tensors, state: State, *losses: Tensor) -> tuple[list[Tensor], State]:
        if len(phi) != len(self.bound):
            raise ValueError(
                f"MetaCurvature: matrices must be there for the {len(phi)} parameters of phi, got {len(self.bound)}:"
                " call prepare({name: parameter}) with them before update()"
            )
        found = []
        for p, g, names in zip(phi, grads, self.bound, strict=True):
            for d, key in names.items():
                g = (g.movedim(d + 1, -1) @ self.matrices[key].mT).movedim(-1, d + 1)
            found.append(p - self.lr * g)
        return found, state
