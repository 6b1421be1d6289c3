"""Read STAR (Mosig et al. 2020): its folder of dialogues, one in each file, or one such file.

    {"DialogueID": 1, "CompletionLevel": "Complete",
     "Scenario": {"Domains": ["doctor"], "Happy": false, "MultiTask": false,
                  "WizardCapabilities": [{"Domain": "doctor", "Task": "doctor_followup"}], …},
     "Events": [{"Agent": "User" | "Wizard" | …, "Action": "utter" | "pick_suggestion" | …, "Text": "…"}, …]}

The bot is the wizard, who utters a text or picks one that was suggested. A task is the wizard's task, or its tasks,
sorted, with + between them. `meta` has domain, happy and single_task ("true" or "false"). Dialogues that broke off are
left out and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from metakern.dialogue.readers import Dialogue, Source, UnreadableError, dialogue, files, reader, records, spoken

__all__ = ["star"]

SUFFIXES = (".json", ".jsonl")
SPEAKERS = {"user": "user", "wizard": "bot"}
SAID = ("utter", "pick_suggestion")


@reader("star", suffixes=SUFFIXES, sniff=lambda record: {"Events", "Scenario"} <= record.keys())
def star(path: Source, skipped: Counter[str]) -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory; the module describes the format."""
    for file in files(path, SUFFIXES, r"\d+\.json"):
        for number, record in records(file, "Events and Scenario"):
            try:
                tasks, domains, scenario = _scenario(record.get("Scenario"))
                turns = _turns(record.get("Events"))
            except UnreadableError:
                skipped["without Scenario and Events"] += 1
                continue
            if record.get("CompletionLevel", "Complete") != "Complete":
                skipped["that broke off"] += 1
                continue
            meta = {
                "bot": "bot",
                "domain": "+".join(domains),
                "happy": _flag(scenario.get("Happy")),
                "single_task": _flag(len(tasks) == 1),
            }
            yield dialogue("+".join(tasks), str(record.get("DialogueID", f"{file.stem}:{number}")), turns, meta)


def _scenario(scenario: Any) -> tuple[list[str], list[str], dict[str, Any]]:
    """Return the tasks and the domains of a scenario, both sorted, and the scenario."""
    try:
        tasks = sorted({capability["Task"] for capability in scenario["WizardCapabilities"]})
        domains = sorted({domain for domain in scenario["Domains"] if domain is not None})  # trivia has no domain
    except (KeyError, TypeError):
        raise UnreadableError from None
    if not tasks or not all(isinstance(name, str) for name in (*tasks, *domains)):
        raise UnreadableError
    return tasks, domains, scenario


def _turns(events: Any) -> list[tuple[str, str]]:
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise UnreadableError
    said = [event for event in events if event.get("Action") in SAID and event.get("Agent") in ("User", "Wizard")]
    return spoken(said, "Agent", "Text", SPEAKERS)


def _flag(value: Any) -> str:
    return "true" if value else "false"
