"""Make synthetic dialogues of service bots, for which no file and no package is needed (`metakern.dialogue.bots`).

A task is a bot. `meta["group"]` is its kind of business (bakery, dentist, railway, …), so that a split can keep all
bots of a kind on one side. `read("bots")` has the seed 0, and `read("bots:7")` has other bots, with the seed 7.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from metakern.dialogue.bots import bots as made
from metakern.dialogue.bots import dialogues
from metakern.dialogue.readers import Dialogue, dialogue, reader
from metakern.errors import DataError

__all__ = ["bots"]


@reader("bots", suffixes=(), synthetic=True, variant="seed")
def bots(path: Path, skipped: Counter[str], *, seed: str | int = "0") -> Iterator[Dialogue]:
    """Yield the dialogues of all bots of a seed, a whole number; the module says what they are."""
    if not (str(seed).isdecimal() and len(str(seed)) < 10):
        raise DataError(f"bots: seed must be a whole number of at most 9 digits, as in bots:7, got {seed!r}")
    for bot in made(int(seed)):
        task_id = f"{bot.kind}/{bot.name}"
        for number, turns in enumerate(dialogues(bot, int(seed))):
            said = ((("user", "bot")[i % 2], text) for i, text in enumerate(turns))
            yield dialogue(task_id, f"{task_id}/{number}", said, {"bot": "bot", "group": bot.kind})
