"""Read conversations of any known format into tasks, turns and speakers.

A `Dialogue` is one conversation, which belongs to one task (a topic, a speaker, a service). `meta["bot"]` names the
speaker whose turns a model learns to produce. A reader is one function in one file of this package:

    @reader("lines", suffixes=(".txt",))
    def lines(path: Path, skipped: Counter[str]) -> Iterator[Dialogue]: ...

It yields dialogues, counts in `skipped` what it leaves out, by reason, and raises `DataError` for a damaged file. It
makes dialogues with `dialogue`, and a reader of JSON takes records from `records`.
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
BLANK = re.compile(r"[\s\ufeff]*")  # concatenated files have byte order marks inside


@dataclass(frozen=True)
class Turn:
    """What one speaker says before another one speaks.

    Attributes:
        speaker: A name. "system" and "tool" stand for instructions, which no model learns.
        text: Not empty, and without white space at its ends, if `dialogue` made it.

    >>> Turn("ann", "hi").text
    'hi'
    """

    speaker: str
    text: str


@dataclass(frozen=True)
class Dialogue:
    """One conversation, which belongs to one task.

    Attributes:
        task_id: The name of the task.
        dialogue_id: The name of the conversation within its source.
        turns: The turns, oldest first; the readers never put two turns of one speaker in a row.
        meta: Further facts. `meta["bot"]` is the speaker whose turns a model learns; without it, the bot is the speaker
            named bot or assistant, otherwise the second to speak.

    >>> Dialogue("greetings", "1", (Turn("ann", "hi"), Turn("bob", "hello")), {"bot": "bob"}).turns[1].speaker
    'bob'
    """

    task_id: str
    dialogue_id: str
    turns: tuple[Turn, ...]
    meta: Mapping[str, str] = field(default_factory=dict)


class Dialogues(list[Dialogue]):
    """The list of dialogues that `read` found in `source`; `skipped` counts what it left out, by reason.

    `source` says so if the dialogues are synthetic.
    """

    def __init__(self, items: Iterable[Dialogue], source: str, skipped: Mapping[str, int]) -> None:
        super().__init__(items)
        self.source, self.skipped = source, skipped

    def summary(self) -> str:
        """Return one line for the user: how many dialogues and tasks there are, and what was skipped.

        >>> Dialogues([], "talk.jsonl", {"with fewer than 2 turns": 3}).summary()
        'talk.jsonl: 0 dialogues of 0 tasks; skipped 3 (3 with fewer than 2 turns)'
        """
        line = f"{self.source}: {len(self)} dialogues of {len({d.task_id for d in self})} tasks"
        return line + (f"; skipped {sum(self.skipped.values())} ({count_of(self.skipped)})" if self.skipped else "")


@dataclass(frozen=True)
class Reader:
    """A format: how to recognize and read it, and where a package has data in it; the fields are as in `reader`."""

    name: str
    load: Callable[..., Iterator[Dialogue]]
    suffixes: tuple[str, ...]
    sniff: Callable[[Mapping[str, Any]], bool] | None
    package: str
    data: str
    synthetic: bool
    variant: str

    def packaged(self) -> Path:
        """Return the path of the packaged data, which is found without importing the package.

        The path is empty if the data is synthetic.

        Raises:
            DataError: If the package is missing.
        """
        if self.synthetic:
            return Path()
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
    synthetic: bool = False,
    variant: str = "",
) -> Callable[[Callable[..., Iterator[Dialogue]]], Callable[..., Iterator[Dialogue]]]:
    """Return a decorator that registers a function as the reader of a format.

    The function is called with a path, a counter `skipped` and options by keyword, and yields dialogues.

    Args:
        name: The name of the format.
        suffixes: What the names of files in this format end in, in lower case, such as ".json".
        sniff: Returns whether a JSON record is of this format, to tell it from others with the same suffixes. None if
            the suffixes suffice.
        package: A Python package that holds data in this format, so that `read(name)` reads them; "" if there is none.
        data: The path of the data inside the package.
        synthetic: Whether the function makes up its dialogues, so that `read(name)` needs no package. It then ignores
            the path that it is called with.
        variant: The option of the function that is set to `x` for the source `"name:x"`.

    >>> @reader("lines", suffixes=(".lines",))
    ... def lines(path, skipped):
    ...     for number, line in enumerate(text_of(path).splitlines()):
    ...         yield dialogue("talk", str(number), enumerate(line.split("|")))
    >>> READERS.pop("lines").suffixes
    ('.lines',)
    """

    def register(load: Callable[..., Iterator[Dialogue]]) -> Callable[..., Iterator[Dialogue]]:
        READERS[name] = Reader(name, load, suffixes, sniff, package, data, synthetic, variant)
        return load

    return register


def read(source: str, format: str = "auto", **options: Any) -> Dialogues:
    """Read dialogues from packaged data, or from a file or directory.

    Args:
        source: Packaged data by name ("chitchat", "chitchat:subjects", "chitchat:senders", "chatterbot",
            "chatterbot:english", …; "bots" and "bots:SEED" are synthetic) or a path. A path that has the name of
            packaged data is written "./chitchat".
        format: "messages", "sharegpt", "chitchat" or "chatterbot". "auto" recognizes the format by the suffix of a
            file and by its first record of a known kind.
        options: The options of the format's reader, such as `task_key` of "messages".

    Returns:
        A list of dialogues with two turns or more. Its `summary()` says how many others were skipped and why.

    Raises:
        DataError: If `format` is unknown, there is no such source, a file is damaged or of no known format, or no
            dialogue is left.

    >>> len({d.task_id for d in read("chatterbot:english")}) > 10
    True
    """
    if format != "auto" and format not in READERS:
        raise DataError(f"read: format must be one of {_formats()}, got {format!r}{_closest(format)}")
    name, _, variant = source.partition(":")
    path = Path(source)
    skipped: Counter[str] = Counter()
    if name in READERS and (READERS[name].package or READERS[name].synthetic) and format in ("auto", name):
        chosen = READERS[name]
        path = chosen.packaged()
        if variant:
            options = {chosen.variant: variant, **options}
    elif not os.path.exists(source):  # not Path.exists, which raises where a name is too long to be a file's
        raise DataError(f"{source}: no such file or directory, nor packaged data{_closest(name)}")
    else:
        chosen = READERS[format] if format != "auto" else _recognize(path)
        if chosen.synthetic:
            raise DataError(f"{source}: no file is in the format {format}, whose data is synthetic: read {format!r}")
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
    return Dialogues(found, f"{source} (synthetic)" if chosen.synthetic else source, dict(skipped))


def dialogue(
    task_id: str, dialogue_id: str, turns: Iterable[tuple[str, str]], meta: Mapping[str, str] | None = None
) -> Dialogue:
    """Return a dialogue of `(speaker, text)` pairs.

    White space at the ends of texts is removed, and empty texts are dropped. Texts of one speaker in a row become one
    turn, with line breaks between them.

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
    """Return a text with ? in the place of each lone surrogate, which JSON may hold and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode("utf-8")


def files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the file `path`, or the files with these suffixes below the directory `path`, sorted, without hidden ones.

    Raises:
        DataError: If a directory holds none.
    """
    if not path.is_dir():
        return [path]
    found = [p for p in _visible(path) if p.suffix.lower() in suffixes]
    if not found:
        raise DataError(f"{path}: must hold files that end in {' or '.join(suffixes)}, got none")
    return found


