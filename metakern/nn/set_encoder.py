"""An encoder of sets: each example is encoded, and the codes are pooled in any order.

    mean        e = mean_n z_n
    attention   e = sum_n softmax_n(q · z_n / sqrt(D)) z_n, with a learned q [D]

Zaheer et al. 2017, "Deep sets", section 2; Lee et al. 2019, "Set transformer", section 3.2 (pooling by attention).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


class SetEncoder(nn.Module):
    """Encodes a set of examples as one vector `[D]`, whatever their order and number; zeros if no example counts.

    Args:
        encode: `encode(batch)` returns a code `[N, D]` of the N examples of a batch. It is a module, or a function that
            uses `modules`.
        pool: "mean", or "attention", for which `size` is needed.
        size: D.
        mask: `mask(batch)` returns `[N]`, True for the examples that count; None counts all.
        modules: The modules that a function `encode` uses, so that they are trained.

    Raises:
        TypeError: By `copy.deepcopy`, if `encode` is a function that uses `modules`: the copy would use the same ones.
        ValueError: For another `pool`, or "attention" without a size; when called, for codes that are not `[N, D]`.

    >>> import metakern as mk, torch
    >>> encoder = mk.nn.SetEncoder(torch.nn.Linear(3, 8), pool="attention", size=8)
    >>> x = torch.randn(5, 3)
    >>> torch.allclose(encoder(x), encoder(x.flip(0)), atol=1e-6)
    True
    """

    def __init__(
        self,
        encode: Callable[[Any], Tensor],
        pool: str = "mean",
        size: int | None = None,
        mask: Callable[[Any], Tensor] | None = None,
        modules: Iterable[nn.Module] = (),
    ) -> None:
        super().__init__()
        if pool not in ("mean", "attention") or (pool == "attention" and size is None):
            raise ValueError(f'SetEncoder: pool must be "mean", or "attention" with a size, got {pool!r}')
        self.encode, self.mask, self.pool = encode, mask, pool
        self.used = nn.ModuleList(modules)
        self.query = nn.Parameter(torch.zeros(size)) if pool == "attention" and size else None

    def __deepcopy__(self, memo: dict[int, Any]) -> SetEncoder:
        if len(self.used) and not isinstance(self.encode, nn.Module):
            raise TypeError(
                "SetEncoder: encode must be a module to be copied, got a function that uses modules: a copy of it would"
                " use those of the original"
            )
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied

    def forward(self, batch: Any) -> Tensor:
        z = self.encode(batch)
        if not isinstance(z, Tensor) or z.dim() != 2:
            got = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"SetEncoder: encode must return a code [N, D] of the examples, got {got}")
        scores = z.new_zeros(len(z)) if self.query is None else z @ self.query.to(z) / z.shape[1] ** 0.5
        if self.mask is None:
            return scores.softmax(0) @ z
        counts = self.mask(batch)
        return (scores.masked_fill(~counts, torch.finfo(scores.dtype).min).softmax(0) * counts) @ z
