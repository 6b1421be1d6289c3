"""Read the Schema-Guided Dialogue dataset (Rastogi et al. 2020): a folder of dialogues_NNN.json, or one such file.

    [{"dialogue_id": "1_00000", "services": ["Restaurants_2"],
      "turns": [{"speaker": "USER" | "SYSTEM", "utterance": "…", "frames": […]}, …]}, …]

A task is a service; its group is the domain, which is the service without its number. Dialogues of several services are
left out and counted. The schemas are not read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from metakern.dialogue.readers import Dialogue, Source, UnreadableError, dialogue, files, reader, records, spoken

__all__ = ["sgd"]

SPEAKERS = {"user": "user", "system": "bot", "0": "user", "1": "bot"}  # the package datasets has numbers
SUFFIXES = (".json", ".jsonl")
SERVICE = re.compile(r"(\w+)_\d+")


def _is_sgd(record: Mapping[str, Any]) -> bool:
    found = record.get("services")
    return "turns" in record and isinstance(found, list) and found != [] and all(map(_domain, found))


def _domain(service: Any) -> str:
    """Return the domain of a service, such as Restaurants of Restaurants_2, or "" if it has none."""
    found = SERVICE.fullmatch(service) if isinstance(service, str) else None
    return found[1] if found else ""


@reader("sgd", suffixes=SUFFIXES, sniff=_is_sgd)
def sgd(path: Source, skipped: Counter[str]) -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory; the module describes the format."""
    for file in files(path, SUFFIXES, r"dialogues_\d+\.json"):
        for number, record in records(file, "services and turns"):
            if not _is_sgd(record):
                skipped["without services and turns"] += 1
            elif len(record["services"]) > 1:
                skipped["of several services"] += 1
            else:
                (service,) = record["services"]
                try:
                    turns = spoken(record["turns"], "speaker", "utterance", SPEAKERS)
                except UnreadableError:
                    skipped["without turns of speaker and utterance"] += 1
                    continue
                name = str(record.get("dialogue_id", f"{file.stem}:{number}"))
                yield dialogue(service, name, turns, {"bot": "bot", "group": _domain(service)})
