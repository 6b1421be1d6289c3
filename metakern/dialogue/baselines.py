"""Baselines without meta-learning: plain training, soft prompts, the support as context, and retrieval.

All but retrieval, which has no weights, have MAML's interface.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import metakern as mk
from metakern.dialogue.tokenizer import IGNORE
from metakern.dialogue.words import words
from metakern.errors import UserError

if TYPE_CHECKING:
    from metakern.dialogue.episodes import Batch

Loss = Callable[[nn.Module, "Batch"], Tensor]
PROMPT_LENGTH = 8


class FineTune(nn.Module):
    """Plain training on support and query together, and MAML's adaptation afterwards.

    `options` are those of `metakern.MAML`.

    Attributes:
        counted: The number of labeled tokens in the loss of the last call, a scalar tensor; None before the first call.
    """

    def __init__(self, model: nn.Module, loss: Loss, **options: Any) -> None:
        super().__init__()
        self.model, self.trained, self.loss = model, model, loss
        maml = mk.MAML(model, loss, **options)
        self.inner, self.adapt, self.evaluate, self.curves = maml.inner, maml.adapt, maml.evaluate, maml.curves
        self.adapt_trained = maml.adapt  # of `trained`, which is not always `model`
        self.counted: Tensor | None = None

    def forward(self, support: Batch, query: Batch) -> Tensor:
        """Return the mean loss over all labeled tokens, a scalar.

        The tensors of support, `[T, B, L]`, and query, `[T, C, L]`, are put together to `[T * (B + C), L]`.
        """
        batch = {k: torch.cat([support[k], query[k]], 1).flatten(0, 1) for k in support}
        self.counted = _labeled(batch)
        return self.loss(self.trained, batch)


class PromptTuning(FineTune):
    """Plain training of the model with a soft prompt, of which the adaptation changes the prompt alone.

    Lester et al. 2021, "The power of scale for parameter-efficient prompt tuning". `length` is that of the prompt.
    """

    def __init__(self, model: nn.Module, loss: Loss, length: int = PROMPT_LENGTH, **options: Any) -> None:
        super().__init__(mk.nn.SoftPrompt(model, length), loss, **options | {"adapt": ["prompt"]})
        self.model, self.adapt = model, _refused


class InContext(nn.Module):
    """Training and evaluation with the support as context before each query, and no gradients at adaptation.

    Min, Lewis, Zettlemoyer, Hajishirzi 2022, "MetaICL", section 3. The windows of the support come first, without their
    padding; then the query, whose labels alone count.

    Args:
        model: Without a limit to the length of its input, or with one as its attribute `max_length`.
        loss: `loss(model, batch)` returns the loss of a batch `[B, L]`.
        **options: Those of `metakern.MAML`, of which none has an effect, as there is no inner loop.

    Attributes:
        counted: As of `FineTune`.
    """

    def __init__(self, model: nn.Module, loss: Loss, **options: Any) -> None:
        super().__init__()
        self.model, self.loss, self.inner, self.adapt = model, loss, None, _refused
        self.counted: Tensor | None = None

    def forward(self, support: Batch, query: Batch) -> Tensor:
        """Return the mean loss over all labeled tokens of the queries, a scalar."""
        tasks = [self._contexts(support, query, t) for t in range(len(query["input_ids"]))]
        longest = max(t["input_ids"].shape[1] for t in tasks)
        joined = [{k: _padded(v, longest, k) for k, v in task.items()} for task in tasks]
        batch = {k: torch.cat([task[k] for task in joined]) for k in joined[0]}
        self.counted = _labeled(batch)
        return self.loss(self.model, batch)

    @torch.no_grad()
    def evaluate(self, support: Batch, query: Batch, steps: Sequence[int] = (0,)) -> Tensor:
        """Return the query losses `[len(steps), T]`; all rows are equal, as there are no inner steps."""
        tasks = range(len(query["input_ids"]))
        losses = [self.loss(self.model, self._contexts(support, query, t)) for t in tasks]
        return torch.stack(losses).expand(len(steps), -1).clone()

    def _contexts(self, support: Batch, query: Batch, t: int) -> Batch:
        """Return the queries of task t, `[C, L']`, each after the support's tokens."""
        C, L = query["input_ids"].shape[1:]
        context = self.context(support, t, L)
        n = len(context)
        before = {"input_ids": context.expand(C, -1), "attention_mask": context.new_ones(C, n)}
        before["labels"] = context.new_full((C, n), -100)
        return {k: torch.cat([before[k], query[k][t]], 1) for k in before}

    def context(self, support: Batch, t: int, length: int) -> Tensor:
        """Return the tokens of the support of task t: the latest windows after which `length` more fit."""
        ids, mask = support["input_ids"][t], support["attention_mask"][t].bool()
        limit = getattr(self.model, "max_length", None) or getattr(
            getattr(self.model, "config", None), "max_position_embeddings", None
        )
        windows = [row[kept] for row, kept in zip(ids, mask, strict=True)]
        while limit and windows and sum(map(len, windows)) + length > limit:
            windows.pop(0)
        return torch.cat([*windows, ids.new_empty(0)])


