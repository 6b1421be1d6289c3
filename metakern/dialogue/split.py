"""Split tasks into training, validation and test, without the same texts in two of them.

Two dialogues overlap if all their turns have the same words, or if they share a turn of at least `min_words` words of a
speaker whom `overlap` names: of the users (anybody but the bot), of everybody, or of nobody ("dialogues"). Replies that
a bot gives word for word to everybody, as service bots do, are what adaptation is to learn, so they may recur. Words
are those of `metakern.dialogue.words`, so case and punctuation do not matter. Emoji do not count as words; a turn of
signs alone is compared as it is written. The turns of a system or a tool are instructions and are not compared.

1. Within a task, a dialogue that overlaps an earlier one is left out. So support and query never share a text.
2. A training dialogue that overlaps a validation or test dialogue is left out, and so is a validation dialogue that
   overlaps a test dialogue. If tasks are speakers (`task_id` is the name of one), a dialogue is left out too if the
   speaker of a task in such a held-out split takes part in it. So a conversation between a training speaker and a test
   speaker is in the test speaker's task alone.
3. A task that has fewer than `min_dialogues` dialogues left is left out.

Tasks whose dialogues have the same `meta["group"]` stay in one split: two versions of a service, or the bots of one
language. A group that holds all tasks counts as none.

If tasks are topics, a speaker may take part in several; `Split.summary` counts the held-out dialogues where that
happens.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from metakern.dialogue.readers import Dialogue, count_of
from metakern.dialogue.shards import Line, Seen
from metakern.dialogue.tokenizer import SYSTEM_SPEAKERS, bot_in
from metakern.dialogue.words import length, words
from metakern.errors import DataError

__all__ = ["OVERLAPS", "Split", "TaskData", "split_tasks", "texts_of", "whole_tasks"]

ROLES = {"user", "assistant", "bot", *SYSTEM_SPEAKERS}  # names of roles, which do not identify a speaker
OVERLAPS = ("users", "turns", "dialogues")
SHARED = "dialogues that share a text with another of their task"
Texts = Set[Hashable]


class Compared(NamedTuple):
    """A dialogue, and the texts by which it overlaps others."""

    dialogue: Dialogue
    texts: Texts


Entry = Compared | Line


@dataclass(frozen=True)
class TaskData:
    """A task and its dialogues, of which no two overlap."""

    task_id: str
    dialogues: tuple[Dialogue, ...]


@dataclass(frozen=True)
class Split:
    """The tasks for training, validation and test; `skipped` counts the dialogues and tasks left out, by reason."""

    train: tuple[TaskData, ...]
    validation: tuple[TaskData, ...]
    test: tuple[TaskData, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Two digests, with a colon between them: of each part's names of tasks, and of their numbers of dialogues."""
        parts = (self.train, self.validation, self.test)
        names = [[task.task_id for task in part] for part in parts]
        sizes = [[len(task.dialogues) for task in part] for part in parts]
        return ":".join(hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32] for value in (names, sizes))

    def summary(self) -> str:
        """Return lines for the user: the sizes, what was left out, and how many held-out dialogues share a speaker."""
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
    overlap: str = "users",
    max_held_out: int | None = None,
    validation: Collection[str] | None = None,
    test: Collection[str] | None = None,
    unread: Mapping[str, int] | None = None,
) -> Split:
    """Split dialogues by task into training, validation and test, so that no text is in two of them.

    Of two dialogues that overlap, as the module says, one is left out: within a task the later one, between splits the
    one for training rather than validation, and the one for validation rather than test. If tasks are speakers,
    dialogues with a held-out task's speaker are left out of the other splits.

    The tasks, or their groups, are ordered by a hash of the seed and their names; the first are for test, the next for
    validation.

    Args:
        dialogues: The dialogues of all tasks.
        seed: The seed of the split.
        fractions: The shares of the tasks for training, validation and test, which add up to 1. A split whose share is
            not 0 gets at least one task.
        min_dialogues: A task with fewer dialogues is left out; at least 2.
        min_words: Shorter turns may recur.
        overlap: Whose turns may not recur: "users" for those of anybody but the bot, "turns" for those of everybody,
            "dialogues" for none, so that only whole dialogues are compared.
        max_held_out: A task with more dialogues goes to training, as far as possible. In a held-out split, a speaker
            who talks with everybody would take most conversations away from training. None sets no limit.
        validation: The names of the validation tasks, in place of a share of all. Other tasks of their groups are left
            out.
        test: The same for test. A task with both names is for test.
        unread: How many dialogues the reader left out, by reason, to be counted with those left out here.

    Returns:
        The tasks of each split, and how many dialogues and tasks were left out for which reason.

    Raises:
        DataError: If a split whose share is not 0, or whose tasks are named, would have no task.
        ValueError: If `fractions` are negative or do not add up to 1, `min_dialogues` is below 2, or `overlap` is
            unknown.

    >>> from metakern.dialogue.readers import read
    >>> split = split_tasks(read("chatterbot:english"), fractions=(0.6, 0.2, 0.2))
    >>> {task.task_id for task in split.train}.isdisjoint(task.task_id for task in split.test)
    True
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"split_tasks: fractions must be at least 0 and add up to 1, got {fractions}")
    if min_dialogues < 2:
        raise ValueError(f"split_tasks: min_dialogues must be at least 2, for support and query, got {min_dialogues}")
    skipped = Counter(unread)
    tasks, groups = _tasks(dialogues, min_words, overlap, skipped)

    def enough(names: Iterable[str]) -> list[str]:
        names = list(names)
        kept = [name for name in names if len(tasks[name]) >= min_dialogues]
        skipped[f"tasks of fewer than {min_dialogues} dialogues"] += len(names) - len(kept)
        return kept

    def lacking(kind: str, got: str) -> DataError:
        return DataError(
            f"split_tasks: {kind}, got {got}:"
            " add data, lower min_dialogues, raise min_words or set overlap to dialogues"
        )

    def rank(group: Sequence[str]) -> bytes:
        return hashlib.sha256(f"{seed}/{groups[group[0]]}".encode()).digest()

    families: dict[str, list[str]] = {}
    for name in enough(tasks):
        families.setdefault(groups[name], []).append(name)
    order = sorted(families.values(), key=rank)
    if max_held_out is not None:
        order.sort(key=lambda family: max(len(tasks[name]) for name in family) > max_held_out)
    chosen: list[list[str]] = [[], []]
    for part, named in zip(chosen, (test, validation), strict=True):
        if named is None:
            continue
        taken = {groups[name] for family in order for name in family if name in named}
        members = [name for family in order for name in family if groups[name] in taken]
        part += [name for name in members if name in named]
        skipped["tasks whose group has a task that is named for a held-out split"] += len(members) - len(part)
        order = [family for family in order if groups[family[0]] not in taken]
    count = sum(map(len, order))
    for part, named, share in zip(chosen, (test, validation), fractions[:0:-1], strict=True):
        size = max(round(share * count), 1) if share and named is None else 0
        while order and len(part) < size:
            part += order.pop(0)
    held_out, train = chosen, [name for family in order for name in family]
    wanted = (fractions[2] or test is not None, fractions[1] or validation is not None, fractions[0])
    if any(wants and not part for wants, part in zip(wanted, (*held_out, train), strict=True)):
        empty = next(
            name
            for name, wants, part in zip(("test", "validation", "training"), wanted, (*held_out, train), strict=True)
            if wants and not part
        )
        if len(families) >= sum(map(bool, wanted)) and (test is not None or validation is not None):
            raise DataError(
                f"data must have a task for {empty}, got none: all {len(families)} are named for another part"
            )
        left_out = count_of({reason: n for reason, n in skipped.items() if n}) or "no dialogue"
        what = "tasks" if len(families) == sum(map(len, families.values())) else "groups of tasks"
        raise lacking(
            f"data must have {sum(map(bool, wanted))} {what} of at least {min_dialogues} dialogues",
            f"{len(families)} ({left_out} left out)",
        )
    used = Seen()
    parts: list[tuple[TaskData, ...]] = []
    for names in (*held_out, train):
        for name in names:
            whole = tasks[name]
            tasks[name] = [e for e in whole if used.isdisjoint(e.texts) and used.isdisjoint(_speakers(_dialogue(e)))]
            lost = len(whole) - len(tasks[name])
            skipped["dialogues that share a text or a task's speaker with a held-out split"] += lost
        kept = enough(names)
        parts.append(tuple(TaskData(name, tuple(map(_dialogue, tasks[name]))) for name in kept))
        if names is not train:  # after which nothing comes
            used.update(kept)
            for name in kept:
                for entry in tasks[name]:
                    used.update(entry.texts)
    for kind, found, wants in zip(("test", "validation", "train"), parts, wanted, strict=True):
        if wants and not found:
            raise lacking(f"{kind} must have a task", "none that shares no text with held-out tasks")
    return Split(parts[2], parts[1], parts[0], {reason: count for reason, count in skipped.items() if count})


def whole_tasks(
    dialogues: Iterable[Dialogue],
    *,
    min_dialogues: int = 2,
    min_words: int = 5,
    overlap: str = "users",
    unread: Mapping[str, int] | None = None,
) -> tuple[tuple[TaskData, ...], dict[str, int]]:
    """Return all tasks, without dialogues that overlap an earlier one of their task; and what was left out, by reason.

    The arguments and errors are those of `split_tasks`.

    >>> from metakern.dialogue.readers import read
    >>> tasks, skipped = whole_tasks(read("chatterbot:english"))
    >>> len(tasks) > 10
    True
    """
    skipped = Counter(unread)
    tasks, _ = _tasks(dialogues, min_words, overlap, skipped)
    found = [TaskData(name, tuple(map(_dialogue, entries))) for name, entries in tasks.items()]
    kept = tuple(task for task in found if len(task.dialogues) >= min_dialogues)
    skipped[f"tasks of fewer than {min_dialogues} dialogues"] += len(found) - len(kept)
    if not kept:
        raise DataError(f"data must have a task of at least {min_dialogues} dialogues, got none: add data")
    return kept, {reason: count for reason, count in skipped.items() if count}


def _tasks(
    dialogues: Iterable[Dialogue], min_words: int, overlap: str, skipped: Counter[str]
) -> tuple[dict[str, list[Entry]], dict[str, str]]:
    """Return the dialogues of each task, of which no two overlap, and the name of the group that each task is in.

    Groups that share a task are one. If all tasks are in one group, each is a group of its own.
    """
    if overlap not in OVERLAPS:
        raise ValueError(f"split_tasks: overlap must be one of {', '.join(OVERLAPS)}, got {overlap!r}")
    tasks: dict[str, list[Entry]] = {}
    seen: dict[str, Seen] = {}
    joined: dict[tuple[str, str], tuple[str, str]] = {}  # a task or a group -> one that it is joined to

    def root(of: tuple[str, str]) -> tuple[str, str]:
        while joined.setdefault(of, of) != of:
            of = joined[of]
        return of

    for dialogue in dialogues:
        name, texts = dialogue.task_id, texts_of(dialogue, min_words, overlap)
        if group := dialogue.meta.get("group"):
            first, second = sorted((root(("group", group)), root(("task", name))))
            joined[second] = first
        if seen.setdefault(name, Seen()).isdisjoint(texts):
            tasks.setdefault(name, []).append(dialogue if isinstance(dialogue, Line) else Compared(dialogue, texts))
            seen[name].update(texts)
        else:
            skipped[SHARED] += 1
    groups = {name: root(("task", name))[1] for name in tasks}
    return tasks, groups if len({*groups.values()}) > 1 else {name: name for name in tasks}


def texts_of(dialogue: Dialogue, min_words: int, overlap: str) -> Texts:
    """Return the texts by which dialogues overlap: the words of all turns in order, and those of each long turn.

    Of a dialogue that stays in its file, return the hashes of these texts.
    """
    if isinstance(dialogue, Line):
        return dialogue.texts
    spoken = [turn for turn in dialogue.turns if turn.speaker not in SYSTEM_SPEAKERS]
    turns = [tuple(word for word in words(turn.text) if any(map(str.isalnum, word))) for turn in spoken]
    whole = tuple(said or turn.text for said, turn in zip(turns, spoken, strict=True))
    bot = bot_in(dialogue)
    compared = {"dialogues": [], "turns": turns}.get(
        overlap, [said for said, turn in zip(turns, spoken, strict=True) if turn.speaker != bot]
    )
    return {whole, *(said for said in compared if sum(map(length, said)) >= min_words)}


def _dialogue(entry: Entry) -> Dialogue:
    return entry if isinstance(entry, Line) else entry.dialogue


def _speakers(dialogue: Dialogue) -> set[str]:
    names = dialogue.speakers if isinstance(dialogue, Line) else {turn.speaker for turn in dialogue.turns}
    return set(names - ROLES)
