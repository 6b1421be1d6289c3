"""Read Taskmaster-1 (Byrne et al. 2019): self-dialogs.json, woz-dialogs.json or a folder of such files.

    [{"conversation_id": "dlg-…", "instruction_id": "restaurant-table-2",
      "utterances": [{"index": 0, "speaker": "USER" | "ASSISTANT", "text": "…", "segments": […]}, …]}, …]

A task is the kind of instruction, without its number: restaurant-table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from metakern.dialogue.readers import Dialogue, Source, UnreadableError, dialogue, files, reader, records, spoken

__all__ = ["taskmaster"]

SUFFIXES = (".json", ".jsonl")
SPEAKERS = {"user": "user", "assistant": "bot"}


@reader(
    "taskmaster",
    suffixes=SUFFIXES,
    sniff=lambda record: "utterances" in record and "instruction_id" in record,
)
def taskmaster(path: Source, skipped: Counter[str]) -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory; the module describes the format."""
    for file in files(path, SUFFIXES, r".*dialogs?\.json"):
        for number, record in records(file, "utterances"):
            task_id = _task(record.get("instruction_id"))
            try:
                turns = spoken(record.get("utterances"), "speaker", "text", SPEAKERS)
            except UnreadableError:
                skipped["without utterances of speaker and text"] += 1
                continue
            if task_id:
                yield dialogue(
                    task_id, str(record.get("conversation_id", f"{file.stem}:{number}")), turns, {"bot": "bot"}
                )
            else:
                skipped["without an instruction_id"] += 1


def _task(instruction: Any) -> str:
    return re.sub(r"-\d+$", "", instruction) if isinstance(instruction, str) else ""
