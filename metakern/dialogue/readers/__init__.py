"""Read conversations of any known format as tasks, turns and speakers.

A `Dialogue` is one conversation of one task (a topic, a speaker, a service).  `meta["bot"]` names the speaker whose
turns a model learns to produce.  A reader is one function in one file of this package:

    @reader("lines", suffixes=(".txt",))
    def lines(path: Path, skipped: Counter[str]) -> Iterator[Dialogue]: ...

It yields dialogues, counts in `skipped` what it leaves out and why, and raises `DataError` for a damaged file.
Every reader makes its dialogues with `dialogue`; one of JSON takes its records from `records`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from metakern.dialogue.words import words
from metakern.errors import DataError

__all__ = ["READERS", "Dialogue", "Dialogues", "Reader", "Turn", "dialogue", "read", "reader", "words"]

COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"PK\x03\x04": "unzip",
    b"\xfd7zXZ": "unxz",
    b"BZh": "bunzip2",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
BLANK = re.compile(r"[\s\ufeff]*")  # files that were put together have byte order marks inside


@dataclass(frozen=True)
class Turn:
    """What one speaker says before another speaks."""

    speaker: str
    text: str


@dataclass(frozen=True)
class Dialogue:
    """One conversation of one task; `meta["bot"]` is the speaker to be modeled."""

    task_id: str
    dialogue_id: str
    turns: tuple[Turn, ...]
    meta: Mapping[str, str] = field(default_factory=dict)


class Dialogues(list[Dialogue]):
    """What `read` found: the dialogues, and in `skipped` the count of every reason for leaving others out."""

    def __init__(self, items: Iterable[Dialogue], source: str, skipped: Mapping[str, int]) -> None:
        super().__init__(items)
        self.source, self.skipped = source, skipped

    def summary(self) -> str:
        """One line for the user.

        >>> Dialogues([], "talk.jsonl", {"with fewer than 2 turns": 3}).summary()
        'talk.jsonl: 0 dialogues of 0 tasks; skipped 3 (3 with fewer than 2 turns)'
        """
        line = f"{self.source}: {len(self)} dialogues of {len({d.task_id for d in self})} tasks"
        return line + (f"; skipped {sum(self.skipped.values())} ({count_of(self.skipped)})" if self.skipped else "")


@dataclass(frozen=True)
class Reader:
    """A format: how to recognize it, how to read it, and where a package holds data in it."""

    name: str
    load: Callable[..., Iterator[Dialogue]]
    suffixes: tuple[str, ...]
    sniff: Callable[[Mapping[str, Any]], bool] | None
    package: str
    data: str
    variant: str

    def packaged(self) -> Path:
        """The path of the packaged data, found without importing the package."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"{self.name}: the package {self.package} is missing: pip install metakern[dialogue]")
        return Path(next(iter(spec.submodule_search_locations))) / self.data


READERS: dict[str, Reader] = {}


def reader(
    name: str,
    *,
    suffixes: tuple[str, ...],
    sniff: Callable[[Mapping[str, Any]], bool] | None = None,
    package: str = "",
    data: str = "",
    variant: str = "",
) -> Callable[[Callable[..., Iterator[Dialogue]]], Callable[..., Iterator[Dialogue]]]:
    """Register a reader.

    suffixes          of the names of files in this format
    sniff             tells this format from others of these suffixes by a record of JSON
    package, data     the package that holds data in this format, and the path inside it
    variant           the option that the `x` of the source `"name:x"` sets
    """

    def register(load: Callable[..., Iterator[Dialogue]]) -> Callable[..., Iterator[Dialogue]]:
        READERS[name] = Reader(name, load, suffixes, sniff, package, data, variant)
        return load

    return register


