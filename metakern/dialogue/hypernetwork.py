"""A hypernetwork for dialogue: a small encoder reads the support conversations, a generator writes the weights."""

from __future__ import annotations

from collections.abc import Callable
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
        ValueError: The model has no embedding of tokens; or as `metakern.HyperNetwork` raises it.
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
        text = mk.nn.TextEncoder(build_model("gru", tokens, embedding=embedding, hidden=hidden))

        def encode(batch: Batch) -> Tensor:
            return text(batch["input_ids"], batch["attention_mask"])

        super().__init__(model, loss, mk.nn.SetEncoder(encode, modules=[text]), size=embedding, **options)
