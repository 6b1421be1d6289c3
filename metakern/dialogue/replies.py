"""Judge a model by its replies after adaptation: to what it was taught, and to what it was not.

    taught    contexts of the support, whose replies the adaptation learned from
    unseen    contexts of the query

A question is the window before a reply, token by token as in training. The model answers it greedily, by at most as
many tokens as the bot's own reply has, and `MARGIN` more. A reply that the window cuts off is a question only if
`metrics.JUDGED` characters of it are left.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from metakern.dialogue import processes
from metakern.dialogue.baselines import InContext, Retrieval
from metakern.dialogue.episodes import Episodes, Exchange
from metakern.dialogue.generate import greedy
from metakern.dialogue.metrics import JUDGED, bleu, by_task, chrf, distinct_n, exact, over_tasks, plain, word_f1
from metakern.dialogue.rates import adapted
from metakern.dialogue.tasks import load_adapted, on_device_of
from metakern.errors import DataError
from metakern.meta.parameters import twin

__all__ = ["KINDS", "Questions", "draw_questions", "generated", "retrieved", "scores"]

KINDS = ("taught", "unseen")
MARGIN = 8
HELD = 2**26  # the number of adapted parameters, of all tasks that are adapted at once, for each of two rates
METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact": lambda replies, references: _mean(exact, replies, references),
    "word_f1": lambda replies, references: _mean(word_f1, replies, references),
    "chrf": chrf,
    "bleu": bleu,
    "distinct_1": lambda replies, _: distinct_n(replies, 1),
    "distinct_2": lambda replies, _: distinct_n(replies, 2),
}


@dataclass(frozen=True)
class Questions:
    """What a model is asked about a task, in one episode.

    Attributes:
        support: All exchanges of the support.
        taught: Those of them that are asked.
        unseen: The exchanges of the query that are asked.
    """

    support: list[Exchange]
    taught: list[Exchange]
    unseen: list[Exchange]


def draw_questions(source: Episodes, limit: int = 12) -> list[Questions]:
    """Return the questions of each episode that `source` has for evaluation.

    Args:
        source: Its seed draws the questions.
        limit: The largest number of taught questions of an episode, and of unseen ones.

    Raises:
        DataError: If the support or the query of a task has no reply that can be judged.
    """
    asked = []
    for name, *sides in source.exchanges():
        drawn = []
        for side, exchanges in zip(("support", "query"), sides, strict=True):
            rng = random.Random(f"replies/{source.seed}/{name}/{side}")
            usable = sorted((e for e in exchanges if _can_be_judged(source, e)), key=lambda _: rng.random())
            if not usable:
                raise DataError(
                    f"replies: task {name!r} must have a reply of the bot to judge in its {side}, and a user before it,"
                    f" got none: where windows of {source.max_length} tokens hold no whole one and no {JUDGED}"
                    " characters of one, raise max_length, else evaluate without replies"
                )
            drawn.append(usable[:limit])
        asked.append(Questions(sides[0], *drawn))
    return asked


def generated(
    algorithm: Any, source: Episodes, asked: Sequence[Questions], steps: int, factor: float = 1.0
) -> Iterator[list[str]]:
    """Yield for each episode the replies to its taught and then its unseen questions, after `steps` inner steps.

    Several processes share the episodes; each yields those of its own. `InContext` takes no steps and has the support
    before each question.

    Args:
        algorithm: An algorithm of `metakern.dialogue.registry`.
        source: The tasks.
        asked: What `draw_questions` returns for them.
        steps: The number of inner steps, at least 0.
        factor: Multiplies the inner rates, as in `metakern.dialogue.rates`.
    """
    tokenizer, in_context = source.tokenizer, isinstance(algorithm, InContext)
    trained = getattr(algorithm, "trained", algorithm.model)
    model = trained if in_context else twin(trained)
    training = algorithm.training
    algorithm.eval()
    rest = iter(asked[processes.share(len(asked))])
    size = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    batch = max(1, min(16, HELD // max(size, 1)))
    for names, support, _ in source.evaluation(batch=batch, share=processes.share):
        support = on_device_of(trained, support)
        phi = {} if in_context else adapted(algorithm, support, steps, factor)
        for t, task in zip(range(len(names)), rest, strict=False):
            load_adapted(model, phi, t)
            before = algorithm.context(support, t, source.max_length).tolist() if in_context else []
            questions = [*task.taught, *task.unseen]
            replies = greedy(
                model,
                [[*before, *question.prompt] for question in questions],
                max_new_tokens=[min(len(q.reply) + MARGIN, source.max_length - len(q.prompt)) for q in questions],
                pad_id=tokenizer.pad_id,
                eos_id=tokenizer.eos_id,
            )
            yield list(map(tokenizer.decode, replies))
    algorithm.train(training)


def retrieved(source: Episodes, asked: Sequence[Questions]) -> Iterator[list[str]]:
    """Yield what `generated` yields, by `Retrieval` of the reply to the nearest context of the support."""
    for task in asked:
        answer = Retrieval([e.context for e in task.support], [e.text for e in task.support])
        yield [answer(question.context) for question in (*task.taught, *task.unseen)]


def scores(source: Episodes, asked: Sequence[Questions], replies: Sequence[Sequence[Sequence[str]]]) -> dict[str, Any]:
    """Return the scores of replies.

    Args:
        source: The tasks.
        asked: What `draw_questions` returns for them.
        replies: For each number of steps and each task, what `generated` yields.

    Returns:
        A dictionary with `taught` and `unseen`; for each, and for each of `METRICS`, what `metrics.over_tasks` returns
        of the means over the episodes of each task.
    """
    found: dict[str, Any] = {"taught": {}, "unseen": {}}
    for kind, metrics in found.items():
        references = [[e.text for e in getattr(task, kind)] for task in asked]
        kept = [slice(len(task.taught)) if kind == "taught" else slice(len(task.taught), None) for task in asked]
        for name, metric in METRICS.items():
            rows = [[metric(r[k], ref) for r, k, ref in zip(row, kept, references, strict=True)] for row in replies]
            metrics[name] = over_tasks(by_task(torch.tensor(rows, dtype=torch.float64), source.repeats))
    return found


def _can_be_judged(source: Episodes, exchange: Exchange) -> bool:
    text = plain(exchange.text)
    return bool(text) and (exchange.reply[-1] == source.tokenizer.eos_id or len(text) >= JUDGED)


def _mean(metric: Callable[[str, str], float], replies: Sequence[str], references: Sequence[str]) -> float:
    return sum(map(metric, replies, references)) / len(references)
