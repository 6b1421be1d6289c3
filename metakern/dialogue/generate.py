"""Generate a reply token by token with any causal language model.

    p ∝ exp(logits / temperature)

A token is drawn from the smallest set of likeliest tokens whose probabilities p add up to top_p or more.

Holtzman et al. 2020, "The curious case of neural text degeneration", section 3.1 (top_p, nucleus sampling).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["generate"]

CACHES = ("cache", "past_key_values")  # what transformers calls the cache in outputs and arguments: since 5.24, before


@torch.no_grad()
def generate(
    model: Callable[..., Any],
    input_ids: Tensor | Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Return the ids that follow `input_ids`, without the `eos_id` that ends them.

    Args:
        model: A call with ids `[1, L]` returns logits `[1, L, V]`, or an object that has them as `logits`. A module is
            in eval mode during the call. If it has an attribute `max_length`, it gets at most that many of the last
            ids. A Hugging Face model uses its cache and, after the first token, gets only the new id.
        input_ids: `[L]` or `[1, L]` with L at least 1.
        max_new_tokens: The largest number of ids to return.
        temperature: At least 0; 0 always takes the likeliest token.
        top_p: In (0, 1]; 1 samples from all tokens.
        eos_id: The id that ends the reply; None never ends it early.
        generator: A random generator on the CPU; None stands for PyTorch's default one.

    Raises:
        ValueError: If `temperature` or `top_p` is out of range, `input_ids` has another shape, or the logits hold NaN
            or nothing finite.

    >>> def count_up(ids):
    ...     return torch.nn.functional.one_hot((ids + 1) % 9, 9) * 50.0
    >>> generate(count_up, [3], max_new_tokens=9, temperature=0, eos_id=8)
    [4, 5, 6, 7]
    """
    check_sampling(temperature, top_p)
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    ids = torch.as_tensor(input_ids, dtype=torch.long, device=None if parameter is None else parameter.device)
    if ids.numel() == 0 or ids.dim() > 2 or (ids.dim() == 2 and ids.shape[0] != 1):
        raise ValueError(f"generate: input_ids must be [L] or [1, L] with L at least 1, got {list(ids.shape)}")
    ids = ids.reshape(1, -1)
    start, window = ids.shape[1], getattr(model, "max_length", None) or 0
    options: dict[str, Any] = {"use_cache": True} if hasattr(getattr(model, "config", None), "use_cache") else {}
    known = 0  # the number of ids in the cache
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        for _ in range(max_new_tokens):
            output = model(ids[:, max(known, ids.shape[1] - window if window else 0) :], **options)
            keys = output.keys() if isinstance(output, Mapping) else ()  # the old name is an alias, which warns
            for name in (name for name in CACHES if name in keys):
                known, options[name] = ids.shape[1], output[name]
            token = _next(getattr(output, "logits", output)[0, -1].float(), temperature, top_p, generator)
            if token == eos_id:
                break
            ids = torch.cat([ids, ids.new_tensor([[token]])], 1)
    finally:
        for module, training in modes:
            module.training = training
    return ids[0, start:].tolist()


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise ValueError for a temperature below 0 or NaN, or a top_p that is not in (0, 1]."""
    if not temperature >= 0:
        raise ValueError(f"generate: temperature must be at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")


def _next(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    if not logits.isfinite().any() or logits.isnan().any():
        raise ValueError("generate: logits must be finite, got NaN or infinities: the model has diverged")
    if temperature == 0:
        return int(logits.argmax())
    p, order = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    p = p * (p.cumsum(0) - p < top_p)
    return int(order[torch.multinomial(p.cpu(), 1, generator=generator)])
