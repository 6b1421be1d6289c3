"""Read utterances with intents, such as CLINC150, BANKING77 and HWU64: the user says one, and the bot names its intent.

CLINC150 (Larson et al. 2019): data_full.json, which alone is read of a folder that has it; domains.json beside it gives
the domain of each intent.

    {"val": [["what expression would i use to say i love you", "translate"], …], "train": […], "oos_test": […], …}

BANKING77 (Casanueva et al. 2020): train.csv and test.csv; others with a column text or utterance, and a column category
or intent.

    text,category
    I am still waiting on my card?,card_arrival

HWU64 (Liu et al. 2019): NLU-Data-Home-Domain-Annotated-All.csv. The bot says the scenario and the intent, alarm_set.

    userid;answerid;scenario;intent;status;answer_annotation;notes;suggested_entities;answer_normalised;answer;question

JSON records and rows of the package datasets have the names of columns as keys. If the format is set, a column label
counts too. A task is the domain or scenario; without one, it is the name of the file without its suffix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from metakern.dialogue.readers import Dialogue, Source, dialogue, files, json_of, reader, records, table, text_of
from metakern.errors import DataError

__all__ = ["intents"]

SUFFIXES = (".csv", ".json", ".jsonl")
TEXTS, DOMAINS = ("text", "utterance", "answer"), ("domain", "scenario")
INTENTS = ("intent", "category", "label")


def _has_intent(columns: Mapping[str, Any]) -> bool:
    chat = "messages" in columns or "conversations" in columns
    return not chat and any(key in columns for key in TEXTS) and any(key in columns for key in INTENTS[:2])


def _is_clinc(record: Mapping[str, Any]) -> bool:
    """Return whether values are lists of pairs of texts."""
    pairs = [value[0] for value in record.values() if isinstance(value, list) and value]
    return bool(pairs) and len(pairs) == len(record) and all(map(_is_pair, pairs))


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


@reader(
    "intents",
    suffixes=SUFFIXES,
    sniff=lambda record: _has_intent(record) or _is_clinc(record),
    sniff_line=lambda line: _has_intent(dict.fromkeys(line.split(_delimiter(line)))),
)
def intents(path: Source, skipped: Counter[str]) -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory; the module describes the formats."""
    for file in files(path, SUFFIXES, r"data_full\.json", r"(?!(domains|categories)\.json).*"):
        domains = _domains(file.with_name("domains.json")) if isinstance(file, Path) else {}
        for number, row in _rows(file):
            text, intent, domain = (_first(row, keys) for keys in (TEXTS, INTENTS, DOMAINS))
            if not text or not intent:
                skipped["without a text and an intent"] += 1
                continue
            if "scenario" in row:
                intent = f"{domain}_{intent}"
            task_id = domain or domains.get(intent, "") or ("" if domains else file.stem)
            if task_id:
                yield dialogue(task_id, f"{file.stem}:{number}", [("user", text), ("bot", intent)], {"bot": "bot"})
            else:
                skipped["of no domain"] += 1


def _rows(file: Source) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Yield rows of columns, each with a number or, in a file of splits, the name of its split and a number."""
    if isinstance(file, Path) and file.suffix.lower() == ".csv":
        yield from table(file, _delimiter(text_of(file).partition("\n")[0]))
        return
    for number, record in records(file, "text and intent"):
        if not _is_clinc(record):
            yield number, record
            continue
        for split, pairs in record.items():
            for i, pair in enumerate(pairs):
                yield f"{split}:{i}", dict(zip(("text", "intent"), pair, strict=True)) if _is_pair(pair) else {}


def _delimiter(line: str) -> str:
    return max(",;\t", key=line.count)


def _first(row: Mapping[str, Any], keys: Iterable[str]) -> str:
    return next((row[key].strip() for key in keys if isinstance(row.get(key), str)), "")


def _domains(file: Path) -> dict[str, str]:
    """Return the domain of each intent, as a file of lists of intents by domain says; without the file, nothing."""
    found = json_of(text_of(file), file) if file.exists() else {}
    if not isinstance(found, dict) or not all(isinstance(names, list) for names in found.values()):
        raise DataError(f"{file}: must be an object with a list of intents for each domain, got another value")
    return {name: domain for domain, names in found.items() for name in names if isinstance(name, str)}
