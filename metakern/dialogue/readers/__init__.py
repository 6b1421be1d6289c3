"""Read conversations of any known format as tasks, turns and speakers.

A `Dialogue` is one conversation of one task (a topic, a speaker, a service).  `meta["bot"]` names the speaker whose
turns a model learns to produce.  A reader is one function in one file of this package:

    @reader("lines", suffixes=(".txt",))
    def lines(path: Path, skipped: Counter[str]) -> Iterator[Dialogue]: ...

It yields dialogues, counts in `skipped` what it leaves out and why, and raises `DataError` for a damaged file.
Every reader makes its dialogues with `dialogue`.
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

__all__ = ["READERS", "DataError", "Dialogue", "Dialogues", "Reader", "Turn", "dialogue", "read", "reader"]


class DataError(ValueError):
    """Input that cannot be used: one line that names the file, the line in it where there is one, and the cure."""


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
    sniff: Callable[[str], bool]
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
    sniff: Callable[[str], bool] = lambda head: True,
    package: str = "",
    data: str = "",
    variant: str = "",
) -> Callable[[Callable[..., Iterator[Dialogue]]], Callable[..., Iterator[Dialogue]]]:
    """Register a reader.

    suffixes, sniff   a file is of this format if its name ends so and `sniff(its first 4,096 characters)` holds
    package, data     the package that holds data in this format, and the path inside it
    variant           the option that the `x` of the source `"name:x"` sets
    """

    def register(load: Callable[..., Iterator[Dialogue]]) -> Callable[..., Iterator[Dialogue]]:
        READERS[name] = Reader(name, load, suffixes, sniff, package, data, variant)
        return load

    return register


def read(source: str, format: str = "auto", **options: Any) -> Dialogues:
    """Read dialogues from packaged data or from a file or directory.

    source    `"chitchat"`, `"chitchat:senders"`, `"chatterbot"`, `"chatterbot:english"`, …, or a path (`"./chitchat"`
              for one that has such a name)
    format    a name of `READERS`, or `"auto"`: by the name and the beginning of the file
    options   those of the format's reader

    Returns a list whose `summary()` tells what was skipped.  Raises `DataError`.

    >>> len({d.task_id for d in read("chatterbot:english")}) > 10
    True
    """
    if format != "auto" and format not in READERS:
        raise DataError(f"read: format must be one of {', '.join(READERS)}, got {format!r}{_closest(format)}")
    name, _, variant = source.partition(":")
    path = Path(source)
    if name in READERS and READERS[name].package and format in ("auto", name):
        chosen = READERS[name]
        path = chosen.packaged()
        if variant:
            options = {chosen.variant: variant, **options}
    elif not os.path.exists(source):  # not Path.exists, which raises where a name is too long to be a file's
        raise DataError(f"{source}: no such file or directory, nor packaged data{_closest(name)}")
    else:
        chosen = READERS[format] if format != "auto" else _recognize(path)

    skipped: Counter[str] = Counter()
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
        text = text.encode("utf-8", "replace").decode("utf-8").strip()
        if text and merged and merged[-1].speaker == speaker:
            merged[-1] = Turn(speaker, f"{merged[-1].text}\n{text}")
        elif text:
            merged.append(Turn(speaker, text))
    return Dialogue(task_id, dialogue_id, tuple(merged), meta or {})


def words(text: str) -> tuple[str, ...]:
    """The words that make two texts the same: no case, no punctuation; a Chinese or Japanese character is a word.

    >>> words("What is A.I.?"), words("你好吗?")
    (('what', 'is', 'a', 'i'), ('你', '好', '吗'))
    """
    return tuple(re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+", text.casefold()))


def files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file itself, or a directory's files of these suffixes in a fixed order."""
    if not path.is_dir():
        return [path]
    found = sorted((p for p in path.rglob("*") if p.suffix in suffixes), key=lambda p: p.as_posix())
    if not found:
        raise DataError(f"{path}: must hold files that end in {' or '.join(suffixes)}, got none")
    return found


def text_of(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise DataError(
            f"{path}:{line}: must be UTF-8, got byte 0x{byte:02x}: convert it with iconv -t utf-8"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def json_of(text: str, path: Path, first_line: int = 1) -> Any:
    """The JSON value in `text`, which begins at a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        where = f"{path}:{line}: must be JSON, got {error.msg} at column {error.colno}"
        raise DataError(f"{where}: the file may be cut short; fetch it again or remove the line") from None
    except (RecursionError, ValueError):  # brackets or digits by the thousand
        raise DataError(f"{path}:{first_line}: must be JSON of moderate depth, got one that Python refuses") from None


def _recognize(path: Path) -> Reader:
    for candidate in sorted({p.suffix for p in path.rglob("*")}) if path.is_dir() else [path.suffix]:
        matching = [r for r in READERS.values() if candidate in r.suffixes]
        if not matching:
            continue
        head = text_of(files(path, (candidate,))[0])[:4096]
        for chosen in matching:
            if chosen.sniff(head):
                return chosen
    raise DataError(f"{path}: of no known format: name one of {', '.join(READERS)}")


def count_of(skipped: Mapping[str, int]) -> str:
    """What was left out: each count and its reason."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))


def _closest(name: str) -> str:
    near = get_close_matches(name, READERS, n=1)
    return f"; did you mean {near[0]}?" if near else f" (known: {', '.join(READERS)})"


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
