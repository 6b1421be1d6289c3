"""Read CrossWOZ (Zhu et al. 2020): train.json, val.json, test.json or a folder of them.

    {"391": {"sys-usr": [43, 18], "type": "不独立多领域", "goal": [[1, "景点", "名称", "", false], …],
             "messages": [{"role": "usr" | "sys", "content": "…", "dialog_act": […]}, …]}, …}

The option `tasks` says what a task is: "types", the type of the goal, or "domains", the domains of the goal, sorted,
with + between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metakern.dialogue.readers import Dialogue, UnreadableError, dialogue, files, json_of, reader, spoken, text_of
from metakern.errors import DataError

__all__ = ["crosswoz"]

SUFFIXES = (".json",)
SPEAKERS = {"usr": "user", "sys": "bot"}
TASKS = ("types", "domains")


def _is_dialogue(value: Any) -> bool:
    messages = value.get("messages") if isinstance(value, dict) else None
    first = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(first, dict) and first.get("role") in SPEAKERS


@reader("crosswoz", suffixes=SUFFIXES, sniff=lambda record: any(map(_is_dialogue, record.values())))
def crosswoz(path: Path, skipped: Counter[str], *, tasks: str = "types") -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory; `tasks` is "types" or "domains", as the module explains."""
    if tasks not in TASKS:
        raise DataError(f"crosswoz: tasks must be one of {', '.join(TASKS)}, got {tasks}")
    for file in files(path, SUFFIXES, r"(train|val|test)\.json"):
        data = json_of(text_of(file), file)
        if not isinstance(data, dict):
            raise DataError(f"{file}: must be an object of dialogues, got {type(data).__name__}")
        for name, item in data.items():
            try:
                turns = spoken(item.get("messages") if isinstance(item, dict) else None, "role", "content", SPEAKERS)
            except UnreadableError:
                skipped["without messages of role and content"] += 1
                continue
            if task_id := _type(item) if tasks == "types" else _domains(item):
                yield dialogue(task_id, name, turns, {"bot": "bot"})
            else:
                skipped[f"without {'a type' if tasks == 'types' else 'domains in the goal'}"] += 1


def _type(item: dict[str, Any]) -> str:
    return item["type"] if isinstance(item.get("type"), str) else ""


def _domains(item: dict[str, Any]) -> str:
    """Return the domains of the goal, whose parts are lists of a number, a domain, a slot, a value and a flag."""
    goal = item.get("goal")
    found = [part[1] for part in goal if isinstance(part, list) and len(part) > 1] if isinstance(goal, list) else []
    return "+".join(sorted({domain for domain in found if isinstance(domain, str)}))
