r"""Read the two formats of ParlAI for dialogues of any kind (Miller et al. 2017).

Text: an example on each line, with tabs between its fields, and \n for a line break in a text. The bot gives the
labels, of which the first counts. An episode ends after a line with episode_done:True.

    text:Hello.␉labels:Hi.|Hello!␉episode_done:True

Conversations: JSON, one on a line; the bot is the second to speak.

    {"dialog": [[{"id": "ann", "text": "Hello."}, {"id": "bob", "text": "Hi."}], …], "topic": "…"}

The task is the value of the field or key `task_key`. By default it is, for conversations, the first of the keys task,
task_id, topic, domain and persona; without any, it is the name of the file without its suffix.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metakern.dialogue.readers import (
    Dialogue,
    Source,
    UnreadableError,
    dialogue,
    files,
    reader,
    records,
    spoken,
    text_of,
)
from metakern.dialogue.readers.messages import task_of
from metakern.errors import DataError

__all__ = ["parlai"]

SUFFIXES = (".txt", ".jsonl", ".json")
EXAMPLE = re.compile(r"(?=(?:.*\t)?text:)(?=(?:.*\t)?(?:eval_)?labels:)\w+:")
SILENCE = "__SILENCE__"


def _is_conversation(record: Mapping[str, Any]) -> bool:
    found = record.get("dialog")
    return isinstance(found, list) and found != [] and all(isinstance(acts, list) for acts in found)


@reader(
    "parlai",
    suffixes=SUFFIXES,
    sniff=_is_conversation,
    sniff_line=lambda line: EXAMPLE.match(line) is not None,
)
def parlai(path: Source, skipped: Counter[str], *, task_key: str | None = None) -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory; `task_key` is the field or key that names the task."""
    for file in files(path, SUFFIXES):
        found = _text(file, task_key) if isinstance(file, Path) and file.suffix == ".txt" else None
        for talk in found or _conversations(file, skipped, task_key):
            if task_key and not talk.task_id:
                skipped[f"without the key {task_key}"] += 1
            else:
                yield talk


def _text(file: Path, task_key: str | None) -> Iterator[Dialogue]:
    turns: list[tuple[str, str]] = []
    task_id, first = "", 1
    for number, line in enumerate(text_of(file).split("\n"), 1):
        if not line.strip():
            continue
        fields = dict(part.split(":", 1) for part in line.rstrip("\r").split("\t") if ":" in part)
        if "text" not in fields:
            raise DataError(f"{file}:{number}: must have a field text:…, got {line[:20]!r}: remove the line")
        if not turns:
            task_id, first = fields.get(task_key, "") if task_key else file.stem, number
        labels = fields.get("labels", fields.get("eval_labels", ""))
        said = [("user", fields["text"]), ("bot", labels.split("|")[0])]
        turns += [(who, text.replace("\\n", "\n")) for who, text in said if text != SILENCE]
        if fields.get("episode_done") == "True":
            yield dialogue(task_id, f"{file.stem}:{first}", turns, {"bot": "bot"})
            turns = []
    if turns:
        yield dialogue(task_id, f"{file.stem}:{first}", turns, {"bot": "bot"})


def _conversations(file: Source, skipped: Counter[str], task_key: str | None) -> Iterator[Dialogue]:
    for number, record in records(file, "dialog"):
        if not _is_conversation(record):
            skipped["without a dialog of id and text"] += 1
            continue
        try:
            turns = spoken([act for acts in record["dialog"] for act in acts], "id", "text")
        except UnreadableError:
            skipped["without a dialog of id and text"] += 1
            continue
        task_id = task_of(record, task_key) or ("" if task_key else file.stem)
        speakers = list(dict.fromkeys(who for who, text in turns if text.strip()))
        yield dialogue(task_id, f"{file.stem}:{number}", turns, {"bot": speakers[1]} if len(speakers) > 1 else {})