def read(source: str, format: str = "auto", **options: Any) -> Dialogues:
    """Read dialogues from packaged data or from a file or directory.

    Args:
        source: `"chitchat"`, `"chitchat:senders"`, `"chatterbot"`, `"chatterbot:english"`, …, or a path
            (`"./chitchat"` for one that has such a name).
        format: A name of `READERS`, or `"auto"`: by the name of the file and its first record of a known kind.
        options: Those of the format's reader.

    Returns:
        A list whose `summary()` tells what was skipped.

    Raises:
        DataError: Where there is nothing to read, or what is there can't be read.

    >>> len({d.task_id for d in read("chatterbot:english")}) > 10
    True
    """
    if format != "auto" and format not in READERS:
        raise DataError(f"read: format must be one of {', '.join(READERS)}, got {format!r}{_closest(format)}")
    name, _, variant = source.partition(":")
    path = Path(source)
    skipped: Counter[str] = Counter()
    if name in READERS and READERS[name].package and format in ("auto", name):
        chosen = READERS[name]
        path = chosen.packaged()
        if variant:
            options = {chosen.variant: variant, **options}
    elif not os.path.exists(source):  # not Path.exists, which raises where a name is too long to be a file's
        raise DataError(f"{source}: no such file or directory, nor packaged data{_closest(name)}")
    else:
        chosen = READERS[format] if format != "auto" else _recognize(path)
        if others := [p for p in _visible(path) if p.suffix.lower() not in chosen.suffixes] if path.is_dir() else []:
            skipped[f"files that do not end in {' or '.join(chosen.suffixes)}"] = len(others)

    found: list[Dialogue] = []
    for item in chosen.load(path, skipped, **options):
        if len(item.turns) < 2:
            skipped["with fewer than 2 turns"] += 1
        else:
            found.append(item)
    if not found:
        raise DataError(f"{source}: must hold a dialogue, got {count_of(skipped) or 'an empty file'}")
    return Dialogues(found, source, dict(skipped))


def dialogue(
    task_id: str, dialogue_id: str, turns: Iterable[tuple[str, str]], meta: Mapping[str, str] | None = None
) -> Dialogue:
    """A dialogue of `(speaker, text)` pairs: texts stripped, empty ones dropped, a speaker's run of texts one turn.

    >>> dialogue("greetings", "1", [("ann", " hi\\n"), ("ann", "you"), ("bob", " "), ("bob", "hello")]).turns
    (Turn(speaker='ann', text='hi\\nyou'), Turn(speaker='bob', text='hello'))
    """
    merged: list[Turn] = []
    for speaker, text in turns:
        speaker, text = _encodable(speaker), _encodable(text).strip()
        if text and merged and merged[-1].speaker == speaker:
            merged[-1] = Turn(speaker, f"{merged[-1].text}\n{text}")
        elif text:
            merged.append(Turn(speaker, text))
    known = {key: _encodable(value) for key, value in (meta or {}).items()}
    return Dialogue(_encodable(task_id), _encodable(dialogue_id), tuple(merged), known)


def _encodable(text: str) -> str:
    """A text with ? for each half of a surrogate pair, which JSON may hold and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode("utf-8")


def files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file itself, or a directory's files of these suffixes in a fixed order, but for hidden ones."""
    if not path.is_dir():
        return [path]
    found = [p for p in _visible(path) if p.suffix.lower() in suffixes]
    if not found:
        raise DataError(f"{path}: must hold files that end in {' or '.join(suffixes)}, got none")
    return found


def _visible(path: Path) -> list[Path]:
    """The files below a directory, without those that a system hides (.DS_Store, ._talk.json, .git/…)."""
    found = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
    return sorted((p for p in found if p.is_file()), key=lambda p: p.as_posix())


