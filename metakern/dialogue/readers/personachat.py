"""Read PersonaChat (Zhang et al. 2018) as JSON of Hugging Face or as text of ParlAI (fbdialog).

JSON, such as personachat_self_original.json. The histories grow, so that the last one and its reply, which is the last
of its candidates, are the whole dialogue. Entries may also be records by themselves, and so may their utterances, with
the personality in each.

    {"train": [{"personality": ["i like tea .", …],
                "utterances": [{"history": ["hi", …], "candidates": ["…", …, "the reply"]}, …]}, …], "valid": […]}

Text, such as train_self_original.txt: a number that begins at 1 in each dialogue, then what the partner says, the
reply, an empty field and candidates, with tabs between them. Lines about personas come first.

    1 your persona: i like tea .
    2 hi␉hello , do you like tea ?␉␉candidate|candidate

The bot gives the replies. A task is its personality, whose sentences are sorted, or that of its partner in files with
nothing else. In files without any, the task is the name of the file without its suffix.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metakern.dialogue.readers import Dialogue, Source, alternating, dialogue, files, reader, records, text_of
from metakern.errors import DataError

__all__ = ["personachat"]

SUFFIXES = (".json", ".jsonl", ".txt")
LINE = re.compile(r"(\d+) (.*)")
PERSONA = re.compile(r"(your|partner's) persona: (.*)")
FIRST = re.compile(r"1 ((your|partner's) persona: |[^\t]*\t[^\t]+(\t|$))")
SILENCE = "__SILENCE__"


def _is_personachat(record: Mapping[str, Any]) -> bool:
    if "personality" in record:
        return "utterances" in record or {"history", "candidates"} <= record.keys()
    entries = (entry for split in record.values() if isinstance(split, list) for entry in split[:1])
    return any(isinstance(entry, dict) and {"personality", "utterances"} <= entry.keys() for entry in entries)


@reader(
    "personachat",
    suffixes=SUFFIXES,
    sniff=_is_personachat,
    sniff_line=lambda line: FIRST.match(line) is not None,
)
def personachat(path: Source, skipped: Counter[str]) -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory; the module describes the formats."""
    for file in files(path, SUFFIXES):
        if isinstance(file, Path) and file.suffix.lower() == ".txt":
            yield from _text(file)
        else:
            yield from _json(file, skipped)


def _json(file: Source, skipped: Counter[str]) -> Iterator[Dialogue]:
    personality, history, reply, number = "", list[str](), "", 0
    for _, record in records(file, "personality and utterances"):
        for entry in _entries(record):
            found = _last(entry)
            if found is None:
                skipped["without personality, history and candidates"] += 1
                continue
            grown = len(found[1]) > len(history) and found[1][: len(history)] == history
            if history and not (grown and found[0] == personality):
                yield _talk(personality or file.stem, f"{file.stem}:{number}", [*history, reply])
                number += 1
            personality, history, reply = found
    if history:
        yield _talk(personality or file.stem, f"{file.stem}:{number}", [*history, reply])


def _entries(record: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the entries of all splits in a record, or the record if it is an entry."""
    if "personality" in record:
        yield record
    else:
        for split in record.values():
            yield from split if isinstance(split, list) else [split]


def _last(entry: Any) -> tuple[str, list[str], str] | None:
    """Return the personality, the longest history and the reply to it; None if an entry is in another form."""
    try:
        last = entry["utterances"][-1] if "utterances" in entry else entry
        personality, history, reply = entry["personality"], last["history"], last["candidates"][-1]
    except (IndexError, KeyError, TypeError):
        return None
    known = isinstance(personality, list) and isinstance(history, list) and history != []
    if not known or not all(isinstance(text, str) for text in (*personality, *history, reply)):
        return None
    return " ".join(sorted(personality)), history, reply


def _talk(task_id: str, name: str, texts: list[str]) -> Dialogue:
    """Return a dialogue of alternating speakers in which the bot speaks last."""
    turns = alternating(texts, first=("user", "bot")[len(texts) % 2])
    return dialogue(task_id, name, [(who, text) for who, text in turns if text != SILENCE], {"bot": "bot"})


def _text(file: Path) -> Iterator[Dialogue]:
    personas: dict[str, list[str]] = {"your": [], "partner's": []}
    texts: list[str] = []
    previous, first = 0, 1

    def talk() -> Dialogue:
        persona = " ".join(sorted(personas["your"] or personas["partner's"]))
        return _talk(persona or file.stem, f"{file.stem}:{first}", texts)

    for number, line in enumerate(text_of(file).split("\n"), 1):
        if not line.strip():
            continue
        if (parts := LINE.fullmatch(line.rstrip("\r"))) is None:
            raise DataError(
                f"{file}:{number}: must begin with a number and a space, got {line[:20]!r}: remove the line"
            )
        if int(parts[1]) <= previous:
            yield talk()
            personas, texts, first = {"your": [], "partner's": []}, [], number
        previous = int(parts[1])
        said, *replies = parts[2].replace("\\n", "\n").split("\t")
        if replies:
            texts += [said, replies[0]]
        elif persona := PERSONA.fullmatch(said):
            personas[persona[1]].append(persona[2])
    if previous:
        yield talk()
