"""A layer with a context: a learned function of a few parameters is added to its output.

    y = layer(x) + U c

For a linear layer this is the layer on [x; c], the input with the context behind it. Zintgraf et al. 2019, "Fast
context adaptation via meta-learning", section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Contextual(nn.Module):
    """A layer to whose output `[..., out]` U c is added, with a context c `[size]`, zero, and a matrix U `[out, size]`.

    `metakern.CAVIA` adapts the context.

    Args:
        layer: A module whose output has its features last, such as a linear layer or an embedding.
        size: The number of context parameters.
        features: The size of the output; None takes `out_features`, `embedding_dim` or `hidden_size` of the layer.

    Raises:
        ValueError: `size` is not an integer of at least 1, or the layer does not say its `features`.

    >>> import metakern as mk, torch
    >>> layer = mk.nn.Contextual(torch.nn.Linear(3, 4), size=2)
    >>> layer(torch.zeros(5, 3)).shape, tuple(layer.context.shape)
    (torch.Size([5, 4]), (2,))
    """

    def __init__(self, layer: nn.Module, size: int, features: int | None = None) -> None:
        super().__init__()
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"Contextual: size must be an integer of at least 1, got {size!r}")
        names = ("out_features", "embedding_dim", "hidden_size")
        features = features or next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
        if features is None:
            raise ValueError(f"Contextual: features must be given for a {type(layer).__name__}, got None")
        like: Any = next(layer.parameters(), torch.zeros(()))
        self.layer = layer
        self.context = nn.Parameter(like.new_zeros(size))
        self.spread = nn.Parameter(torch.randn(features, size).to(like) * size**-0.5)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer(*args, **kwargs) + self.spread @ self.context
