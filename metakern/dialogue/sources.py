"""Where dialogues come from: the files of a folder, the records of JSON, the rows of CSV, rows in memory."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from metakern import io
from metakern.errors import DataError

__all__ = [
    "JSON",
    "Rows",
    "Source",
    "cells",
    "files",
    "first_line",
    "json_of",
    "records",
    "table",
    "text_of",
    "visible",
]

COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"PK\x03\x04": "unzip",
    b"\xfd7zXZ": "unxz",
    b"BZh": "bunzip2",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
LARGEST = 2**31  # bytes of a file
JSON = (".json", ".jsonl", ".ndjson")
BLANK = re.compile(r"[\s\ufeff]*")  # concatenated files have byte order marks inside


class Rows:
    """Rows in memory, which readers of JSON records take in the place of a file.

    Args:
        rows: Dictionaries, such as those of a `datasets.Dataset`. An integer in a column of class labels is replaced by
            the name of its class.

    >>> [row["label"] for row in Rows([{"label": "yes"}])]
    ['yes']
    """

    def __init__(self, rows: Iterable[Any]) -> None:
        self.stem = str(getattr(rows, "builder_name", None) or "dataset")
        columns = getattr(rows, "features", None) or {}
        self._classes = {name: column.names for name, column in columns.items() if hasattr(column, "names")}
        self._rows = list(rows) if isinstance(rows, Iterator) else rows

    def __iter__(self) -> Iterator[Any]:
        for row in self._rows:
            yield {**row, **self._named(row)} if self._classes else row

    def _named(self, row: Mapping[str, Any]) -> dict[str, str | None]:
        """Return the names of the row's classes; -1 stands for no class in the package datasets."""
        found = {key: row[key] for key in self._classes if isinstance(row.get(key), int)}
        return {key: self._classes[key][label] if label >= 0 else None for key, label in found.items()}

    def __str__(self) -> str:
        return self.stem


Source: TypeAlias = Path | Rows


def files(path: Source, suffixes: tuple[str, ...], *names: str) -> list[Any]:
    """Return the file or rows `path`, or the files with these suffixes below the directory `path`, without hidden ones.

    Args:
        path: A file, a directory or rows.
        suffixes: What the names of the files end in.
        names: Regular expressions of whole names. If names of files match, only the files are returned whose names
            match the first such expression.

    Returns:
        Paths, sorted, or `path` alone.

    Raises:
        DataError: If a directory holds none.
    """
    if isinstance(path, Rows) or not path.is_dir():
        return [path]
    found = [p for p in visible(path) if p.suffix.lower() in suffixes]
    if not found:
        raise DataError(f"{path}: must hold files that end in {' or '.join(suffixes)}, got none")
    return next(filter(None, ([p for p in found if re.fullmatch(name, p.name)] for name in names)), found)


def visible(path: Path) -> list[Path]:
    """Return the files below a directory, sorted, without hidden ones (.DS_Store, ._talk.json, .git/…)."""
    found = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
    return sorted((p for p in found if p.is_file()), key=lambda p: p.as_posix())


def text_of(path: Source) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises:
        DataError: If the file can't be read, is compressed, is not UTF-8, is no regular file or larger than 2 GiB, or
            `path` are rows.
    """
    if isinstance(path, Rows):
        raise DataError(f"{path}: must be a file in this format, got rows in memory")
    try:
        data = io.read(path, LARGEST)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if tool := next((tool for magic, tool in COMPRESSED.items() if data.startswith(magic)), None):
            raise DataError(f"{path}: must be text, got a compressed file: unpack it with {tool}") from None
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise DataError(
            f"{path}:{line}: must be UTF-8, got byte 0x{byte:02x}: convert it with iconv -f ENCODING -t utf-8"
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


def records(path: Source, key: str = "messages") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the JSON objects of a file, or rows, each with a number.

    The objects are the items of one array, numbered from 1, or stand one after the other, each on a line or over
    several, numbered by the line at which they begin.

    Args:
        path: The file or rows.
        key: What each object should have, for the error message if one is not an object.

    Raises:
        DataError: If the file can't be read, is not JSON, or holds something else than objects.
    """
    if isinstance(path, Rows):
        for number, row in enumerate(path, 1):
            if not isinstance(row, dict):
                raise DataError(f"{path}: row {number} must be a dictionary, got {type(row).__name__}")
            yield number, row
        return
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


def cells(path: Path, delimiter: str = ",", quoted: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each row of a CSV file, with the number of the line at which the row ends.

    Empty lines are left out. The file is read a part at a time.

    Args:
        path: The file.
        delimiter: What stands between columns.
        quoted: Texts may stand in quotation marks and then have delimiters and line breaks inside.

    Raises:
        DataError: If the file can't be read, or a quotation mark is not where it may be.
    """
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    rows = csv.reader(_lines(path, ""), delimiter=delimiter, quoting=quoting, strict=True)
    begins = 1
    try:
        for row in rows:
            begins = rows.line_num + 1  # the next row
            if row:
                yield rows.line_num, row
    except csv.Error as error:
        where = f"{path}:{begins}: must be CSV, got {error}"
        raise DataError(
            f"{where}: the file may be cut short or lack a quotation mark; fetch it again, or mend or remove the line"
        ) from None


def table(path: Path, delimiter: str = ",", quoted: bool = True) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a file whose first line names the columns, each with the number of the line at which it ends.

    Args:
        path: The file.
        delimiter: As of `cells`.
        quoted: As of `cells`.

    Raises:
        DataError: As `cells`, and if a row has fewer columns than the first line.
    """
    rows = cells(path, delimiter, quoted)
    _, columns = next(rows, (0, []))
    for number, row in rows:
        if len(row) < len(columns):
            where = f"{path}:{number}: must have {len(columns)} columns"
            raise DataError(f"{where}, got {len(row)}: the file may be cut short; fetch it again or remove the line")
        yield number, dict(zip(columns, row, strict=False))


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


def first_line(file: Path) -> str:
    """Return the first line that is not blank, without the white space at its ends."""
    lines = (line[_after_blank(line, 0) :].rstrip() for line in _lines(file, "\n"))
    return next(filter(None, lines), "")


def _lines(path: Path, newline: str) -> Iterator[str]:
    """Yield the lines of a UTF-8 file as `open` splits them with `newline`; a byte order mark is left out.

    Raises:
        DataError: As `text_of`.
    """
    try:
        with open(io.opened(path, LARGEST), encoding="utf-8-sig", newline=newline) as file:
            yield from file
    except (OSError, UnicodeDecodeError):
        text_of(path)  # raises an error that says what to do
        raise
