"""Read conversations of any known format into tasks, turns and speakers.

A `Dialogue` is one conversation, which belongs to one task (a topic, a speaker, a service). `meta["bot"]` names the
speaker whose turns a model learns to produce. A reader is one function in one file of this package:

    @reader("lines", suffixes=(".txt",))
    def lines(path: Path, skipped: Counter[str]) -> Iterator[Dialogue]: ...

It yields dialogues, counts in `skipped` what it leaves out, by reason, and raises `DataError` for a damaged file. It
makes dialogues with `dialogue`; a reader of JSON takes records from `records`, and a reader of CSV takes rows from
`table` or `cells`. The further arguments of the function are the options of the reader.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from metakern.dialogue.sources import (
    JSON,
    Rows,
    Source,
    cells,
    files,
    first_line,
    json_of,
    records,
    table,
    text_of,
    visible,
)
from metakern.dialogue.words import words
from metakern.errors import DataError

__all__ = [
    "READERS",
    "Dialogue",
    "Dialogues",
    "Reader",
    "Rows",
    "Source",
    "Turn",
    "UnreadableError",
    "alternating",
    "cells",
    "dialogue",
    "files",
    "first_line",
    "json_of",
    "read",
    "reader",
    "records",
    "spoken",
    "table",
    "text_of",
    "words",
]


LONGEST = 100_000  # characters of a turn


@dataclass(frozen=True)
class Turn:
    """What one speaker says before another one speaks.

    Attributes:
        speaker: A name. "system" and "tool" stand for instructions, which no model learns.
        text: Not empty, and without white space at its ends, if `dialogue` made it.
        act: The dialogue act, such as "REQUEST", or several in alphabetical order, such as "INFORM_COUNT+OFFER"; ""
            where the data has none.
        slots: The annotated slots of the text with their values, such as ("city", "San Jose").

    >>> Turn("ann", "hi").text
    'hi'
    """

    speaker: str
    text: str
    act: str = ""
    slots: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One conversation, which belongs to one task.

    Attributes:
        task_id: The name of the task.
        dialogue_id: The name of the conversation within its source.
        turns: The turns, oldest first; the readers never put two turns of one speaker in a row.
        meta: Further facts. `meta["bot"]` is the speaker whose turns a model learns; without it, the bot is the speaker
            named bot or assistant, otherwise the second to speak. `meta["group"]` is what the task has in common with
            others, such as a domain or a language: tasks of one group must stay on one side of a split. Without it, a
            task is a group of its own.

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


class UnreadableError(ValueError):
    """A part of a record, such as its turns, is not in the form that its format has."""


@dataclass(frozen=True)
class Reader:
    """A format: how to recognize and read it, and where a package has data in it; the fields are as in `reader`."""

    name: str
    load: Callable[..., Iterator[Dialogue]]
    suffixes: tuple[str, ...]
    sniff: Callable[[Mapping[str, Any]], bool] | None
    sniff_line: Callable[[str], bool] | None
    package: str
    data: str
    synthetic: bool
    variant: str

    @property
    def options(self) -> list[str]:
        """The names of the reader's options: the arguments after the path and `skipped`."""
        return list(inspect.signature(self.load).parameters)[2:]

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
    sniff_line: Callable[[str], bool] | None = None,
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
        sniff: Returns whether a JSON record is of this format, to tell it from others with the same suffixes.
        sniff_line: Returns whether a line is the first one of a text file in this format. A format with neither `sniff`
            nor `sniff_line` is recognized by its suffixes, if there is no file of another format.
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
        READERS[name] = Reader(name, load, suffixes, sniff, sniff_line, package, data, synthetic, variant)
        return load

    return register


