"""Chat `messages`: JSON records, on a line each, in one array, or one after the other over several lines.

    {"messages": [{"role": "system" | "user" | "assistant" | "tool", "content": "…"}, …], "topic": "…"}
    {"prompt": [message, …] | "…", "completion": [message, …] | "…"}

A content is a text, a number, or what holds texts: a list of parts, {"text": …}, {"parts": …}, {"content": …} or
{"value": …}, within each other too; the texts are put together by spaces.  A part without text, such as an image, is
left out and counted.  A message without content is silent if its content is null or it calls a tool; a dialogue with
another one is left out and counted.

The bot is the assistant.  The task is the value of `task_key`; by default the first of task, task_id, topic, domain and
persona that a record has, otherwise the name of the file without its suffix: a directory holds one task a file.  0 and
false are names of tasks; null, an empty text and an empty list are none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from metakern.dialogue.readers import Dialogue, dialogue, files, reader, records

__all__ = ["messages"]

SUFFIXES = (".jsonl", ".ndjson", ".json")
TASK_KEYS = ("task", "task_id", "topic", "domain", "persona")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}
ROLES |= {"chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "ai": "assistant"}
ROLES |= {"function": "tool", "observation": "tool", "function_call": "assistant"}
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
CONTENT = ("content", "value", "parts", "text")
CALLS = ("tool_calls", "function_call")
NO_TEXT = "message parts without text"


class UnreadableError(ValueError):
    """A message that holds no role or no content that can be read."""


@reader(
    "messages",
    suffixes=SUFFIXES,
    sniff=lambda record: "messages" in record or ("prompt" in record and "conversations" not in record),
)
def messages(path: Path, skipped: Counter[str], *, task_key: str | None = None) -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory; see the module."""
    return dialogues(path, skipped, task_key, "messages", "role and content", _messages)


def dialogues(
    path: Path,
    skipped: Counter[str],
    task_key: str | None,
    key: str,
    parts: str,
    messages_of: Callable[[Mapping[str, Any]], Iterable[Any]],
) -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory whose records hold messages; `key` and `parts` are for reasons."""
    for file in files(path, SUFFIXES):
        for number, record in records(file, key):
            try:
                task_id = _task(record, task_key)
                turns = [_turn(message, skipped) for message in messages_of(record)]
            except UnreadableError:
                skipped[f"without {key} of {parts}"] += 1
                continue
            except RecursionError:
                skipped["that are nested too deeply"] += 1
                continue
            talk = dialogue(task_id or file.stem, f"{file.stem}:{number}", turns, {"bot": "assistant"})
            if task_key and not task_id:
                skipped[f"without the key {task_key}"] += 1
            elif not any(turn.speaker == "assistant" for turn in talk.turns):
                skipped["without a turn of the assistant"] += 1
            else:
                yield talk


def _task(record: Mapping[str, Any], task_key: str | None) -> str:
    """The name of a record's task on one line, or nothing."""
    return next(filter(None, (_name(record.get(key)) for key in ([task_key] if task_key else TASK_KEYS))), "")


def _turn(message: Any, skipped: Counter[str]) -> tuple[str, str]:
    """Speaker and text of a message, whose parts without text are counted; raises `UnreadableError`."""
    if not isinstance(message, dict):
        raise UnreadableError
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or (speaker := ROLES.get(role.strip().lower())) is None:
        raise UnreadableError
    if key := next((key for key in CONTENT if message.get(key) is not None), None):
        return speaker, _text(message[key], skipped)
    if any(key in message for key in (*CONTENT, *CALLS)):
        return speaker, ""
    raise UnreadableError


def _messages(record: Mapping[str, Any]) -> list[Any]:
    if record.get("messages") is not None:
        return listed(record["messages"])
    sides = [(record.get("prompt"), "user"), (record.get("completion"), "assistant")]
    found = [[{"role": role, "content": side}] if isinstance(side, str) else listed(side) for side, role in sides]
    return [message for side in found for message in side]


def listed(found: Any) -> list[Any]:
    """A list of messages; raises `UnreadableError`."""
    if not isinstance(found, list):
        raise UnreadableError
    return found


def _text(content: Any, skipped: Counter[str]) -> str:
    """The text of a content, or the texts of its parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, (int, float)) and not isinstance(content, bool):
        return str(content)
    if isinstance(content, list):
        return " ".join(text for part in content if (text := _part(part, skipped)))
    if isinstance(content, dict) and (key := next((key for key in CONTENT if content.get(key) is not None), None)):
        return _text(content[key], skipped)
    raise UnreadableError


def _part(part: Any, skipped: Counter[str]) -> str:
    """The text of a part; a part of another kind is counted."""
    if part is None or (isinstance(part, dict) and all(part.get(key) is None for key in CONTENT)):
        skipped[NO_TEXT] += 1
        return ""
    return _text(part, skipped)


def _name(value: Any) -> str:
    """A name on one line; a persona may be a list of sentences."""
    parts = value if isinstance(value, list) else [value]
    return " ".join(" ".join(str(part) for part in parts if part is not None).split())
