"""Draw episodes of dialogue acts: the windows of `metakern.dialogue.episodes`, labeled with the acts of the bot.

The label of a token is the number of an act where the bot's reply begins after it, and -100 elsewhere. So one pass
over a window predicts the act of each of its replies from all that was said before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from metakern.dialogue.episodes import Episodes
from metakern.dialogue.readers import Dialogue, Turn
from metakern.dialogue.split import TaskData
from metakern.dialogue.tokenizer import IGNORE, DialogueTokenizer, bot_in
from metakern.errors import DataError

__all__ = ["Acts", "acts_in", "labeled"]

Example = tuple[str, int]  # a text and the number of the act that follows it


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
    """Episodes as of `Episodes`, in which `labels` `[T, B, L]` number the acts of the bot.

    A reply whose act is not among `acts` has the label -100: it is not learned and not judged.

    Args:
        tasks: As of `Episodes`.
        tokenizer: As of `Episodes`.
        acts: The acts, by number.
        options: The other arguments of `Episodes`.

    Attributes:
        unknown: The number of replies in `tasks` whose act is not among `acts`.
    """

    def __init__(
        self, tasks: Sequence[TaskData], tokenizer: DialogueTokenizer, *, acts: Sequence[str], **options: Any
    ) -> None:
        self.number: Mapping[str, int] = {act: i for i, act in enumerate(acts)}
        super().__init__(tasks, tokenizer, **options)
        said = [(turn, bot_in(d)) for task in tasks for d in task.dialogues for turn in d.turns]
        self.unknown = sum(bool(turn.act) and turn.act not in self.number and turn.speaker == bot for turn, bot in said)

    def examples(self) -> Iterator[tuple[list[Example], list[Example]]]:
        """Yield the labels in the episodes of `evaluation`, each with the text of the turn before: support, query."""
        for name, dialogues in self._tasks:
            for i in range(self.repeats):
                support, query = (
                    [example for window in side for example in self._examples(*window)]
                    for side in self._draw_windows(dialogues, self._evaluation_rng(name, i))
                )
                yield support, query

    def _examples(self, dialogue: Dialogue, start: int) -> Iterator[Example]:
        turns = self._turns(dialogue, start)
        for i, _, _ in self.tokenizer.replies(turns, self.max_length, bot_in(dialogue)):
            if turns[i].act in self.number:
                yield turns[i - 1].text if i else "", self.number[turns[i].act]

    def _encode(self, dialogue: Dialogue, start: int, end: int | None = None) -> tuple[list[int], list[int]]:
        turns = self._turns(dialogue, start, end)
        return labeled(turns, self.tokenizer, self.number, self.max_length, bot_in(dialogue))


def labeled(
    turns: Sequence[Turn],
    tokenizer: DialogueTokenizer,
    number: Mapping[str, int],
    max_length: int,
    bot: str | None,
) -> tuple[list[int], list[int]]:
    """Return the ids and the labels of the beginning of a dialogue, as `Acts` has them.

    Args:
        turns: The turns, oldest first.
        tokenizer: The tokenizer.
        number: The number of each known act.
        max_length: The largest number of ids.
        bot: The speaker who is the bot.
    """
    ids, _ = tokenizer.encode_dialogue(turns, "bot", max_length, bot)
    labels = [IGNORE] * len(ids)
    for i, before, _ in tokenizer.replies(turns, max_length, bot):
        labels[len(before) - 1] = number.get(turns[i].act, IGNORE)
    return ids, labels
