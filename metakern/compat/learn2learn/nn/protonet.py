"""The classifier of prototypical networks: the class whose mean is nearest.

    c_k = mean of the support of class k        logits_k(x) = -|x - c_k|², or the cosine of x and c_k

Snell, Swersky, Zemel 2017, "Prototypical networks for few-shot learning", section 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def compute_prototypes(support: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean of each class, its prototype.

    Args:
        support: Features, [S, ...].
        labels: Their classes, [S], integers.

    Returns:
        The prototypes, [ways, ...], of the classes that occur, in ascending order.

    >>> import torch
    >>> from metakern.compat.learn2learn.nn import compute_prototypes
    >>> compute_prototypes(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1]))
    tensor([[1.],
            [5.]])
    """
    return torch.stack([support[labels == label].mean(dim=0) for label in torch.unique(labels)])


class PrototypicalClassifier(nn.Module):
    """A classifier whose logits, [Q, ways], are the negative distances of queries [Q, D] to the prototypes.

    Args:
        support: Features of the support set, [S, D]; without them, call `fit_` later.
        labels: Their classes, [S], integers.
        distance: "euclidean", the squared distance; "cosine", the negative cosine; or a function of the prototypes
            [ways, D] and the queries that returns distances, [Q, ways].
        normalize: Whether prototypes and queries are scaled to norm 1 first; "cosine" always does it.

    Raises:
        ValueError: For another `distance`. At a call, if there are no prototypes yet.

    >>> import torch
    >>> from metakern.compat.learn2learn.nn import PrototypicalClassifier
    >>> classifier = PrototypicalClassifier(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1]))
    >>> classifier(torch.tensor([[1.0], [4.0]]))
    tensor([[ -0., -16.],
            [ -9.,  -1.]])
    """

    def __init__(
        self,
        support: Tensor | None = None,
        labels: Tensor | None = None,
        distance: str | Callable[[Tensor, Tensor], Tensor] = "euclidean",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        known = {"euclidean": self.euclidean_distance, "cosine": self.cosine_distance}
        if isinstance(distance, str) and distance not in known:
            raise ValueError(
                f"PrototypicalClassifier: distance must be 'euclidean', 'cosine' or a function, got {distance!r}"
            )
        self.distance = known[distance] if isinstance(distance, str) else distance
        self._normalizes = normalize or distance == "cosine"
        self.prototypes: Tensor | None = None
        if support is not None and labels is not None:
            self.fit_(support, labels)

    def fit_(self, support: Tensor, labels: Tensor) -> Tensor:
        """Sets and returns the prototypes of a support set [S, D] with labels [S]; derivatives pass through them."""
        prototypes = compute_prototypes(support, labels)
        self.prototypes = self.normalize(prototypes) if self._normalizes else prototypes
        return self.prototypes

    @staticmethod
    def cosine_distance(prototypes: Tensor, queries: Tensor) -> Tensor:
        """Returns the negative cosines, [Q, ways], of prototypes [ways, D] and queries [Q, D] of norm 1."""
        return -(queries @ prototypes.t())

    @staticmethod
    def euclidean_distance(prototypes: Tensor, queries: Tensor) -> Tensor:
        """Returns the squared distances, [Q, ways], of prototypes [ways, D] and queries [Q, D]."""
        return (prototypes - queries.unsqueeze(1)).square().sum(dim=2)

    @staticmethod
    def normalize(x: Tensor, epsilon: float = 1e-8) -> Tensor:
        """Returns the rows of x, [B, D], divided by their norm plus `epsilon`."""
        return x / (x.norm(p=2, dim=1, keepdim=True) + epsilon)

    def forward(self, x: Tensor) -> Tensor:
        if self.prototypes is None:
            raise ValueError(
                "PrototypicalClassifier: prototypes must be set before a call, got None: call fit_(support, labels)"
            )
        return -self.distance(self.prototypes, self.normalize(x) if self._normalizes else x)
