"""Draw the next token of each of many replies, as `metakern.dialogue.generate` does for one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["draw"]


def draw(
    logits: Tensor, temperatures: Sequence[float], top_ps: Sequence[float], uniforms: Sequence[float]
) -> list[int]:
    """Return a token for each row of `logits`; -1 where they hold NaN or nothing finite: the model has diverged.

    Args:
        logits: `[B, V]`.
        temperatures: At least 0, for each row; 0 takes the likeliest token.
        top_ps: In (0, 1], for each row: the token is drawn from the smallest set of likeliest tokens whose
            probabilities add up to this or more.
        uniforms: A random number in [0, 1) for each row, which decides its draw.

    >>> draw(torch.tensor([[0.0, 2.0, 1.0], [9.0, 0.0, 0.0]]), [0.0, 1.0], [1.0, 0.5], [0.5, 0.99])
    [1, 0]
    """
    logits = logits.float()
    usable = logits.isfinite().any(-1) & ~logits.isnan().any(-1)
    tokens = logits.argmax(-1)
    rows = [i for i, temperature in enumerate(temperatures) if temperature > 0]
    if rows:
        scale = torch.tensor([[temperatures[i]] for i in rows], dtype=torch.float64)
        p, order = (logits[rows].double() / scale).softmax(-1).sort(descending=True, stable=True)
        kept = p * (p.cumsum(-1) - p < torch.tensor([[top_ps[i]] for i in rows], dtype=torch.float64))
        total = kept.cumsum(-1)
        place = torch.searchsorted(total, total[:, -1:] * torch.tensor([[uniforms[i]] for i in rows]), right=True)
        tokens[rows] = order.gather(1, place.clamp(max=logits.shape[1] - 1)).squeeze(1)
    found: list[int] = tokens.masked_fill(~usable, -1).tolist()
    return found
