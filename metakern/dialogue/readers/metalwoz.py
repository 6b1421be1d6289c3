"""Read MetaLWOz (Lee et al. 2019): a folder with dialogues/<DOMAIN>.txt, or one such file.

    {"id": "…", "user_id": "…", "bot_id": "…", "domain": "AGREEMENT_BOT", "task_id": "…", "turns": ["Hello …", …]}

The bot speaks first, and bot and user alternate. A task is a task_id, or the value of the key `task_key`; its group is
the domain. The file tasks.txt, which describes the tasks, is not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from metakern.dialogue.readers import Dialogue, Source, alternating, dialogue, files, reader, records

__all__ = ["metalwoz"]

SUFFIXES = (".txt", ".jsonl", ".json")


@reader(
    "metalwoz",
    suffixes=SUFFIXES,
    sniff=lambda record: {"domain", "task_id", "turns"} <= record.keys(),
)
def metalwoz(path: Source, skipped: Counter[str], *, task_key: str = "task_id") -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory; `task_key` is the key that names the task, such as domain."""
    for file in files(path, SUFFIXES, r"(?!tasks\.txt).*"):
        for number, record in records(file, "turns"):
            turns, domain, task_id = (record.get(key) for key in ("turns", "domain", task_key))
            if not isinstance(turns, list) or not all(isinstance(text, str) for text in turns):
                skipped["without turns of text"] += 1
            elif not isinstance(domain, str) or not isinstance(task_id, str):
                skipped[f"without the keys domain and {task_key}"] += 1
            else:
                name = str(record.get("id", f"{file.stem}:{number}"))
                yield dialogue(task_id, name, alternating(turns, first="bot"), {"bot": "bot", "group": domain})
