"""Read the Schema-Guided Dialogue dataset (Rastogi et al. 2020): a folder of dialogues_NNN.json, or one such file.

    [{"dialogue_id": "1_00000", "services": ["Restaurants_2"],
      "turns": [{"speaker": "USER" | "SYSTEM", "utterance": "…", "frames": […]}, …]}, …]

A task is a service; its group is the domain, which is the service without its number. Dialogues of several services are
left out and counted. A turn has the acts and the slots of its frames. The schemas are not read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from metakern.dialogue.readers import Dialogue, Source, Turn, UnreadableError, dialogue, files, reader, records, spoken

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
                found = dialogue(service, name, turns, {"bot": "bot", "group": _domain(service)})
                yield replace(found, turns=tuple(_annotated(found.turns, record["turns"])))


def _annotated(turns: tuple[Turn, ...], raw: Any) -> Iterator[Turn]:
    """Yield turns with the acts and slots of their records; where turns were merged or dropped, as they are."""
    same = isinstance(raw, list) and len(raw) == len(turns)
    for turn, record in zip(turns, raw if same else [{}] * len(turns), strict=True):
        frames = record.get("frames")
        frames = [frame for frame in frames if isinstance(frame, dict)] if isinstance(frames, list) else []
        acts = {action["act"] for frame in frames for action in _items(frame, "actions") if _text(action, "act")}
        slots = (slot for frame in frames for slot in _items(frame, "slots") if _text(slot, "slot"))
        spans = ((s["slot"], s.get("start"), s.get("exclusive_end")) for s in slots)
        values = ((name, record["utterance"][a:b]) for name, a, b in spans if type(a) is int and type(b) is int)
        yield replace(turn, act="+".join(sorted(acts)), slots=tuple((name, value) for name, value in values if value))


def _items(frame: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = frame.get(key)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _text(item: Mapping[str, Any], key: str) -> bool:
    return isinstance(item.get(key), str) and item[key] != ""
