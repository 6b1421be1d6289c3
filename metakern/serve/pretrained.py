"""A pretrained causal language model for a `Stack`: it reads new tokens only, in rows of different lengths.

| tensor | shape |
|---|---|
| keys and values of a layer | [R, H, S, D] for R rows, H heads and S positions |
| mask | [R, 1, L, K] for L new tokens and the K positions in use |

The new tokens of a row are padded on the left here, so that the logits that count are the last ones. Padding is never
put into the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from metakern.dialogue.generate import CACHES
from metakern.errors import UserError

__all__ = ["Pretrained"]


class Pretrained:
    """A causal language model of Hugging Face with the methods of a `GPT` that decode.

    Args:
        model: The model. It is changed: PyTorch's attention takes the place of another one.
        length: S, the length of the longest sequence, in tokens.

    Raises:
        UserError: If the model takes no cache or no positions, or forgets tokens before `length`.
    """

    cuts_cache = True  # whether `next_logits` can go on from the first tokens of a cache

    def __init__(self, model: Any, length: int) -> None:
        self.model, self.length = model, length
        kind, accepted = type(model).__name__, inspect.signature(model.forward).parameters
        self._argument = next((name for name in CACHES if name in accepted), "")
        if not self._argument or "position_ids" not in accepted:
            raise UserError(f"serve: a pretrained model must take a cache and position_ids, which {kind} does not")
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if window and getattr(config, "use_sliding_window", True) and window < length:
            raise UserError(
                f"serve: a pretrained model must see max_length tokens, {length}, but {kind} sees the last {window}"
            )
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        attention = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation(attention)
        else:  # transformers before 4.54
            config._attn_implementation = attention

    def empty_cache(self, rows: int) -> tuple[Tensor, ...]:
        """Return a cache for `rows` sequences: the keys and the values of each layer, `[rows, H, S, D]`."""
        shapes = _Shapes()
        self._call(torch.zeros(rows, 1, dtype=torch.long), shapes)
        return tuple(
            one.new_zeros(*one.shape[:2], self.length, one.shape[3])
            for layer in sorted(shapes.found)
            for one in shapes.found[layer]
        )

    def next_logits(self, input_ids: Tensor, counts: Tensor, cache: Sequence[Tensor], known: Tensor) -> Tensor:
        """Return the logits `[B, V]` of the token after new tokens, as `metakern.dialogue.models.GPT.next_logits` does.

        Raises:
            ValueError: If a sequence becomes longer than `length`.
        """
        longest = int((known + counts).max())
        if longest > self.length:
            raise ValueError(f"a sequence must be at most {self.length} long, got {longest}")
        number = torch.arange(input_ids.shape[1]) - (input_ids.shape[1] - counts).unsqueeze(1)  # [B, L]
        positions = (known.unsqueeze(1) + number).clamp(min=0)
        seen = torch.arange(longest) <= positions.unsqueeze(-1)  # [B, L, longest]
        mask = torch.zeros(seen.shape, dtype=cache[0].dtype).masked_fill(~seen, torch.finfo(cache[0].dtype).min)
        rows, columns = torch.where(number >= 0)
        layers = _Layers(cache, rows, columns, positions[rows, columns], longest)
        ids = input_ids.gather(1, number.clamp(min=0))
        return self._call(ids, layers, attention_mask=mask.unsqueeze(1), position_ids=positions)

    def _call(self, input_ids: Tensor, cache: DynamicCache, **inputs: Tensor) -> Tensor:
        options = {"use_cache": True, self._argument: cache} | self._options
        return self.model(input_ids=input_ids, **inputs, **options).logits[:, -1]


class _Shapes(DynamicCache):
    """Keeps nothing but the keys and values of the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        self.found[layer_idx] = key_states, value_states
        return key_states, value_states


class _Layers(DynamicCache):
    """Puts the keys and values of new tokens, at `rows` and `columns` of a batch, to `positions` of a cache."""

    def __init__(self, cache: Sequence[Tensor], rows: Tensor, columns: Tensor, positions: Tensor, longest: int) -> None:
        super().__init__()
        self._cache, self._rows, self._columns, self._positions = cache, rows, columns, positions
        self._longest = longest

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        found = []
        for kept, new in zip(self._cache[2 * layer_idx :], (key_states, value_states), strict=False):
            kept[self._rows, :, self._positions] = new[self._rows, :, self._columns]
            found.append(kept[:, :, : self._longest])
        return tuple(found)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._longest - 1
