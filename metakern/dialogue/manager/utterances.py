"""Draw episodes of intents: texts of a few intents as support, others of the same intents as query.

A task is `ways` intents, drawn for it. Its support holds `shots` texts of each, its query up to `queries` others of
each. Everything is drawn by `random.Random.random`, seeded with a string, as in `metakern.dialogue.episodes`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from metakern.dialogue.episodes import Batch, Share, draw, whole
from metakern.dialogue.readers import Dialogue, Turn
from metakern.dialogue.split import TaskData
from metakern.dialogue.tokenizer import IGNORE, DialogueTokenizer, bot_in
from metakern.errors import DataError

__all__ = ["Episode", "Utterances", "by_intent", "encoded"]

EPISODES = 32  # in a validation
OUT_OF_SCOPE = "oos"  # the label of texts without an intent in CLINC150
Text = tuple[str, int]  # a text and the number of its intent, IGNORE for one out of scope


@dataclass(frozen=True)
class Episode:
    """A task: texts of some intents.

    Attributes:
        intents: The names of the intents, by number.
        support: Texts with the numbers of their intents.
        query: Other texts with the numbers of their intents.
        strangers: Texts with the names of other intents, which are out of scope here.
    """

    intents: tuple[str, ...]
    support: tuple[Text, ...]
    query: tuple[Text, ...]
    strangers: tuple[tuple[str, str], ...] = ()


class Utterances:
    """A source of episodes of intents; a batch holds `input_ids`, `attention_mask` `[T, N, L]` and `labels` `[T, N]`.

    Labels number the intents of a task from 0, in the order in which they are drawn; they are -100 on padding.

    Args:
        tasks: One for each intent, as `by_intent` makes them; at least two.
        tokenizer: It frames a text as a user's turn that the bot is to answer.
        ways: The intents of a task; all there are, if there are fewer.
        shots: Support texts of each intent; several numbers take turns from step to step.
        queries: The largest number of query texts of each intent.
        max_length: The largest L, in tokens; the oldest tokens of longer texts are dropped.
        seed: The seed of all draws.
        whole: Let labels number all intents of `tasks` instead, for plain training.

    Raises:
        DataError: If there are fewer than two intents, or one has not a text more than the largest number of shots.

    >>> from metakern.dialogue.tokenizer import Tokenizer
    >>> talks = {i: [Dialogue(i, n, (Turn("user", i + n), Turn("bot", i))) for n in "123"] for i in ("pay", "call")}
    >>> tasks = [TaskData(intent, tuple(said)) for intent, said in talks.items()]
    >>> tokenizer = Tokenizer.train(talks["pay"] + talks["call"], 262)
    >>> source = Utterances(tasks, tokenizer, ways=2, shots=(1,), queries=2, max_length=32, seed=0)
    >>> support, query = source.sample(step=0, tasks=3)
    >>> support["labels"].tolist(), query["input_ids"].shape[:2]
    ([[0, 1], [0, 1], [0, 1]], torch.Size([3, 4]))
    """

    def __init__(
        self,
        tasks: Sequence[TaskData],
        tokenizer: DialogueTokenizer,
        *,
        ways: int,
        shots: Sequence[int],
        queries: int,
        max_length: int,
        seed: int,
        whole: bool = False,
    ) -> None:
        if len(tasks) < 2:
            raise DataError(f"parser: data must have 2 intents in each split, got {len(tasks)}: add data")
        self.texts = {task.task_id: [d.turns[0].text for d in task.dialogues] for task in tasks}
        name, texts = min(self.texts.items(), key=lambda item: len(item[1]))
        if len(texts) <= max(shots):
            raise DataError(
                f"parser: each intent must have more texts than the largest of shots, {max(shots)}, got {len(texts)} of"
                f" {name!r}: lower shots or raise min_dialogues"
            )
        self.tokenizer, self.max_length, self.seed, self.whole = tokenizer, max_length, seed, whole
        self.ways, self.shots, self.queries = min(ways, len(tasks)), tuple(shots), queries
        self.number = {name: i for i, name in enumerate(self.texts)}

    def __len__(self) -> int:
        return EPISODES

    def episode(self, rng: random.Random, shots: int, strangers: int = 0) -> Episode:
        """Return a task that `rng` draws.

        Args:
            rng: A random generator.
            shots: The number of support texts of each intent.
            strangers: The number of texts of other intents.
        """
        drawn = draw(list(self.texts), len(self.texts), rng)
        intents, others = drawn[: self.ways], drawn[self.ways :]
        support, query = list[Text](), list[Text]()
        for number, name in enumerate(intents):
            texts = draw(self.texts[name], len(self.texts[name]), rng)
            support += [(text, number) for text in texts[:shots]]
            query += [(text, number) for text in texts[shots : shots + self.queries]]
        names = draw(others, strangers, rng) if others else []
        unknown = tuple((draw(self.texts[name], 1, rng)[0], name) for name in names)
        return Episode(tuple(intents), tuple(support), tuple(query), unknown)

    def sample(self, step: int, tasks: int, share: Share = whole) -> tuple[Batch, Batch]:
        """Return support and query of the share of `tasks` tasks, which depend on the seed and the arguments alone."""
        return self._batch(self._drawn(step, tasks)[share(tasks)])

    def names(self, step: int, tasks: int) -> list[str]:
        """Return the intents of the tasks that `sample` draws with the same arguments, in the same order."""
        return [" / ".join(episode.intents) for episode in self._drawn(step, tasks)]

    def evaluation(
        self, limit: int | None = None, *, batch: int = 16, share: Share = whole
    ) -> Iterator[tuple[list[str], Batch, Batch]]:
        """Yield the share of `limit` fixed episodes (None: `EPISODES`), `batch` at a time: names, support, query."""
        for shots in self.shots:
            count = -(-(limit or EPISODES) // len(self.shots))
            episodes = self.fixed(count, shots)[share(count)]
            for start in range(0, len(episodes), batch):
                part = episodes[start : start + batch]
                yield ([" / ".join(episode.intents) for episode in part], *self._batch(part))

    def fixed(self, count: int, shots: int, strangers: int = 0) -> list[Episode]:
        """Return `count` episodes for evaluation, which depend on the seed and the arguments alone."""
        return [
            self.episode(random.Random(f"intents/evaluation/{self.seed}/{shots}/{i}"), shots, strangers)
            for i in range(count)
        ]

    def _drawn(self, step: int, tasks: int) -> list[Episode]:
        rng = random.Random(f"intents/{self.seed}/{step}")
        return [self.episode(rng, self.shots[step % len(self.shots)]) for _ in range(tasks)]

    def _batch(self, episodes: Sequence[Episode]) -> tuple[Batch, Batch]:
        if self.whole:
            names = [[self.number[name] for name in e.intents] for e in episodes]
            episodes = [
                replace(
                    e,
                    support=tuple((text, of[i]) for text, i in e.support),
                    query=tuple((text, of[i]) for text, i in e.query),
                )
                for e, of in zip(episodes, names, strict=True)
            ]
        support, query = (
            encoded([getattr(e, side) for e in episodes], self.tokenizer, self.max_length)
            for side in ("support", "query")
        )
        return support, query


def encoded(tasks: Sequence[Sequence[Text]], tokenizer: DialogueTokenizer, max_length: int) -> Batch:
    """Return the texts of tasks as a batch, with padding on the right and after the texts of smaller tasks.

    L is a multiple of 8, so that there are few shapes.
    """
    rows = [[(tokenizer.prompt([Turn("user", t)], max_length, "bot"), label) for t, label in task] for task in tasks]
    longest = max((len(ids) for task in rows for ids, _ in task), default=1)
    T, N, L = len(rows), max(map(len, rows)), -(-longest // 8) * 8
    batch = {
        "input_ids": torch.full((T, N, L), tokenizer.pad_id),
        "attention_mask": torch.zeros(T, N, L, dtype=torch.long),
        "labels": torch.full((T, N), IGNORE),
    }
    for t, task in enumerate(rows):
        for n, (ids, label) in enumerate(task):
            batch["input_ids"][t, n, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][t, n, : len(ids)] = 1
            batch["labels"][t, n] = label
    return batch


def by_intent(dialogues: Iterable[Dialogue]) -> list[Dialogue]:
    """Return dialogues of a text and its intent as tasks that are the intents, whatever tasks they had.

    Texts that CLINC150 marks as out of scope are left out.

    Raises:
        DataError: If one is longer than a text of the user and its intent, so that it names no intent.
    """
    found = []
    for dialogue in dialogues:
        said = [turn for turn in dialogue.turns if turn.speaker in ("user", bot_in(dialogue))]
        if len(said) != 2 or said[1].speaker != bot_in(dialogue):
            raise DataError(
                f"parser: data must have texts with intents, as the format intents has, got a dialogue of"
                f" {len(dialogue.turns)} turns in task {dialogue.task_id!r}"
            )
        if said[1].text == OUT_OF_SCOPE:
            continue
        name = f"{dialogue.task_id}/{dialogue.dialogue_id}"
        found.append(replace(dialogue, task_id=said[1].text, dialogue_id=name, turns=tuple(said), meta={"bot": "bot"}))
    return found