def read(source: str | Iterable[Mapping[str, Any]], format: str = "auto", **options: Any) -> Dialogues:
    """Read dialogues from packaged data, from a file or directory, or from the rows of a dataset.

    Args:
        source: Packaged data by name ("chitchat", "chitchat:subjects", "chitchat:senders", "chatterbot",
            "chatterbot:english", …; "bots" and "bots:SEED" are synthetic) or a path. A path that has the name of
            packaged data is written "./chitchat". Or an iterable of dictionaries, such as a `datasets.Dataset`, which
            are read like the records of a JSON file.
        format: "chatterbot", "chitchat", "crosswoz", "csv", "dailydialog", "empathetic", "intents", "messages",
            "metalwoz", "multiwoz", "parlai", "personachat", "sgd", "sharegpt", "star", "taskmaster" or "ubuntu". "auto"
            recognizes the format by the suffix of a file and by its first line or record of a known kind.
        options: The options of the format's reader, such as `task_key` of "messages".

    Returns:
        A list of dialogues with two turns or more, none of which has more than 100,000 characters. Its `summary()` says
        how many others were skipped and why.

    Raises:
        DataError: If `format` or an option is unknown, there is no such source, a file is damaged or of no known
            format, or no dialogue is left.

    >>> len({d.task_id for d in read("chatterbot:english")}) > 10
    True
    """
    if format != "auto" and format not in READERS:
        raise DataError(f"read: format must be one of {', '.join(formats())}, got {format!r}{_closest(format)}")
    if isinstance(source, str):
        where, (chosen, path, variant) = source, _find(source, format)
        options = variant | options
    else:
        path = _rows(source)
        where, chosen = str(path), READERS[format] if format != "auto" else _recognize(path)
        if chosen.sniff is None:
            raise DataError(f"{chosen.name}: must be read from a file or directory, got rows in memory")
    if unknown := [option for option in options if option not in chosen.options]:
        known = ", ".join(chosen.options) or "(none)"
        raise DataError(f"{chosen.name}: options of the reader must be among {known}, got {unknown[0]!r}")
    skipped: Counter[str] = Counter()
    if isinstance(path, Path) and path.is_dir() and not chosen.synthetic:
        others = sum(p.suffix.lower() not in chosen.suffixes for p in visible(path))
        skipped.update({f"files that do not end in {' or '.join(chosen.suffixes)}": others} if others else {})

    found: list[Dialogue] = []
    for item in chosen.load(path, skipped, **options):
        if len(item.turns) < 2:
            skipped["with fewer than 2 turns"] += 1
        elif max(len(turn.text) for turn in item.turns) > LONGEST:
            skipped[f"with a turn of more than {LONGEST:,} characters"] += 1
        else:
            found.append(item)
    if not found:
        raise DataError(f"{where}: must hold a dialogue, got {count_of(skipped) or 'an empty file'}")
    return Dialogues(found, f"{where} (synthetic)" if chosen.synthetic else where, dict(skipped))


def _find(source: str, format: str) -> tuple[Reader, Source, dict[str, Any]]:
    """Return the reader and the path of packaged data or of a file or directory, and the option after a colon."""
    name, _, variant = source.partition(":")
    if name in READERS and (READERS[name].package or READERS[name].synthetic) and format in ("auto", name):
        found = READERS[name]
        return found, found.packaged(), {found.variant: variant} if variant else {}
    if not os.path.exists(source):  # not Path.exists, which raises where a name is too long to be a file's
        raise DataError(f"{source}: no such file or directory, nor packaged data{_closest(name)}")
    found = READERS[format] if format != "auto" else _recognize(Path(source))
    if found.synthetic:
        raise DataError(f"{source}: no file is in the format {format}, whose data is synthetic: read {format!r}")
    return found, Path(source), {}


def _rows(source: Iterable[Any]) -> Rows:
    if isinstance(source, Mapping):
        splits = ", ".join(map(str, source))
        raise DataError(f"read: source must be one split of a dataset, got a dictionary of {splits}: choose one")
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        raise DataError(f"read: source must be a text or rows, got {type(source).__name__}")
    return Rows(source)


