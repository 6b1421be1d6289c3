"""Read ShareGPT: conversations with assistants as JSON records, each on a line or in one array.

    {"id": "QWJhYvA_0", "conversations": [{"from": "human" | "gpt" | "system" | …, "value": "…"}, …], "system": "…"}

The bot is the assistant, who is called gpt, chatgpt, bing, bard, bot or assistant, among other names. Tasks and
contents are as in `readers.messages`. If a conversation was cut, the ids of its parts end in _0, _1, … Each part is a
dialogue, which may begin with the assistant. With `task_key="id"`, all parts of a conversation are one task.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from metakern.dialogue.readers import Dialogue, Source, reader
from metakern.dialogue.readers.messages import SUFFIXES, dialogues, listed

__all__ = ["sharegpt"]


@reader("sharegpt", suffixes=SUFFIXES, sniff=lambda record: "conversations" in record)
def sharegpt(path: Source, skipped: Counter[str], *, task_key: str | None = None) -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory; `task_key` is the key that names the task, as in `messages`."""
    for talk in dialogues(path, skipped, task_key, "conversations", "from and value", _messages):
        yield replace(talk, task_id=re.sub(r"_\d+$", "", talk.task_id)) if task_key == "id" else talk


def _messages(record: Mapping[str, Any]) -> list[Any]:
    system = [{"from": "system", "value": record["system"]}] if record.get("system") else []
    return [*system, *listed(record.get("conversations"))]
