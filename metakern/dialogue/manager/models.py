"""The models of a parser and of a policy.

    BagEncoder    x = Σ_i importance(token_i) · embedding(token_i), divided by its norm       [B, D]
    Classifier    the embedding of a text -> head, one label for each text                    [B, C]
    ActModel      the embedding of each turn and its speaker -> recurrent layer -> head       [B, U, C]

Texts are `input_ids` and `attention_mask`, both `[B, L]`, or `[B, U, L]` for dialogues of U turns. Instead of a
BagEncoder, a parser can have a `TextEncoder` over a language model, its `body`, which plain language modeling trains
first.

The importance of a token begins as its inverse document frequency, and embeddings begin at random, almost orthogonal to
each other. So a new BagEncoder compares texts much as TF-IDF does, and training starts from there.

Jones 1972, "A statistical interpretation of term specificity and its application in retrieval" (IDF); Arora, Liang, Ma
2017, "A simple but tough-to-beat baseline for sentence embeddings" (weighted means of embeddings).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

import metakern as mk
from metakern.dialogue.models import CELLS
from metakern.losses import labelled
from metakern.nn.text import TextEncoder

__all__ = ["ActModel", "BagEncoder", "Classifier", "PlainClassifier"]


class BagEncoder(nn.Module):
    """Embeds texts by the tokens that they hold, whatever their order.

    Args:
        vocab_size: V, the number of tokens.
        width: D, the width of the embeddings.

    >>> encoder = BagEncoder(300, width=16)
    >>> encoder(torch.tensor([[3, 4], [4, 3]])).norm(dim=-1)
    tensor([1., 1.], grad_fn=<LinalgVectorNormBackward0>)
    """

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        if vocab_size < 1 or width < 1:
            raise ValueError(f"BagEncoder: vocab_size and width must be at least 1, got {vocab_size} and {width}")
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.importance = nn.Embedding(vocab_size, 1)
        nn.init.ones_(self.importance.weight)

    @torch.no_grad()
    def weigh(self, texts: Iterable[Sequence[int]]) -> None:
        """Set the importance of tokens to their inverse document frequency, log((1 + N) / (1 + n)) + 1.

        Args:
            texts: N texts, each as its ids; n of them hold a token. A token that all hold gets the importance 0.
        """
        held = torch.zeros_like(self.importance.weight)
        count = 0
        for ids in texts:
            held[torch.tensor(sorted(set(ids)), dtype=torch.long)] += 1
            count += 1
        self.importance.weight.copy_((((1 + count) / (1 + held)).log() + 1).where(held < count, 0.0))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return embeddings `[B, D]` of norm 1; zeros for a text without tokens of any importance."""
        importance = self.importance(input_ids)  # [B, L, 1]
        if attention_mask is not None:
            importance = importance * attention_mask.unsqueeze(-1)
        x = (importance * self.embedding(input_ids)).sum(1)
        squared = x.square().sum(-1, keepdim=True)
        return x * squared.where(squared > 0, 1.0).rsqrt()


class Classifier(nn.Module):
    """A linear head over the embeddings of a `BagEncoder` or a `TextEncoder`.

    Args:
        encoder: Maps `input_ids` and `attention_mask` to embeddings `[B, D]`.
        classes: C, the number of classes.

    >>> model = Classifier(BagEncoder(300, width=8), classes=4)
    >>> model(torch.zeros(2, 5, dtype=torch.long)).shape
    torch.Size([2, 4])
    """

    def __init__(self, encoder: BagEncoder | TextEncoder, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(_width(encoder), classes)

    @property
    def body(self) -> nn.Module:
        """The language model, or the encoder if there is none."""
        return getattr(self.encoder, "body", self.encoder)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits `[B, C]` of the texts `input_ids` `[B, L]`."""
        return self.head(self.encoder(input_ids, attention_mask))


class ActModel(nn.Module):
    """Predicts after each turn of a dialogue the act that follows, from that turn and all before it.

    Args:
        vocab_size: The number of tokens.
        width: The width of the embedding of a turn.
        cell: "rnn", "gru" or "lstm".
        hidden: The number of hidden units of the recurrent layer.
        classes: C, the number of acts.

    >>> model = ActModel(300, width=8, cell="gru", hidden=8, classes=4)
    >>> model(torch.zeros(2, 3, 5, dtype=torch.long), speakers=torch.tensor([[0, 1, 0], [1, 0, 1]])).shape
    torch.Size([2, 3, 4])
    """

    def __init__(self, vocab_size: int, width: int, cell: str, hidden: int, classes: int) -> None:
        super().__init__()
        self.encoder = BagEncoder(vocab_size, width)
        self.speaker = nn.Embedding(2, width)
        self.rnn = CELLS[cell](width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)
        self.scale = width**0.5  # of the norm of an embedding, so that its elements are about 1

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, speakers: Tensor) -> Tensor:
        """Return the logits `[B, U, C]` of the acts after turns `input_ids` `[B, U, L]` of `speakers` `[B, U]`."""
        B, U, L = input_ids.shape
        mask = None if attention_mask is None else attention_mask.reshape(B * U, L)
        x = self.encoder(input_ids.reshape(B * U, L), mask).reshape(B, U, -1) * self.scale
        states, _ = self.rnn(x + self.speaker(speakers))
        return self.head(states)


class PlainClassifier(mk.ProtoNet):
    """Plain training as a classifier of all training intents, and prototypes afterwards: no meta-learning.

    Chen, Liu, Xu, Darrell, Wang 2021, "Meta-baseline: exploring simple meta-learning for few-shot learning", section
    3.1 (classifier baseline). Labels of its training batches number all training intents.

    Args:
        model: Maps texts to embeddings, as `metakern.ProtoNet` takes it.
        classes: The number of training intents.
        options: The other arguments of `metakern.ProtoNet`.
    """

    def __init__(self, model: nn.Module, classes: int, **options: object) -> None:
        super().__init__(model, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(_width(model), classes)

    def forward(self, support: dict[str, Tensor], query: dict[str, Tensor]) -> Tensor:
        """Return the mean cross-entropy over the texts of support and query, whose labels are not negative."""
        logits, labels = [], []
        for batch in (support, query):
            _, inputs, of = labelled({k: x.flatten(0, 1) for k, x in batch.items()}, "PlainClassifier: batch")
            logits.append(self.head(self.model(**inputs)))
            labels.append(of)
        return mk.ops.cross_entropy(torch.cat(logits), torch.cat(labels))


@torch.no_grad()
def _width(encoder: nn.Module) -> int:
    """Return the width of the embeddings of an encoder."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(encoder.parameters()).device)
    return int(encoder(ids).shape[-1])
