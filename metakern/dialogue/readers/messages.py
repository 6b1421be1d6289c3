"""Chat `messages`: one JSON record a line, or one JSON array of records.

    {"messages": [{"role": "system" | "user" | "assistant" | "tool", "content": "…"}, …], "topic": "…"}
    {"prompt": [message, …] | "…", "completion": [message, …] | "…"}

The bot is the assistant.  The task is the value of `task_key`; by default the first of task, task_id, topic, domain and
persona that a record has, otherwise the name of the file without its suffix: a directory holds one task a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metakern.dialogue.readers import DataError, Dialogue, dialogue, files, json_of, reader, text_of

__all__ = ["messages"]

TASK_KEYS = ("task", "task_id", "topic", "domain", "persona")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}
ROLES |= {"function": "tool"} | {role: role for role in ("system", "user", "assistant", "tool")}


@reader(
    "messages",
    suffixes=(".jsonl", ".ndjson", ".json"),
    sniff=lambda head: not head.strip() or '"messages"' in head or '"prompt"' in head,
)
def messages(path: Path, skipped: Counter[str], *, task_key: str | None = None) -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory; see the module."""
    for file in files(path, (".jsonl", ".ndjson", ".json")):
        for line, record in _records(file):
            if not isinstance(record, dict):
                raise DataError(f"{file}:{line}: must be an object with messages, got {type(record).__name__}")
            if task_key and task_key not in record:
                skipped[f"without the key {task_key}"] += 1
                continue
            try:
                turns = _turns(record)
            except (KeyError, TypeError, AttributeError):
                skipped["without messages of role and content"] += 1
                continue
            task_id = next((_name(record[k]) for k in ([task_key] if task_key else TASK_KEYS) if record.get(k)), "")
            talk = dialogue(task_id or file.stem, f"{file.stem}:{line}", turns, {"bot": "assistant"})
            if not any(turn.speaker == "assistant" for turn in talk.turns):
                skipped["without a turn of the assistant"] += 1
                continue
            yield talk


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    text = text_of(file)
    if text.lstrip().startswith("["):
        yield from enumerate(json_of(text, file), start=1)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, json_of(line, file, number)


def _turns(record: dict[str, Any]) -> list[tuple[str, str]]:
    if "messages" in record:
        talk = record["messages"]
    else:
        talk = [*_side(record["prompt"], "user"), *_side(record["completion"], "assistant")]
    return [(ROLES[message["role"]], _content(message.get("content"))) for message in talk]


def _side(side: Any, role: str) -> list[Any]:
    return [{"role": role, "content": side}] if isinstance(side, str) else side


def _content(content: Any) -> str:
    """Plain text, or the text among the parts of a message; a call of a tool has no content."""
    if content is None:
        return ""
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if "text" in part)


def _name(value: Any) -> str:
    """A name on one line; a persona may be a list of sentences."""
    return " ".join(" ".join(map(str, value if isinstance(value, list) else [value])).split())
