"""Read chat `messages`: JSON records, each on a line, in one array, or one after the other over several lines.

    {"messages": [{"role": "system" | "user" | "assistant" | "tool", "content": "…"}, …], "topic": "…"}
    {"prompt": [message, …] | "…", "completion": [message, …] | "…"}

A content is a text, a number, a list of parts, or an object with the key text, parts, content or value; these may be
nested. The texts are joined by spaces. A part without text, such as an image, is left out and counted. A message
without content is skipped if its content is null or it calls a tool; otherwise its dialogue is left out and counted.

The bot is the assistant. The task is the value of the key `task_key` or, by default, of the first of the keys task,
task_id, topic, domain and persona that a record has. Without any, it is the name of the file without its suffix, so
that a directory holds one task in each file. 0 and false are names of tasks; null, an empty text and an empty list are
not. The value of the key group, if there is one, is `meta["group"]`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from metakern.dialogue.readers import Dialogue, Source, UnreadableError, dialogue, files, reader, records

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


@reader(
    "messages",
    suffixes=SUFFIXES,
    sniff=lambda record: (
        "messages" in record or ("prompt" in record and "completion" in record and "conversations" not in record)
    ),
)
def messages(path: Source, skipped: Counter[str], *, task_key: str | None = None) -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory; `task_key` is the key that names the task (None: the defaults)."""
    return dialogues(path, skipped, task_key, "messages", "role and content", _messages)


def dialogues(
    path: Source,
    skipped: Counter[str],
    task_key: str | None,
    key: str,
    parts: str,
    messages_of: Callable[[Mapping[str, Any]], Iterable[Any]],
) -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory whose records hold messages.

    Args:
        path: The file or directory.
        skipped: Counts what is left out, by reason.
        task_key: The key of a record that names its task; None stands for the first of `TASK_KEYS` that it has.
        key: The key that holds the messages, for error messages.
        parts: The keys of a message, for the reason why a record was left out.
        messages_of: Returns the messages of a record, or raises `UnreadableError`.
    """
    for file in files(path, SUFFIXES):
        for number, record in records(file, key):
            try:
                task_id = task_of(record, task_key)
                turns = [_turn(message, skipped) for message in messages_of(record)]
            except UnreadableError:
                skipped[f"without {key} of {parts}"] += 1
                continue
            except RecursionError:
                skipped["that are nested too deeply"] += 1
                continue
            meta = {"bot": "assistant"} | ({"group": group} if (group := _name(record.get("group"))) else {})
            talk = dialogue(task_id or file.stem, f"{file.stem}:{number}", turns, meta)
            if task_key and not task_id:
                skipped[f"without the key {task_key}"] += 1
            elif not any(turn.speaker == "assistant" for turn in talk.turns):
                skipped["without a turn of the assistant"] += 1
            else:
                yield talk


def task_of(record: Mapping[str, Any], task_key: str | None) -> str:
    """Return the name of a record's task, on one line, or "" if it has none."""
    return next(filter(None, (_name(record.get(key)) for key in ([task_key] if task_key else TASK_KEYS))), "")


def _turn(message: Any, skipped: Counter[str]) -> tuple[str, str]:
    """Return the speaker and the text of a message; parts without text are counted in `skipped`.

    Raises:
        UnreadableError: If the role or the content can't be read.
    """
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
    """Return a list of messages as it is; raise `UnreadableError` if it is not a list."""
    if not isinstance(found, list):
        raise UnreadableError
    return found


def _text(content: Any, skipped: Counter[str]) -> str:
    """Return the text of a content, or the texts of its parts, joined by spaces."""
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
    """Return the text of a part; a part without text is counted in `skipped` and gives ""."""
    if part is None or (isinstance(part, dict) and all(part.get(key) is None for key in CONTENT)):
        skipped[NO_TEXT] += 1
        return ""
    return _text(part, skipped)


def _name(value: Any) -> str:
    """Return the name of a task on one line; a list, such as the sentences of a persona, is joined."""
    parts = value if isinstance(value, list) else [value]
    return " ".join(" ".join(str(part) for part in parts if part is not None).split())
