"""Tasks split by task, and episodes of support and query drawn from them, with no text on two sides.

What counts as the same text: two dialogues overlap if all their turns have the same words, or if they share a turn of
at least `min_words` words (`metakern.dialogue.words`: case and punctuation do not matter).  Emoji do not make a text
another one, nor longer; a turn of nothing but signs counts as it is written.  A bare "yes" or "how are you?" may recur.
The turns of a system or a tool are instructions and do not count.

1. Within a task, a dialogue that overlaps an earlier one is left out, so support and query share no text however drawn.
2. Between splits, a dialogue of train that overlaps one of validation or test is left out, and one of validation that
   overlaps one of test.  Where tasks are speakers (`task_id` is a speaker's name), so is a dialogue in which the
   speaker of a held-out task takes part: a conversation of a training and a test speaker belongs to the test speaker.
3. A task that has fewer than `min_dialogues` dialogues left is left out.

Where tasks are topics, a speaker may talk in several; `Split.summary` says in how many held-out dialogues that is so.

Everything is drawn from `random.Random.random` seeded with a string, the one sequence that Python promises to keep, so
a seed gives the same split and the same episodes on every machine.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from metakern.dialogue.readers import Dialogue, count_of
from metakern.dialogue.tokenizer import IGNORE, SYSTEM_SPEAKERS, DialogueTokenizer, bot_of
from metakern.dialogue.words import length, words
from metakern.errors import DataError

__all__ = ["Episodes", "Split", "TaskData", "collate", "split_tasks"]

Batch = dict[str, Tensor]
Startable = tuple[Dialogue, list[int]]  # with the turns at which a window may begin
Window = tuple[list[int], list[int]]  # ids and labels
ROLES = {"user", "assistant", "bot", *SYSTEM_SPEAKERS}  # names of speakers that say nothing about who they are
T = TypeVar("T")


@dataclass(frozen=True)
class TaskData:
    """A task and its dialogues, no two of which share a text."""

    task_id: str
    dialogues: tuple[Dialogue, ...]


@dataclass(frozen=True)
class Split:
    """Tasks of three kinds, and in `skipped` the count of every reason for leaving a dialogue or a task out."""

    train: tuple[TaskData, ...]
    validation: tuple[TaskData, ...]
    test: tuple[TaskData, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """Lines for the user: sizes, what was left out, and how far speakers recur."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        lines = [f"{name}: {len(p)} tasks, {sum(len(t.dialogues) for t in p)} dialogues" for name, p in parts.items()]
        lines += [f"left out: {count} {reason}" for reason, count in sorted(self.skipped.items())]
        known = {name for task in self.train for d in task.dialogues for name in _speakers(d)}
        held_out = [d for task in (*self.validation, *self.test) for d in task.dialogues]
        recurring = sum(not known.isdisjoint(_speakers(d)) for d in held_out)
        if recurring:
            lines.append(f"{recurring} of {len(held_out)} held-out dialogues have a speaker who also talks in train")
        return "\n".join(lines)


