"""The chitchat-dataset package: English conversations of two strangers under a prompt (MIT).

    {uuid: {"messages": [[{"text", "timestamp", "sender"}, … one turn], …], "prompt", "ratings", "start"}}

tasks="topics"    a task is a prompt; the bot is the second to speak
tasks="senders"   a task is a person, who is the bot; every conversation belongs to the tasks of both its speakers

Left out: conversations of one speaker, of fewer than 4 turns or with an e-mail address, and topics without a prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from metakern.dialogue.readers import DataError, Dialogue, dialogue, json_of, reader, text_of

__all__ = ["chitchat"]

EMAIL = re.compile(r"\S@\w[\w-]*\.\w")


@reader(
    "chitchat",
    suffixes=(".json",),
    sniff=lambda head: head.lstrip().startswith("{") and '"sender"' in head,
    package="chitchat_dataset",
    data="dataset.json",
    variant="tasks",
)
def chitchat(path: Path, skipped: Counter[str], *, tasks: str = "topics") -> Iterator[Dialogue]:
    """Yield the dialogues of chitchat; see the module."""
    if tasks not in ("topics", "senders"):
        raise DataError(f"chitchat: tasks must be topics or senders, got {tasks}")
    data = json_of(text_of(path), path)
    if not isinstance(data, dict):
        raise DataError(f"{path}: must be an object of conversations, got {type(data).__name__}")
    for key, conversation in data.items():
        try:
            messages = [m for turn in conversation["messages"] for m in turn]
            prompt = str(conversation.get("prompt", "")).strip()
            talk = dialogue(prompt, key, [(str(m["sender"]), str(m["text"])) for m in messages])
        except (AttributeError, KeyError, TypeError):
            skipped["without messages of sender and text"] += 1
            continue
        speakers = list(dict.fromkeys(turn.speaker for turn in talk.turns))
        if len(speakers) != 2:
            skipped["without two speakers"] += 1
        elif len(talk.turns) < 4:
            skipped["with fewer than 4 turns"] += 1
        elif any(EMAIL.search(turn.text) for turn in talk.turns):
            skipped["with an e-mail address"] += 1
        elif tasks == "senders":
            for speaker in speakers:
                yield Dialogue(speaker, key, talk.turns, {"bot": speaker, "topic": prompt})
        elif len(prompt) < 2:
            skipped["without a prompt"] += 1
        else:
            yield Dialogue(prompt, key, talk.turns, {"bot": speakers[1]})
