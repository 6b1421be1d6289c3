"""Read MultiWOZ (Budzianowski et al. 2018): a folder or a file of version 2.0, 2.1 or 2.2.

2.0 and 2.1, data.json: turns of user and system alternate, and the goal has a key for each domain.

    {"SNG0129.json": {"goal": {"hotel": {…}, "taxi": {}, …}, "log": [{"text": "…", "metadata": {…}}, …]}, …}

2.2, dialogues_NNN.json:

    [{"dialogue_id": "SNG0129.json", "services": ["hotel"],
      "turns": [{"speaker": "USER" | "SYSTEM", "utterance": "…", "frames": […]}, …]}, …]

A task is the domains of a dialogue, sorted, with + between them, such as hotel+taxi. Other files are not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from metakern.dialogue.readers import (
    Dialogue,
    Source,
    UnreadableError,
    alternating,
    dialogue,
    files,
    reader,
    records,
    spoken,
)
from metakern.dialogue.readers.sgd import SERVICE, SPEAKERS

__all__ = ["multiwoz"]

SUFFIXES = (".json", ".jsonl")
NO_DOMAINS = ("message", "topic")  # other keys of a goal


def _is_multiwoz(record: Mapping[str, Any]) -> bool:
    found = record.get("services")
    if isinstance(found, list) and "turns" in record:
        return all(isinstance(service, str) and not SERVICE.fullmatch(service) for service in found)
    return any(isinstance(value, dict) and "log" in value and "goal" in value for value in record.values())


@reader("multiwoz", suffixes=SUFFIXES, sniff=_is_multiwoz)
def multiwoz(path: Source, skipped: Counter[str]) -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory; the module describes the formats."""
    for file in files(path, SUFFIXES, r"data\.json", r"dialogues_\d+\.json"):
        for number, record in records(file, "turns or log"):
            flat = "turns" in record
            items = {str(record.get("dialogue_id", f"{file.stem}:{number}")): record} if flat else record
            for name, item in items.items():
                try:
                    domains, turns = _services(item) if flat else _goal(item)
                except UnreadableError:
                    skipped["without domains, speakers and texts"] += 1
                    continue
                if domains:
                    yield dialogue("+".join(sorted(domains)), name, turns, {"bot": "bot"})
                else:
                    skipped["without a domain"] += 1


def _services(record: Mapping[str, Any]) -> tuple[Iterable[str], list[tuple[str, str]]]:
    """Return the domains and turns of a record of version 2.2."""
    services = record.get("services")
    if not isinstance(services, list) or not all(isinstance(service, str) for service in services):
        raise UnreadableError
    return services, spoken(record["turns"], "speaker", "utterance", SPEAKERS)


def _goal(item: Any) -> tuple[Iterable[str], list[tuple[str, str]]]:
    """Return the domains and turns of a dialogue of version 2.0 or 2.1."""
    goal, log = (item.get("goal"), item.get("log")) if isinstance(item, dict) else (None, None)
    if not isinstance(goal, dict) or not isinstance(log, list):
        raise UnreadableError
    texts = [turn["text"] for turn in log if isinstance(turn, dict) and isinstance(turn.get("text"), str)]
    if len(texts) < len(log):
        raise UnreadableError
    return [name for name, asked in goal.items() if asked and name not in NO_DOMAINS], alternating(texts)