def split_tasks(
    dialogues: Iterable[Dialogue],
    *,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    min_dialogues: int = 8,
    min_words: int = 5,
    max_held_out: int | None = None,
) -> Split:
    """Split by task; the module says what is left out so that no text is shared.

    A task's place follows from the seed and its name alone, up to the rounding of fractions.

    Args:
        dialogues: Those of all tasks.
        seed: Another one gives another split.
        fractions: Of tasks, for train, validation and test; one that is not 0 gets at least one task.
        min_dialogues: A task with fewer is left out.
        min_words: A turn that long must not recur; see the module.
        max_held_out: A task with more dialogues is for training: held out, a speaker who talks with everybody would
            take most conversations away from train.

    Raises:
        DataError: Where too few tasks are left.
        ValueError: For fractions that are not a partition, and min_dialogues below 2.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"split_tasks: fractions must be three parts of 1, got {fractions}")
    if min_dialogues < 2:
        raise ValueError(f"split_tasks: min_dialogues must be at least 2, for support and query, got {min_dialogues}")
    skipped: Counter[str] = Counter()
    tasks: dict[str, list[tuple[Dialogue, set[Hashable]]]] = {}
    seen: dict[str, set[Hashable]] = {}
    for dialogue in dialogues:
        texts = _texts(dialogue, min_words)
        if seen.setdefault(dialogue.task_id, set()).isdisjoint(texts):
            tasks.setdefault(dialogue.task_id, []).append((dialogue, texts))
            seen[dialogue.task_id] |= texts
        else:
            skipped["dialogues that share a text with another of their task"] += 1

    def enough(names: Iterable[str]) -> list[str]:
        kept = []
        for name in names:
            if len(tasks[name]) < min_dialogues:
                skipped[f"tasks of fewer than {min_dialogues} dialogues"] += 1
            else:
                kept.append(name)
        return kept

    order = sorted(enough(tasks), key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    if max_held_out is not None:
        order.sort(key=lambda name: len(tasks[name]) > max_held_out)
    sizes = [max(round(fraction * len(order)), 1) if fraction else 0 for fraction in fractions[1:]]
    if len(order) < (needed := sum(sizes) + (fractions[0] > 0)):
        lacking = f"{len(order)} ({count_of(skipped) or 'no dialogue'} left out)"
        raise DataError(
            f"split_tasks: data must have {max(needed, 1)} tasks of at least {min_dialogues} dialogues, got {lacking}:"
            " add data, lower min_dialogues or raise min_words"
        )
    test, validation, train = order[: sizes[1]], order[sizes[1] : sum(sizes)], order[sum(sizes) :]
    taken: set[Hashable] = set()
    parts: list[tuple[TaskData, ...]] = []
    for names in (test, validation, train):
        for name in names:
            whole = tasks[name]
            tasks[name] = [(d, texts) for d, texts in whole if taken.isdisjoint(texts | _speakers(d))]
            lost = len(whole) - len(tasks[name])
            skipped["dialogues that share a text or a task's speaker with a held-out split"] += lost
        kept = enough(names)
        parts.append(tuple(TaskData(name, tuple(d for d, _ in tasks[name])) for name in kept))
        taken.update(kept, *(texts for name in kept for _, texts in tasks[name]))
    for kind, part, fraction in zip(("test", "validation", "train"), parts, fractions[::-1], strict=True):
        if fraction and not part:
            raise DataError(
                f"split_tasks: {kind} must have a task, got none that shares no text with held-out tasks:"
                " add data, lower min_dialogues or raise min_words"
            )
    return Split(parts[2], parts[1], parts[0], {reason: count for reason, count in skipped.items() if count})


class Episodes:
    """Episodes of tasks: for every task, windows of some dialogues as support and of others as query.

    A window begins at a turn that a learned turn answers and goes on to `max_length` tokens (`encode_dialogue`); what a
    system says at the beginning of a dialogue is in front of its every window.  The dialogues of a task are shared out
    to support and query in proportion to their sizes, and a side takes each of its dialogues once before any twice.

    windows   "any"; "opening": only from the first turn that is answered, where people keep to a topic; "later": only
              from turns that the opening window does not reach

    A batch is a dict of int64 tensors `[T, B, L]`: `input_ids`, `attention_mask` (1 on tokens, 0 on padding, which is
    on the right) and `labels` (aligned with `input_ids`, -100 where nothing is to be learned), with L a multiple of 8
    or `max_length`.
    """

    def __init__(
        self,
        tasks: Sequence[TaskData],
        tokenizer: DialogueTokenizer,
        *,
        support_size: int,
        query_size: int,
        max_length: int,
        seed: int,
        train_on: str = "bot",
        windows: str = "any",
    ) -> None:
        if windows not in ("any", "opening", "later"):
            raise ValueError(f"Episodes: windows must be any, opening or later, got {windows!r}")
        if train_on not in ("bot", "all"):
            raise ValueError(f"Episodes: train_on must be bot or all, got {train_on!r}")
        if min(support_size, query_size) < 1:
            raise ValueError(f"Episodes: sizes must be at least 1, got {support_size} and {query_size}")
        if max_length < tokenizer.least:
            raise ValueError(f"Episodes: max_length must be at least {tokenizer.least} here, got {max_length}")
        self.tokenizer, self.max_length, self.seed, self.train_on = tokenizer, max_length, seed, train_on
        self.sizes, self.windows = (support_size, query_size), windows
        self._tasks: list[tuple[str, list[Startable]]] = []
        for task in tasks:
            usable = [(d, starts) for d in task.dialogues if (starts := self._starts(d))]
            if len(usable) < 2:
                raise DataError(
                    f"Episodes: task {task.task_id!r} must have 2 dialogues with a reply, for support and query,"
                    f" got {len(usable)}"
                )
            self._tasks.append((task.task_id, usable))
        if not self._tasks:
            raise DataError("Episodes: tasks must hold a task, got none")

    def __len__(self) -> int:
        return len(self._tasks)

    def sample(self, step: int, tasks: int) -> tuple[Batch, Batch]:
        """Support and query of `tasks` tasks, a pure function of the seed and `step`.

        The tasks differ from each other unless more are asked for than there are.
        """
        drawn, rng = self._drawn(step, tasks)
        _, support, query = self._batch(drawn, [rng] * tasks)
        return support, query

    def names(self, step: int, tasks: int) -> list[str]:
        """The tasks that `sample` gives, in its order."""
        return [name for name, _ in self._drawn(step, tasks)[0]]

    def _drawn(self, step: int, tasks: int) -> tuple[list[tuple[str, list[Startable]]], random.Random]:
        if tasks < 1:
            raise ValueError(f"sample: tasks must be at least 1, got {tasks}")
        rng = random.Random(f"episodes/{self.seed}/{step}")
        return _draw(self._tasks, tasks, rng), rng

    def evaluation(self, limit: int | None = None, *, batch: int = 16) -> Iterator[tuple[list[str], Batch, Batch]]:
        """One fixed episode of every task, or of the first `limit`, `batch` tasks at once: names, support, query.

        A task's episode depends on the seed and the task alone, not on its neighbors.
        """
        chosen = self._tasks[:limit]
        for i in range(0, len(chosen), batch):
            part = chosen[i : i + batch]
            yield self._batch(part, [random.Random(f"evaluation/{self.seed}/{name}") for name, _ in part])

    def _batch(
        self, tasks: Sequence[tuple[str, list[Startable]]], rngs: Sequence[random.Random]
    ) -> tuple[list[str], Batch, Batch]:
        sides: tuple[list[list[Window]], list[list[Window]]] = ([], [])
        for (_, dialogues), rng in zip(tasks, rngs, strict=True):
            shuffled = _draw(dialogues, len(dialogues), rng)
            share = round(len(shuffled) * self.sizes[0] / sum(self.sizes))
            cut = min(max(share, 1), len(shuffled) - 1)
            for side, pool, size in zip(sides, (shuffled[:cut], shuffled[cut:]), self.sizes, strict=True):
                side.append([self._window(pool[i % len(pool)], rng) for i in range(size)])
        longest = max(len(ids) for side in sides for rows in side for ids, _ in rows)
        length = min(-(-longest // 8) * 8, self.max_length)
        support, query = (collate(side, self.tokenizer.pad_id, length) for side in sides)
        return [name for name, _ in tasks], support, query

    def _starts(self, dialogue: Dialogue) -> list[int]:
        starts = _starts(dialogue, self.train_on)
        if self.windows == "any":
            return starts
        if self.windows == "opening":
            return starts[:1]
        opening = ((i, self._encode(dialogue, starts[0], starts[i])[0]) for i in range(1, len(starts)))
        return starts[next((i for i, ids in opening if len(ids) == self.max_length), len(starts)) :]

    def _window(self, item: Startable, rng: random.Random) -> Window:
        dialogue, starts = item
        return self._encode(dialogue, starts[int(rng.random() * len(starts))])

    def _encode(self, dialogue: Dialogue, start: int, end: int | None = None) -> Window:
        turns = dialogue.turns[: _instructions(dialogue)] + dialogue.turns[start:end]
        return self.tokenizer.encode_dialogue(turns, self.train_on, self.max_length, _bot(dialogue))


def collate(tasks: Sequence[Sequence[Window]], pad_id: int, length: int | None = None) -> Batch:
    """The batch of the windows of each task, as many in every task, padded on the right to `length` or the longest.

    >>> batch = collate([[([1, 5, 2], [-100, 5, 2]), ([1, 7], [-100, 7])]], pad_id=0)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[[1, 5, 2], [1, 7, 0]]], [[[-100, 5, 2], [-100, 7, -100]]])
    """
    lengths = torch.tensor([[len(ids) for ids, _ in windows] for windows in tasks])
    length = int(lengths.max()) if length is None else length

    def padded(which: int, value: int) -> Tensor:
        return torch.tensor([[w[which] + [value] * (length - len(w[which])) for w in windows] for windows in tasks])

    mask = (torch.arange(length) < lengths.unsqueeze(-1)).long()
    return {"input_ids": padded(0, pad_id), "attention_mask": mask, "labels": padded(1, IGNORE)}


def _texts(dialogue: Dialogue, min_words: int) -> set[Hashable]:
    """What no other side may hold of a dialogue: all its words in order, and each long turn's."""
    spoken = [turn.text for turn in dialogue.turns if turn.speaker not in SYSTEM_SPEAKERS]
    turns = [tuple(word for word in words(text) if any(map(str.isalnum, word))) for text in spoken]
    whole = tuple(said or text for said, text in zip(turns, spoken, strict=True))
    return {whole, *(said for said in turns if sum(map(length, said)) >= min_words)}