def dialogue(
    task_id: str, dialogue_id: str, turns: Iterable[tuple[str, str]], meta: Mapping[str, str] | None = None
) -> Dialogue:
    """Return a dialogue of `(speaker, text)` pairs.

    White space at the ends of texts is removed, and empty texts are dropped. Texts of one speaker in a row become one
    turn, with line breaks between them.

    >>> dialogue("greetings", "1", [("ann", " hi\\n"), ("ann", "you"), ("bob", " "), ("bob", "hello")]).turns[0].text
    'hi\\nyou'
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


def alternating(texts: Sequence[str], first: str = "user") -> list[tuple[str, str]]:
    """Return `(speaker, text)` pairs of "user" and "bot" in turn, of whom `first` begins.

    >>> alternating(["Hi", "Hello"], first="bot")
    [('bot', 'Hi'), ('user', 'Hello')]
    """
    speakers = ("user", "bot") if first == "user" else ("bot", "user")
    return [(speakers[i % 2], text) for i, text in enumerate(texts)]


def spoken(turns: Any, speaker: str, text: str, names: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """Return the `(speaker, text)` pairs of the turns of a record.

    Args:
        turns: A list of objects, or an object of lists, as the package datasets makes of it.
        speaker: The key of the speaker in a turn.
        text: The key of the text in a turn.
        names: The speakers by what they are called in a turn, in lower case. None keeps what they are called there.

    Raises:
        UnreadableError: If `turns` are something else, or a turn has no text or no speaker in `names`.

    >>> spoken([{"who": "SYSTEM", "said": "Hi"}], "who", "said", {"system": "bot"})
    [('bot', 'Hi')]
    """
    if isinstance(turns, dict) and all(isinstance(column, list) for column in turns.values()):
        turns = [dict(zip(turns, row, strict=False)) for row in zip(*turns.values(), strict=False)]
    if not isinstance(turns, list):
        raise UnreadableError
    found = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get(text), str) or turn.get(speaker) is None:
            raise UnreadableError
        name = str(turn[speaker])
        if names is not None and (name := names.get(name.strip().lower(), "")) == "":
            raise UnreadableError
        found.append((name, turn[text]))
    return found


def _encodable(text: str) -> str:
    """Return a text with ? in the place of each lone surrogate, which JSON may hold and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _recognize(path: Source) -> Reader:
    """Return the reader of a file or of rows, or of the first file below a directory that one recognizes.

    A file of a directory that can't be read matters only if no file is recognized; then its error is raised.
    """
    unknown = DataError(f"{path}: must be in a known format, got another: set format to one of {', '.join(formats())}")
    if isinstance(path, Rows):
        if found := _by_record(path, list(READERS.values())):
            return found
        raise unknown
    empty, errors, by_suffix = [], list[DataError](), list[Reader]()
    for file in visible(path) if path.is_dir() else [path]:
        matching = [candidate for candidate in READERS.values() if file.suffix.lower() in candidate.suffixes]
        by_suffix += [candidate for candidate in matching if not candidate.sniff and not candidate.sniff_line]
        try:
            line = first_line(file) if matching else ""
            for candidate in matching:
                if candidate.sniff_line and candidate.sniff_line(line):
                    return candidate
            is_json = line.startswith("{") or file.suffix.lower() in JSON
            if is_json and matching and (found := _by_record(file, matching)):
                return found
            empty += [not line] if matching else []
        except DataError as error:
            errors.append(error)
    if by_suffix:
        return by_suffix[0]
    if errors:
        raise errors[0]
    if empty and all(empty):
        raise DataError(f"{path}: must hold a dialogue, got an empty file")
    if not path.is_dir():
        text_of(path)  # raises a clearer error if the file is not text
    raise unknown


def _by_record(source: Source, candidates: Sequence[Reader]) -> Reader | None:
    """Return the reader that recognizes the first record of a known kind."""
    for _, record in records(source):
        for candidate in candidates:
            if candidate.sniff and candidate.sniff(record):
                return candidate
    return None


def formats() -> list[str]:
    """Return the names of the formats that files can be in."""
    return [name for name, known in READERS.items() if not known.synthetic]


def count_of(skipped: Mapping[str, int]) -> str:
    """Return what was left out, as text: each count with its reason."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))


def _closest(name: str) -> str:
    near = get_close_matches(name, READERS, n=1)
    return f"; did you mean {near[0]}?" if near else f" (known: {', '.join(READERS)})"


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
