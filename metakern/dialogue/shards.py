"""Conversations that stay in their files. Memory holds where the line of each begins, and hashes of its texts.

A file, or each of the files of a directory, holds a JSON record on each line. Its lines are read once, to find the
tasks and the texts that a split compares. Later a line is read again whenever its dialogue is drawn. What is drawn does
not depend on where dialogues are held, so a run is the same as one with all of them in memory.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Set
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from metakern.dialogue.readers import READERS, Dialogue, Dialogues, Rows, Turn
from metakern.dialogue.sources import JSON, files, json_of
from metakern.errors import DataError

__all__ = ["Line", "Seen", "stream"]

DIGEST = 8  # bytes of the hash of a text
POSITION = 8  # bytes of the position of a line


class Hashes(Set[Hashable]):
    """A small set of hashes, which are held as one string of bytes."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    @classmethod
    def of(cls, texts: Iterable[Hashable]) -> Hashes:
        """Return the hashes of texts."""
        return cls(b"".join({blake2b(repr(text).encode(), digest_size=DIGEST).digest() for text in texts}))

    def __contains__(self, item: object) -> bool:
        return item in list(self)

    def __iter__(self) -> Iterator[bytes]:
        return (self.data[i : i + DIGEST] for i in range(0, len(self.data), DIGEST))

    def __len__(self) -> int:
        return len(self.data) // DIGEST

    @classmethod
    def _from_iterable(cls, items: Iterable[Any]) -> set[Any]:
        return set(items)  # what the operators of sets return


class Seen:
    """The texts that were met so far; a hash takes 11 to 22 bytes, where Python's set takes about 90.

    Hashes stand in a table with room for up to 8/3 as many, each at the first free place from that of its value on.

    >>> seen = Seen()
    >>> seen.update(["hi", b"12345678"])
    >>> [seen.isdisjoint([text]) for text in ("hi", b"12345678", b"87654321")]
    [False, False, True]
    """

    def __init__(self) -> None:
        self._texts: set[Hashable] = set()  # what is no hash, and the hash that is 0
        self._table, self._count = array("Q", bytes(8 * 8)), 0  # 0 marks a free place

    def isdisjoint(self, texts: Iterable[Hashable]) -> bool:
        return not any(self._has(text) for text in texts)

    def update(self, texts: Iterable[Hashable]) -> None:
        for text in texts:
            if not _is_hash(text):
                self._texts.add(text)
            elif not self._table[place := self._place(number := _number(text))]:
                self._table[place] = number
                self._count += 1
                if 4 * self._count > 3 * len(self._table):
                    self._grow()

    def _has(self, text: Hashable) -> bool:
        return bool(self._table[self._place(_number(text))]) if _is_hash(text) else text in self._texts

    def _place(self, number: int) -> int:
        """Return where a number stands in the table, or would stand."""
        table, last = self._table, len(self._table) - 1
        at = number & last
        while table[at] and table[at] != number:
            at = (at + 1) & last
        return at

    def _grow(self) -> None:
        numbers, self._table = self._table, array("Q", bytes(16 * len(self._table)))
        for number in filter(None, numbers):
            self._table[self._place(number)] = number


def _is_hash(text: Hashable) -> TypeGuard[bytes]:
    return isinstance(text, bytes) and len(text) == DIGEST and any(text)


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "little")


class Shared(NamedTuple):
    """What many lines have in common."""

    task_id: str
    meta: Mapping[str, str]
    speakers: frozenset[str]
    shards: Shards


class Line(Dialogue):
    """A dialogue on a line of a file; its turns are read whenever they are asked for, so ask once.

    Attributes:
        task_id: As of `Dialogue`.
        dialogue_id: Empty.
        meta: The `group` of its task, if it has one.
        speakers: The names of all speakers.
        texts: The hashes of the texts by which dialogues overlap.
        at: The position of the line in bytes, as if all files were one.
    """

    __slots__ = ("_data", "_shared")
    _data: bytes  # the position and the hashes
    _shared: Shared

    def __init__(self, shared: Shared, texts: Hashes, at: int) -> None:
        object.__setattr__(self, "_shared", shared)
        object.__setattr__(self, "_data", at.to_bytes(POSITION, "little") + texts.data)

    @property
    def task_id(self) -> str:
        return self._shared.task_id

    @property
    def dialogue_id(self) -> str:
        return ""

    @property
    def meta(self) -> Mapping[str, str]:
        return self._shared.meta

    @property
    def turns(self) -> tuple[Turn, ...]:
        return self.read().turns

    @property
    def speakers(self) -> frozenset[str]:
        return self._shared.speakers

    @property
    def texts(self) -> Hashes:
        return Hashes(self._data[POSITION:])

    @property
    def at(self) -> int:
        return int.from_bytes(self._data[:POSITION], "little")

    def read(self) -> Dialogue:
        """Return the dialogue with its turns in memory.

        Raises:
            DataError: If the file has changed.
        """
        return self._shared.shards.dialogue(self.at)


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
    held: dict[tuple[str, str, frozenset[str]], Shared] = {}
    lines = []
    try:
        shards = Shards(files(Path(path), JSON), format, options)
        for at, dialogue in shards.dialogues(skipped):
            speakers = frozenset(turn.speaker for turn in dialogue.turns)
            if len(dialogue.turns) < 2 or dialogue.meta.get("bot") not in speakers:
                skipped["with fewer than 2 turns or without a reply of the bot"] += 1
                continue
            group = dialogue.meta.get("group", "")
            meta = {"group": group} if group else {}
            key = dialogue.task_id, group, speakers
            shared = held.setdefault(key, Shared(dialogue.task_id, meta, speakers, shards))
            lines.append(Line(shared, Hashes.of(texts(dialogue)), at))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None
    if not lines:
        raise DataError(f"{path}: must hold a dialogue, got none")
    return Dialogues(lines, str(path), skipped)