def _speakers(dialogue: Dialogue) -> set[str]:
    return {turn.speaker for turn in dialogue.turns} - ROLES


def _bot(dialogue: Dialogue) -> str | None:
    return dialogue.meta.get("bot") or bot_of(dialogue.turns)


def _instructions(dialogue: Dialogue) -> int:
    """How many turns of a system begin a dialogue."""
    spoken = (i for i, turn in enumerate(dialogue.turns) if turn.speaker not in SYSTEM_SPEAKERS)
    return next(spoken, len(dialogue.turns))


def _starts(dialogue: Dialogue, train_on: str) -> list[int]:
    """The spoken turns that a learned turn answers; where there is none, the beginning if anything is to be learned."""
    bot = _bot(dialogue)
    spoken = [i for i, turn in enumerate(dialogue.turns) if turn.speaker not in SYSTEM_SPEAKERS]
    learned = {i: train_on == "all" or dialogue.turns[i].speaker == bot for i in spoken}
    answered = [i for i, j in pairwise(spoken) if learned[j]]
    return answered or spoken[:1] * any(learned.values())


def _draw(items: Sequence[T], count: int, rng: random.Random) -> list[T]:
    """`count` items in random order, each once before any comes again."""
    drawn: list[T] = []
    while len(drawn) < count:
        drawn += sorted(items, key=lambda _: rng.random())
    return drawn[:count]
