"""The chatterbot-corpus package, and any files of its format: questions and answers by topic in 28 languages (BSD).

    data/<language>/<topic>.yml: {"categories": [...], "conversations": [[question, answer, ...], ...]}

A task is a topic of a language.  Most questions come several times with different answers; only the first one is kept,
since the same question on both sides would leak from support to query.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metakern.dialogue.readers import DataError, Dialogue, dialogue, files, reader, text_of
from metakern.dialogue.words import words

__all__ = ["chatterbot"]


@reader(
    "chatterbot",
    suffixes=(".yml", ".yaml"),
    package="chatterbot_corpus",
    data="data",
    variant="language",
)
def chatterbot(path: Path, skipped: Counter[str], *, language: str = "") -> Iterator[Dialogue]:
    """Yield the dialogues of one language, or of all; see the module."""
    if language:
        known = sorted(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
        if language not in known:
            raise DataError(f"{path}: language must be one of {', '.join(known) or '(none)'}, got {language}")
        path = path / language
    for file in files(path, (".yml", ".yaml")):
        task_id, asked = f"{file.parent.name}/{file.stem}", set[tuple[str, ...]]()
        for number, conversation in enumerate(_conversations(file)):
            if not isinstance(conversation, list):
                skipped["that are not a list of turns"] += 1
                continue
            turns = ((("user", "bot")[i % 2], _text(item)) for i, item in enumerate(conversation))
            talk = dialogue(task_id, f"{task_id}/{number}", turns, {"bot": "bot"})
            question = words(talk.turns[0].text) if talk.turns else ()
            if question in asked:
                skipped["with a repeated question"] += 1
                continue
            asked.add(question)
            yield talk


def _conversations(file: Path) -> list[Any]:
    try:
        import yaml
    except ImportError:
        raise DataError("chatterbot: the package pyyaml is missing: pip install metakern[dialogue]") from None
    try:
        # The base loader leaves scalars as they are written: "Yes" stays a word and "42" does not become a number.
        data = yaml.load(text_of(file), Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise DataError(f"{file}{line}: must be YAML, got {getattr(error, 'problem', 'damaged text')}") from None
    if not isinstance(data, dict) or not isinstance(data.get("conversations"), list):
        raise DataError(f"{file}: must hold a list under the key conversations, got none")
    return data["conversations"]


def _text(item: Any) -> str:
    """An item as it was written: an unquoted "note: this" is a mapping to YAML."""
    if isinstance(item, dict):
        return " ".join(f"{key}: {_text(value)}" for key, value in item.items())
    if isinstance(item, list):
        return " ".join(_text(value) for value in item)
    return str(item)