def text_of(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if tool := next((tool for magic, tool in COMPRESSED.items() if data.startswith(magic)), None):
            raise DataError(f"{path}: must be text, got a compressed file: unpack it with {tool}") from None
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise DataError(
            f"{path}:{line}: must be UTF-8, got byte 0x{byte:02x}: convert it with iconv -t utf-8"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def json_of(text: str, path: Path) -> Any:
    """The JSON value that a file holds; numbers with a point and NaN are texts, as they are written."""
    value, end = _decode(text, _after_blank(text, 0), path)
    _must_end(text, end, path)
    return value


def records(path: Path, key: str = "messages") -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file: the items of an array by number, or one after the other, on a line each or over
    several, by the line at which they begin.  `key` is what each should have, for the error where one is no object."""
    text = text_of(path)
    at = _after_blank(text, 0)
    if array := text.startswith("[", at):
        at = _after_blank(text, at + 1)
    line, counted, number, on_one_line = 1, 0, 0, False
    while at < len(text) and not (array and text[at] == "]"):
        line, counted, number = line + text.count("\n", counted, at), at, number + 1
        value, end = _decode(text, at, path, on_one_line)
        if not isinstance(value, dict):
            raise DataError(f"{path}:{line}: must be an object with {key}, got {type(value).__name__}")
        yield number if array else line, value
        on_one_line = not array and text.find("\n", at, end) < 0
        at = _after_blank(text, end)
        if array and text.startswith(",", at):
            at = _after_blank(text, at + 1)
        elif array and not text.startswith("]", at):
            raise _damaged(json.JSONDecodeError("no comma and no bracket", text, at), path)
    if array:
        if at == len(text):
            raise _damaged(json.JSONDecodeError("no closing bracket", text, at), path)
        _must_end(text, at + 1, path)


class _RepeatedKeyError(ValueError):
    """An object that has a key twice, of which `json` would drop the first without a word."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedKeyError(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=str, parse_constant=str)


def _decode(text: str, at: int, path: Path, on_one_line: bool = False) -> tuple[Any, int]:
    """The JSON value that begins at a position, and where it ends.  `on_one_line` says that it should end on its line,
    where it is told what is wrong then, and not in the lines after it."""
    try:
        return DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        end = text.find("\n", at) if on_one_line else -1
        if end >= 0:
            _decode(text[:end], at, path)
        raise _damaged(error, path) from None
    except _RepeatedKeyError as error:
        where = f"{path}:{text.count(chr(10), 0, at) + 1}"
        raise DataError(f"{where}: must have each key once in an object, got {str(error)!r} twice: keep one") from None
    except (RecursionError, ValueError):  # brackets or digits by the thousand
        where = f"{path}:{text.count(chr(10), 0, at) + 1}"
        raise DataError(f"{where}: must be JSON of moderate depth, got one that Python refuses: remove it") from None


def _damaged(error: json.JSONDecodeError, path: Path) -> DataError:
    what = error.msg.removesuffix(" at")
    where = f"{path}:{error.lineno}: must be JSON, got {what} at column {error.colno}"
    return DataError(f"{where}: the file may be cut short; fetch it again or remove the line")


def _must_end(text: str, at: int, path: Path) -> None:
    if (at := _after_blank(text, at)) < len(text):
        raise _damaged(json.JSONDecodeError("more after the end", text, at), path)


def _after_blank(text: str, at: int) -> int:
    found = BLANK.match(text, at)
    return found.end() if found else at


def _recognize(path: Path) -> Reader:
    """The reader of a file, or of the first file of a directory that has one."""
    empty = False
    for file in _visible(path) if path.is_dir() else [path]:
        matching = [candidate for candidate in READERS.values() if file.suffix.lower() in candidate.suffixes]
        for chosen in matching:
            if chosen.sniff is None:
                return chosen
        if not matching:
            continue
        empty = True
        for _, record in records(file):
            empty = False
            for chosen in matching:
                if chosen.sniff and chosen.sniff(record):
                    return chosen
    if empty:
        raise DataError(f"{path}: must hold a dialogue, got an empty file")
    if not path.is_dir():
        text_of(path)  # a file that is no text at all has an error of its own
    raise DataError(f"{path}: of no known format: name one of {', '.join(READERS)}")


def count_of(skipped: Mapping[str, int]) -> str:
    """What was left out: each count and its reason."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))


def _closest(name: str) -> str:
    near = get_close_matches(name, READERS, n=1)
    return f"; did you mean {near[0]}?" if near else f" (known: {', '.join(READERS)})"


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