class Retrieval:
    """The reply of the nearest of some contexts, by the cosine of their TF-IDF vectors; nothing is trained.

    Jones 1972, "A statistical interpretation of term specificity and its application in retrieval" (IDF). A word that
    n of N contexts hold has the weight log((1 + N) / (1 + n)) + 1, times how often the text holds it; words are those
    of `metakern.dialogue.words`. Of contexts that are equally near, the first is taken, and the first of all if no word
    is common.

    Args:
        contexts: The texts that were answered, at least one.
        replies: The reply to each.

    Raises:
        ValueError: If there is no context, or the numbers of contexts and replies differ.

    >>> Retrieval(["What is your name?", "How old are you?"], ["Ann.", "Nine."])("And your name?")
    'Ann.'
    """

    def __init__(self, contexts: Sequence[str], replies: Sequence[str]) -> None:
        if not contexts or len(contexts) != len(replies):
            raise ValueError(
                f"Retrieval: replies must be as many as contexts, at least 1, got {len(replies)} and {len(contexts)}"
            )
        self.replies = list(replies)
        held = Counter(word for text in contexts for word in set(words(text)))
        self.weights = {word: math.log((1 + len(contexts)) / (1 + n)) + 1 for word, n in held.items()}
        self.vectors = [self._vector(text) for text in contexts]

    def __call__(self, context: str) -> str:
        """Return the reply to the context that is nearest to `context`."""
        cosines = self.cosines(context)
        return self.replies[cosines.index(max(cosines))]

    def cosines(self, context: str) -> list[float]:
        """Return the cosine of the vector of `context` with that of each known context."""
        query = self._vector(context)
        return [math.fsum(x * vector.get(word, 0.0) for word, x in query.items()) for vector in self.vectors]

    def _vector(self, text: str) -> dict[str, float]:
        """Return the TF-IDF of the known words of a text, of length 1."""
        counts = Counter(word for word in words(text) if word in self.weights)
        vector = {word: n * self.weights[word] for word, n in counts.items()}
        norm = math.sqrt(math.fsum(x * x for x in vector.values()))
        return {word: x / norm for word, x in vector.items()}


def _refused(*args: Any, **options: Any) -> Any:
    raise UserError("adapt: prompt and incontext leave a model's weights as they are: adapt a run of another algorithm")


def _labeled(batch: Batch) -> Tensor:
    """Return the number of tokens that count in the mean of a loss of the next token, a scalar tensor."""
    return (batch["labels"][:, 1:] != IGNORE).sum()


def _padded(x: Tensor, length: int, key: str) -> Tensor:
    """Return x `[C, L]` padded on the right to `[C, length]`."""
    return nn.functional.pad(x, (0, length - x.shape[1]), value=-100 if key == "labels" else 0)
