"""Draw episodes of dialogue acts: whole dialogues, turn by turn, labeled with the act of the bot's next turn.

| tensor         | shape        |
|----------------|--------------|
| input_ids      | [T, B, U, L] |
| attention_mask | [T, B, U, L] |
| speakers       | [T, B, U]    |
| labels         | [T, B, U]    |

T tasks, B dialogues of a task, U turns, L tokens of a turn. A speaker is 1 for the bot, 0 for anybody else. The label
of a turn is the number of the act of the bot's turn that follows it, and -100 if there is none.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from metakern.dialogue.episodes import Batch, Episodes, Speech, Startable
from metakern.dialogue.readers import Dialogue, Turn
from metakern.dialogue.split import TaskData
from metakern.dialogue.tokenizer import IGNORE, DialogueTokenizer, bot_in
from metakern.errors import DataError

__all__ = ["Acts", "acts_in", "encoded_turns"]

TURNS = 40  # the largest U; of longer dialogues, the first turns are taken
Example = tuple[str, int]  # the text of a turn and the number of the act that follows it


def acts_in(dialogues: Iterable[Dialogue]) -> list[str]:
    """Return the acts of the bot in dialogues, in alphabetical order.

    Raises:
        DataError: If there are fewer than two.
    """
    found = sorted({turn.act for d in dialogues for turn in d.turns if turn.act and turn.speaker == bot_in(d)})
    if len(found) < 2:
        raise DataError(f"policy: data must have two dialogue acts of the bot, as the format sgd has, got {len(found)}")
    return found


class Acts(Episodes):
    """Episodes as of `Episodes`, of whole dialogues, in the form that the module describes.

    U and L are the same in support and query.

    A turn of the bot whose act is not among `acts` is not learned and not judged.

    Args:
        tasks: As of `Episodes`.
        tokenizer: As of `Episodes`.
        acts: The acts, by number.
        options: The other arguments of `Episodes`; `max_length` is the largest L, and longer turns lose their ends.

    Attributes:
        unknown: The number of turns of the bot in `tasks` whose act is not among `acts`.
    """

    def __init__(
        self, tasks: Sequence[TaskData], tokenizer: DialogueTokenizer, *, acts: Sequence[str], **options: Any
    ) -> None:
        self.number: Mapping[str, int] = {act: i for i, act in enumerate(acts)}
        super().__init__(tasks, tokenizer, windows="opening", **options)
        said = [(turn, bot_in(d)) for task in tasks for d in task.dialogues for turn in d.turns]
        self.unknown = sum(bool(turn.act) and turn.act not in self.number and turn.speaker == bot for turn, bot in said)

    def examples(self) -> Iterator[tuple[list[Example], list[Example]]]:
        """Yield the labels in the episodes of `evaluation` with the texts of their turns: support, query."""
        for name, dialogues in self._tasks:
            for i in range(self.repeats):
                support, query = (
                    [
                        (turn.text, label)
                        for dialogue, _ in (self._begun(*window) for window in side)
                        for turn, label in zip(dialogue.turns, self._labels(dialogue), strict=False)
                        if label != IGNORE
                    ]
                    for side in self._draw_windows(dialogues, self._evaluation_rng(name, i))
                )
                yield support, query

    def _labels(self, dialogue: Dialogue) -> list[int]:
        return labels_of_turns(dialogue.turns, bot_in(dialogue), self.number)[:TURNS]

    def _batch(
        self, tasks: Sequence[tuple[str, list[Startable]]], rngs: Sequence[random.Random], part: slice = slice(None)
    ) -> tuple[list[str], Batch, Batch]:
        drawn = [self._draw_windows(dialogues, rng) for (_, dialogues), rng in zip(tasks, rngs, strict=True)][part]
        dialogues = [[self._begun(*window)[0] for side in task for window in side] for task in drawn]
        said = [[(dialogue.turns, bot_in(dialogue)) for dialogue in task] for task in dialogues]
        both = encoded_turns(said, self.tokenizer, self.number, self.max_length)
        support, query = (
            {key: x.contiguous() for key, x in zip(both, halves, strict=True)}
            for halves in zip(*(x.split(self.sizes, 1) for x in both.values()), strict=True)
        )
        return [name for name, _ in tasks[part]], support, query


def labels_of_turns(turns: Sequence[Turn], bot: str | None, number: Mapping[str, int]) -> list[int]:
    """Return the label of each turn, as the module says, given the number of each known act."""
    following = [number.get(turn.act, IGNORE) if turn.speaker == bot else IGNORE for turn in turns[1:]]
    return [*following, IGNORE][: len(turns)]


def encoded_turns(
    tasks: Sequence[Sequence[Speech]], tokenizer: DialogueTokenizer, number: Mapping[str, int], max_length: int
) -> Batch:
    """Return the dialogues of tasks as a batch, padded on the right; each task has as many dialogues.

    L is a multiple of 8 and U one of 4, so that there are few shapes.

    Args:
        tasks: For each task its dialogues.
        tokenizer: The tokenizer.
        number: The number of each known act.
        max_length: The largest L.
    """
    rows = [
        [
            (
                [tokenizer.encode(turn.text)[:max_length] for turn in turns[:TURNS]],
                [int(turn.speaker == bot) for turn in turns[:TURNS]],
                labels_of_turns(turns, bot, number)[:TURNS],
            )
            for turns, bot in task
        ]
        for task in tasks
    ]
    T, B = len(rows), len(rows[0])
    U = -(-max(len(speakers) for task in rows for _, speakers, _ in task) // 4) * 4
    L = -(-max(len(ids) for task in rows for texts, _, _ in task for ids in texts) // 8) * 8
    batch = {
        "input_ids": torch.full((T, B, U, L), tokenizer.pad_id),
        "attention_mask": torch.zeros(T, B, U, L, dtype=torch.long),
        "speakers": torch.zeros(T, B, U, dtype=torch.long),
        "labels": torch.full((T, B, U), IGNORE),
    }
    for t, task in enumerate(rows):
        for b, (texts, speakers, labels) in enumerate(task):
            for u, ids in enumerate(texts):
                batch["input_ids"][t, b, u, : len(ids)] = torch.tensor(ids)
                batch["attention_mask"][t, b, u, : len(ids)] = 1
            batch["speakers"][t, b, : len(speakers)] = torch.tensor(speakers)
            batch["labels"][t, b, : len(labels)] = torch.tensor(labels)
    return batch
