"""The models of a parser and of a policy, over the hidden states of a language model.

    Classifier    mean over the tokens of a text -> head             one label for each text
    Tagger        hidden state of each token -> head                 one label for each token

| tensor         | shape     |
|----------------|-----------|
| input_ids      | [B, L]    |
| attention_mask | [B, L]    |
| logits         | [B, C] of a Classifier, [B, L, C] of a Tagger |

Both have the language model as `body`, so that plain language modeling can train it first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metakern.nn.text import TextEncoder, hidden_states

__all__ = ["Classifier", "PlainClassifier", "Tagger", "width_of"]

import metakern as mk
from metakern.losses import labelled


class Classifier(nn.Module):
    """A linear head over the embeddings of a `TextEncoder`.

    Args:
        encoder: Maps `input_ids` and `attention_mask` to embeddings `[B, D]`.
        classes: C, the number of classes.

    >>> from metakern.dialogue.models import build_model
    >>> model = Classifier(TextEncoder(build_model("gru", 300, embedding=8, hidden=8)), classes=4)
    >>> model(torch.zeros(2, 5, dtype=torch.long)).shape
    torch.Size([2, 4])
    """

    def __init__(self, encoder: TextEncoder, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width_of(encoder.body), classes)

    @property
    def body(self) -> nn.Module:
        """The language model."""
        return self.encoder.body

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits `[B, C]` of the texts `input_ids` `[B, L]`."""
        return self.head(self.encoder(input_ids, attention_mask))


class Tagger(nn.Module):
    """A linear head over each hidden state of a language model, whose states know no later token.

    Args:
        body: A causal language model, as `TextEncoder` takes it.
        classes: C, the number of labels.

    >>> from metakern.dialogue.models import build_model
    >>> model = Tagger(build_model("gru", 300, embedding=8, hidden=8), classes=4)
    >>> model(torch.zeros(2, 5, dtype=torch.long)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(self, body: nn.Module, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width_of(body), classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits `[B, L, C]` of the tokens `input_ids` `[B, L]`."""
        return self.head(hidden_states(self.body, input_ids, attention_mask, "Tagger"))


class PlainClassifier(mk.ProtoNet):
    """Plain training as a classifier of all training intents, and prototypes afterwards: no meta-learning.

    Chen, Liu, Xu, Darrell, Wang 2021, "Meta-baseline: exploring simple meta-learning for few-shot learning", section
    3.1 (classifier baseline). Labels of its training batches number all training intents.

    Args:
        model: Maps texts to embeddings, as `metakern.ProtoNet` takes it.
        classes: The number of training intents.
        options: The other arguments of `metakern.ProtoNet`.
    """

    def __init__(self, model: TextEncoder, classes: int, **options: object) -> None:
        super().__init__(model, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(width_of(model.body), classes)

    def forward(self, support: dict[str, Tensor], query: dict[str, Tensor]) -> Tensor:
        """Return the mean cross-entropy over the texts of support and query, whose labels are not negative."""
        batch = {key: torch.cat([support[key], query[key]], 1).flatten(0, 1) for key in support}
        _, inputs, labels = labelled(batch, "PlainClassifier: batch")
        return mk.ops.cross_entropy(self.head(self.model(**inputs)), labels)


@torch.no_grad()
def width_of(body: nn.Module) -> int:
    """Return the width of the hidden states of a language model."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(body.parameters()).device)
    return hidden_states(body, ids).shape[-1]
