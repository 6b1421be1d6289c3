"""Read CSV with a header: questions and answers, or the messages of conversations, one in each row.

Questions and answers, such as the export of an FAQ. Each row is a dialogue.

    question,answer,bot
    When do you open?,"At nine, on weekdays.",bakery

Messages, such as a chat log, in the order of the rows. Conversations may be mixed, as in a log that is sorted by time.

    conversation_id;role;text;topic
    17;user;Is my parcel there?;delivery
    17;agent;It comes today.;delivery

Columns have one of the names below, whatever the case, spaces and underscores, or the one that an option gives. They
are separated by commas, semicolons or tabs. The bot is who has one of the roles in `BOTS`, such as agent; if the option
`bot_speaker` is given, it is the speaker of that name and nobody else. The task is the column `task_key` or, by
default, the first of `TASKS` that is there; without any, it is the name of the file without its suffix. The column
group, if there is one, is `meta["group"]`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from metakern.dialogue.readers import Dialogue, cells, dialogue, files, first_line, reader
from metakern.dialogue.readers.messages import ROLES
from metakern.errors import DataError

__all__ = ["csv"]

SUFFIXES = (".csv", ".tsv")
TALKS = ("conversation", "dialogue", "dialog", "chat", "session", "thread", "ticket")
MESSAGES = {
    "conversation": (*(f"{name}id" for name in (*TALKS, "conv")), *TALKS),
    "speaker": ("role", "speaker", "from", "author", "sender"),
    "text": ("text", "message", "content", "utterance", "body"),
}
FAQ = {
    "question": ("question", "prompt", "ask", "query"),
    "answer": ("answer", "response", "reply", "completion"),
}
SIDES = {"question": ("user", "human"), "answer": ("bot", "assistant")}
TASKS = ("task", "taskid", "topic", "domain", "persona", "bot", "category", "department")
USERS = ("customer", "client", "visitor", "guest")
BOTS = ("agent", "operator", "support", "chatbot", *(name for name, role in ROLES.items() if role == "assistant"))


def _has_columns(line: str) -> bool:
    names = _split(line, _delimiter(line, {}))
    is_hwu = {"scenario", "intent"} <= {*names}  # `intents` reads it; other files with a category come here first
    return bool(_columns(names, {})) and not is_hwu


@reader("csv", suffixes=SUFFIXES, sniff_line=_has_columns)
def csv(
    path: Path,
    skipped: Counter[str],
    *,
    task_key: str | None = None,
    question: str | None = None,
    answer: str | None = None,
    conversation: str | None = None,
    speaker: str | None = None,
    text: str | None = None,
    bot_speaker: str | None = None,
) -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory; all options but `bot_speaker` are names of columns."""
    options = {"question": question, "answer": answer, "conversation": conversation, "speaker": speaker, "text": text}
    given = {part: str(name) for part, name in {**options, "task": task_key}.items() if name is not None}
    for file in files(path, SUFFIXES):
        talks: dict[str, list[Mapping[str, str]]] = {}
        for number, row in _rows(file, given):
            if "question" not in row:
                if row["conversation"] and row["speaker"] and row["text"]:
                    talks.setdefault(row["conversation"], []).append(row)
                else:
                    skipped["rows without a conversation, a speaker and a text"] += 1
            elif not row["question"] or not row["answer"]:
                skipped["rows without a question and an answer"] += 1
            elif not row["task"]:
                skipped["rows without a task"] += 1
            else:
                said = [("user", row["question"]), ("bot", row["answer"])]
                yield dialogue(row["task"], f"{file.stem}:{number}", said, _meta(row))
        for name, rows in talks.items():
            turns = [(_role(row["speaker"], bot_speaker), row["text"]) for row in rows]
            tasks = {row["task"] for row in rows if row["task"]}
            if len(tasks) != 1:
                skipped["of several tasks" if tasks else "without a task"] += 1
            elif not any(who == "bot" for who, _ in turns):
                named = bot_speaker or "a bot, assistant or agent"
                skipped[f"without a turn of {named} (--reader-options bot_speaker=NAME)"] += 1
            else:
                yield dialogue(tasks.pop(), f"{file.stem}:{name}", turns, _meta(rows[0]))


def _rows(file: Path, given: Mapping[str, str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the cells of each row that is not blank, by what they are, with the number of the line at which it ends."""
    delimiter = _delimiter(first_line(file), given)
    rows = cells(file, delimiter)
    names = next(rows, (0, []))[1]
    while names and not names[-1].strip():
        names.pop()
    if not names:
        return
    plain = [_plain(name) for name in names]
    shown = " ".join(", ".join(names).split())[:200]
    for part, name in given.items():
        if _plain(name) not in plain:
            raise DataError(f"{file}: {part} must be the name of a column, got {name!r}: the columns are {shown}")
    columns = _columns(plain, given)
    if not columns:
        raise DataError(
            f"{file}: the first line must name the columns question and answer, or conversation, speaker and text, got"
            f" {shown}: add such a line, or tell which is which by --reader-options question=NAME,answer=NAME"
        )
    if twice := next((names[i] for i in columns.values() if plain.count(plain[i]) > 1), ""):
        raise DataError(f"{file}: the first line must name each column once, got {twice!r} twice: rename one")
    inside = {",": "a comma", ";": "a semicolon"}.get(delimiter, "a tab")
    for number, row in rows:
        if not any(cell.strip() for cell in row):
            continue
        if len(row) < len(names) or any(cell.strip() for cell in row[len(names) :]):
            raise DataError(
                f"{file}:{number}: must have {len(names)} columns, got {len(row)}:"
                f" put a text that has {inside} or a line break inside into quotation marks"
            )
        found = {part: row[column].strip() for part, column in columns.items()}
        yield number, found | {"task": " ".join(found.get("task", file.stem).split())}


def _columns(plain: Sequence[str], given: Mapping[str, str]) -> dict[str, int]:
    """Return the positions of the columns of a kind, of the task and of the group; {} if they are of no kind.

    Args:
        plain: The names of all columns, as `_plain` makes them.
        given: The names of columns by what they are, where options say so.
    """
    for kind in (MESSAGES, FAQ, SIDES):
        found: dict[str, int] = {}
        taken = {_plain(name) for name in given.values()}
        for part, known in {**kind, "task": TASKS, "group": ("group",)}.items():
            names = [_plain(given[part])] if part in given else [name for name in known if name not in taken]
            if name := next((name for name in names if name in plain), ""):
                found[part] = plain.index(name)
                taken.add(name)
        if kind.keys() <= found.keys() and given.keys() <= {*kind, "task"}:
            return found
    return {}


def _delimiter(line: str, given: Mapping[str, str]) -> str:
    """Return what separates the columns that a line names: with it, there are the columns that are needed."""
    return max(",;\t", key=lambda delimiter: (len(_columns(_split(line, delimiter), given)), line.count(delimiter)))


def _split(line: str, delimiter: str) -> list[str]:
    return [_plain(name) for name in line.split(delimiter)]


def _plain(name: str) -> str:
    """Return a name of a column without what differs between programs: case, spaces, quotation marks, underscores."""
    return re.sub(r"[\W_]+", "", name).casefold()


def _role(speaker: str, bot_speaker: str | None) -> str:
    name = speaker.casefold()
    is_bot = name in BOTS if bot_speaker is None else name == str(bot_speaker).strip().casefold()
    return "bot" if is_bot else "user" if name in USERS else ROLES.get(name, speaker)


def _meta(row: Mapping[str, str]) -> dict[str, str]:
    return {"bot": "bot"} | ({"group": row["group"]} if row.get("group") else {})
