"""The classifier of prototypical networks (Snell, Swersky, Zemel 2017): the nearest mean of a class.

c_k = mean of support of class k       logits_k(x) = -|x - c_k|², or the cosine of x and c_k
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def compute_prototypes(support: Tensor, labels: Tensor) -> Tensor:
    """The mean of each class that occurs, in the order of the labels: [ways, ...]."""
    return torch.stack([support[labels == label].mean(dim=0) for label in torch.unique(labels)])


class PrototypicalClassifier(nn.Module):
    """Logits of queries [Q, D] by their distance to the prototypes of a support set [S, D] with labels [S].

    distance: "euclidean", its square; "cosine", which normalizes; or a function of prototypes and queries.

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
        """Takes the prototypes from a support set, with their history; returns them."""
        prototypes = compute_prototypes(support, labels)
        self.prototypes = self.normalize(prototypes) if self._normalizes else prototypes
        return self.prototypes

    @staticmethod
    def cosine_distance(prototypes: Tensor, queries: Tensor) -> Tensor:
        """[Q, ways], of what is normalized."""
        return -(queries @ prototypes.t())

    @staticmethod
    def euclidean_distance(prototypes: Tensor, queries: Tensor) -> Tensor:
        """[Q, ways], squared."""
        return (prototypes - queries.unsqueeze(1)).square().sum(dim=2)

    @staticmethod
    def normalize(x: Tensor, epsilon: float = 1e-8) -> Tensor:
        return x / (x.norm(p=2, dim=1, keepdim=True) + epsilon)

    def forward(self, x: Tensor) -> Tensor:
        if self.prototypes is None:
            raise ValueError("PrototypicalClassifier: it must have prototypes to be called: fit_(support, labels)")
        return -self.distance(self.prototypes, self.normalize(x) if self._normalizes else x)
