"""Conversations that stay in their files. Memory holds where the line of each begins, and hashes of its texts.

A file, or each of the files of a directory, holds a JSON record on each line. Its lines are read once, to find the
tasks and the texts that a split compares. Later a line is read again whenever its dialogue is drawn. What is drawn does
not depend on where dialogues are held, so a run is the same as one with all of them in memory.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Set
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any

from metakern.dialogue.readers import READERS, Dialogue, Dialogues, Rows, Turn
from metakern.dialogue.sources import JSON, files, json_of
from metakern.errors import DataError

__all__ = ["Line", "stream"]

DIGEST = 8  # bytes of the hash of a text


class Hashes(Set[Hashable]):
    """A small set of hashes, which are held as one string of bytes."""

    __slots__ = ("_data",)

    def __init__(self, texts: Iterable[Hashable]) -> None:
        self._data = b"".join({blake2b(repr(text).encode(), digest_size=DIGEST).digest() for text in texts})

    def __contains__(self, item: object) -> bool:
        return item in list(self)

    def __iter__(self) -> Iterator[bytes]:
        return (self._data[i : i + DIGEST] for i in range(0, len(self._data), DIGEST))

    def __len__(self) -> int:
        return len(self._data) // DIGEST

    @classmethod
    def _from_iterable(cls, items: Iterable[Any]) -> set[Any]:
        return set(items)  # what the operators of sets return


class Line(Dialogue):
    """A dialogue on a line of a file; its turns are read whenever they are asked for, so ask once.

    Attributes:
        task_id: As of `Dialogue`.
        meta: The `group` of its task, if it has one.
        speakers: The names of all speakers.
        hashes: Those of the texts by which dialogues overlap.
        shards: The files.
        at: The position of the line in bytes, as if all files were one.
    """

    __slots__ = ("at", "hashes", "shards", "speakers")
    at: int
    hashes: Hashes
    shards: Shards
    speakers: frozenset[str]

    def __init__(
        self, task_id: str, meta: Mapping[str, str], speakers: frozenset[str], hashes: Hashes, shards: Shards, at: int
    ) -> None:
        fields = {"task_id": task_id, "dialogue_id": "", "meta": meta, "speakers": speakers}
        for name, value in (fields | {"hashes": hashes, "shards": shards, "at": at}).items():
            object.__setattr__(self, name, value)

    @property
    def turns(self) -> tuple[Turn, ...]:
        return self.read().turns

    def read(self) -> Dialogue:
        """Return the dialogue with its turns in memory.

        Raises:
            DataError: If the file has changed.
        """
        return self.shards.dialogue(self.at)


class Shards:
    """Files with a record on each line, and the reader of their format."""

    def __init__(self, paths: list[Path], format: str, options: Mapping[str, Any]) -> None:
        self.paths, self._load, self._options = paths, READERS[format].load, options
        self._changed = [path.stat().st_mtime_ns for path in paths]
        self.begins = [0, *accumulate(path.stat().st_size for path in paths)]

    def dialogues(self, skipped: Counter[str]) -> Iterator[tuple[int, Dialogue]]:
        """Yield the dialogues, each with the position of its line in bytes, as if all files were one.

        Raises:
            DataError: If a line is not a record of one dialogue.
        """
        for path, begin in zip(self.paths, self.begins, strict=False):
            at = begin
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    found = self._of(line, path, number, skipped)
                    if len(found) > 1:
                        raise DataError(f"{path}:{number}: must hold one dialogue to be streamed, got {len(found)}")
                    yield from ((at, dialogue) for dialogue in found)
                    at += len(line)

    def dialogue(self, at: int) -> Dialogue:
        """Return the dialogue of the line that begins at a position.

        Raises:
            DataError: If the file has changed or can't be read.
        """
        i = bisect_right(self.begins, at) - 1
        try:
            with self.paths[i].open("rb") as file:
                if os.fstat(file.fileno()).st_mtime_ns != self._changed[i]:
                    raise ValueError
                file.seek(at - self.begins[i])
                (found,) = self._of(file.readline(), self.paths[i], 0, Counter())
        except (OSError, ValueError):
            raise DataError(f"{self.paths[i]}: must stay as it is while it is streamed, but has changed") from None
        return found

    def _of(self, line: bytes, path: Path, number: int, skipped: Counter[str]) -> list[Dialogue]:
        """Return the dialogues of a line."""
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise DataError(f"{path}:{number}: must be UTF-8: convert it with iconv -t utf-8") from None
        if not text:
            return []
        try:
            record = json_of(text, path)
        except DataError as error:
            raise DataError(str(error).replace(f"{path}:1:", f"{path}:{number}:")) from None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: must be an object on each line, got {type(record).__name__}")
        rows = Rows([record])
        rows.stem = path.stem
        return list(self._load(rows, skipped, **self._options))


def stream(path: str | Path, format: str, texts: Callable[[Dialogue], Iterable[Hashable]], **options: Any) -> Dialogues:
    """Return a `Line` for each dialogue of JSON files that holds a reply of its bot.

    Args:
        path: A file, or a directory of files.
        format: The name of the format, whose records must be dialogues: "messages" or "sharegpt".
        texts: Returns the texts by which a dialogue overlaps others.
        options: Those of the reader.

    Raises:
        DataError: If a file can't be read, or a line is not a record.
    """
    if format not in READERS or READERS[format].sniff is None:
        raise DataError(f"stream: format must be messages or another one of JSON records, got {format!r}")
    skipped: Counter[str] = Counter()
    held: dict[Any, Any] = {}  # equal names and sets are in memory once
    lines = []
    try:
        shards = Shards(files(Path(path), JSON), format, options)
        for at, dialogue in shards.dialogues(skipped):
            speakers = frozenset(turn.speaker for turn in dialogue.turns)
            if len(dialogue.turns) < 2 or dialogue.meta.get("bot") not in speakers:
                skipped["with fewer than 2 turns or without a reply of the bot"] += 1
                continue
            group = dialogue.meta.get("group", "")
            meta = held.setdefault(("group", group), {"group": group} if group else {})
            task_id, speakers = (held.setdefault(value, value) for value in (dialogue.task_id, speakers))
            lines.append(Line(task_id, meta, speakers, Hashes(texts(dialogue)), shards, at))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None
    if not lines:
        raise DataError(f"{path}: must hold a dialogue, got none")
    return Dialogues(lines, str(path), skipped)
