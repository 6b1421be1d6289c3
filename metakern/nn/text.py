"""Embeddings of texts: the mean of the hidden states of their tokens.

| tensor | shape |
|---|---|
| input_ids | [B, L] |
| attention_mask | [B, L], nonzero for tokens, 0 for padding |
| hidden states | [B, L, D] |
| embeddings | [B, D] |

Reimers, Gurevych 2019, "Sentence-BERT: sentence embeddings using Siamese BERT-networks", section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TextEncoder(nn.Module):
    """Embeds texts by the mean of a model's hidden states over their tokens.

    Args:
        body: A language model of `metakern.dialogue` (its `hidden_states` are taken, the head is not run); or a module
            that is called as `body(input_ids=…, attention_mask=…)` and returns hidden states [B, L, D], as a tensor, as
            `.last_hidden_state`, or as the first entry of a tuple, such as Hugging Face's `AutoModel`.

    Raises:
        TypeError: If `body` is no `nn.Module`.
        ValueError: At a call, if `body` returns no hidden states [B, L, D].

    >>> import metakern as mk, torch
    >>> from metakern.dialogue.models import build_model
    >>> encoder = mk.nn.TextEncoder(build_model("gru", 50, embedding=8, hidden=16))
    >>> encoder(torch.tensor([[3, 4, 5], [6, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])).shape
    torch.Size([2, 8])
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        if not isinstance(body, nn.Module):
            raise TypeError(f"TextEncoder: body must be an nn.Module, got {type(body).__name__}")
        self.body = body

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns embeddings [B, D]; zeros for a text without tokens. Without a mask, every token counts."""
        states = self._states(input_ids, attention_mask)
        if attention_mask is None:
            return states.mean(1)
        kept = (attention_mask != 0).unsqueeze(-1)
        return torch.where(kept, states, 0.0).sum(1) / kept.to(states.dtype).sum(1).clamp(min=1)

    def _states(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        body: Any = self.body
        if hasattr(body, "hidden_states"):
            output = body.hidden_states(input_ids)
        elif attention_mask is None:
            output = body(input_ids=input_ids)
        else:
            output = body(input_ids=input_ids, attention_mask=attention_mask)
        if hasattr(output, "logits"):
            raise ValueError(
                f"TextEncoder: body must return hidden states, got logits from {type(body).__name__}: pass the model"
                " without its head, such as transformers.AutoModel"
            )
        states = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
        states = output[0] if states is None else states
        if states.dim() != 3 or states.shape[:2] != input_ids.shape:
            raise ValueError(f"TextEncoder: body must return hidden states [B, L, D], got {list(states.shape)}")
        return states