def _visible(path: Path) -> list[Path]:
    """Return the files below a directory, sorted, without hidden ones (.DS_Store, ._talk.json, .git/…)."""
    found = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
    return sorted((p for p in found if p.is_file()), key=lambda p: p.as_posix())


def text_of(path: Path) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises:
        DataError: If the file can't be read, is compressed or is not UTF-8.
    """
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
    """Return the JSON value in the text of a file; floating-point numbers and NaN become strings, as they are written.

    Raises:
        DataError: If the text is not one JSON value, or an object has a key twice.
    """
    value, end = _decode(text, _after_blank(text, 0), path)
    _must_end(text, end, path)
    return value


def records(path: Path, key: str = "messages") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the JSON objects of a file, each with a number.

    The objects are the items of one array, numbered from 1, or stand one after the other, each on a line or over
    several, numbered by the line at which they begin.

    Args:
        path: The file.
        key: What each object should have, for the error message if one is not an object.

    Raises:
        DataError: If the file can't be read, is not JSON, or holds something else than objects.
    """
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
    """A JSON object has a key twice; `json` would drop the first one silently."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedKeyError(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=str, parse_constant=str)


def _decode(text: str, at: int, path: Path, on_one_line: bool = False) -> tuple[Any, int]:
    """Return the JSON value that begins at the position `at`, and the position after it.

    `on_one_line` says that the value should end on its line. An error is then reported there, not on a later line.
    """
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
    except (RecursionError, ValueError):  # thousands of nested brackets, or of digits in a number
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
    """Return the reader of a file, or of the first file below a directory that has a reader."""
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
        text_of(path)  # raises a clearer error if the file is not text
    raise DataError(f"{path}: must be in a known format, got another: set format to one of {_formats()}")


def _formats() -> str:
    """Return the names of the formats that files can be in."""
    return ", ".join(name for name, known in READERS.items() if not known.synthetic)


def count_of(skipped: Mapping[str, int]) -> str:
    """Return what was left out, as text: each count with its reason."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))


def _closest(name: str) -> str:
    near = get_close_matches(name, READERS, n=1)
    return f"; did you mean {near[0]}?" if near else f" (known: {', '.join(READERS)})"


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
