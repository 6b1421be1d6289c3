"""Draw episodes of support and query from tasks.

Everything is drawn by `random.Random.random`, seeded with a string. Python promises to keep this sequence, so a seed
gives the same episodes on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import TypeVar

import torch
from torch import Tensor

from metakern.dialogue.hints import HINT, Hints
from metakern.dialogue.readers import Dialogue, Turn
from metakern.dialogue.shards import Line
from metakern.dialogue.split import TaskData
from metakern.dialogue.tokenizer import IGNORE, SYSTEM_SPEAKERS, DialogueTokenizer, bot_in
from metakern.errors import DataError

__all__ = ["Episodes", "Exchange", "Share", "collate", "draw", "whole"]

Batch = dict[str, Tensor]
Startable = tuple[Dialogue, list[int]] | Line  # a dialogue, and the turns at which a window may begin
Window = tuple[list[int], list[int]]  # ids and labels
Speech = tuple[Sequence[Turn], str | None]  # turns, and the speaker who is the bot
Rewriter = Callable[[Sequence[Dialogue]], Callable[[Dialogue], Dialogue]]
T = TypeVar("T")
Share = Callable[[int], slice]  # from a number of episodes to the slice of them that is wanted


def whole(count: int) -> slice:
    """Return the slice of all episodes."""
    return slice(count)


RENAMED = 0.3  # share of the words of the vocabulary that change places in an augmented task


@dataclass(frozen=True)
class Exchange:
    """A reply of the bot to a turn of somebody else, in a window.

    Attributes:
        context: The texts of the window's turns before the reply, a line each or more, without hints.
        prompt: The ids of the window before the reply.
        reply: The ids of the reply as they are to be learned. They end with the token that ends a turn if the window
            holds the whole reply.
        text: The text of `reply`.
    """

    context: str
    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    text: str


class Episodes:
    """A source of episodes: for each task, windows of some of its dialogues as support, and of others as query.

    A window is a part of a dialogue of at most `max_length` tokens. It begins at a turn that a turn to be learned
    answers. System messages at the beginning of a dialogue are at the beginning of each of its windows. The dialogues
    of a task are divided between support and query in proportion to their sizes. Either takes a window of each of its
    dialogues before it takes a second one of any.

    A batch is a dictionary of int64 tensors `[T, B, L]` (tasks, windows, tokens). `input_ids` are padded on the right,
    `attention_mask` is 1 on tokens and 0 on padding, and `labels` are aligned with `input_ids` and -100 where nothing
    is to be learned. L is the same in support and query, and a multiple of 8 or `max_length`.

    Args:
        tasks: Each needs two dialogues with a reply.
        tokenizer: A `Tokenizer`, or a `ChatTokenizer` for a pretrained model.
        support_size: B of the support, the number of windows of a task.
        query_size: B of the query.
        max_length: The largest L, in tokens.
        seed: The seed of all draws.
        train_on: Which turns are to be learned: "bot" stands for the bot's, "all" for all but those of a system or a
            tool.
        task_power: Tasks are drawn in proportion to their numbers of usable dialogues to this power; with 0, all alike.
        augment: The probability with which `sample` renames the tokens of a task: 30% of those that texts consist of
            change places at random, the same way in support and query. What a renamed bot says can only be learned from
            its support, not remembered from earlier episodes (Rajendran, Irpan, Jang 2020, "Meta-learning requires
            meta-augmentation", section 4).
        repeats: The number of episodes of each task in an evaluation.
        hints: What stands before each reply of the bot, one of `metakern.dialogue.hints.KINDS`. Replies are retrieved
            from the conversations of the support.
        policy: It is called with the conversations of a support, and returns a function that gives a conversation of
            the query other acts, which its hints then name. None leaves the acts of the data.
        windows: Where a window may begin: "any" stands for each turn that is answered, "opening" for the first one
            only, near which people keep to a topic, and "later" for those that the opening window does not reach.

    Raises:
        DataError: If there is no task, or a task has fewer than two dialogues with a reply (for "later": one after the
            opening window); if hints are to name acts, and the data have none.
        ValueError: If `windows` or `train_on` is unknown, a size is below 1, or `max_length` is too small.

    >>> from metakern.dialogue.readers import Turn
    >>> from metakern.dialogue.tokenizer import Tokenizer
    >>> talks = [Dialogue("pets", str(i), (Turn("ann", f"cat {i}"), Turn("bot", f"dog {i}"))) for i in range(4)]
    >>> tokenizer, tasks = Tokenizer.train(talks, 262), [TaskData("pets", tuple(talks))]
    >>> episodes = Episodes(tasks, tokenizer, support_size=2, query_size=3, max_length=20, seed=0)
    >>> support, query = episodes.sample(step=0, tasks=1)
    >>> support["input_ids"].shape, query["labels"].shape
    (torch.Size([1, 2, 16]), torch.Size([1, 3, 16]))
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
        task_power: float = 0.0,
        augment: float = 0.0,
        repeats: int = 1,
        hints: str = "none",
        policy: Rewriter | None = None,
    ) -> None:
        if windows not in ("any", "opening", "later"):
            raise ValueError(f"Episodes: windows must be any, opening or later, got {windows!r}")
        if train_on not in ("bot", "all"):
            raise ValueError(f"Episodes: train_on must be bot or all, got {train_on!r}")
        if min(support_size, query_size, repeats) < 1:
            raise ValueError(
                "Episodes: support_size, query_size and repeats must be at least 1,"
                f" got {support_size}, {query_size} and {repeats}"
            )
        if max_length < tokenizer.least:
            raise ValueError(
                f"Episodes: max_length must be at least {tokenizer.least} for this tokenizer, got {max_length}"
            )
        self.tokenizer, self.max_length, self.seed, self.train_on = tokenizer, max_length, seed, train_on
        self.sizes, self.windows, self.task_power = (support_size, query_size), windows, task_power
        self.augment, self.repeats, self.hints, self.policy = augment, repeats, hints, policy
        self._tasks: list[tuple[str, list[Startable]]] = []
        for task in tasks:
            usable = list(self._usable(task.dialogues))
            if len(usable) < 2:
                raise DataError(
                    f"Episodes: task {task.task_id!r} must have 2 dialogues with a reply, for support and query,"
                    f" got {len(usable)}"
                )
            self._tasks.append((task.task_id, usable))
        if not self._tasks:
            raise DataError("Episodes: tasks must hold a task, got none")
        if "act" in hints and not any(turn.act for _, usable in self._tasks for d in usable for turn in _turns_of(d)):
            raise DataError("hints: data must have dialogue acts, as the format sgd has, got none")

    def __len__(self) -> int:
        return len(self._tasks)

    def sample(self, step: int, tasks: int, share: Share = whole) -> tuple[Batch, Batch]:
        """Return the support and the query of one step, which depend on the seed and the arguments alone.

        Args:
            step: The number of the step.
            tasks: The number of tasks to draw, at least 1. No task comes twice before all have come once.
            share: Which of them to return, as of `metakern.dialogue.processes`. All T tasks are drawn, so that an
                episode is the same in every share, but only those in the share are encoded.

        Returns:
            Two batches, which are dictionaries of int64 tensors `[T, B, L]`, as the class says.

        Raises:
            ValueError: If `tasks` is below 1.
        """
        drawn, rng = self._drawn(step, tasks)
        _, support, query = self._batch(drawn, [rng] * tasks, share(tasks))
        renamings = [self._renaming(rng) for _ in range(tasks)][share(tasks)] if self.augment else []
        for t, names in enumerate(renamings):
            for batch in (support, query):
                for key in ("input_ids", "labels"):
                    ids = batch[key][t]
                    ids.copy_(torch.where(ids == IGNORE, ids, names[ids.clamp(min=0)]))
        return support, query

    def _renaming(self, rng: random.Random) -> Tensor:
        """Return a permutation of the vocabulary, `[vocab_size]`, which moves a random part of the words or nothing."""
        names = torch.arange(self.tokenizer.vocab_size)
        if rng.random() >= self.augment:
            return names
        moved = [i for i in self.tokenizer.word_ids if rng.random() < RENAMED]
        names[moved] = torch.tensor(draw(moved, len(moved), rng), dtype=torch.int64)
        return names

    def names(self, step: int, tasks: int) -> list[str]:
        """Return the names of the tasks that `sample` draws with the same arguments, in the same order."""
        return [name for name, _ in self._drawn(step, tasks)[0]]

    def _drawn(self, step: int, tasks: int) -> tuple[list[tuple[str, list[Startable]]], random.Random]:
        if tasks < 1:
            raise ValueError(f"sample: tasks must be at least 1, got {tasks}")
        rng = random.Random(f"episodes/{self.seed}/{step}")
        if not self.task_power:
            return draw(self._tasks, tasks, rng), rng
        weights = [len(dialogues) ** self.task_power for _, dialogues in self._tasks]
        return draw(self._tasks, tasks, rng, weights), rng

    def evaluation(
        self, limit: int | None = None, *, batch: int = 16, share: Share = whole
    ) -> Iterator[tuple[list[str], Batch, Batch]]:
        """Yield fixed episodes of the tasks: names, support, query.

        There are `repeats` episodes of each task, one after the other. An episode depends on the seed, the task and its
        number alone; only the padding depends on the other episodes of a batch.

        Args:
            limit: How many of the first tasks to take; None takes all.
            batch: The number of episodes in a batch; the last one may have fewer.
            share: Which of all episodes to yield.
        """
        chosen = [(task, i) for task in self._tasks[:limit] for i in range(self.repeats)]
        chosen = chosen[share(len(chosen))]
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            yield self._batch([task for task, _ in part], [self._evaluation_rng(task[0], i) for task, i in part])

    def exchanges(self) -> Iterator[tuple[str, list[Exchange], list[Exchange]]]:
        """Yield the exchanges in the episodes of `evaluation`: for each the task's name, the support's, the query's.

        An exchange that stands in two windows of a side comes once.
        """
        for name, dialogues in self._tasks:
            for i in range(self.repeats):
                drawn = self._draw_windows(dialogues, self._evaluation_rng(name, i))
                support, query = (
                    list(dict.fromkeys(exchange for window in side for exchange in self._exchanges(*window)))
                    for side in self._shown(drawn)
                )
                yield name, support, query

    def _evaluation_rng(self, name: str, number: int) -> random.Random:
        return random.Random(f"evaluation/{self.seed}/{name}" + f"/{number}" * bool(number))

    def _batch(
        self, tasks: Sequence[tuple[str, list[Startable]]], rngs: Sequence[random.Random], part: slice = slice(None)
    ) -> tuple[list[str], Batch, Batch]:
        """Draw the windows of tasks, and return the names and batches of those in `part`."""
        drawn = [self._draw_windows(dialogues, rng) for (_, dialogues), rng in zip(tasks, rngs, strict=True)][part]
        tasks_shown = [[[self._encoded(*w) for w in side] for side in self._shown(task)] for task in drawn]
        sides = list(zip(*tasks_shown, strict=True))
        longest = max(len(ids) for side in sides for rows in side for ids, _ in rows)
        length = min(-(-longest // 8) * 8, self.max_length)
        support, query = (collate(side, self.tokenizer.pad_id, length) for side in sides)
        return [name for name, _ in tasks[part]], support, query

    def _draw_windows(
        self, dialogues: Sequence[Startable], rng: random.Random
    ) -> tuple[list[tuple[Startable, float]], list[tuple[Startable, float]]]:
        """Return the windows of a task's support and query, as `_begun` takes them."""
        shuffled = draw(dialogues, len(dialogues), rng)
        share = round(len(shuffled) * self.sizes[0] / sum(self.sizes))
        cut = min(max(share, 1), len(shuffled) - 1)
        support, query = (
            [(pool[i % len(pool)], rng.random()) for i in range(size)]
            for pool, size in zip((shuffled[:cut], shuffled[cut:]), self.sizes, strict=True)
        )
        return support, query

    def _shown(self, drawn: Sequence[Sequence[tuple[Startable, float]]]) -> list[list[Speech]]:
        """Return the windows of a task's support and query, as `_draw_windows` draws them, with their hints."""
        support, query = ([self._begun(*window) for window in side] for side in drawn)
        if self.hints == "none":
            return [[(self._turns(d, start), bot_in(d)) for d, start in side] for side in (support, query)]
        known = [dialogue for dialogue, _ in support]
        if self.policy:
            rewritten = self.policy(known)
            query = [(rewritten(dialogue), start) for dialogue, start in query]
        hints = Hints(self.hints, known)
        return [
            [(hints(self._turns(d, start), bot_in(d), d.turns), bot_in(d)) for d, start in side]
            for side in (support, query)
        ]

    def _usable(self, dialogues: Sequence[Dialogue]) -> Iterator[Startable]:
        """Yield the dialogues that have a window; those that stay in their files all have one."""
        for dialogue in dialogues:
            if isinstance(dialogue, Line):
                yield dialogue
            elif starts := self._starts(dialogue):
                yield dialogue, starts

    def _begun(self, item: Startable, drawn: float) -> tuple[Dialogue, int]:
        """Return a dialogue and the turn at which a window begins; `drawn` is a random number from [0, 1)."""
        if isinstance(item, Line):
            dialogue = item.read()
            starts = self._starts(dialogue)
        else:
            dialogue, starts = item
        return dialogue, starts[int(drawn * len(starts))]

    def _starts(self, dialogue: Dialogue) -> list[int]:
        starts = _starts(dialogue, self.train_on)
        if self.windows == "any":
            return starts
        if self.windows == "opening":
            return starts[:1]
        bot = bot_in(dialogue)
        opening = (
            (i, self._encoded(self._turns(dialogue, starts[0], starts[i]), bot)[0]) for i in range(1, len(starts))
        )
        return starts[next((i for i, ids in opening if len(ids) == self.max_length), len(starts)) :]

    def _encoded(self, turns: Sequence[Turn], bot: str | None) -> Window:
        return self.tokenizer.encode_dialogue(turns, self.train_on, self.max_length, bot)

    def _turns(self, dialogue: Dialogue, start: int, end: int | None = None) -> Sequence[Turn]:
        return dialogue.turns[: _instructions(dialogue)] + dialogue.turns[start:end]

    def _exchanges(self, turns: Sequence[Turn], bot: str | None) -> Iterator[Exchange]:
        for i, prompt, reply in self.tokenizer.replies(turns, self.max_length, bot):
            spoken = [turn for turn in turns[:i] if turn.speaker not in SYSTEM_SPEAKERS]
            if spoken and spoken[-1].speaker != bot:
                context = "\n".join(turn.text for turn in turns[:i] if turn.act != HINT)
                yield Exchange(context, tuple(prompt), tuple(reply), self.tokenizer.decode(reply))


def collate(tasks: Sequence[Sequence[Window]], pad_id: int, length: int | None = None) -> Batch:
    """Return the batch of the windows of tasks, padded on the right.

    Args:
        tasks: For each task the same number of windows, which are pairs of ids and labels.
        pad_id: The id for padding; its label is -100.
        length: L; None stands for the length of the longest window.

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


def _turns_of(item: Startable) -> Sequence[Turn]:
    return (item.read() if isinstance(item, Line) else item[0]).turns


def _instructions(dialogue: Dialogue) -> int:
    """Return the number of turns of a system or a tool at the beginning of a dialogue."""
    spoken = (i for i, turn in enumerate(dialogue.turns) if turn.speaker not in SYSTEM_SPEAKERS)
    return next(spoken, len(dialogue.turns))


def _starts(dialogue: Dialogue, train_on: str) -> list[int]:
    """Return the indices of spoken turns that are followed by a turn to be learned.

    If there is none, but the first spoken turn is to be learned, return its index. Turns of a system or a tool are not
    spoken.
    """
    bot = bot_in(dialogue)
    spoken = [i for i, turn in enumerate(dialogue.turns) if turn.speaker not in SYSTEM_SPEAKERS]
    learned = {i: train_on == "all" or dialogue.turns[i].speaker == bot for i in spoken}
    answered = [i for i, j in pairwise(spoken) if learned[j]]
    return answered or spoken[:1] * any(learned.values())


def draw(items: Sequence[T], count: int, rng: random.Random, weights: Sequence[float] | None = None) -> list[T]:
    """Return `count` items in random order; no item comes twice before all have come once.

    With weights, each next item is one of the rest in proportion to them (Efraimidis, Spirakis 2006).
    """
    drawn: list[T] = []
    while len(drawn) < count:
        keys = [rng.random() if weights is None else -log(1 - rng.random()) / weights[i] for i in range(len(items))]
        drawn += [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]
    return drawn[:count]
