"""Read the package chatterbot-corpus, or files in its format: questions and answers by topic in 28 languages (BSD).

    data/<language>/<topic>.yml: {"categories": [...], "conversations": [[question, answer, ...], ...]}

A task is a topic in a language; its group is the language, in whatever script. Most questions occur several times with
different answers. Only the first one is kept, since the same question in support and query would be a leak.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

from metakern.dialogue.readers import Dialogue, dialogue, files, reader, text_of
from metakern.dialogue.words import words
from metakern.errors import DataError

__all__ = ["chatterbot"]

DEEPEST = 50  # collections inside one another
SAME = {"traditionalchinese": "chinese", "hinglish": "hindi"}  # folders of one language in another script


@reader(
    "chatterbot",
    suffixes=(".yml", ".yaml"),
    package="chatterbot_corpus",
    data="data",
    variant="language",
)
def chatterbot(path: Path, skipped: Counter[str], *, language: str = "") -> Iterator[Dialogue]:
    """Yield the dialogues of one language (a folder of `path`) or, for "", of all; the module describes the format."""
    if language:
        known = sorted(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
        if language not in known:
            raise DataError(f"{path}: language must be one of {', '.join(known) or '(none)'}, got {language}")
        path = path / language
    for file in files(path, (".yml", ".yaml")):
        task_id, asked = f"{file.parent.name}/{file.stem}", set[Hashable]()
        meta = {"bot": "bot", "group": SAME.get(file.parent.name, file.parent.name)}
        for number, conversation in enumerate(_conversations(file)):
            if not isinstance(conversation, list):
                skipped["that are not a list of turns"] += 1
                continue
            turns = ((("user", "bot")[i % 2], _text(item)) for i, item in enumerate(conversation))
            talk = dialogue(task_id, f"{task_id}/{number}", turns, meta)
            question = talk.turns and (words(talk.turns[0].text) or talk.turns[0].text)
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
    text = text_of(file)
    # The base loader leaves scalars as they are written: "Yes" does not become True, and "42" stays a text.
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        depth = 0
        for event in yaml.parse(text, loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise DataError(f"{file}: must be YAML of moderate depth, got one that is nested too deeply")
            if isinstance(event, yaml.AliasEvent):  # a few of them can stand for billions of texts
                raise DataError(f"{file}: must be YAML without aliases, got *{event.anchor}: write it out")
        document = loader(text)
        node = document.get_single_node()
        data = document.construct_document(node) if node else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise DataError(f"{file}{line}: must be YAML, got {getattr(error, 'problem', 'damaged text')}") from None
    if not isinstance(data, dict) or not isinstance(data.get("conversations"), list):
        raise DataError(f"{file}: must hold a list under the key conversations, got none")
    if node and len(data) < len(node.value):
        raise DataError(f"{file}: must have each key once, got one twice: keep one")
    return data["conversations"]


def _text(item: Any) -> str:
    """Return the text of an item as it was written; YAML takes an unquoted "note: this" for a mapping."""
    if isinstance(item, dict):
        return " ".join(f"{key}: {_text(value)}" for key, value in item.items())
    if isinstance(item, list):
        return " ".join(_text(value) for value in item)
    return str(item)
