"""Soft prompts: learned vectors before the embedded tokens of a language model.

    logits = model([prompt; embedding(tokens)]) of the tokens alone

Lester, Al-Rfou, Constant 2021, "The power of scale for parameter-efficient prompt tuning", section 2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SoftPrompt(nn.Module):
    """A causal language model with a prompt of learned vectors before its input.

    The prompt begins as the embeddings of tokens drawn at random. `metakern.MAML(SoftPrompt(model, 8), loss,
    adapt=["prompt"])` adapts the prompt alone; a model whose parameters have requires_grad=False stays as it is.

    Args:
        model: It is called with ids `[B, L]` and returns logits `[B, L, V]`, or an object that has them as `logits`.
            It embeds the ids by one `torch.nn.Embedding`: that of its `get_input_embeddings()`, or the first it has.
        length: The number of vectors.
        seed: The seed of the drawn tokens.

    Raises:
        ValueError: The model has no embedding, or `length` is below 1; at a call, the model does not embed its ids by
            one call of the embedding.

    >>> import metakern as mk, torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
    >>> mk.nn.SoftPrompt(model, length=4)(torch.zeros(2, 7, dtype=torch.long)).shape
    torch.Size([2, 7, 50])
    """

    def __init__(self, model: nn.Module, length: int, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ValueError(f"SoftPrompt: length must be an integer of at least 1, got {length!r}")
        self.model, self.length = model, length
        weight = self._embedding().weight
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(weight), (length,), generator=generator).to(weight.device)
        self.prompt = nn.Parameter(weight.detach()[drawn].clone())

    def _embedding(self) -> nn.Embedding:
        given = getattr(self.model, "get_input_embeddings", lambda: None)()
        found = given or next((m for m in self.model.modules() if isinstance(m, nn.Embedding)), None)
        if found is None:
            raise ValueError(f"SoftPrompt: model must have an embedding of tokens, got {type(self.model).__name__}")
        return found

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits `[B, L, V]` of the tokens `input_ids` `[B, L]`."""
        embedding, prompt, calls = self._embedding(), self.prompt, 0
        forward, own = embedding.forward, embedding.__dict__.get("forward")

        def prompted(ids: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            x = forward(ids)
            return torch.cat([prompt.to(x).expand(len(x), -1, -1), x[:, self.length :]], 1)

        options: dict[str, Any] = {}
        if attention_mask is not None:
            options["attention_mask"] = F.pad(attention_mask, (self.length, 0), value=1)
        embedding.__dict__["forward"] = prompted
        try:
            output = self.model(F.pad(input_ids, (self.length, 0)), **options)
        finally:
            del embedding.__dict__["forward"]
            if own is not None:
                embedding.__dict__["forward"] = own
        if calls != 1:
            raise ValueError(f"SoftPrompt: model must embed its ids by one call of its embedding, got {calls}")
        logits = output if isinstance(output, Tensor) else output.logits
        return logits[:, self.length :]
