"""A hypernetwork for dialogue: a small encoder reads the support conversations, a generator writes the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

import metakern as mk
from metakern.dialogue.episodes import Batch
from metakern.dialogue.models import build_model


class TextHyperNetwork(mk.HyperNetwork):
    """`metakern.HyperNetwork` for language models: the embedding of a task is the mean of those of its conversations.

    Args:
        model: A causal language model with an embedding of tokens.
        loss: `loss(model, batch)` returns the loss of one task.
        embedding: The width of the encoder's embeddings of tokens, and of a task.
        hidden: The hidden units of the encoder, a GRU.
        **options: The other arguments of `metakern.HyperNetwork`.

    Raises:
        ValueError: The model has no embedding of tokens; at a call, the support has no input_ids `[T, B, L]`; or as
            `metakern.HyperNetwork` raises it.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Batch], Tensor],
        embedding: int = 64,
        hidden: int = 64,
        **options: Any,
    ) -> None:
        tokens = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), None)
        if tokens is None:
            raise ValueError(f"TextHyperNetwork: model must have an embedding of tokens, got {type(model).__name__}")
        encoder = mk.nn.SetEncoder(_Conversations(tokens, embedding, hidden))
        if taken := {"encoder", "size"} & options.keys():
            raise ValueError(f"TextHyperNetwork: {min(taken)} must not be given: embedding and hidden are its sizes")
        super().__init__(model, loss, encoder, size=embedding, **options)


class _Conversations(nn.Module):
    """Encodes each conversation of a support as a vector, `[B, embedding]`."""

    def __init__(self, tokens: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.text = mk.nn.TextEncoder(build_model("gru", tokens, embedding=embedding, hidden=hidden))

    def forward(self, batch: Batch) -> Tensor:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if ids is None or ids.dim() != 2:
            got = type(batch).__name__ if ids is None else f"input_ids {list(ids.shape)} of a task"
            raise ValueError(f"TextHyperNetwork: support must hold input_ids [T, B, L] of conversations, got {got}")
        return self.text(ids, batch.get("attention_mask"))
