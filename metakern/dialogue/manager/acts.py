"""Draw episodes of dialogue acts: the windows of `metakern.dialogue.episodes`, labeled with the acts of the bot.

The label of a token is the number of an act where the bot's reply begins after it, and -100 elsewhere. So one pass
over a window predicts the act of each of its replies from all that was said before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metakern.dialogue.episodes import Episodes
from metakern.dialogue.readers import Dialogue
from metakern.dialogue.split import TaskData
from metakern.dialogue.tokenizer import IGNORE, DialogueTokenizer, bot_in
from metakern.errors import DataError

__all__ = ["Acts", "acts_in"]


def acts_in(dialogues: Iterable[Dialogue]) -> list[str]:
    """Return the acts of the bot in dialogues, in alphabetical order.

    Raises:
        DataError: If there are fewer than two.
    """
    found = sorted({turn.act for d in dialogues for turn in d.turns if turn.act and turn.speaker == bot_in(d)})
    if len(found) < 2:
        raise DataError(
            f"policy: data must have two dialogue acts of the bot, as the format sgd has, got {len(found)}"
        )
    return found


class Acts(Episodes):
    """Episodes as of `Episodes`, in which `labels` `[T, B, L]` number the acts of the bot.

    A reply whose act is not among `acts` has the label -100: it is not learned and not judged.

    Args:
        tasks: As of `Episodes`.
        tokenizer: As of `Episodes`.
        acts: The acts, by number.
        options: The other arguments of `Episodes`.
    """

    def __init__(
        self, tasks: Sequence[TaskData], tokenizer: DialogueTokenizer, *, acts: Sequence[str], **options: Any
    ) -> None:
        self.number: Mapping[str, int] = {act: i for i, act in enumerate(acts)}
        super().__init__(tasks, tokenizer, **options)

    def _encode(self, dialogue: Dialogue, start: int, end: int | None = None) -> tuple[list[int], list[int]]:
        turns, bot = self._turns(dialogue, start, end), bot_in(dialogue)
        ids, _ = self.tokenizer.encode_dialogue(turns, "bot", self.max_length, bot)
        labels = [IGNORE] * len(ids)
        for i, before, _ in self.tokenizer.replies(turns, self.max_length, bot):
            labels[len(before) - 1] = self.number.get(turns[i].act, IGNORE)
        return ids, labels
