"""Read DailyDialog (Li et al. 2017) as its own text files, or as JSON of ParlAI or of the package datasets.

Text: dialogues_text.txt, or dialogues_train.txt, dialogues_validation.txt and dialogues_test.txt. A folder that has the
first, which holds all dialogues, is read from there. Each line of dialogues_topic.txt, if that is beside it, is the
number of a dialogue's topic.

    Hi , Jim . __eou__ Hello , how are you ? __eou__ Fine , thanks . __eou__

JSON, one on a line:

    {"topic": "Work", "dialogue": [{"text": "Hi , Jim .", "emotion": "…", "act": "…"}, …]}
    {"dialog": ["Hi , Jim .", "Hello , how are you ?"], "act": […], "emotion": […]}

Two speakers alternate; the bot is the second. A task is a topic; without topics, it is the name of the file without its
suffix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metakern.dialogue.readers import Dialogue, Source, alternating, dialogue, files, reader, records, text_of
from metakern.errors import DataError

__all__ = ["dailydialog"]

SUFFIXES = (".txt", ".jsonl", ".json")
WHOLE, SPLIT = "dialogues_text.txt", "dialogues_(train|validation|test).txt"
END = "__eou__"
TOPICS = (
    "Ordinary Life",
    "School Life",
    "Culture & Education",
    "Attitude & Emotion",
    "Relationship",
    "Tourism",
    "Health",
    "Work",
    "Politics",
    "Finance",
)


def _texts(record: Mapping[str, Any]) -> list[str] | None:
    """Return the texts of a record, or None if it is in another form."""
    found = record.get("dialogue", record.get("dialog"))
    if "dialogue" in record and isinstance(found, list):
        found = [turn.get("text") if isinstance(turn, dict) else None for turn in found]
    return found if isinstance(found, list) and found and all(isinstance(text, str) for text in found) else None


@reader(
    "dailydialog",
    suffixes=SUFFIXES,
    sniff=lambda record: _texts(record) is not None and not {"topic", "emotion"}.isdisjoint(record),
    sniff_line=lambda line: END in line and line.endswith(END) and "\t" not in line,
)
def dailydialog(path: Source, skipped: Counter[str]) -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory; the module describes the formats."""
    for file in files(path, SUFFIXES, WHOLE, SPLIT):
        if isinstance(file, Path) and file.suffix.lower() == ".txt":
            yield from _lines(file)
            continue
        for number, record in records(file, "dialogue"):
            if (texts := _texts(record)) is None:
                skipped["without a dialogue of texts"] += 1
            else:
                topic = _topic(record.get("topic")) or file.stem
                yield dialogue(topic, f"{file.stem}:{number}", alternating(texts), {"bot": "bot"})


def _lines(file: Path) -> Iterator[Dialogue]:
    lines = [(number, line) for number, line in enumerate(text_of(file).split("\n"), 1) if line.strip()]
    beside = file.with_name("dialogues_topic.txt")
    topics = [file.stem] * len(lines)
    if file.name == WHOLE and beside.exists():
        topics = [_topic(line.strip()) for line in text_of(beside).split("\n") if line.strip()]
        if len(topics) != len(lines):
            raise DataError(f"{beside}: must have {len(lines)} lines, as {file.name} has, got {len(topics)}")
    for (number, line), topic in zip(lines, topics, strict=True):
        if END not in line:
            raise DataError(f"{file}:{number}: must have {END} after each turn, got {line[:20]!r}: remove the line")
        yield dialogue(topic, f"{file.stem}:{number}", alternating(line.split(END)), {"bot": "bot"})


def _topic(value: Any) -> str:
    """Return the name of a topic, which may be a number from 1 to 10, or "" for none."""
    text = str(value).strip() if value is not None else ""
    return TOPICS[int(text) - 1] if text.isdecimal() and 1 <= int(text) <= len(TOPICS) else text
